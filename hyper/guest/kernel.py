"""The guest's kernel: a distribution's package, unpacked, its modules chosen. Nothing of it is changed.

The package is fetched by apt, which checks its signature, and unpacked by dpkg-deb. See store.py for what is left behind.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from ambi.core.errors import Corrupt, Internal, NotFound, Unavailable, Unsupported
from hyper.guest.store import FORMAT, RECORD, read_record

PACKAGE = "linux-image-cloud-amd64"

# What the agent loads, and for what (agent/modules.c): `virtio:N` for devices of virtio's type N, the others by name.
GROUPS: dict[str, tuple[str, ...]] = {
    "pci": ("virtio_pci",),
    "mmio": ("virtio_mmio",),
    "virtio:1": ("virtio_net",),
    "virtio:2": ("virtio_blk",),
    "virtio:3": ("virtio_console",),
    "virtio:4": ("virtio_rng",),
    "virtio:5": ("virtio_balloon",),
    "virtio:19": ("vmw_vsock_virtio_transport",),
    "virtio:24": ("virtio_mem",),
    "virtiofs": ("virtiofs",),
    "erofs": ("erofs",),
    "overlay": ("overlay",),
}

Say = Callable[[str], None]


def fetch_kernel(guest_dir: Path, *, package: str = PACKAGE, say: Say = lambda text: None) -> Path:
    """The directory of the newest kernel of `package`, fetched unless it is there. What is there stays when this fails.

    Raises:
        Unsupported: no apt or dpkg on this machine, or no depmod.
        NotFound: apt does not know the package.
        Unavailable: it could not be downloaded.
    """
    _need_tools()
    image = _resolve(package, say)
    known = _known(guest_dir, image)
    if known:
        return known
    guest_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=guest_dir, prefix=".kernel-") as scratch:
        say(f"downloading {image}")
        archive = _download(image, Path(scratch))
        say(f"unpacking {archive.name}")
        made = _prepare(archive, image, Path(scratch))
        return _publish(made, guest_dir / made.name)


def download_package(into: Path, *, package: str = PACKAGE, say: Say = lambda text: None) -> Path:
    """The newest kernel's archive of `package`, in the directory `into`. Raises as fetch_kernel."""
    _need_tools()
    return _download(_resolve(package, say), into)


def unpack_package(archive: Path, tree: Path) -> str:
    """Unpacks a kernel's archive below `tree` (boot/vmlinuz-RELEASE, lib/modules/RELEASE); the release. Raises Corrupt."""
    run = _run(["dpkg-deb", "-x", str(archive), str(tree)])
    if run.returncode:
        raise Corrupt(f"cannot unpack {archive.name}: {run.stderr.strip()}", hint="apt-get clean, then try again")
    images = sorted((tree / "boot").glob("vmlinuz-*"))
    if not images:
        raise Corrupt(f"{archive.name} has no kernel in /boot")
    return images[0].name.removeprefix("vmlinuz-")


def _need_tools() -> None:
    for tool, needed in (("apt-get", "apt"), ("dpkg-deb", "dpkg"), ("depmod", "kmod")):
        _need(tool, needed)


def _need(tool: str, package: str) -> str:
    found = shutil.which(tool) or shutil.which(tool, path="/usr/sbin:/sbin")
    if not found:
        raise Unsupported(
            f"cannot prepare the guest's kernel: {tool} is not installed",
            hint=f"apt-get install {package}, or copy the guest directory of a Debian machine",
        )
    return found


def _run(command: list[str], cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, check=False, capture_output=True, text=True, cwd=cwd)


def _resolve(package: str, say: Say) -> str:
    """The package with the kernel in it that the meta package `package` depends on, of the newest version."""
    image = _dependency(package)
    if not image and os.geteuid() == 0:
        say("apt knows no kernel yet: updating its lists")
        _run(["apt-get", "-q", "update"])
        image = _dependency(package)
    if not image:
        raise NotFound(f"apt does not know the package {package}", hint="apt-get update")
    return image


def _dependency(package: str) -> str | None:
    shown = _run(["apt-cache", "depends", "--no-recommends", "--no-suggests", package])
    for line in shown.stdout.splitlines():
        words = line.split()
        if len(words) == 2 and words[0] == "Depends:" and words[1].startswith("linux-image-"):
            return words[1]
    return package if "linux-image-" in shown.stdout and "Depends:" in shown.stdout else None


def _known(guest_dir: Path, image: str) -> Path | None:
    directory = guest_dir / image.removeprefix("linux-image-").removesuffix("-unsigned")
    try:
        record = read_record(directory)
    except (OSError, Corrupt):
        return None
    groups = {name: list(modules) for name, modules in GROUPS.items()}
    return directory if record.get("modules") == groups and record.get("package") == image else None


