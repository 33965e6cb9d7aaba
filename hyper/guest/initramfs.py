"""The initramfs: the agent as /init, the modules, and directories to mount on. An uncompressed cpio archive in newc form.

Uncompressed, because a decompressor in the guest costs more than reading 3 MB does. The agent removes modules once they are
loaded, so the guest does not keep both.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from hyper.guest.build import build_agent
from hyper.guest.store import INITRAMFS

_ALIGNMENT = 512


class Entry(NamedTuple):
    """One member; `mode` with its type, `device` (major, minor) for device nodes."""

    name: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


def newc(entries: Iterable[Entry]) -> bytes:
    """Linux's Documentation/driver-api/early-userspace/buffer-format.rst."""
    archive = bytearray()
    for number, entry in enumerate((*entries, Entry("TRAILER!!!", 0)), 1):
        name = entry.name.encode() + b"\0"
        header = (number, entry.mode, 0, 0, 1, 0, len(entry.data), 0, 0, *entry.device, len(name), 0)
        archive += b"070701" + b"".join(b"%08X" % value for value in header) + name
        archive += bytes(-len(archive) % 4)
        archive += entry.data
        archive += bytes(-len(archive) % 4)
    return bytes(archive) + bytes(-len(archive) % _ALIGNMENT)


def entries(agent: bytes, modules: Path) -> list[Entry]:
    """What the guest's first root has in it. The console's node is there for the kernel's own opening of it."""
    directories = [Entry(name, stat.S_IFDIR | 0o755) for name in ("dev", "proc", "sys", "run", "modules")]
    files = [
        Entry("init", stat.S_IFREG | 0o755, agent),
        Entry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1)),
        Entry("dev/null", stat.S_IFCHR | 0o666, device=(1, 3)),
    ]
    chosen = [Entry(f"modules/{path.name}", stat.S_IFREG | 0o600, path.read_bytes()) for path in sorted(modules.iterdir())]
    return directories + files + chosen


def build_initramfs(kernel: Path) -> Path:
    """The initramfs of the kernel in directory `kernel`, made unless it is there, and what `initramfs.cpio` points to."""
    agent = build_agent(kernel.parent)
    archive = newc(entries(agent.read_bytes(), kernel / "modules"))
    made = kernel / f"initramfs-{hashlib.sha256(archive).hexdigest()[:12]}.cpio"
    if not made.exists():
        with tempfile.NamedTemporaryFile(dir=kernel, prefix=".initramfs-", delete=False) as file:
            file.write(archive)
            os.fchmod(file.fileno(), 0o644)
        os.rename(file.name, made)
    _point(kernel / INITRAMFS, made.name)
    for old in kernel.glob("initramfs-*.cpio"):
        if old != made:
            old.unlink()
    return made


def _point(link: Path, target: str) -> None:
    if link.is_symlink() and os.readlink(link) == target:
        return
    scratch = link.with_name(f".{link.name}-{os.getpid()}")
    scratch.symlink_to(target)
    os.rename(scratch, link)
