"""System calls in a row: the last steps of a process before execve, as a list that is made without Python in between.

    calls = Calls()
    calls.add("set the groups", 116, 1, array)          what it does, number, arguments
    calls.execve(path, argv, env)
    calls.make()                                        here
    pid = calls.spawn(flags, cgroup=fd)                 or in a child

The child of `spawn` shares the memory of the caller, who sleeps until the child has executed its program or ended: nothing
is copied, no page is faulted in, and what failed is told in memory. A child of fork(2) pays both for a whole interpreter,
which is more than all that it does. The list is walked by a few bytes of machine code (calls.c).

Until its execve the child can be traced, or its memory read, by whoever could do that to the caller: be not dumpable.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
from collections.abc import Callable

from ambi.linux.calls.program import CODE
from ambi.linux.libc import check, libc

ANY = -1  # as `ignored`: no errno is a failure
CLONE_VM, CLONE_VFORK = 0x00000100, 0x00004000  # linux/sched.h
_CLONE_PARENT, _CLONE_INTO_CGROUP = 0x00008000, 0x200000000
_STACK_BYTES = 16384
_NR_RT_SIGACTION, _NR_RT_SIGPROCMASK, _NR_EXECVE = 13, 14, 59
_HIGHEST_SIGNAL = 64

Buffer = bytes | ctypes.Array[ctypes.c_char]


class _call(ctypes.Structure):  # struct call, calls.c
    _fields_ = [("number", ctypes.c_long), ("arguments", ctypes.c_uint64 * 6), ("ignored", ctypes.c_long)]


class _batch(ctypes.Structure):  # struct batch, calls.c
    _fields_ = [
        ("calls", ctypes.c_void_p), ("count", ctypes.c_long), ("at", ctypes.c_long), ("error", ctypes.c_long),
        ("result", ctypes.c_long),
    ]  # fmt: skip


class CallFailed(OSError):
    """A call of the list failed; `what` says which."""

    def __init__(self, code: int, what: str) -> None:
        super().__init__(code, os.strerror(code), what)
        self.what = what


class Calls:
    """A list of system calls; buffers given to it live as long as it does."""

    def __init__(self) -> None:
        self._list: list[tuple[int, tuple[int, ...], int]] = []
        self._what: list[str] = []
        self._kept: list[object] = []

    def add(self, what: str, number: int, *arguments: int | Buffer, ignored: int = 0) -> None:
        """Append call `number`; `what` names it in an error. ignored: an errno that is no failure, or ANY."""
        words = tuple(word if isinstance(word, int) else self.address(word) for word in arguments)
        self._list.append((number, words, ignored))
        self._what.append(what)

    def address(self, data: Buffer) -> int:
        """Of a copy of bytes, or of the buffer itself; it stays for as long as the list does."""
        buffer = ctypes.create_string_buffer(data, len(data)) if isinstance(data, bytes) else data
        self._kept.append(buffer)
        return ctypes.addressof(buffer)

    def _words(self, strings: list[bytes]) -> Buffer:
        """A NULL-terminated array of C strings."""
        array = b"".join(self.address(text + b"\0").to_bytes(8, "little") for text in strings)
        return array + bytes(8)

    def execve(self, what: str, path: str, arguments: list[str], env: dict[str, str]) -> None:
        """The last call. ValueError for a NUL inside."""
        strings = [os.fsencode(path), *map(os.fsencode, arguments)]
        pairs = [os.fsencode(name) + b"=" + os.fsencode(value) for name, value in env.items()]
        if any(b"\0" in text for text in (*strings, *pairs)):
            raise ValueError("embedded null byte")
        self.add(what, _NR_EXECVE, strings[0] + b"\0", self._words(strings[1:]), self._words(pairs))

    def default_signals(self, ignored: list[int]) -> None:
        """Default dispositions for the signals `ignored`, which execve would keep so, and an empty mask."""
        default = bytes(32)  # struct kernel_sigaction with SIG_DFL
        for number in ignored:
            self.add("reset the signals", _NR_RT_SIGACTION, number, default, 0, _HIGHEST_SIGNAL // 8)
        self.add("reset the signals", _NR_RT_SIGPROCMASK, 2, bytes(8), 0, _HIGHEST_SIGNAL // 8)  # SIG_SETMASK

    def make(self) -> None:
        """Make them all, in this process. Raises CallFailed for the first that fails; those before it have been made."""
        batch, _array = self._prepare()
        _code()(ctypes.addressof(batch), 0)
        self._check(batch)

    def spawn(self, flags: int, *, cgroup: int | None = None) -> int:
        """The pid of a child that has made them all, the last of which is execve, or was killed on its way.

        flags: CLONE_* beyond CLONE_VM and CLONE_VFORK; cgroup: of version 2, to be born in. Block all signals around it.
        Raises CallFailed, when the child has ended with 125, and OSError when there is none.
        """
        batch, _array = self._prepare()
        stack = ctypes.create_string_buffer(_STACK_BYTES)
        how = (ctypes.c_uint64 * 11)()  # struct clone_args: flags, pidfd, child_tid, parent_tid, exit_signal, stack, size...
        how[0] = flags | CLONE_VM | CLONE_VFORK
        how[5], how[6] = ctypes.addressof(stack) & ~15, _STACK_BYTES - 16
        if not flags & _CLONE_PARENT:
            how[4] = signal.SIGCHLD
        if cgroup is not None:
            how[0] |= _CLONE_INTO_CGROUP
            how[10] = cgroup
        pid = _code()(ctypes.addressof(batch), ctypes.addressof(how))
        if pid < 0:
            raise OSError(-pid, os.strerror(-pid), "clone3")
        self._check(batch)
        return pid

    def _prepare(self) -> tuple[_batch, ctypes.Array[_call]]:
        array = (_call * len(self._list))()
        for entry, (number, words, ignored) in zip(array, self._list, strict=True):
            entry.number, entry.ignored = number, ignored
            for index, word in enumerate(words):
                entry.arguments[index] = word & 0xFFFFFFFFFFFFFFFF
        return _batch(ctypes.addressof(array), len(array), 0, 0, 0), array

    def _check(self, batch: _batch) -> None:
        if batch.error:
            raise CallFailed(batch.error, self._what[batch.at])


_page: mmap.mmap | None = None
_entry: Callable[[int, int], int] | None = None


def _code() -> Callable[[int, int], int]:
    """The function `calls`, in a page of its own that nobody can write to any more."""
    global _page, _entry
    if _entry is None:
        _page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        _page.write(CODE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(_page))
        check(libc.mprotect(ctypes.c_void_p(address), mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_EXEC), "mprotect")
        _entry = ctypes.CFUNCTYPE(ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)(address)
    return _entry
