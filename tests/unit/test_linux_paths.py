"""Paths below a hostile root: whatever links it holds, results stay below it."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from ambi.linux import memfd, paths, process


@pytest.fixture
def root(tmp_path: Path) -> Iterator[tuple[int, Path]]:
    top = tmp_path / "root"
    top.mkdir()
    (tmp_path / "outside").mkdir()
    fd = os.open(top, paths.O_PATH | os.O_DIRECTORY)
    yield fd, top
    os.close(fd)


def _where(fd: int) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)


@pytest.mark.parametrize("target", ["/", "../../../..", "/../..", "."])
def test_links_end_at_the_root(root: tuple[int, Path], target: str) -> None:
    fd, top = root
    (top / "link").symlink_to(target)
    assert _where(paths.open_in_root(fd, "/link")) == str(top)


def test_absolute_links_are_below_the_root(root: tuple[int, Path], tmp_path: Path) -> None:
    fd, top = root
    (top / "link").symlink_to(tmp_path / "outside")
    with pytest.raises(FileNotFoundError):
        paths.open_in_root(fd, "link")


def test_magic_links_are_refused(root: tuple[int, Path]) -> None:
    proc = os.open("/proc", paths.O_PATH)
    try:
        with pytest.raises(OSError) as raised:
            paths.open_in_root(proc, "self/root")
        assert raised.value.errno == errno.ELOOP
    finally:
        os.close(proc)


def test_directories_are_made(root: tuple[int, Path]) -> None:
    fd, top = root
    assert _where(paths.make_directories(fd, "/a/./b//c/../d", 0o700)) == str(top / "a/b/d")
    assert (top / "a").is_dir() and not (top / "a/b/c").exists()


@pytest.mark.parametrize("target", ["missing", "/missing", "../../missing", "/deep/../missing"])
def test_dangling_links_are_followed_below_the_root(root: tuple[int, Path], target: str) -> None:
    fd, top = root
    (top / "link").symlink_to(target)
    assert _where(paths.make_directories(fd, "/link/x")) == str(top / "missing/x")
    (top / "file").symlink_to(target + "/made")
    assert _where(paths.make_file(fd, "/file")) == str(top / "missing/made")


def test_links_in_a_circle(root: tuple[int, Path]) -> None:
    fd, top = root
    (top / "a").symlink_to("b")
    (top / "b").symlink_to("a")
    for make in (paths.make_directories, paths.make_file):
        with pytest.raises(OSError) as raised:
            make(fd, "/a/x")
        assert raised.value.errno == errno.ELOOP


def test_a_file_where_a_directory_is_needed(root: tuple[int, Path]) -> None:
    fd, top = root
    (top / "file").touch()
    with pytest.raises(NotADirectoryError):
        paths.make_directories(fd, "/file/x")


def test_reading(root: tuple[int, Path]) -> None:
    fd, top = root
    (top / "file").write_bytes(b"x" * 100)
    assert paths.read_in_root(fd, "/file") == b"x" * 100
    with pytest.raises(OSError, match="larger than 99"):
        paths.read_in_root(fd, "/file", 99)
    os.mkfifo(top / "fifo")
    with pytest.raises(OSError, match="not a regular file"):
        paths.read_in_root(fd, "/fifo")


def test_writes_go_to_a_real_procfs(root: tuple[int, Path]) -> None:
    _, top = root
    with pytest.raises(OSError, match="not a proc file system"):
        paths.open_procfs(str(top))
    proc = paths.open_procfs()
    try:
        own = paths.own_directory(proc)
        assert own == str(os.getpid())
        paths.write_in_procfs(proc, f"{own}/comm", "renamed")
        assert Path("/proc/self/comm").read_text() == "renamed\n"
        with pytest.raises(OSError) as raised:
            paths.write_in_procfs(proc, "self/comm", "by a link")
        assert raised.value.errno == errno.ELOOP
    finally:
        paths.write_in_procfs(proc, f"{paths.own_directory(proc)}/comm", "pytest")
        os.close(proc)


def test_sealed_memory() -> None:
    fd = memfd.sealed("name", b"content")
    try:
        assert os.pread(fd, 100, 0) == b"content"
        for attempt in (lambda: os.pwrite(fd, b"x", 0), lambda: os.ftruncate(fd, 1), lambda: os.ftruncate(fd, 100)):
            with pytest.raises(PermissionError):
                attempt()
    finally:
        os.close(fd)


def test_close_on_exec() -> None:
    fd = os.open("/dev/null", os.O_RDONLY)
    os.set_inheritable(fd, True)
    process.close_on_exec(fd, fd)
    assert not os.get_inheritable(fd)
    process.close_range(fd, fd)
    with pytest.raises(OSError):
        os.fstat(fd)


def test_start_time_is_that_of_stat() -> None:
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    assert process.start_time(os.getpid()) == int(fields[19])
