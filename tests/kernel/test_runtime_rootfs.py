"""Root file systems: deep stacks, layers mounted once, roots that are given, the carried init."""

from __future__ import annotations

import concurrent.futures
import os
import subprocess
from pathlib import Path

import pytest

from ambi.core.errors import AmbiError
from ambi.core.plan import Directory, Layer, Layers
from ambi.linux import loop, mount, paths
from runtime import rootfs
from runtime.tini import PROGRAM
from tests import driverkit
from tests.driverkit import Rig
from tests.kernel.runtimekit import rig, tree

__all__ = ["rig", "tree"]


def test_127_layers(rig: Rig, tree: Path) -> None:
    """Docker's limit; the paths of so many would not fit the page that mount(2) takes."""
    lowers = [rig.lowers[0]]
    for number in range(126):
        path = tree.parent / f"a-layer-with-a-long-name-{'x' * 60}-{number}"
        path.mkdir()
        (path / f"f{number}").write_text(str(number))
        (path / "top").write_text(str(number))
        lowers.append(Layer(f"l{number}", "dir", path, 0))
    rig.lowers = tuple(lowers)
    done = rig.run(["sh", "-c", "cat /top; ls / | grep -c '^f[0-9]'"])
    assert done.out == b"125126\n"


def test_upper_takes_the_root_of_the_image(rig: Rig, tree: Path) -> None:
    tree.chmod(0o711)
    os.chown(tree, 12, 34)
    assert rig.run(["stat", "-c", "%a %u %g", "/"]).out == b"711 12 34\n"


def test_no_layers(rig: Rig, tree: Path) -> None:
    """An image made from scratch: everything is in the upper."""
    plan = rig.plan(["/bin/busybox", "echo", "hi"])
    assert isinstance(plan.rootfs, Layers)
    subprocess.run(["cp", "-a", tree, plan.rootfs.upper / "fs"], check=True)
    (plan.rootfs.upper / "work").mkdir()
    with rig.started_plan(plan._replace(rootfs=Layers((), plan.rootfs.upper))) as running:
        assert running.init.finish().out == b"hi\n"


def test_directory(rig: Rig, tree: Path) -> None:
    plan = rig.plan(["sh", "-c", "echo made > /made; ls /sub"])._replace(rootfs=Directory(tree))
    (tree / "sub").mkdir()
    mount.mount("tmpfs", tree / "sub", "tmpfs")
    (tree / "sub" / "mounted").touch()
    with rig.started_plan(plan) as running:
        assert running.init.finish().out == b"mounted\n"
    assert (tree / "made").read_text() == "made\n"


def test_disposable_upper_can_be_used_again(rig: Rig) -> None:
    """`volatile` leaves a mark that would keep overlay from mounting the upper a second time."""
    first = rig.plan(["sh", "-c", "echo x > /x"], annotations={"ambi.disposable": "1"})
    for _ in range(2):
        with rig.started_plan(first) as running:
            assert running.init.finish().code == 0


def test_erofs_is_mounted_once_for_all(rig: Rig, tree: Path) -> None:
    layer = driverkit.make_layer(tree, "erofs", tree.parent / "l.erofs", "once")
    rig.lowers = (layer,)
    plans = [rig.plan(["true"]) for _ in range(4)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = list(pool.map(rootfs.prepare, plans))
    assert {tuple(lowers) for _, lowers, _ in found} == {(str(rig.base / "layers" / "once"),)}
    mounts = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if f"{rig.base}/layers/once " in line]
    assert len(mounts) == 1 and " erofs " in mounts[0]


def test_damaged_layer(rig: Rig, tree: Path) -> None:
    bad = tree.parent / "bad.erofs"
    bad.write_bytes(os.urandom(1 << 20))
    rig.lowers = (Layer("bad", "erofs", bad, 1 << 20),)
    with pytest.raises(AmbiError, match="bad"), rig.started(["true"]):
        pass


def test_loop_device_frees_itself(tree: Path) -> None:
    """The way for kernels that cannot mount a file."""
    layer = driverkit.make_layer(tree, "erofs", tree.parent / "l.erofs")
    file = os.open(layer.path, os.O_RDONLY)
    device, handle = loop.attach(file)
    backing = Path("/sys/block", Path(device).name, "loop", "backing_file")
    try:
        made = mount.new_mount("erofs", device, (), mount.MOUNT_ATTR_RDONLY, readonly=True)
        os.close(handle)
        assert backing.read_text().strip() == str(layer.path)
        fd = paths.open_in_root(made, "/bin/busybox", os.O_RDONLY)
        assert os.read(fd, 4) == b"\x7fELF"
        os.close(fd)
        os.close(made)
    finally:
        os.close(file)
    end = 100
    while backing.exists() and (end := end - 1):
        os.sched_yield()
        subprocess.run(["sleep", "0.05"], check=True)
    assert not backing.exists()


def test_layer_over_the_image_root_hides_nothing_of_the_host(rig: Rig) -> None:
    done = rig.run(["cat", "/proc/mounts"])
    assert str(rig.base).encode() not in done.out


# ambi-init


@pytest.mark.needs("gcc")
def test_carried_init_is_what_its_source_makes(tmp_path: Path) -> None:
    """Not byte for byte, because compilers differ; both must do the same."""
    from runtime.tini.build import build

    for number, program in enumerate((PROGRAM, build())):
        path = tmp_path / f"init{number}"
        path.write_bytes(program)
        path.chmod(0o755)
        codes = [subprocess.run([path, "/bin/sh", "sh", "-c", script], check=False).returncode
                 for script in ("exit 0", "exit 7", "kill -9 $$", "(exit 3) & wait $!")]  # fmt: skip
        assert codes == [0, 7, 137, 3]
        assert subprocess.run([path, "/nothing", "x"], check=False, stderr=subprocess.DEVNULL).returncode == 127
        assert subprocess.run([path, "/etc", "x"], check=False, stderr=subprocess.DEVNULL).returncode == 126
        assert subprocess.run([path], check=False).returncode == 125
