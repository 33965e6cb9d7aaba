"""Host memory for a guest, aligned so that the kernel can back it with huge pages."""

from __future__ import annotations

import ctypes
import mmap
import os
import stat
from collections.abc import Callable, Iterator
from errno import EINVAL, ENOSPC

from hyper.kvm.api import libc

HUGE = 2 << 20
PAGE = 4096

# linux/mman.h, asm-generic/mman.h
MAP_FIXED = 0x10
MAP_NORESERVE = 0x4000
MADV_DONTNEED = 4
MADV_REMOVE = 9
MADV_DONTFORK = 10
MADV_MERGEABLE = 12
MADV_HUGEPAGE = 14
MADV_NOHUGEPAGE = 15
MADV_DONTDUMP = 16
MADV_COLD = 20
MADV_PAGEOUT = 21
MADV_POPULATE_READ = 22
MADV_POPULATE_WRITE = 23

_mmap = libc.mmap
_mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_longlong)
_mmap.restype = ctypes.c_void_p
_madvise = libc.madvise
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_ZEROS = bytes(HUGE)
_FAILED = ctypes.c_void_p(-1).value


class Memory:
    """A mapping of `size` bytes, a multiple of 4096, whose `address` is a multiple of 2 MiB.

    Memory(size) is anonymous; `of_file` and `memfd` make the others. `fd` is the descriptor of a memfd, which is owned, else
    -1. `view` is all of it as bytes, read-only where the mapping is. The pages go when it is closed and the last view of it
    is gone, never under a view. A VM keeps what was added to it.

    2 MiB more of the address space are reserved (no memory), because mmap does not align; an unaligned guest has a nested
    page fault for each 4 KiB instead of each 2 MiB.
    """

    __slots__ = ("_reserved", "address", "fd", "readonly", "shared", "size", "view")

    def __init__(self, size: int) -> None:
        """Zeroed, private, given by the kernel page by page as it is touched. Raises OSError."""
        self._map(size, -1, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE, readonly=False)

    @classmethod
    def of_file(cls, fd: int, size: int, offset: int = 0, *, shared: bool, readonly: bool = False) -> Memory:
        """[offset, offset + size) of the file; `fd` stays the caller's and may be closed.

        Without `shared` what is written stays here (copy on write). A read-only one is for KVM_MEM_READONLY, or it faults.
        Raises OSError; EINVAL when the file is shorter, since touching what it lacks would be a SIGBUS.
        """
        info = os.fstat(fd)
        if stat.S_ISREG(info.st_mode) and info.st_size < offset + size:
            raise OSError(EINVAL, f"a mapping of {size} bytes at {offset} of a file of {info.st_size}")
        self = cls.__new__(cls)
        flags = mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE | MAP_NORESERVE
        self._map(size, fd, offset, flags, readonly=readonly)
        return self

    @classmethod
    def memfd(cls, size: int, name: str = "guest") -> Memory:
        """Zeroed, in a memfd that other processes can map by `fd` (vhost-user)."""
        fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, size)
            self = cls.of_file(fd, size, shared=True)
        except BaseException:
            os.close(fd)
            raise
        self.fd = fd
        return self

    def _map(self, size: int, fd: int, offset: int, flags: int, *, readonly: bool) -> None:
        if size <= 0 or size % PAGE or offset % PAGE:
            raise OSError(EINVAL, f"memory of {size} bytes at {offset}: neither may cut a page")
        self.fd = -1
        self.size = size
        self.readonly = readonly
        self.shared = bool(flags & mmap.MAP_SHARED)
        self._reserved, gap = map_aligned(size, HUGE, protection(readonly), flags, fd, offset)
        self.address = address_of(self._reserved) + gap
        view = memoryview(self._reserved)[gap : gap + size]
        self.view = view.toreadonly() if readonly else view

    def advise(self, advice: int, offset: int = 0, length: int | None = None) -> None:
        """madvise(2) of [offset, offset + length), whole pages; all of it without `length`. Raises OSError."""
        length = self.size - offset if length is None else length
        if offset < 0 or length < 0 or offset + length > self.size:
            raise OSError(EINVAL, f"{length} bytes at {offset} are not inside of {self.size}")
        if _madvise(self.address + offset, length, advice) < 0:
            code = ctypes.get_errno()
            raise OSError(code, f"madvise({advice}) of {length} bytes at {offset}: {os.strerror(code)}")

    def discard(self, offset: int, length: int) -> None:
        """Give the pages back to the host. They read as zeros next, or, of a private mapping, as what its file has."""
        self.advise(MADV_REMOVE if self.shared else MADV_DONTNEED, offset, length)

    def share(self, fd: int, offset: int, read: Callable[[int, int], bytes | bytearray] | None = None) -> None:
        """Go on as a shared mapping of [offset, offset + size) of the file `fd`, zeros so far, which gets what is here.

        read: of an offset and a length, where somebody knows what is there without touching it.

        Address and views stay good, and a VM that has the memory follows. Nobody may write meanwhile. It goes step by step,
        so that the memory is there once, not twice. Raises OSError; all is there still, be it in part in the file.
        """
        for at in range(0, self.size, HUGE):
            length = min(HUGE, self.size - at)
            data = bytes(self.view[at : at + length]) if read is None else read(at, length)
            if data != (_ZEROS if length == HUGE else bytes(length)) and os.pwrite(fd, data, offset + at) != length:
                raise OSError(ENOSPC, f"no room for {length} bytes of memory")
            flags = mmap.MAP_SHARED | MAP_FIXED
            if _mmap(self.address + at, length, protection(self.readonly), flags, fd, offset + at) == _FAILED:
                code = ctypes.get_errno()
                raise OSError(code, f"cannot map {length} bytes at {offset + at}: {os.strerror(code)}")
        self.shared = True

    def close(self) -> None:
        """Idempotent. Views taken from `view` stay good; the pages go with the last of them."""
        if self.size:
            self.size = 0
            self.view.release()
            try:
                self._reserved.close()
            except BufferError:
                pass  # somebody still has a view: the mapping goes with it
            if self.fd >= 0:
                os.close(self.fd)
                self.fd = -1

    def __enter__(self) -> Memory:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def protection(readonly: bool) -> int:
    return mmap.PROT_READ | (0 if readonly else mmap.PROT_WRITE)


