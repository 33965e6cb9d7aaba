"""Looking into a root: the same archives and differences from every driver, and no way out of the root for anybody."""

from __future__ import annotations

import io
import os
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ambi.core.deadline import Deadline
from ambi.core.errors import Forbidden, InvalidRequest, NotFound
from ambi.core.loop import Loop
from ambi.core.plan import LaunchPlan
from ambi.core.undo import Undo
from tests.driverkit import Rig, Running
from tests.treekit import Looked, archive, changes, entries, look

WHEN = 1_234_567_890
NS = "1234567890.123456789"
CAPABILITY = b"\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"  # cap_net_bind_service+ep


@contextmanager
def browsed(rig: Rig, plan: LaunchPlan) -> Iterator[tuple[Any, Loop]]:
    """The root of `plan` without a workload."""
    loop = Loop()
    with Undo() as undo:
        driver: Any = rig.driver
        opened = driver.browse(plan, undo, Deadline.after(120), loop)
        undo.keep()
    try:
        yield opened, loop
    finally:
        opened.delete(Deadline.after(30))


def rich() -> bytes:
    """Every kind of entry that a root can have, with times in nanoseconds and owners that nobody has a name for."""
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w", format=tarfile.PAX_FORMAT) as tar:

        def add(name: str, kind: bytes, mode: int, content: bytes = b"", **fields: Any) -> None:
            member = tarfile.TarInfo(name)
            member.type, member.mode, member.uid, member.gid, member.mtime = kind, mode, 70_000, 3_000_000, WHEN
            member.size = len(content)
            member.pax_headers = {"mtime": NS}
            for key, value in fields.items():
                setattr(member, key, value)
            tar.addfile(member, io.BytesIO(content) if content else None)

        add("t", tarfile.DIRTYPE, 0o1751)
        add("t/" + "n" * 120, tarfile.REGTYPE, 0o4711, b"long")
        add("t/a", tarfile.REGTYPE, 0o640, b"a" * 70_000, pax_headers={"mtime": NS, "SCHILY.xattr.user.mark": "here"})
        add("t/b", tarfile.LNKTYPE, 0o640, linkname="t/a")
        add("t/c", tarfile.CHRTYPE, 0o600, devmajor=1, devminor=3)
        add("t/d", tarfile.SYMTYPE, 0o777, linkname="/etc/" + "x" * 150)
        add("t/e", tarfile.FIFOTYPE, 0o622)
        add("t/f", tarfile.REGTYPE, 0o600)
    return target.getvalue()


def expected(*, prefix: str = "t") -> list[tuple[Any, ...]]:
    owner = (70_000, 3_000_000)
    mark = (("SCHILY.xattr.user.mark", "here"),)
    rows = [
        ("", b"5", 0o1751, 0, "", (0, 0), (), b""),
        ("/a", b"0", 0o640, 70_000, "", (0, 0), mark, b"a" * 70_000),
        ("/b", b"1", 0o640, 0, f"{prefix}/a", (0, 0), (), b""),
        ("/c", b"3", 0o600, 0, "", (1, 3), (), b""),
        ("/d", b"2", 0o777, 0, "/etc/" + "x" * 150, (0, 0), (), b""),
        ("/e", b"6", 0o622, 0, "", (0, 0), (), b""),
        ("/f", b"0", 0o600, 0, "", (0, 0), (), b""),
        ("/" + "n" * 120, b"0", 0o4711, 4, "", (0, 0), (), b"long"),
    ]
    return [(prefix + n, k, mode, *owner, size, NS, link, dev, xa, data) for n, k, mode, size, link, dev, xa, data in rows]


SCRIPT = """
rm /etc/group; echo more >> /etc/passwd; mkdir /etc/new; echo 1 > /etc/new/one
rm -r /tmp; mkdir -m 1777 /tmp; chmod 711 /root 2>/dev/null || mkdir -m 711 /root
dd if=/dev/zero of=/hole bs=1 count=1 seek=50000000 2>/dev/null
echo gone > /gone; rm /gone; mkdir /vol/inside; echo v > /vol/inside/v; echo ready
exec sleep 100000
"""


