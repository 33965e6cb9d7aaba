"""Which kernel and initramfs a VM boots: those that `python -m hyper.guest` built below the guest directory.

GUEST/RELEASE/vmlinux               uncompressed, which QEMU starts by PVH without firmware code in between; or
GUEST/RELEASE/vmlinuz               as the distribution ships it
GUEST/RELEASE/initramfs-HASH.cpio   the newest counts
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from ambi.core.errors import NotFound

HINT = "build it: `python -m hyper.guest --guest-dir {}`, or run scripts/quickstart"


class BootFiles(NamedTuple):
    release: str
    kernel: Path
    initramfs: Path


def find(guest_dir: Path, release: str = "") -> BootFiles:
    """The files of `release`, or of the newest kernel when it is "". Raises NotFound with the command that builds them."""
    names = [release] if release else sorted(_releases(guest_dir), key=_version_key, reverse=True)
    for name in names:
        directory = guest_dir / name
        kernel = next((directory / k for k in ("vmlinux", "vmlinuz") if (directory / k).is_file()), None)
        initramfs = sorted(directory.glob("initramfs-*.cpio"), key=lambda path: path.stat().st_mtime_ns)
        if kernel and initramfs:
            return BootFiles(name, kernel, initramfs[-1])
    what = f"the guest kernel {release} is not built" if release else "no guest kernel is built"
    raise NotFound(f"{what}: there is none below {guest_dir}", hint=HINT.format(guest_dir))


def _releases(guest_dir: Path) -> list[str]:
    try:
        return [entry.name for entry in os.scandir(guest_dir) if entry.is_dir() and entry.name[0].isdigit()]
    except OSError:
        return []


def _version_key(release: str) -> list[tuple[int, str]]:
    """`6.1.0-40-cloud-amd64` sorts behind `6.1.0-9-cloud-amd64`."""
    return [(int(word), "") if word.isdigit() else (-1, word) for word in release.replace("-", ".").split(".")]
