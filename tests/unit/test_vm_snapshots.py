"""The files of VM snapshots: what is published is whole, what is damaged is named, what is half made goes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ambi.core.deadline import Deadline
from ambi.core.errors import AmbiError, Conflict, Corrupt, InvalidRequest, NotFound, Unsupported
from ambi.core.loop import Loop
from hyper.guest.protocol import INITIAL_CREDIT
from hyper.vm import snapshots
from hyper.vm.guest_process import Outlet
from hyper.vm.snapshots import BLOCK, MAX_CHAIN

MIB = 1 << 20


def manifest(name: str, parent: str | None = None, **changes: Any) -> dict[str, Any]:
    return {
        "name": name, "created_ns": 7, "parent": parent, "vmm": "ambi", "words": {}, "vcpus": 1, "memory_bytes": MIB,
        "common": True, "devices": {"eth0": 0}, "nics": 5, "next_id": 2, "paused": False, "still_ns": 5,
        "notes": {"/a": "b"}, "files": ["state", "memory", "disk.img"], **changes,
    }  # fmt: skip


def publish(directory: Path, name: str, parent: str | None = None) -> Path:
    home = directory / name
    snapshots.make(home)
    for file in ("state", "memory", "disk.img"):
        fd = snapshots.create_file(snapshots.draft_of(home), file)
        os.ftruncate(fd, 8 * MIB)
        os.pwrite(fd, file.encode() * 100, 3 * MIB - 50)
        os.close(fd)
    snapshots.publish(home, manifest(name, parent), Deadline.after(10))
    return home


def test_what_is_published_is_read_again(tmp_path: Path) -> None:
    directory = tmp_path / "snapshots"
    home = publish(directory, "one")
    found = snapshots.read(home)
    assert (found.name, found.devices, found.notes, found.disks) == ("one", {"eth0": 0}, {"/a": "b"}, {"disk": "disk.img"})
    assert found.files["memory"] == (8 * MIB, None) and found.files["state"][1]
    snapshots.verify(found, Deadline.after(10))
    assert snapshots.names(directory) == ["one"] and directory.stat().st_mode & 0o777 == 0o700
    assert home.stat().st_mode & 0o777 == 0o700 and all(path.stat().st_mode & 0o77 == 0 for path in home.iterdir())
    assert 0 < found.allocated_bytes() < 4 * MIB


@pytest.mark.parametrize("name", ["", ".x", "a/b", "..", "ä", "a b", "x" * 129, "-a"])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(InvalidRequest, match="invalid name"):
        snapshots.check_name(name)


def _cut(home: Path) -> None:
    os.truncate(home / "state", 8 * MIB - 1)


def _flip(home: Path) -> None:
    with open(home / "disk.img", "r+b") as file:
        file.seek(3 * MIB)
        file.write(b"!")


def _more(home: Path) -> None:
    with open(home / "disk.img", "r+b") as file:
        file.seek(7 * MIB)
        file.write(b"!")


def _gone(home: Path) -> None:
    (home / "disk.img").unlink()


@pytest.mark.parametrize("damage", [_cut, _flip, _more, _gone])
def test_a_damaged_file_is_named(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    home = publish(tmp_path, "one")
    damage(home)
    with pytest.raises(Corrupt, match=r"one/(state|disk\.img)") as raised:
        snapshots.verify(snapshots.read(home), Deadline.after(10))
    assert raised.value.hint


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", '{"format": 1}', "\x00", '{"format": 1, "checksum": 3}'])
def test_a_damaged_manifest_is_named(tmp_path: Path, text: str) -> None:
    home = publish(tmp_path, "one")
    (home / "manifest.json").write_text(text)
    with pytest.raises(Corrupt, match=r"snapshot one is damaged.*manifest\.json"):
        snapshots.read(home)


def test_every_byte_of_a_manifest_counts(tmp_path: Path) -> None:
    home = publish(tmp_path, "one")
    good = (home / "manifest.json").read_bytes()
    for at in range(0, len(good), 9):
        (home / "manifest.json").write_bytes(good[:at] + bytes((good[at] ^ 1,)) + good[at + 1 :])
        try:
            snapshots.read(home)
        except (Corrupt, Unsupported):
            continue
        assert json.loads((home / "manifest.json").read_bytes()) == json.loads(good), at


def test_a_newer_format_and_what_is_not_there(tmp_path: Path) -> None:
    home = publish(tmp_path, "one")
    body = json.loads((home / "manifest.json").read_bytes())
    (home / "manifest.json").write_text(json.dumps({**body, "format": 2}))
    with pytest.raises(Unsupported, match="format 2"):
        snapshots.read(home)
    with pytest.raises(NotFound, match="no snapshot two"):
        snapshots.read(tmp_path / "two")
    (home / "manifest.json").unlink()
    with pytest.raises(Corrupt, match="gone"):
        snapshots.read(home)


def test_chains_and_who_follows(tmp_path: Path) -> None:
    for number in range(4):
        publish(tmp_path, f"s{number}", f"s{number - 1}" if number else None)
    publish(tmp_path, "side", "s1")
    assert [it.name for it in snapshots.chain(snapshots.read(tmp_path / "s3"))] == ["s0", "s1", "s2", "s3"]
    assert snapshots.children(tmp_path, "s1") == ["s2", "side"]
    snapshots.remove(tmp_path / "s1")
    with pytest.raises(Corrupt, match="s2 follows s1, which is gone"):
        snapshots.chain(snapshots.read(tmp_path / "s3"))
    publish(tmp_path, "s1", "s3")
    with pytest.raises(Corrupt, match=f"more than {MAX_CHAIN} others"):
        snapshots.chain(snapshots.read(tmp_path / "s3"))


def test_a_name_that_is_taken_and_what_is_half_made(tmp_path: Path) -> None:
    directory = tmp_path / "snapshots"
    home = publish(directory, "one")
    with pytest.raises(Conflict, match="already"):
        snapshots.make(home)
    snapshots.make(directory / "two")
    os.close(snapshots.create_file(directory / ".new-two", "state"))
    assert snapshots.names(directory) == ["one"]
    snapshots.make(directory / "two")  # as if nobody had begun
    assert list((directory / ".new-two").iterdir()) == []
    os.close(snapshots.create_file(directory / ".new-two", "state"))
    snapshots.sweep(directory)
    assert os.listdir(directory) == ["one"]
    snapshots.remove(home)
    assert os.listdir(directory) == []
    snapshots.sweep(tmp_path / "nothing")


def test_a_publication_that_fails_leaves_nothing(tmp_path: Path) -> None:
    home = tmp_path / "one"
    snapshots.make(home)
    with pytest.raises(AmbiError, match="cannot write snapshot one"):
        snapshots.publish(home, manifest("one"), Deadline.after(10))  # its files are not there
    assert list(tmp_path.iterdir()) == []


def test_copies_have_no_more_on_the_disk_and_holes_do_not_count(tmp_path: Path) -> None:
    source, target, full = (os.open(tmp_path / name, os.O_RDWR | os.O_CREAT) for name in ("source", "target", "full"))
    os.ftruncate(source, 64 * MIB + 5)
    for at in (0, 5 * MIB - 3, 40 * MIB, 64 * MIB):
        os.pwrite(source, b"here!", at)
    os.pwrite(source, bytes(3 * BLOCK), 20 * MIB)  # zeros that are there
    snapshots.copy(source, target, Deadline.after(10))
    os.pwrite(full, os.pread(source, 64 * MIB + 5, 0), 0)
    assert os.pread(target, 65 * MIB, 0) == os.pread(full, 65 * MIB, 0)
    assert os.fstat(target).st_blocks <= os.fstat(source).st_blocks
    digests = {snapshots.digest_of(fd, Deadline.after(10)) for fd in (source, target, full)}
    assert len(digests) == 1
    os.pwrite(target, b"!", 30 * MIB)
    assert snapshots.digest_of(target, Deadline.after(10)) not in digests
    for fd in (source, target, full):
        os.close(fd)


class Credits:
    """The part of a link that an outlet uses: what it says to the guest."""

    def __init__(self) -> None:
        self.given = 0

    def tell(self, _kind: int, _ident: int, items: Any) -> None:
        self.given += dict(items)[2]


def test_credits_of_another_host_are_not_given_back() -> None:
    reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    link = Credits()
    outlet = Outlet(Loop(), link, 1, 1, writer, terminal=False)  # type: ignore[arg-type]
    outlet.hold()
    piece = bytes(40000)
    for _ in range(6):
        outlet.push(piece)
    assert os.read(reader, 1 << 20) and link.given == 0
    with pytest.raises(Corrupt, match="more output than it may"):
        outlet.push(bytes(INITIAL_CREDIT - 6 * len(piece) + 1))
    outlet.renew()
    outlet._flush()
    held = 6 * len(piece)
    taken = 0
    while data := _read(reader):
        taken += len(data)
        outlet._flush()
    assert link.given == 0 and taken <= held + 1
    for _ in range(6):  # a whole new credit is there
        outlet.push(piece)
        while _read(reader):
            outlet._flush()
    assert link.given >= 3 * 65536
    outlet.close()
    os.close(reader)


def _read(fd: int) -> bytes:
    try:
        return os.read(fd, 1 << 20)
    except BlockingIOError:
        return b""
