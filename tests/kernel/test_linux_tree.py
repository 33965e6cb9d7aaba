"""ambi-tree by itself: archives of every maker, damaged ones, and what a root can hold."""

from __future__ import annotations

import io
import os
import random
import shutil
import struct
import subprocess
import tarfile
from pathlib import Path
from typing import NamedTuple

import pytest

from ambi.linux import memfd
from ambi.linux.tree import build
from ambi.linux.tree.program import PROGRAM
from tests.treekit import archive

pytestmark = pytest.mark.needs("root")
KIND, MESSAGE = 16, 17


class Ended(NamedTuple):
    """How a run ended: exit status, negative for a signal; fields of its answer; what it wrote."""

    status: int
    fields: dict[int, bytes]
    out: bytes


def tree(root: Path, verb: str, path: str = "/", *, send: bytes = b"", flags: int = 0) -> Ended:
    """One request to the program, in `root`."""
    ends = [os.memfd_create(name) for name in ("in", "out", "answer")]
    os.pwrite(ends[0], send, 0)
    program = memfd.sealed("ambi-tree", PROGRAM)
    pid = os.fork()
    if pid == 0:
        try:
            for fd, number in zip(ends, (0, 1, 3), strict=True):
                os.dup2(fd, number)
            os.chroot(root)
            os.execve(program, ["ambi-tree", verb, path, str(flags), "0", "0"], {})
        finally:
            os._exit(99)
    _, status = os.waitpid(pid, 0)
    out, answer = (os.pread(fd, os.fstat(fd).st_size, 0) for fd in ends[1:])
    for fd in (*ends, program):
        os.close(fd)
    fields, at = {}, 0
    while at < len(answer):
        tag, _, length = struct.unpack_from("<HHI", answer, at)
        fields[tag] = answer[at + 8 : at + 8 + length]
        at += 8 + length
    return Ended(os.waitstatus_to_exitcode(status), fields, out)


