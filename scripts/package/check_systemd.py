"""Prove the unit file with a real systemd: a Debian machine of its own, in QEMU, with ambi installed from its wheel.

    .venv/bin/python scripts/package/check_systemd.py [--keep DIR]

The machine has the host's own release, pure cgroup v2, and no network. It boots twice: the first boot enables the unit and
goes through stop, restart and kill -9 of the engine with instances running; the second finds those back that have to be.
The checks themselves are systemd_guest.py, which prints a line each. Takes four minutes on a quiet machine without KVM, of
which a minute makes the machine; --keep DIR keeps its root there for the next time.
"""

from __future__ import annotations

import argparse
import importlib.machinery
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

from hyper.guest import initramfs, kernel  # noqa: E402
from tests.rootfs import busybox_tar  # noqa: E402

PACKAGES = "systemd,systemd-sysv,dbus,python3,python3-venv,libnftables1,iproute2,procps,kmod,ca-certificates"
BOOT_MODULES = ("virtio_mmio", "virtio_blk", "ext4")
SIZE_MIB = 1200
BOOT_SECONDS = 1200
# Mounts the disk and gives it to systemd; the tools are busybox's.
INIT = """#!/bin/busybox sh
B=/bin/busybox
$B mount -t proc proc /proc
$B mount -t devtmpfs dev /dev
for m in $($B cat /order); do $B insmod /modules/$m; done
$B mount -t ext4 /dev/vda /root
$B mount -t tmpfs -o size=64m,mode=755 tmpfs /root/run
exec $B switch_root /root /lib/systemd/systemd
"""
CHECK_UNIT = """[Unit]
Description=the checks
After=multi-user.target
[Service]
Type=oneshot
ExecStart=/usr/bin/python3 /check/systemd_guest.py
StandardOutput=file:/check/said
StandardError=inherit
ExecStopPost=/bin/systemctl --no-block reboot
[Install]
WantedBy=multi-user.target
"""


def run(*argv: str | Path, **options: object) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, **options)  # type: ignore[call-overload]
    if done.returncode:
        sys.exit(
            f"error: {' '.join(map(str, argv))} ended with {done.returncode}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
        )
    return str(done.stdout)


def lab() -> ModuleType:
    """scripts/kvm-lab, which knows the host's archive and a kernel's modules."""
    loader = importlib.machinery.SourceFileLoader("kvm_lab", str(ROOT / "scripts" / "kvm-lab"))
    spec = importlib.util.spec_from_loader("kvm_lab", loader)
    assert spec
    module = importlib.util.module_from_spec(spec)
    sys.modules["kvm_lab"] = module
    loader.exec_module(module)
    return module


def make_root(tree: Path, work: Path) -> None:
    """The Debian root, with ambi's wheel in /opt/ambi; `tree` is complete or absent afterwards."""
    wheels = work / "wheels"
    run(sys.executable, "-m", "pip", "wheel", "-q", "-w", wheels, ROOT)
    made = work / "tree"
    run(
        "mmdebstrap", "--mode=root", "--variant=minbase", f"--include={PACKAGES}", "--format=directory",
        '--aptopt=APT::Install-Recommends "false"', lab().suite(), made, *lab().sources(lab().suite()),
    )  # fmt: skip
    shutil.copytree(wheels, made / "wheels")
    run("chroot", made, "python3", "-m", "venv", "/opt/ambi")
    run("chroot", made, "/opt/ambi/bin/pip", "install", "-q", "--no-index", "--find-links", "/wheels", "ambi")
    shutil.rmtree(made / "wheels")
    made.rename(tree)


def furnish(tree: Path, work: Path, modules: Path) -> None:
    """What is under test: command, unit, group; and the checks."""
    (tree / "usr/bin/ambi").unlink(missing_ok=True)
    (tree / "usr/bin/ambi").symlink_to("/opt/ambi/bin/ambi")
    for source, target in (
        ("ambi.service", "usr/lib/systemd/system/ambi.service"),
        ("ambi.sysusers", "usr/lib/sysusers.d/ambi.conf"),
        ("systemd_guest.py", "check/systemd_guest.py"),
    ):
        (tree / target).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(HERE / source, tree / target)
    shutil.copy(busybox_tar(work / "busybox.tar"), tree / "check/busybox.tar")
    (tree / "etc/systemd/system/check.service").write_text(CHECK_UNIT)
    run("systemctl", "--root", tree, "enable", "check.service")
    shutil.copytree(modules, tree / "lib/modules" / modules.name, dirs_exist_ok=True)
    (tree / "etc/hostname").write_text("check\n")
    (tree / "etc/fstab").write_text("")


