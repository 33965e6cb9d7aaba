"""The initramfs: the agent as /init, the modules, and directories to mount on. An uncompressed cpio archive in newc form.

Uncompressed, because a decompressor in the guest costs more than reading 3 MB does. The agent removes modules once they are
loaded, so the guest does not keep both.
"""

from __future__ import annotations

import hashlib
import os
import stat
import struct
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from hyper.guest.build import build_agent

_ALIGNMENT = 512
_SIGNATURE_MAGIC = b"~Module signature appended~\n"
_SIGNATURE_RECORD = 12
_SHF_ALLOC = 2
_UNREAD = (b".BTF", b".orc_unwind", b".orc_unwind_ip")


class Entry(NamedTuple):
    """One member; `mode` with its type, `device` (major, minor) for device nodes."""

    name: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


def directory(name: str, mode: int = 0o755) -> Entry:
    return Entry(name, stat.S_IFDIR | mode)


def file(name: str, data: bytes, mode: int) -> Entry:
    return Entry(name, stat.S_IFREG | mode, data)


def character_device(name: str, major: int, minor: int, mode: int) -> Entry:
    return Entry(name, stat.S_IFCHR | mode, device=(major, minor))


def cpio(entries: Iterable[Entry]) -> bytes:
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


def contents(agent: bytes, modules: Path) -> list[Entry]:
    """What the guest's first root has in it. The console's node is there for the kernel's own opening of it."""
    return [
        *(directory(name) for name in ("dev", "proc", "sys", "run", "modules")),
        file("init", agent, 0o755),
        character_device("dev/console", 5, 1, 0o600),
        character_device("dev/null", 1, 3, 0o666),
        *(
            file(f"modules/{path.name}", slimmed(without_signature(path.read_bytes())), 0o600)
            for path in sorted(modules.iterdir())
        ),
    ]


def without_signature(module: bytes) -> bytes:
    """`module` without the signature that linux/module_signature.h appends: code, signature, 12 bytes of which the last four
    are its length (big-endian), magic.

    Checking it costs an emulated guest a hundred milliseconds, and proves nothing there: who can change a module in the
    initramfs can change /init too. apt has checked the package.
    """
    if not module.endswith(_SIGNATURE_MAGIC):
        return module
    end = len(module) - len(_SIGNATURE_MAGIC) - _SIGNATURE_RECORD
    length = int.from_bytes(module[end + 8 : end + 12], "big")
    return module[: end - length] if 0 < length < end else module


def slimmed(module: bytes) -> bytes:
    """`module`, an ELF64 file, without what the kernel reads for tracers and stack traces alone: it parses the types of each
    module and relocates and sorts its unwind tables, which is a tenth of what an emulated guest does to load modules.

    The sections stay where they are, without a name and not to be loaded; the code is untouched.
    """
    if not module.startswith(b"\x7fELF\x02\x01"):
        return module
    (headers,) = struct.unpack_from("<Q", module, 0x28)  # e_shoff
    size, count, names_at = struct.unpack_from("<HHH", module, 0x3A)
    (names,) = struct.unpack_from("<Q", module, headers + names_at * size + 24)
    made = bytearray(module)
    for at in range(headers, headers + count * size, size):
        name, _, flags = struct.unpack_from("<IIQ", module, at)
        if module[names + name : module.index(b"\0", names + name)] in _UNREAD:
            struct.pack_into("<I", made, at, 0)
            struct.pack_into("<Q", made, at + 8, flags & ~_SHF_ALLOC)
    return bytes(made)


def build_initramfs(kernel: Path) -> Path:
    """The initramfs of the kernel in directory `kernel`, made unless it is there; older ones go."""
    agent = build_agent(kernel.parent)
    archive = cpio(contents(agent.read_bytes(), kernel / "modules"))
    made = kernel / f"initramfs-{hashlib.sha256(archive).hexdigest()[:12]}.cpio"
    if not made.exists():
        with tempfile.NamedTemporaryFile(dir=kernel, prefix=".initramfs-", delete=False) as scratch:
            scratch.write(archive)
            os.fchmod(scratch.fileno(), 0o644)
        os.rename(scratch.name, made)
    for old in kernel.glob("initramfs-*.cpio"):
        if old != made:
            old.unlink()
    return made