@pytest.mark.needs("gcc")
@pytest.mark.needs("gcc-12")
def test_the_program_is_what_the_sources_give() -> None:
    assert build.build() == PROGRAM, "python -m ambi.linux.tree.build"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A small tree with what tar formats differ about."""
    folder = tmp_path / "source"
    (folder / "a" / ("d" * 90) / ("e" * 90)).mkdir(parents=True)
    (folder / "a" / ("d" * 90) / ("e" * 90) / ("f" * 90)).write_text("far away")
    (folder / "plain").write_bytes(os.urandom(3000))
    os.link(folder / "plain", folder / "second")
    os.symlink("/" + "l" * 180, folder / "link")
    with open(folder / "holes", "wb") as file:
        for at in (0, 1 << 20, 5 << 20):
            file.seek(at)
            file.write(b"here")
        file.truncate(9 << 20)
    (folder / "empty").touch()
    return folder


FORMATS = [
    ["--format=gnu"], ["--format=posix"], ["--format=gnu", "--sparse"],
    ["--format=posix", "--sparse", "--sparse-version=0.0"],
    ["--format=posix", "--sparse", "--sparse-version=0.1"], ["--format=posix", "--sparse", "--sparse-version=1.0"],
]  # fmt: skip


@pytest.mark.parametrize("options", FORMATS, ids=" ".join)
def test_archives_of_gnu_tar(source: Path, tmp_path: Path, options: list[str]) -> None:
    made = subprocess.run(["tar", *options, "-C", source, "-cf", "-", "."], stdout=subprocess.PIPE, check=True).stdout
    root = tmp_path / "root"
    root.mkdir()
    assert tree(root, "put", send=made) == Ended(0, {}, b"")
    assert subprocess.run(["diff", "-r", "--no-dereference", source, root], check=False).returncode == 0
    assert os.stat(root / "plain").st_nlink == 2
    if "--sparse" in options:
        assert os.stat(root / "holes").st_blocks * 512 < 1 << 20


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_archives_of_python(source: Path, tmp_path: Path, form: int) -> None:
    (source / "link").unlink()  # too long for ustar
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w", format=form) as tar:
        tar.add(source / "plain", "x/y/plain")
        tar.add(source / "empty", "empty")
    root = tmp_path / "root"
    root.mkdir()
    assert tree(root, "put", send=target.getvalue()).status == 0
    assert (root / "x/y/plain").read_bytes() == (source / "plain").read_bytes()
    assert os.stat(root / "x/y/plain").st_mtime == pytest.approx(os.stat(source / "plain").st_mtime, abs=1)


def test_what_goes_out_is_read_by_gnu_tar_and_comes_back(source: Path, tmp_path: Path) -> None:
    sent = tree(source, "export")
    assert sent.status == 0 and len(sent.out) < 1 << 20, "holes are no data"
    for number, unpack in enumerate((_by_gnu_tar, _by_ourselves)):
        root = tmp_path / f"root{number}"
        root.mkdir()
        unpack(root, sent.out)
        assert subprocess.run(["diff", "-r", "--no-dereference", source, root], check=False).returncode == 0
        assert os.stat(root / "plain").st_mtime_ns == os.stat(source / "plain").st_mtime_ns
        assert tree(root, "export").out == sent.out


def _by_gnu_tar(root: Path, data: bytes) -> None:
    subprocess.run(["tar", "-C", root, "-xpf", "-"], input=data, check=True)


def _by_ourselves(root: Path, data: bytes) -> None:
    assert tree(root, "put", send=data).status == 0


def test_directories_that_are_deep(tmp_path: Path) -> None:
    """1,500 of them: more than a path of the kernel can name, and than most programs have descriptors."""
    root = tmp_path / "root"
    root.mkdir()
    here = os.open(root, os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("deeper", dir_fd=here)
        below = os.open("deeper", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    ended = tree(root, "export")
    assert ended.status in (0, 1) and (ended.status == 0 or b"too many directories" in ended.fields[MESSAGE])
    shutil.rmtree(root / "deeper") if ended.status else subprocess.run(["rm", "-rf", root / "deeper"], check=True)


def test_an_owner_and_a_time_at_their_limits(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "old").touch()
    os.chown(root / "old", 4_000_000_000, 3_999_999_999)
    os.utime(root / "old", ns=(0, -1_500_000_000))
    sent = tree(root, "get", "/old").out
    os.unlink(root / "old")
    assert tree(root, "put", send=sent).status == 0
    status = os.stat(root / "old")
    assert (status.st_uid, status.st_gid, status.st_mtime_ns) == (4_000_000_000, 3_999_999_999, -1_500_000_000)


def test_damaged_archives_are_answered(source: Path, tmp_path: Path) -> None:
    """Some hundred archives with a few bytes changed, cut or doubled: each is unpacked below the root, or refused."""
    root, beside = tmp_path / "root", tmp_path / "beside"
    beside.mkdir()
    whole = tree(source, "export").out[:40_000] + archive(("../x", b"x"), ("a/../../y", b"y"))
    chance = random.Random(20261124)
    for number in range(300):
        data = bytearray(whole)
        for _ in range(chance.randint(1, 4)):
            at = chance.randrange(len(data)) if chance.random() < 0.3 else chance.randrange(0, len(data) // 512) * 512
            at = min(len(data) - 1, at + chance.choice((0, 100, 124, 130, 156, 157, 257, 345, 512, 514)))
            data[at : at + chance.randint(0, 3)] = chance.randbytes(chance.randint(0, 3))
        if chance.random() < 0.5:  # so that more than the first check sum is looked at
            for start in range(0, len(data) - 511, 512):
                block = data[start : start + 512]
                if block[257:262] == b"ustar":
                    data[start + 148 : start + 156] = b"%06o\0 " % ((sum(block[:148]) + sum(block[156:]) + 256) & 0o777777)
        root.mkdir()
        ended = tree(root, "put", send=bytes(data))
        assert ended.status == 0 or (ended.status == 1 and ended.fields[KIND] and ended.fields[MESSAGE]), (number, ended)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["beside", "root", "source"], number
        shutil.rmtree(root)


def test_what_vanishes_while_it_is_read_is_left_out(tmp_path: Path) -> None:
    """A busy root: files come, go and shrink; the archive is whole all the same."""
    root = tmp_path / "root"
    root.mkdir()
    for number in range(300):
        (root / f"f{number}").write_bytes(b"x" * 100_000)
    busy = subprocess.Popen(
        ["sh", "-c", "while :; do for i in $(seq 0 299); do rm -f f$i; : > f$i; head -c 50000 /dev/zero > f$i; done; done"],
        cwd=root,
    )
    try:
        for _ in range(5):
            ended = tree(root, "export")
            assert ended.status == 0
            with tarfile.open(fileobj=io.BytesIO(ended.out)) as tar:
                assert all(name.startswith("f") for name in tar.getnames())
    finally:
        busy.kill()
        busy.wait()