@pytest.fixture(scope="module")
def busy(rig: Rig, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, Path]]:
    """A workload that has changed things, with a volume and a file of ours."""
    volume = tmp_path_factory.mktemp("volume", numbered=True)
    (volume / "there").write_text("from the host")
    mounts = (
        {"destination": "/vol", "type": "bind", "source": str(volume), "options": ["rbind", "rw"]},
        {"destination": "/ro", "type": "bind", "source": str(volume), "options": ["rbind", "ro"]},
    )
    script = ["sh", "-c", SCRIPT]
    with rig.started(script, mounts=mounts, files={"/etc/hosts": "127.0.0.1 box\n", "/etc/extra/one": "1"}) as running:
        running.init.until(lambda: b"ready" in running.init.out)
        yield running, volume


def ask(running: Running, verb: str, path: str = "/", **fields: Any) -> Looked:
    return look(running.created, running.loop, verb, path, **fields)


def test_diff_tells_what_the_workload_changed(busy: tuple[Running, Path]) -> None:
    running, _ = busy
    told = set(changes(ask(running, "diff").stream))
    assert {"C /etc", "D /etc/group", "A /etc/new", "A /etc/new/one", "C /etc/passwd", "A /hole"} <= told
    paths = {line[2:] for line in told}
    assert not paths & {"/gone", "/vol", "/vol/inside", "/proc", "/dev", "/etc/hosts", "/etc/extra/one"}


def test_layer_is_what_a_stack_of_layers_needs(busy: tuple[Running, Path]) -> None:
    running, _ = busy
    found = {entry[0]: entry for entry in entries(ask(running, "layer").stream)}
    assert found["etc/.wh.group"][5] == 0 and found["etc/new/one"][10] == b"1\n"
    assert found["etc/passwd"][10].endswith(b"more\n")
    assert found["hole"][5] == 50_000_001 and found["hole"][10].count(b"\0") == 50_000_001
    assert not {"vol", "etc/hosts", "gone", "proc", ".wh.gone"} & set(found)
    assert "tmp/.wh..wh..opq" in found, "a directory that was there and was made anew hides the old one"


def test_sparse_files_take_little_room(busy: tuple[Running, Path]) -> None:
    running, _ = busy
    assert len(ask(running, "get", "/hole").stream) < 100_000


def test_an_archive_comes_back_as_it_went_in(busy: tuple[Running, Path]) -> None:
    running, _ = busy
    ask(running, "put", "/var" if _exists(running, "/var") else "/root", send=rich())
    base = "/var" if _exists(running, "/var/t") else "/root"
    assert entries(ask(running, "get", f"{base}/t").stream) == expected()
    layer = [entry for entry in entries(ask(running, "layer").stream) if entry[0].startswith(f"{base[1:]}/t")]
    assert layer == expected(prefix=f"{base[1:]}/t")


def _exists(running: Running, path: str) -> bool:
    try:
        ask(running, "stat", path)
    except NotFound:
        return False
    return True


def test_file_capabilities_survive(busy: tuple[Running, Path]) -> None:
    running, _ = busy
    body = b"SCHILY.xattr.security.capability=" + CAPABILITY + b"\n"
    length = len(body) + 3
    record = b"%d " % length + body
    assert len(record) == length
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, len(record)
    sent = header.tobuf() + record.ljust(512, b"\0") + archive(("capable", b"x"))
    ask(running, "put", "/", send=sent)
    assert body in ask(running, "get", "/capable").stream


def test_volumes_are_a_part_of_the_root_and_of_no_layer(busy: tuple[Running, Path]) -> None:
    running, volume = busy
    assert entries(ask(running, "get", "/vol/there").stream)[0][10] == b"from the host"
    ask(running, "put", "/vol", send=archive(("sent", b"by cp")))
    assert (volume / "sent").read_bytes() == b"by cp"
    with pytest.raises(InvalidRequest, match="mounted volume is marked read-only"):
        ask(running, "put", "/ro", send=archive(("sent", b"2")))
    exported = {entry[0] for entry in entries(ask(running, "export").stream)}
    assert "vol" in exported and not {name for name in exported if name.startswith(("vol/", "proc/", "dev/"))}


