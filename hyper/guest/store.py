"""Where the guest's parts are, for whoever starts a VM: cheap to import, makes nothing.

GUEST_DIR/agent-BUILD_ID                 the agent
GUEST_DIR/RELEASE/vmlinuz                as the distribution's package has it
GUEST_DIR/RELEASE/vmlinux                the same kernel uncompressed; absent when it could not be extracted
GUEST_DIR/RELEASE/modules/               the modules that a guest may need, and `order`, see initramfs.py
GUEST_DIR/RELEASE/kernel.json            {"format": 1, "release", "package", "version", "vmlinuz_sha256", "modules"}
GUEST_DIR/RELEASE/initramfs-HASH.cpio    agent and modules; `initramfs.cpio` is a link to the newest
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from ambi.core.errors import Corrupt, NotFound

FORMAT = 1
RECORD = "kernel.json"
INITRAMFS = "initramfs.cpio"


class GuestKernel(NamedTuple):
    """A kernel with its initramfs. `boot` is what QEMU's -kernel takes: vmlinux (PVH) where there is one, else vmlinuz."""

    release: str
    directory: Path
    boot: Path
    vmlinuz: Path
    vmlinuz_sha256: str
    initramfs: Path


def find(guest_dir: Path, release: str = "") -> GuestKernel:
    """The kernel `release`, or the newest one.

    Raises:
        NotFound: there is none, or it has no initramfs yet.
        Corrupt: its record is damaged.
    """
    hint = f"python -m hyper.guest --guest-dir {guest_dir}"
    if release:
        directory = guest_dir / release
        if "/" in release or release in (".", "..") or not (directory / RECORD).exists():
            raise NotFound(f"no guest kernel '{release}' in {guest_dir}", hint=hint)
    else:
        found = sorted((path.parent for path in guest_dir.glob(f"*/{RECORD}")), key=lambda path: version_key(path.name))
        if not found:
            raise NotFound(f"no guest kernel in {guest_dir}", hint=hint)
        directory = found[-1]
    record = read_record(directory)
    initramfs = directory / INITRAMFS
    if not initramfs.exists():
        raise NotFound(f"guest kernel '{directory.name}' has no initramfs", hint=hint)
    vmlinux, vmlinuz = directory / "vmlinux", directory / "vmlinuz"
    return GuestKernel(
        release=directory.name,
        directory=directory,
        boot=vmlinux if vmlinux.exists() else vmlinuz,
        vmlinuz=vmlinuz,
        vmlinuz_sha256=str(record["vmlinuz_sha256"]),
        initramfs=initramfs.resolve(),
    )


def read_record(directory: Path) -> dict[str, object]:
    """Raises Corrupt when kernel.json of `directory` is not one of this format."""
    path = directory / RECORD
    try:
        record = json.loads(path.read_bytes())
        known = record["format"] == FORMAT and isinstance(record["vmlinuz_sha256"], str)
    except (ValueError, KeyError, TypeError) as error:
        raise Corrupt(f"{path} is damaged: {error}", hint=f"rm -r {directory}") from error
    if not known:
        raise Corrupt(f"{path} has format {record['format']!r}, this version reads {FORMAT}", hint=f"rm -r {directory}")
    return dict(record)


def version_key(release: str) -> list[tuple[int, str]]:
    """`6.1.0-9` before `6.1.0-40`: digits compare as numbers."""
    parts: list[tuple[int, str]] = []
    digits = ""
    for character in release + "\0":
        if character.isdecimal():
            digits += character
            continue
        if digits:
            parts.append((int(digits), ""))
            digits = ""
        parts.append((-1, character))
    return parts
