"""Lists of system calls, made here and in a child that shares our memory; and the raw clone beside other threads."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

import pytest

from ambi.linux.calls import ANY, CallFailed, Calls
from ambi.linux.calls.build import build
from ambi.linux.calls.program import CODE

NR_DUP2, NR_UMASK, NR_CLOSE = 33, 95, 3


def shell(calls: Calls, script: str, **env: str) -> None:
    calls.execve("run sh", "/bin/sh", ["sh", "-c", script], env)


def status(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.needs("gcc-12")
def test_what_is_carried_is_what_gcc_makes() -> None:
    assert build() == CODE


def test_the_first_that_fails_is_named_and_those_after_it_are_not_made(tmp_path: Path) -> None:
    before = os.umask(0o022)
    os.umask(before)
    calls = Calls()
    calls.add("close nothing", NR_CLOSE, 1 << 20, ignored=errno.EBADF)
    calls.add("close nothing", NR_CLOSE, 1 << 20, ignored=ANY)
    calls.add("enter it", 80, os.fsencode(tmp_path / "none") + b"\0")
    calls.add("set the umask", NR_UMASK, 0o077)
    with pytest.raises(CallFailed) as caught:
        calls.make()
    assert (caught.value.errno, caught.value.what) == (errno.ENOENT, "enter it")
    assert os.umask(before) == before


def test_a_child_has_made_them_and_runs_its_program() -> None:
    read, write = os.pipe()
    calls = Calls()
    calls.add("its output", NR_DUP2, write, 1)
    calls.default_signals([signal.SIGPIPE])
    shell(calls, 'echo "$WORD"; grep SigIgn /proc/self/status; exit 7', WORD="wörd", PATH="/usr/bin:/bin")
    pid = calls.spawn(0)
    os.close(write)
    with os.fdopen(read) as file:
        word, ignored = file.read().splitlines()
    assert status(pid) == 7
    assert word == "wörd"
    assert not int(ignored.split()[1], 16) >> (signal.SIGPIPE - 1) & 1, "Python's own ignoring of SIGPIPE is inherited"


def test_a_child_that_fails_tells_why_in_memory_and_ends() -> None:
    calls = Calls()
    calls.execve("run it", "/no/such/program", ["x"], {})
    with pytest.raises(CallFailed) as caught:
        calls.spawn(0)
    assert (caught.value.errno, caught.value.what) == (errno.ENOENT, "run it")
    assert os.waitstatus_to_exitcode(os.wait()[1]) == 125


def test_a_nul_is_refused() -> None:
    with pytest.raises(ValueError, match="null"):
        Calls().execve("run it", "/bin/true", ["a\0b"], {})