@pytest.mark.parametrize(
    "verb,path,error,text",
    [
        ("stat", "/nope", NotFound, "no such file"),
        ("get", "/nope/x", NotFound, "no such file"),
        ("put", "/nope", NotFound, "no such file"),
        ("put", "/etc/passwd", InvalidRequest, "extraction point is not a directory"),
        ("stat", "/etc/passwd/", InvalidRequest, "not a directory"),
        ("stat", "/proc/1/status", InvalidRequest, "kernel"),
        ("put", "/proc/sys", InvalidRequest, "kernel"),
        ("put", "/sys", InvalidRequest, "kernel"),
    ],
)
def test_what_cannot_be_done(busy: tuple[Running, Path], verb: str, path: str, error: type[Exception], text: str) -> None:
    running, _ = busy
    with pytest.raises(error, match=text):
        ask(running, verb, path, send=archive(("a", b"b")))


@pytest.mark.parametrize("name", ["../up", "a/../../up", "/../up", "a/b/../../../up"])
def test_a_name_that_leads_out_is_refused(busy: tuple[Running, Path], name: str) -> None:
    running, _ = busy
    with pytest.raises(InvalidRequest, match="leads out of its directory"):
        ask(running, "put", "/etc/new", send=archive((name, b"x")))
    assert not _exists(running, "/etc/up")


def test_links_of_the_workload_lead_nowhere_else(busy: tuple[Running, Path]) -> None:
    """CVE-2018-15664 and its kin: absolute links, links up, links of procfs."""
    running, _ = busy
    script = (
        "ln -s / /l1; ln -s ../../../../.. /l2; ln -s /proc/1/root /l3; ln -s /proc/self/cwd /l4; ln -s /etc/new/one /l5"
    )
    assert running.exec(["sh", "-c", script]).code == 0
    for link in ("l1", "l2"):
        assert {e[0] for e in entries(ask(running, "get", f"/{link}/etc/new").stream)} == {"new", "new/one"}
        ask(running, "put", f"/{link}", send=archive((f"by-{link}", b"x")))
        assert _exists(running, f"/by-{link}") and not Path(f"/by-{link}").exists()
    for link in ("l3", "l4"):
        for verb in ("get", "put"):
            with pytest.raises((InvalidRequest, NotFound, Forbidden)):
                ask(running, verb, f"/{link}/etc", send=archive(("a", b"b")))
    assert ask(running, "stat", "/l5").answer["link"] == "/etc/new/one"
    assert ask(running, "stat", "/l5", follow=True).answer["link"] == ""


def test_a_link_that_is_swapped_all_the_time(busy: tuple[Running, Path], tmp_path: Path) -> None:
    """The race of CVE-2018-15664: what was a directory when it was looked at is a link to the host's path when used."""
    running, _ = busy
    inside = f"mkdir -p /race; cd /race; while :; do rm -rf x; mkdir -p x{tmp_path}; rm -rf x; ln -s / x; done"
    swapper = running.start_exec(["sh", "-c", inside])
    try:
        for number in range(25):
            try:
                ask(running, "put", f"/race/x{tmp_path}", send=archive((f"escaped{number}", b"x")))
            except (NotFound, InvalidRequest):  # it was no directory just then
                continue
    finally:
        swapper.process.signal(9)
        swapper.finish()
    assert not list(tmp_path.iterdir())


def test_nothing_of_the_root_is_loaded(busy: tuple[Running, Path]) -> None:
    """CVE-2019-14271: a library of the container was loaded by the process that had entered it."""
    running, _ = busy
    script = "mkdir -p /lib/x86_64-linux-gnu /lib64; echo evil > /lib64/ld-linux-x86-64.so.2; cd /lib/x*;"
    script += " for name in libc.so.6 libnss_files.so.2 libm.so.6; do echo evil > $name; done"
    assert running.exec(["sh", "-c", script]).code == 0
    ask(running, "put", "/", send=archive(("loaded", b"x")), copy_ids=True)
    assert ask(running, "stat", "/loaded").answer["size"] == 1