def make_boot(work: Path) -> Path:
    """Fetch a kernel; writes vmlinux and initrd into `work` and returns the folder of its modules."""
    unpacked = work / "kernel"
    release = kernel.unpack_package(kernel.download_package(work), unpacked)
    run("depmod", "-b", unpacked, release)
    image = (unpacked / "boot" / f"vmlinuz-{release}").read_bytes()
    (work / "vmlinux").write_bytes(kernel.extract_vmlinux(image) or image)
    tools = lab()
    vars(tools)["BOOT_MODULES"] = BOOT_MODULES
    modules = tools.module_order(unpacked, release)
    busybox = Path(tools.need("busybox", "busybox-static")).read_bytes()
    entries = [initramfs.directory(name) for name in ("bin", "proc", "dev", "root", "modules")]
    entries += [initramfs.file("bin/busybox", busybox, 0o755), initramfs.file("init", INIT.encode(), 0o755)]
    entries += [initramfs.file(f"modules/{path.name}", path.read_bytes(), 0o644) for path in modules]
    entries.append(initramfs.file("order", " ".join(path.name for path in modules).encode(), 0o644))
    (work / "initrd").write_bytes(initramfs.cpio(entries))
    return unpacked / "lib" / "modules" / release


def boot(work: Path, number: int) -> str:
    """Boot the machine, wait for its end, and return what the checks have printed."""
    console = work / f"console{number}"
    words = (
        "console=ttyS0 quiet reboot=t panic=-1 root=/dev/vda rw mitigations=off no_timer_check tsc=reliable 8250.nr_uarts=1 "
        "i8042.noaux i8042.nomux i8042.nopnp i8042.dumbkbd cryptomgr.notests random.trust_cpu=on rcupdate.rcu_expedited=1 "
        f"tsc_early_khz={lab().tsc_khz()} noreplace-smp systemd.show_status=1 systemd.getty_auto=0"
    )
    argv = ["qemu-system-x86_64", "-M", "microvm,pit=off,pic=off,rtc=on", "-accel", "tcg,tb-size=512", "-cpu", "max"]
    argv += ["-m", "1024", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", f"file:{console}"]
    argv += ["-kernel", str(work / "vmlinux"), "-initrd", str(work / "initrd"), "-append", words]
    argv += [
        "-drive",
        f"id=root,if=none,format=raw,file={work}/disk,cache=unsafe",
        "-device",
        "virtio-blk-device,drive=root",
    ]
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL) as machine:
        try:
            machine.wait(BOOT_SECONDS)
        except subprocess.TimeoutExpired:
            print(console.read_text(errors="replace")[-4000:], file=sys.stderr)
            sys.exit(f"error: boot {number}: the machine has not ended after {BOOT_SECONDS} s")
        finally:
            machine.kill()
    said = run("debugfs", "-R", "cat /check/said", work / "disk")
    if not said.endswith("end of the checks\n"):
        print(console.read_text(errors="replace")[-4000:], file=sys.stderr)
        sys.exit(f"error: boot {number}: the checks did not come to their end:\n{said}")
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the machine's root there, or use the one that is")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ambi-systemd-") as name:
        work, began = Path(name), time.monotonic()
        tree = options.keep.absolute() if options.keep else work / "root"
        if not tree.exists():
            make_root(tree, work)
        furnish(tree, work, make_boot(work))
        run("mke2fs", "-q", "-t", "ext4", "-d", tree, work / "disk", f"{SIZE_MIB}M")
        print(f"the machine is made ({time.monotonic() - began:.0f} s)", flush=True)
        for number in (1, 2):
            began = time.monotonic()
            print(f"== boot {number}\n{boot(work, number)}({time.monotonic() - began:.0f} s)", flush=True)
    print("the unit works with systemd")


if __name__ == "__main__":
    main()