def _download(image: str, scratch: Path) -> Path:
    scratch.chmod(0o755)
    run = _run(["apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", image], cwd=scratch)
    archives = sorted(scratch.glob("*.deb"))
    if run.returncode or not archives:
        cause = next((line for line in run.stderr.splitlines() if line.startswith("E:")), "apt-get failed")
        raise Unavailable(
            f"cannot download {image}: {cause.removeprefix('E:').strip()}",
            hint="check the network and /etc/apt/sources.list, then apt-get update",
        )
    return archives[0]


def _prepare(archive: Path, image: str, scratch: Path) -> Path:
    """A directory as store.py describes it, but for the initramfs."""
    tree = scratch / "tree"
    release = unpack_package(archive, tree)
    made = scratch / release
    made.mkdir()
    kernel = (tree / "boot" / f"vmlinuz-{release}").read_bytes()
    (made / "vmlinuz").write_bytes(kernel)
    vmlinux = extract_vmlinux(kernel)
    if vmlinux:
        (made / "vmlinux").write_bytes(vmlinux)
    _choose_modules(_module_tree(tree, release), made / "modules")
    version = _run(["dpkg-deb", "-f", str(archive), "Version"]).stdout.strip()
    record = {
        "format": FORMAT,
        "release": release,
        "package": image,
        "version": version,
        "vmlinuz_sha256": hashlib.sha256(kernel).hexdigest(),
        "modules": GROUPS,
    }
    (made / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    return made


def _module_tree(tree: Path, release: str) -> Path:
    """/lib/modules/RELEASE of the package, with the index that only its installation makes."""
    base = tree / "usr" if (tree / "usr/lib/modules").exists() else tree
    run = _run([_need("depmod", "kmod"), "-b", str(base), release])
    if run.returncode:
        raise Internal(f"depmod failed for kernel {release}: {run.stderr.strip()}")
    return base / "lib/modules" / release


def _choose_modules(modules: Path, into: Path) -> None:
    """Copies the files of GROUPS, decompressed, and writes `order`: lines of "GROUP FILE", dependencies first."""
    into.mkdir()
    needs: dict[str, list[str]] = {}
    for line in (modules / "modules.dep").read_text().splitlines():
        path, _, rest = line.partition(":")
        needs[_module_name(path)] = [*reversed(rest.split()), path]
    builtin = {_module_name(line) for line in (modules / "modules.builtin").read_text().splitlines()}
    order: list[str] = []
    for group, names in GROUPS.items():
        for name in names:
            if name not in needs and name not in builtin:
                raise Unsupported(
                    f"the guest's kernel {modules.name} has no module {name}", hint="choose another kernel package"
                )
            for path in needs.get(name, []):
                file = f"{_module_name(path)}.ko"
                (into / file).write_bytes(_module_bytes(modules / path))
                order.append(f"{group} {file}")
    (into / "order").write_text("".join(f"{line}\n" for line in order))


def _module_name(path: str) -> str:
    return path.rsplit("/", 1)[-1].split(".ko")[0].replace("-", "_")


def _module_bytes(path: Path) -> bytes:
    data = path.read_bytes()
    return data if path.suffix == ".ko" else decompress(data)


def extract_vmlinux(image: bytes) -> bytes | None:
    """The ELF kernel inside of a bzImage, which boots by PVH without being decompressed by the guest; None if it cannot be.

    Linux/x86 boot protocol: setup_sects at 0x1f1, payload_offset and payload_length at 0x248, from the end of the setup. The
    payload ends with its length when decompressed, in four bytes.
    """
    if len(image) < 0x250 or image[0x202:0x206] != b"HdrS":
        return None
    offset, length = struct.unpack_from("<II", image, 0x248)
    start = ((image[0x1F1] or 4) + 1) * 512 + offset
    payload = image[start : start + length]
    try:
        elf = decompress(payload[:-4])
    except Unsupported:
        return None
    return elf if elf.startswith(b"\x7fELF") else None


def decompress(data: bytes) -> bytes:
    """`data` by what its magic says. Raises Unsupported when there is nothing here to do it with."""
    if data.startswith(b"\x1f\x8b"):
        return gzip.decompress(data)
    if data.startswith(b"\xfd7zXZ"):
        return lzma.decompress(data)
    for magic, tool in ((b"\x02\x21\x4c\x18", "lz4"), (b"\x28\xb5\x2f\xfd", "zstd")):
        if data.startswith(magic) and shutil.which(tool):
            run = subprocess.run([tool, "-dc"], check=False, input=data, capture_output=True)
            if run.returncode == 0:
                return run.stdout
    raise Unsupported("cannot decompress a part of the guest's kernel", hint="apt-get install lz4 zstd")


def _publish(made: Path, directory: Path) -> Path:
    """An older directory of the same release makes way; running VMs keep its files open."""
    if directory.exists():
        os.rename(directory, made.parent / "old")
    os.rename(made, directory)
    return directory