def test_directories_and_files_do_not_replace_each_other_unasked(busy: tuple[Running, Path]) -> None:
    running, _ = busy
    ask(running, "put", "/", send=archive(("swap", None), ("swap/in", b"x"), ("plain", b"1")))
    with pytest.raises(InvalidRequest, match="cannot overwrite directory with non-directory"):
        ask(running, "put", "/", send=archive(("swap", b"file")), no_overwrite_dir_non_dir=True)
    with pytest.raises(InvalidRequest, match="cannot overwrite non-directory with directory"):
        ask(running, "put", "/", send=archive(("plain", None)), no_overwrite_dir_non_dir=True)
    ask(running, "put", "/", send=archive(("swap", b"file"), ("plain", None)))
    assert ask(running, "stat", "/swap").answer["size"] == 4


@pytest.mark.parametrize("damage", ["cut", "checksum", "text", "size"])
def test_a_damaged_archive_is_refused(busy: tuple[Running, Path], damage: str) -> None:
    running, _ = busy
    whole = bytearray(archive(("damaged", b"x" * 5000)))
    if damage == "cut":
        del whole[2000:]
    elif damage == "checksum":
        whole[150] ^= 1
    elif damage == "size":
        whole[124:136] = b"77777777777\0"
        whole[148:156] = b"%06o\0 " % (sum(whole[:148]) + sum(whole[156:512]) + 8 * 32)
    else:
        whole = bytearray(b"this is no archive, but text. " * 100)
    with pytest.raises(InvalidRequest, match="archive is damaged"):
        ask(running, "put", "/tmp", send=bytes(whole))


def test_a_reader_that_goes_away_ends_the_work(busy: tuple[Running, Path]) -> None:
    running, _ = busy
    reader, writer = os.pipe()
    answers: list[Any] = []
    running.created.tree({"verb": "export", "path": "/"}, writer, answers.append)  # type: ignore[attr-defined]
    os.close(reader)
    assert running.loop.run(lambda: bool(answers), Deadline.after(30))
    assert isinstance(answers[0], Exception)
    assert _exists(running, "/etc")


def test_without_a_workload(rig: Rig) -> None:
    """Created, changed, started, ended and changed again: one root all the time."""
    plan = rig.plan(["sh", "-c", "cat /sent; echo out > /made"], files={"/etc/hosts": "127.0.0.1 h\n"})
    with browsed(rig, plan) as (opened, loop):
        look(opened, loop, "put", "/", send=archive(("sent", b"before the start")))
        assert changes(look(opened, loop, "diff").stream) == ["A /sent"]
        assert entries(look(opened, loop, "get", "/etc/hosts").stream)[0][10] == b"127.0.0.1 h\n"
    with rig.started_plan(plan) as running:
        done = running.init.finish()
    assert (done.code, done.out) == (0, b"before the start")
    readonly = plan._replace(config={**plan.config, "root": {"path": "rootfs", "readonly": True}})
    with browsed(rig, readonly) as (opened, loop):
        assert changes(look(opened, loop, "diff").stream) == ["A /made", "A /sent"]
        assert entries(look(opened, loop, "get", "/made").stream)[0][10] == b"out\n"
        with pytest.raises(InvalidRequest, match="container rootfs is marked read-only"):
            look(opened, loop, "put", "/", send=archive(("sent", b"x")))


def test_the_end_of_the_workload_does_not_cut_a_copy(rig: Rig) -> None:
    plan = rig.plan(
        ["sh", "-c", "dd if=/dev/urandom of=/data bs=64k count=32 2>/dev/null; echo ready; read end"], stdin=True
    )
    with rig.started_plan(plan) as running:
        running.init.until(lambda: b"ready" in running.init.out)
        reader, writer = os.pipe()
        answers: list[Any] = []
        running.created.tree({"verb": "get", "path": "/data"}, writer, answers.append)  # type: ignore[attr-defined]
        running.init.close_stdin()
        running.init.finish()
        thread = threading.Thread(target=_drain, args=(reader, into := bytearray()))
        thread.start()
        running.created.delete(Deadline.after(30))
        thread.join(30)
        running.loop.run(lambda: bool(answers), Deadline.after(10))
    assert isinstance(answers[0], dict), answers
    assert entries(bytes(into))[0][5] == 32 << 16


def _drain(fd: int, into: bytearray) -> None:
    with open(fd, "rb") as file:
        while piece := file.read1(1 << 16):
            into += piece
