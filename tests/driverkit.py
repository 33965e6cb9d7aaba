"""Drivers under test, without engine or shim: plans over a busybox root, and what a workload did.

with layers_namespace():
    rig = Rig("container", base, layers)
    done = rig.run(["echo", "hi"])          done.code, done.out, done.err, done.exit
    with rig.started(["sleep", "1000"]) as running:
        running.exec(["id"], user="alice")
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from ambi.core.deadline import Deadline
from ambi.core.driver import Created, Driver, Process
from ambi.core.loop import POLLIN, Loop
from ambi.core.model import ExitStatus, InstanceId, Isolation, VmShape
from ambi.core.plan import File, LaunchPlan, Layer, Layers
from ambi.core.undo import Undo
from ambi.linux import mount, process, seccomp_profile
from ambi.shim import drivers
from runtime import cgroups
from tests.harness import guest_dir

CAPABILITIES = [
    "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FSETID", "CAP_FOWNER", "CAP_MKNOD", "CAP_NET_RAW", "CAP_SETGID", "CAP_SETUID",
    "CAP_SETFCAP", "CAP_SETPCAP", "CAP_NET_BIND_SERVICE", "CAP_SYS_CHROOT", "CAP_KILL", "CAP_AUDIT_WRITE",
]  # fmt: skip
MASKED = [
    "/proc/asound", "/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list",
    "/proc/timer_stats", "/proc/sched_debug", "/proc/scsi", "/sys/firmware",
]  # fmt: skip
READONLY = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]
MOUNTS: list[dict[str, Any]] = [
    {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
    {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "strictatime", "mode=755"]},
    {
        "destination": "/dev/pts", "type": "devpts", "source": "devpts",
        "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
    },
    {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]},
    {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["ro", "nosuid", "noexec", "nodev"]},
    {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": ["nosuid", "noexec", "nodev"]},
    {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["nosuid", "noexec", "nodev", "mode=1777"]},
]  # fmt: skip
NAMESPACES = ("mount", "network", "uts", "pid", "ipc", "cgroup")
VCPUS = int(os.environ.get("AMBI_TEST_VCPUS", "1"))  # of VMs that ask for no other number
_numbers = itertools.count(1)


def oci_process(args: list[str], **changes: Any) -> dict[str, Any]:
    """An OCI process object as the engine makes it; `user` may be the written form."""
    found: dict[str, Any] = {
        "terminal": False,
        "user": {"uid": 0, "gid": 0},
        "args": args,
        "env": ["PATH=/usr/bin:/bin", "MARK=here"],
        "cwd": "/",
        "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), CAPABILITIES),
        "noNewPrivileges": False,
    }
    if isinstance(changes.get("user"), str):
        changes["user"] = {"uid": 0, "gid": 0, "username": changes["user"]}
    return {**found, **changes}


def oci_config(args: list[str], *, mounts: tuple[dict[str, Any], ...] = (), **changes: Any) -> dict[str, Any]:
    """A config.json as the engine makes it. `changes` are fields of process, but for those of CONFIG_FIELDS."""
    top: dict[str, Any] = {name: changes.pop(name) for name in ("hostname", "annotations", "root") if name in changes}
    linux = changes.pop("linux", {})
    resources = changes.pop("resources", {})
    return {
        "ociVersion": "1.0.2",
        "process": oci_process(args, **changes),
        "root": {"path": "rootfs", "readonly": False},
        "hostname": "box",
        "mounts": [*copy.deepcopy(MOUNTS), *mounts],
        "linux": {
            "namespaces": [{"type": kind} for kind in NAMESPACES],
            "maskedPaths": MASKED,
            "readonlyPaths": READONLY,
            "seccomp": seccomp_profile.default_profile(CAPABILITIES),
            "resources": {"devices": [{"allow": False, "access": "rwm"}], **resources},
            **linux,
        },
        **top,
    }


def unpack(tar: Path, target: Path) -> Path:
    """The tree of `tar` at `target`."""
    target.mkdir()
    with tarfile.open(tar) as archive:
        archive.extractall(target)
    target.chmod(0o755)
    return target


def make_layer(tree: Path, form: str, target: Path, name: str = "base") -> Layer:
    """`tree` as a layer of the given form; `target` is where an EROFS file goes."""
    if form == "dir":
        return Layer(name, "dir", tree, 0)
    subprocess.run(["mkfs.erofs", "--quiet", target, tree], check=True, stdout=subprocess.DEVNULL)
    size = -(-target.stat().st_size // (2 << 20)) * (2 << 20)
    os.truncate(target, size)
    return Layer(name, "erofs", target, size)


@contextlib.contextmanager
def layers_namespace() -> Iterator[None]:
    """Be in a mount namespace of our own, as shims are: what drivers mount is gone afterwards."""
    outside, cwd = os.open("/proc/self/ns/mnt", os.O_RDONLY), os.getcwd()
    process.unshare(process.CLONE_NEWNS)
    try:
        mount.mount(None, "/", None, mount.MS_SLAVE | mount.MS_REC)
        yield
    finally:
        process.unshare(process.CLONE_FS)  # threads made meanwhile share it, and setns refuses that
        process.setns(outside, process.CLONE_NEWNS)
        os.close(outside)
        os.chdir(cwd)
        _remove_parents()


def _remove_parents() -> None:
    """The group of all containers, unless somebody else has containers in it."""
    found = cgroups.hierarchies()
    for place in [*(hierarchy.mount for hierarchy in found.v1), found.v2]:
        try:
            os.rmdir(f"{place}/ambi")
        except OSError:
            pass


class Done(NamedTuple):
    """How a process ended and what it wrote."""

    code: int
    out: bytes
    err: bytes
    exit: ExitStatus


class Watched:
    """A process of a driver whose output is collected while the loop turns."""

    def __init__(self, process: Process, loop: Loop) -> None:
        self.process, self._loop = process, loop
        self.exits: list[ExitStatus] = []
        self._collected: dict[int, bytearray] = {1: bytearray(), 2: bytearray()}
        self._open: set[int] = set()
        process.on_exit = self.exits.append
        streams = process.streams
        self._watch(streams.stdout, 1)
        if streams.stderr is not None:
            self._watch(streams.stderr, 2)

    def _watch(self, fd: int, number: int) -> None:
        def ready(_: int) -> None:
            try:
                data = os.read(fd, 1 << 16)
            except BlockingIOError:
                return
            except OSError:  # EIO: the terminal's end
                data = b""
            self._collected[number] += data
            if not data:
                self._loop.unwatch(fd)
                self._open.discard(fd)

        self._open.add(fd)
        self._loop.watch(fd, POLLIN, ready)

    @property
    def out(self) -> bytes:
        return bytes(self._collected[1])

    def write(self, data: bytes) -> None:
        """Write all of `data` to stdin, letting the loop turn while it is full."""
        assert self.process.streams.stdin is not None
        while data:
            try:
                data = data[os.write(self.process.streams.stdin, data) :]
            except BlockingIOError:
                self._loop.step(Deadline.after(0.05))

    def close_stdin(self) -> None:
        streams = self.process.streams
        if streams.stdin is not None and streams.stdin != streams.stdout:
            self._loop.unwatch(streams.stdin)
            os.close(streams.stdin)

    def until(self, condition: Callable[[], object], seconds: float = 60) -> None:
        """Turn the loop until `condition` holds; AssertionError with the output so far when it does not in time."""
        assert self._loop.run(lambda: bool(condition()), Deadline.after(seconds)), (self._collected, self.exits)

    def finish(self, seconds: float = 60) -> Done:
        """Wait for the exit and the end of all output; closes the output streams."""
        self.until(lambda: self.exits and not self._open, seconds)
        self.release()
        out, err = bytes(self._collected[1]), bytes(self._collected[2])
        return Done(self.exits[0].code, out, err, self.exits[0])

    def release(self) -> None:
        for fd in {self.process.streams.stdout, self.process.streams.stderr} - {None}:
            assert fd is not None
            self._loop.unwatch(fd)
            try:
                os.close(fd)
            except OSError:
                pass
        self._open.clear()


class Running:
    """A started workload."""

    def __init__(self, created: Created, loop: Loop) -> None:
        self.created, self.loop = created, loop
        self.init = Watched(created.init, loop)

    def start_exec(self, args: list[str], *, stdin: bool = False, **changes: Any) -> Watched:
        return Watched(self.created.exec(oci_process(args, **changes), stdin, Deadline.after(60)), self.loop)

    def exec(self, args: list[str], *, stdin: bytes | None = None, **changes: Any) -> Done:
        """Run `args` to its end."""
        watched = self.start_exec(args, stdin=stdin is not None, **changes)
        if stdin is not None:
            watched.write(stdin)
            watched.close_stdin()
        return watched.finish()


class Rig:
    """One driver with one stack of layers; `base` is a short directory for all that its plans name."""

    def __init__(self, name: str, base: Path, lowers: tuple[Layer, ...], guest_dir: Path) -> None:
        self.name, self.base, self.lowers, self.guest_dir = name, base, lowers, guest_dir
        self.driver: Driver = drivers.load(name)
        (base / "layers").mkdir(exist_ok=True)

    def plan(
        self,
        args: list[str],
        *,
        files: dict[str, str] | None = None,
        stdin: bool = False,
        upper: Path | None = None,
        **changes: Any,
    ) -> LaunchPlan:
        """A plan of its own directories; `upper` reuses that of an earlier one."""
        number = next(_numbers)
        home = self.base / f"i{number}"
        for folder in ("data", "run", "upper"):
            (home / folder).mkdir(parents=True)
        config = oci_config(args, **changes)
        config["linux"].setdefault("cgroupsPath", f"/ambi/test-{os.getpid()}-{number}")
        return LaunchPlan(
            id=InstanceId(f"{number:064x}"),
            isolation=Isolation(self.name),
            config=config,
            rootfs=Layers(self.lowers, upper or home / "upper"),
            data_dir=home / "data",
            run_dir=home / "run",
            layers_dir=self.base / "layers",
            guest_dir=self.guest_dir,
            files=tuple(File(PurePosixPath(path), 0o644, text) for path, text in (files or {}).items()),
            stdin=stdin,
            vm=VmShape(vcpus=VCPUS) if self.name == "vm" else None,
        )

    def create(self, plan: LaunchPlan, loop: Loop) -> Created:
        with Undo() as undo:
            created = self.driver.create(plan, undo, Deadline.after(120), loop)
            undo.keep()
        return created

    @contextlib.contextmanager
    def started(self, args: list[str], **changes: Any) -> Iterator[Running]:
        """A workload that runs; deleted on the way out."""
        with self.started_plan(self.plan(args, **changes)) as running:
            yield running

    @contextlib.contextmanager
    def started_plan(self, plan: LaunchPlan) -> Iterator[Running]:
        loop = Loop()
        created = self.create(plan, loop)
        running = Running(created, loop)
        try:
            created.start(Deadline.after(60))
            yield running
        finally:
            running.init.release()
            created.delete(Deadline.after(30))

    def run(self, args: list[str], *, input: bytes | None = None, **changes: Any) -> Done:
        """Run `args` as init to its end, with `input` as its stdin."""
        if input is not None:
            changes["stdin"] = True
        with self.started(args, **changes) as running:
            if input is not None:
                running.init.write(input)
                running.init.close_stdin()
            return running.init.finish()


@contextlib.contextmanager
def vm_rig(busybox_tar: Path) -> Iterator[Rig]:
    """A rig for VMs of one EROFS layer."""
    base = Path(tempfile.mkdtemp(prefix="ambi-", dir="/tmp"))
    tree = unpack(busybox_tar, base / "tree")
    yield Rig("vm", base, (make_layer(tree, "erofs", base / "base.erofs"),), guest_dir())
    shutil.rmtree(base)