def address_of(mapping: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(mapping))


def map_aligned(size: int, alignment: int, prot: int, flags: int, fd: int, offset: int = 0) -> tuple[mmap.mmap, int]:
    """A mapping, and where in it `size` bytes of `fd` begin, at a multiple of `alignment` (a page, or more). Raises OSError.

    Python's own anonymous mapping holds the range: it counts the views and unmaps after the last of them. And it would keep
    a duplicate of the descriptor, were it to map that itself.
    """
    room = size + (alignment if alignment > PAGE else 0)
    mapping = mmap.mmap(-1, room, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    start = address_of(mapping)
    gap = -start % alignment
    if _mmap(start + gap, size, prot, flags | MAP_FIXED, fd, offset) == _FAILED:
        code = ctypes.get_errno()
        mapping.close()
        raise OSError(code, f"cannot map {size} bytes at {offset}: {os.strerror(code)}")
    return mapping, gap


def set_bits(bitmap: bytes | bytearray | memoryview) -> Iterator[tuple[int, int]]:
    """The runs of set bits, as (first, end), ascending: pages of a dirty log."""
    bits = int.from_bytes(bitmap, "little")
    at = 0
    while bits:
        skip = (bits & -bits).bit_length() - 1
        bits >>= skip
        run = (~bits & (bits + 1)).bit_length() - 1
        bits >>= run
        at += skip
        yield at, at + run
        at += run
