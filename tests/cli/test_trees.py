"""cp, diff, export and commit by real clients, for both kinds of instance."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import signal
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.harness import EngineUnderTest
from tests.peers import Dockerd
from tests.rawclient import RawClient
from tests.treekit import archive

RUNTIMES = ["container", pytest.param("vm", marks=pytest.mark.needs("qemu"))]


@pytest.fixture(scope="module")
def engine(busybox_tar: Path) -> Iterator[EngineUnderTest]:
    base = Path(tempfile.mkdtemp(prefix="ambi-", dir="/tmp"))
    engine = EngineUnderTest(base)
    try:
        engine.start()
        engine.load_busybox(busybox_tar)
        yield engine
    finally:
        engine.destroy()
        shutil.rmtree(base, ignore_errors=True)


@pytest.fixture(params=RUNTIMES)
def runtime(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def said(engine: EngineUnderTest, *args: str, **options: Any) -> str:
    done = engine.docker(*args, **options)
    assert done.returncode == 0, (args, done.stderr.decode())
    return done.stdout.decode()


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes


def ask(engine: EngineUnderTest, method: str, path: str, data: bytes = b"") -> Answer:
    client = RawClient(engine.socket)
    try:
        head = f"{method} /v1.41{path} HTTP/1.1\r\nHost: docker\r\nContent-Length: {len(data)}\r\n\r\n"
        client.socket.sendall(head.encode() + data)
        status, headers = client.head()
        return Answer(status, headers, b"" if method == "HEAD" else client.body(headers))
    finally:
        client.close()


def message(answer: Answer) -> str:
    return str(json.loads(answer.body)["message"])


def test_archive_of_created_running_paused_and_stopped(engine: EngineUnderTest, runtime: str) -> None:
    """The state of an instance makes no difference to what can be copied, and what was copied stays."""
    name = f"states-{runtime}"
    said(engine, "create", "--runtime", runtime, "--network", "none", "--name", name, "busybox", "sleep", "1000")
    for state in ("created", "running", "paused", "stopped"):
        if state == "running":
            said(engine, "start", name)
        elif state == "paused":
            said(engine, "pause", name)
        elif state == "stopped":
            said(engine, "unpause", name)
            said(engine, "stop", "-t", "0", name)
        sent = archive((state, state.encode()))
        assert ask(engine, "PUT", f"/containers/{name}/archive?path=/tmp", sent).status == 200, state
        got = ask(engine, "GET", f"/containers/{name}/archive?path=/tmp/{state}")
        with tarfile.open(fileobj=io.BytesIO(got.body)) as tar:
            content = tar.extractfile(state)
            assert got.status == 200 and content is not None and content.read() == state.encode()
    changes = said(engine, "diff", name).split("\n")
    assert [f"A /tmp/{state}" in changes for state in ("created", "running", "paused", "stopped")] == [True] * 4
    said(engine, "rm", name)


def test_the_answers_that_clients_read(engine: EngineUnderTest) -> None:
    said(engine, "create", "--name", "answers", "busybox", "true")
    said(engine, "create", "--name", "closed", "--read-only", "busybox", "true")
    assert ask(engine, "PUT", "/containers/answers/archive?path=/", archive(("set", b"x"), mode=0o4755)).status == 200
    archived = "/containers/answers/archive"
    head = ask(engine, "HEAD", f"{archived}?path=/set")
    about = json.loads(base64.b64decode(head.headers["x-docker-container-path-stat"]))
    assert (head.status, about["name"], about["size"], about["linkTarget"]) == (200, "set", 1, "")
    assert about["mode"] == (1 << 23) | 0o755 and about["mtime"] == "1970-01-01T00:00:00Z"
    folder = ask(engine, "HEAD", f"{archived}?path=/tmp/")
    mode = json.loads(base64.b64decode(folder.headers["x-docker-container-path-stat"]))["mode"]
    assert mode & (1 << 31) and mode & 0o777
    missing = ask(engine, "GET", f"{archived}?path=/no/../such")
    assert (missing.status, message(missing)) == (404, "Could not find the file /such in container answers")
    assert ask(engine, "HEAD", f"{archived}?path=/nope").status == 404
    assert ask(engine, "GET", "/containers/nobody/archive?path=/").status == 404
    assert ask(engine, "GET", archived).status == 400
    target = ask(engine, "PUT", f"{archived}?path=/set", archive(("a", b"b")))
    assert (target.status, message(target)) == (400, "extraction point is not a directory")
    assert ask(engine, "PUT", f"{archived}?path=/nope", archive(("a", b"b"))).status == 404
    closed = ask(engine, "PUT", "/containers/closed/archive?path=/", archive(("a", b"b")))
    assert (closed.status, message(closed)) == (400, "container rootfs is marked read-only")
    assert ask(engine, "PUT", f"{archived}?path=/", b"text, no archive" * 100).status == 400
    changes = json.loads(ask(engine, "GET", "/containers/answers/changes").body)
    assert changes == [{"Path": "/set", "Kind": 1}]
    said(engine, "rm", "answers", "closed")


@pytest.mark.parametrize("compression", ["gz", "bz2", "xz"])
def test_a_compressed_archive(engine: EngineUnderTest, compression: str) -> None:
    said(engine, "create", "--name", "packed", "busybox", "true")
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode=f"w:{compression}") as tar:  # type: ignore[call-overload]
        member = tarfile.TarInfo("in")
        member.size = 1 << 20
        tar.addfile(member, io.BytesIO(bytes(1 << 20)))
    assert ask(engine, "PUT", "/containers/packed/archive?path=/", target.getvalue()).status == 200
    cut = ask(engine, "PUT", "/containers/packed/archive?path=/", target.getvalue()[:-30])
    assert cut.status == 400
    said(engine, "rm", "packed")


def test_a_user_gets_what_is_copied_for_him(engine: EngineUnderTest, runtime: str) -> None:
    name = f"user-{runtime}"
    options = ["--runtime", runtime, "--network", "none", "--user", "alice", "--name", name]
    said(engine, "create", *options, "busybox", "ls", "-n", "/tmp")
    path = f"/containers/{name}/archive?path=/tmp"
    assert ask(engine, "PUT", f"{path}&copyUIDGID=1", archive(("mine", b"x"), uid=77, gid=77)).status == 200
    assert ask(engine, "PUT", path, archive(("theirs", b"x"), uid=77, gid=78)).status == 200
    lines = {line.split()[-1]: line.split()[2:4] for line in said(engine, "start", "-a", name).splitlines() if "-rw" in line}
    alice = said(engine, "run", "--rm", "--network", "none", "busybox", "grep", "alice", "/etc/passwd").split(":")
    assert lines == {"mine": alice[2:4], "theirs": ["77", "78"]}
    said(engine, "rm", name)


CASES = [
    "{s} {c}:/new", "{s}/. {c}:/tmp", "{s}/. {c}:/new", "{s}/f {c}:/tmp/g", "{s}/f {c}:/nodir/", "{s} {c}:/etc/passwd",
    "{s}/f {c}:/etc/passwd", "{s}/dl {c}:/tmp/l", "-L {s}/dl {c}:/tmp/l", "{c}:/d {o}", "{c}:/d/. {o}", "{c}:/d {o}/new",
    "{c}:/d/x {o}/n", "{c}:/d/x {o}/no/", "-L {c}:/d/l {o}", "-L {c}:/dl {o}/z", "{c}:/d {o}/file",
]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_cp_does_what_dockers_does(engine: EngineUnderTest, tmp_path: Path, case: str) -> None:
    """Both clients, from the same beginning: the same files there and here, and both content or both not."""
    source = tmp_path / "src"
    (source / "d").mkdir(parents=True)
    (source / "d" / "x").write_text("hello")
    (source / "f").write_text("file")
    (source / "f").chmod(0o750)
    os.symlink("x", source / "d" / "l")
    os.symlink("d", source / "dl")
    os.link(source / "d" / "x", source / "d" / "h")
    found = {}
    for client in (engine.docker, engine.ambi):
        here = tmp_path / client.__name__
        here.mkdir()
        (here / "file").write_text("x")
        said(engine, "create", "--name", "copied", "busybox", "true")
        if "{c}:/d" in case or "{c}:/nope" in case:
            said(engine, "cp", f"{source}/.", "copied:/")
        done = client("cp", *(word.format(s=source, c="copied", o=here) for word in case.split()))
        inside = said(engine, "diff", "copied")
        tree = sorted((str(p.relative_to(here)), p.lstat().st_mode, _content(p)) for p in here.rglob("*"))
        found[client.__name__] = (done.returncode == 0, inside, tree)
        said(engine, "rm", "copied")
    assert found["ambi"] == found["docker"]


def _content(path: Path) -> str:
    return os.readlink(path) if path.is_symlink() else path.read_text() if path.is_file() else ""


def test_an_archive_of_a_hostile_instance_leaves_its_target_alone(engine: EngineUnderTest, tmp_path: Path) -> None:
    """A link out, then a file through it: our client writes below its target and nowhere else."""
    outside = tmp_path / "outside"
    outside.mkdir()
    said(engine, "create", "--name", "hostile", "busybox", "true")
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w") as tar:
        for name, link in (("evil/way", str(outside)), ("evil/up", "../..")):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, link
            tar.addfile(member)
    assert ask(engine, "PUT", "/containers/hostile/archive?path=/", target.getvalue()).status == 200
    here = tmp_path / "here"
    here.mkdir()
    assert engine.ambi("cp", "hostile:/evil", str(here)).returncode == 0
    assert os.readlink(here / "evil" / "way") == str(outside)
    (tmp_path / "again").mkdir()
    os.symlink(outside, tmp_path / "again" / "evil")
    done = engine.ambi("cp", "hostile:/evil", str(tmp_path / "again"))
    assert done.returncode == 125 and not list(outside.iterdir())
    said(engine, "rm", "hostile")


def test_cp_through_pipes(engine: EngineUnderTest, tmp_path: Path) -> None:
    said(engine, "create", "--name", "piped", "busybox", "true")
    assert engine.ambi("cp", "-", "piped:/tmp", input=archive(("a/b", b"by pipe"))).returncode == 0
    done = engine.ambi("cp", "piped:/tmp/a", "-")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as tar:
        assert tar.getnames() == ["a", "a/b"]
    exported = tmp_path / "all.tar"
    assert engine.ambi("export", "-o", str(exported), "piped").returncode == 0
    with tarfile.open(exported) as tar:
        assert "tmp/a/b" in tar.getnames() and "bin/busybox" in tar.getnames()
    assert engine.ambi("diff", "piped").stdout == engine.docker("diff", "piped").stdout
    said(engine, "rm", "piped")


SCRIPT = "rm /etc/group; mkdir /d; echo kept > /d/f; ln /d/f /d/g; chmod 4755 /d/f; rm -r /tmp; mkdir /tmp; sleep 1000"


def test_commit_runs_as_both_kinds_and_in_docker(engine: EngineUnderTest, runtime: str, tmp_path: Path) -> None:
    name, image = f"work-{runtime}", f"made-{runtime}:1"
    said(engine, "run", "-d", "--runtime", runtime, "--network", "none", "--name", name, "busybox", "sh", "-c", SCRIPT)
    end = time.monotonic() + 30
    while time.monotonic() < end and engine.docker("exec", name, "test", "-u", "/d/f", "-a", "-d", "/tmp").returncode:
        time.sleep(0.2)
    change = ["-c", 'CMD ["cat","/d/g"]', "-c", "ENV X=y", "-a", "Jane", "-m", "why"]
    done = engine.ambi("commit", *change, name, image)
    assert done.returncode == 0, done.stderr
    about = json.loads(said(engine, "image", "inspect", image))[0]
    assert about["Id"] == done.stdout.decode().strip() and about["Author"] == "Jane" and "X=y" in about["Config"]["Env"]
    history = json.loads(ask(engine, "GET", f"/images/{image}/history").body)
    assert history[0]["Comment"] == "why" and history[0]["CreatedBy"].startswith("sh -c rm /etc/group")
    kinds = ["container", "vm"] if shutil.which("qemu-system-x86_64") else ["container"]
    for kind in kinds:
        assert said(engine, "run", "--rm", "--runtime", kind, "--network", "none", image) == "kept\n"
    state = said(engine, "inspect", "--format", "{{.State.Status}}", name)
    assert state == "running\n", "it goes on after it was held"
    said(engine, "rm", "-f", name)
    again = ["--runtime", runtime, "--network", "none", "--name", name, image]
    said(engine, "run", *again, "sh", "-c", "rm /d/f; echo new > /d/new; rm -r /tmp; echo kept > /d/g")
    assert said(engine, "diff", name).split("\n") == ["C /d", "D /d/f", "C /d/g", "A /d/new", "D /tmp", ""], "on two layers"
    said(engine, "rm", name)
    if runtime == "vm":  # the layer is compared in the conformance suite: one load is enough
        return
    saved = tmp_path / "saved.tar"
    said(engine, "save", "-o", str(saved), image)
    with Dockerd() as peer:
        assert peer.docker("load", "-i", str(saved)).returncode == 0
        seen = peer.docker("run", "--rm", "--network", "none", image, "sh", "-c", "cat /d/f; ls /etc; stat -c %h%a /d/f")
        assert seen.stdout.decode().split("\n")[0] == "kept" and "24755" in seen.stdout.decode()
        assert "group" not in seen.stdout.decode().split()


def test_nothing_changed_is_an_image_too(engine: EngineUnderTest) -> None:
    said(engine, "create", "--name", "idle", "busybox", "echo", "same")
    image = said(engine, "commit", "idle").strip()
    assert said(engine, "run", "--rm", "--network", "none", image) == "same\n"
    assert engine.docker("commit", "-c", "BOGUS x", "idle").returncode == 1
    said(engine, "rm", "idle")
    said(engine, "rmi", image)


def test_kill_of_a_shim_that_only_looks(engine: EngineUnderTest, runtime: str) -> None:
    """In the middle of a copy: the client learns of it, and the next copy works."""
    name = f"killed-{runtime}"
    said(engine, "create", "--runtime", runtime, "--network", "none", "--name", name, "busybox", "true")
    id = said(engine, "inspect", "--format", "{{.Id}}", name).strip()
    client = RawClient(engine.socket)
    client.socket.sendall(
        f"PUT /v1.41/containers/{name}/archive?path=/ HTTP/1.1\r\nHost: d\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    )
    client.socket.sendall(b"200\r\n" + archive(("half", b"x" * 9000))[:512] + b"\r\n")
    end = time.monotonic() + 30
    while not _looks(engine, id):
        assert time.monotonic() < end, "nobody looks"
        time.sleep(0.1)
    os.kill(engine.shims()[id], signal.SIGKILL)
    client.socket.sendall(b"0\r\n\r\n")
    status, _ = client.head()
    client.close()
    assert status >= 400
    assert ask(engine, "PUT", f"/containers/{name}/archive?path=/", archive(("whole", b"x"))).status == 200
    said(engine, "start", "-a", name)
    said(engine, "rm", name)


def _looks(engine: EngineUnderTest, id: str) -> bool:
    """Whether the shim of `id` has a child that looks: a program of ours, or a VMM whose guest has been set up."""
    shim = engine.shims().get(id)
    if shim is None:
        return False
    try:
        children = Path(f"/proc/{shim}/task/{shim}/children").read_text().split()
        names = [Path(f"/proc/{child}/comm").read_text().strip() for child in children]
    except OSError:
        return False
    return any(name.startswith(("ambi-tree", "qemu-system")) for name in names)


def test_a_hundred_megabytes_there_and_back(engine: EngineUnderTest, tmp_path: Path) -> None:
    source = tmp_path / "big"
    source.mkdir()
    for number in range(20):
        (source / f"f{number}").write_bytes(os.urandom(1 << 20) * 5)
    said(engine, "create", "--name", "large", "busybox", "true")
    said(engine, "cp", str(source), "large:/big")
    said(engine, "cp", "large:/big", str(tmp_path / "back"))
    assert subprocess.run(["diff", "-r", source, tmp_path / "back"], check=False).returncode == 0
    said(engine, "rm", "large")
