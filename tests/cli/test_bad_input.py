"""What a user gets wrong: one line that names the object, a hint, docker's exit status, and nothing half made."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import re
import shutil
import socket
import sqlite3
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.cli.test_real_engine import OnDemand
from tests.harness import ROOT
from tests.needs import NEEDS as NEEDS_OF_HOST

BOTH = ("container", "vm")


class Case(NamedTuple):
    """A command line. BAD stands for the folder of bad files; run and create get --isolation. kinds: where it is tried."""

    argv: str
    status: int
    message: str
    hint: str
    kinds: tuple[str, ...] = ("container",)


CASES = {
    "unknown image": Case(
        "run --rm --pull never nothing true", 125, r"No such image: nothing:latest", r"ambi image bootstrap", BOTH
    ),
    "image that nobody has": Case(
        "run --rm --pull always 127.0.0.1:1/nothing true", 125, r"registry 127.0.0.1:1 cannot be reached", r"network"
    ),
    "image misspelt": Case("run --rm --pull never busybx true", 125, r"No such image: busybx", r"did you mean busybox"),
    "image in capitals": Case("run --rm BusyBox true", 125, r"'BusyBox' must be lowercase", r"busybox"),
    "unknown program": Case(
        "run --rm busybox nope", 127, r'"nope": executable file not found in \$PATH', r"--entrypoint sh", BOTH
    ),
    "unknown path": Case("run --rm busybox /no/such", 127, r"/no/such.*no such file", r"ambi run", BOTH),
    "no program": Case("run --rm busybox /etc/passwd", 126, r'"/etc/passwd": permission denied', r"sh FILE", BOTH),
    "directory": Case("run --rm busybox /etc", 126, r'"/etc": is a directory', r"name a program", BOTH),
    "exec of an unknown program": Case("exec up nope", 127, r'"nope": executable file not found', r"ambi exec -it", BOTH),
    "exec of no program": Case("exec up /etc/passwd", 126, r'"/etc/passwd": permission denied', r"sh FILE", BOTH),
    "exec as nobody known": Case("exec -u ghost up true", 126, r"unable to find user ghost", r"--user", BOTH),
    "exec in one that is down": Case("exec down true", 125, r"is not running", r"ambi start down"),
    "unknown user": Case("run --rm -u ghost busybox true", 125, r"unable to find user ghost", r"/etc/passwd", BOTH),
    "unknown group": Case("run --rm -u 0:ghost busybox true", 125, r"unable to find group ghost", r"/etc/group", BOTH),
    "unknown command": Case("frobnicate", 125, r"no such command: frobnicate", r"ambi --help"),
    "command misspelt": Case("rnu busybox", 125, r"no such command: rnu", r"did you mean run"),
    "unknown flag": Case("run --frobnicate busybox", 125, r"no such option: --frobnicate", r"ambi run --help"),
    "flag misspelt": Case("run --memroy 1g busybox", 125, r"no such option: --memroy", r"did you mean --memory"),
    "port that is none": Case("run -p 80:x busybox true", 125, r"invalid port specification: 80:x", r"-p 8080:80"),
    "port of no protocol": Case("run -p 80/ftp busybox true", 125, r"invalid proto.*: ftp", r"tcp, udp or sctp"),
    "port ranges that differ": Case("run -p 1-3:1-2 busybox true", 125, r"invalid ranges", r"same length"),
    "port of no address": Case("run -p 1.2.3:1:1 busybox true", 125, r"invalid IP address: 1\.2\.3", r"-p 127\.0\.0\.1"),
    "port in use": Case(
        "run --rm -p 4500:80 busybox true", 125, r"Bind for 0\.0\.0\.0:4500 failed.*by container up\)", r"-p 4501:80", BOTH
    ),
    "unknown network": Case("run --rm --network nope busybox true", 125, r"network nope not found", r"network ls", BOTH),
    "address of another subnet": Case(
        "run --rm --network net --ip 10.1.1.1 busybox true", 125, r"no configured subnet", r"10\.70\.0\.0/24", BOTH
    ),
    "address in use": Case(
        "run --rm --network net --ip 10.70.0.1 busybox true", 125, r"Address already in use", r"network inspect", BOTH
    ),
    "address on the default network": Case(
        "run --ip 10.1.1.1 busybox true", 125, r"user defined networks only", r"--subnet"
    ),
    "address that is none": Case("run --network net --ip 1.2 busybox true", 125, r"--ip: '1\.2'", r"192\.0\.2\.5"),
    "alias on the default network": Case(
        "run --network-alias a busybox true", 125, r"only supported for", r"network create"
    ),
    "MAC that is none": Case("run --mac-address 01:02 busybox true", 125, r"01:02 is not a valid mac", r"--mac-address 02:"),
    "link to nobody": Case("run --rm --link nope busybox true", 125, r"could not get container for nope", r"ambi ps"),
    "network named twice": Case("run --network a --network a busybox true", 125, r'"a" is specified multiple', r"once"),
    "unknown key of a network": Case("run --network name=a,frob=1 busybox true", 125, r"invalid field frob=1", r"alias, ip"),
    "network of a name in use": Case("network create net", 125, r"network with name net already exists", r"network rm net"),
    "network that overlaps": Case("network create --subnet 10.70.0.0/16 b", 125, r"Pool overlaps", r"ip route"),
    "gateway outside": Case(
        "network create --subnet 10.71.0.0/24 --gateway 10.1.1.1 b", 125, r"no matching subnet", r"--subnet"
    ),
    "subnet that is none": Case("network create --subnet frob b", 125, r"invalid value for --subnet", r"10\.20\.0\.0/24"),
    "unknown network driver": Case("network create -d frob b", 125, r"could not find plugin frob", r"bridge"),
    "network to keep": Case("network rm bridge", 125, r"is a pre-defined network", r"--help"),
    "unknown network to remove": Case("network rm ne", 125, r"network ne not found", r"did you mean net"),
    "connected to what is shared": Case("network connect host up", 125, r"connected to host network", r"--help"),
    "not connected": Case("network disconnect net up", 125, r"is not connected to network net", r"--help"),
    "flag without its value": Case("run --name", 125, r"--name", r"ambi (run )?--help"),
    "detached and attached": Case("run -d -a stdout busybox", 125, r"--attach and --detach", r"leave one of them out"),
    "two kinds": Case("run --runtime vm busybox true", 125, r"--isolation.*--runtime", r"leave|one", ("container",)),
    "swap below memory": Case("run --rm -m 64m --memory-swap 32m busybox true", 125, r"memoryswap", r"--memory-swap", BOTH),
    "little memory": Case("run --rm -m 1m busybox true", 125, r"Minimum memory limit", r"--memory 64m", BOTH),
    "many processors": Case("run --rm --cpus 9999 busybox true", 125, r"Range of CPUs", r"--cpus \d+ is all"),
    "no number": Case("run --rm --cpus two busybox true", 125, r"--cpus: 'two'", r"0\.5"),
    "relative directory": Case("run --rm -w srv busybox true", 125, r"'srv' is invalid", r"-w /srv", BOTH),
    "no source": Case(
        "run --rm --mount type=bind,src=/no/such,dst=/x busybox true",
        125,
        r"does not exist: /no/such",
        r"mkdir -p /no/such",
        BOTH,
    ),
    "host's network": Case(
        "run --rm --network host busybox true", 125, r"--network host", r"--isolation container", ("vm",)
    ),
    "host's processes": Case("run --rm --pid host busybox true", 125, r"--pid host", r"--isolation container", ("vm",)),
    "name in use": Case("run --name up busybox true", 125, r'"/up" is already in use', r"ambi rm -f up", BOTH),
    "name of a new kind": Case("run --name a/b busybox true", 125, r"\(a/b\)", r"--name web-1"),
    "rename to a name in use": Case("rename down up", 125, r'"/up" is already in use', r"ambi rename up NEW"),
    "remove what runs": Case("rm up", 125, r"cannot remove a running container", r"ambi stop up, or ambi rm -f up", BOTH),
    "remove an image in use": Case("rmi busybox", 125, r'"busybox".*is using', r"ambi rm"),
    "unknown instance": Case("rm nothing", 125, r"No such container: nothing", r"ambi ps --all"),
    "instance misspelt": Case("logs dwon", 125, r"No such container: dwon", r"did you mean down"),
    "unknown signal": Case("kill -s FROB up", 125, r"Invalid signal: FROB", r"kill -l"),
    "unknown filter": Case("ps -f frob=1", 125, r"invalid filter 'frob'", r"known filters"),
    "unknown field": Case("ps --format {{.Frob}}", 125, r"no field 'Frob'", r"fields: "),
    "no archive there": Case("load -i BAD/none.tar", 125, r"BAD/none\.tar: No such file", r"ls -ld"),
    "directory for an archive": Case("load -i BAD", 125, r"BAD: Is a directory", r"ls -ld"),
    "noise to load": Case("load -i BAD/noise", 125, r"not a tar archive: BAD/noise", r"tar -tvf BAD/noise"),
    "noise to import": Case(
        "import BAD/noise made", 125, r"made:latest: not a tar archive: BAD/noise", r"tar -tvf BAD/noise"
    ),
    "cut gzip to load": Case("load -i BAD/cut.gz", 125, r"gzip archive is cut short.*BAD/cut\.gz", r"tar -tvf"),
    "cut gzip to import": Case("import BAD/cut.gz made", 125, r"gzip archive is cut short.*BAD/cut\.gz", r"tar -tvf"),
    "cut tar to import": Case("import BAD/cut.tar made", 125, r"archive is cut short.*BAD/cut\.tar", r"tar -tvf"),
    "nothing to import": Case("import BAD/empty made", 125, r"the archive is empty: BAD/empty", r"tar -tvf"),
    "wrong digest": Case("load -i BAD/digest.tar", 125, r"layer l\.tar|the image says|is damaged", r"tar -tvf"),
    "root file system to load": Case(
        "load -i BAD/root.tar", 125, r"neither manifest\.json nor", r"ambi image import BAD/root\.tar"
    ),
    "import in capitals": Case("import BAD/root.tar Made", 125, r"'Made' must be lowercase", r"made"),
    "unknown instruction": Case("import -c FROB=1 BAD/root.tar made", 125, r"'FROB=1' is not a change", r"CMD"),
    "unknown image to tag": Case("tag nothing made", 125, r"No such image: nothing", r"ambi image"),
    "unknown release": Case("image bootstrap fedora:40", 125, r"'fedora:40'", r"debian:bookworm"),
}


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory, busybox_tar: Path) -> Path:
    """Files that are not what they are given for."""
    folder = tmp_path_factory.mktemp("bad")
    whole = busybox_tar.read_bytes()
    (folder / "root.tar").write_bytes(whole)
    (folder / "noise").write_bytes(bytes((i * 73 + i // 256 * 31) % 251 + 1 for i in range(70_000)))
    (folder / "cut.tar").write_bytes(whole[: len(whole) // 2])
    packed = gzip.compress(whole, 1)
    (folder / "cut.gz").write_bytes(packed[: len(packed) // 2])
    (folder / "empty").touch()
    (folder / "digest.tar").write_bytes(_image_with_another_layer(whole))
    return folder


def _image_with_another_layer(layer: bytes) -> bytes:
    """An archive as of `docker save` whose config names another layer than it has."""
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{'1' * 64}"]},
    }
    manifest = [{"Config": "c.json", "RepoTags": ["made:latest"], "Layers": ["l.tar"]}]
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, data in (("c.json", json.dumps(config)), ("manifest.json", json.dumps(manifest)), ("l.tar", layer)):
            body = data.encode() if isinstance(data, str) else data
            entry = tarfile.TarInfo(name)
            entry.size = len(body)
            archive.addfile(entry, io.BytesIO(body))
    return out.getvalue()


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory, busybox_tar: Path) -> Iterator[Callable[[str], OnDemand]]:
    """The engine for a kind, with the image `busybox`, an instance `up` of that kind that runs and one `down`."""
    started: dict[str, OnDemand] = {}

    def of(kind: str) -> OnDemand:
        if kind not in started:
            it = started[kind] = OnDemand(tmp_path_factory.mktemp(kind))
            it.start(vm=kind == "vm")
            it.ok("import", str(busybox_tar), "busybox")
            it.ok("network", "create", "--subnet", "10.70.0.0/24", "net")
            it.ok("run", "-d", "--isolation", kind, "--name", "up", "-p", "4500:80", "busybox", "sleep", "100000")
            it.ok("create", "--isolation", kind, "--name", "down", "busybox", "true")
        return started[kind]

    yield of
    for it in started.values():
        it.destroy()


class Made(NamedTuple):
    """What there is of instances, images and networks: as listed, and as files and supervisors."""

    instances: str
    networks: str
    images: str
    files: frozenset[str]
    shims: frozenset[int]


def made(it: OnDemand) -> Made:
    files = {str(p.relative_to(it.data)) for top in ("instances", "images") for p in (it.data / top).rglob("*")}
    ours = frozenset(name for name in files if not name.endswith(("-wal", "-shm")))
    return Made(
        it.ok("ps", "-aq", "--no-trunc"),
        it.ok("network", "ls", "-q"),
        it.ok("images", "--format", "{{.Repository}}:{{.Tag}} {{.ID}}"),
        ours,
        frozenset(it.shims().values()),
    )


def argv_of(case: Case, bad: Path, kind: str) -> list[str]:
    words = [word.replace("BAD", str(bad)) for word in case.argv.split()]
    if words[0] == "run" and len(words) > 2:
        words[1:1] = ["--isolation", kind]
    return words


def check_error(done: subprocess.CompletedProcess[bytes], status: int, message: str, hint: str) -> None:
    """Status, and exactly two lines; an exec's message comes through the stream, without `error:`."""
    lines = (done.stdout + done.stderr).decode().splitlines()
    assert done.returncode == status, done
    assert len(lines) == 2, lines
    assert re.search(message, lines[0]), lines
    assert re.fullmatch(rf"hint: .*(?:{hint}).*", lines[1]), lines


NEEDS: dict[str, list[pytest.MarkDecorator]] = {"container": [], "vm": [pytest.mark.needs("qemu")]}
TRIED = [pytest.param(kind, name, marks=NEEDS[kind]) for kind in BOTH for name, case in CASES.items() if kind in case.kinds]


@pytest.mark.parametrize(("kind", "name"), TRIED)
def test_bad_command_line(kind: str, name: str, engines: Callable[[str], OnDemand], bad: Path) -> None:
    case, engine = CASES[name], engines(kind)
    before = made(engine)
    done = engine.ambi(*argv_of(case, bad, kind))
    check_error(
        done, case.status, case.message.replace("BAD", re.escape(str(bad))), case.hint.replace("BAD", re.escape(str(bad)))
    )
    assert made(engine) == before


# What is wrong with the host, or with the engine's places


@pytest.fixture
def place(short_tmp: Path) -> Iterator[OnDemand]:
    """Roots of their own, without an engine."""
    it = OnDemand(short_tmp / "p")
    it.start(vm=False)
    yield it
    it.destroy()


def refused(it: OnDemand, *args: str, message: str, hint: str, status: int = 125, **options: object) -> None:
    check_error(it.ambi(*args, **options), status, message, hint)


def test_no_engine_and_none_can_start(short_tmp: Path) -> None:
    it = OnDemand(short_tmp / "p")
    it.base.mkdir()
    it.data.write_text("a file")
    refused(it, "ps", message=rf"cannot start the engine: .*{it.data}", hint="ls -ld PATH|remove it, or choose")
    refused(it, "engine", "status", message=rf"no engine answers at {it.socket}", hint="ambi engine start", status=3)
    assert sorted(path.name for path in it.base.iterdir()) == ["data"]


def test_run_root_of_another_kind(place: OnDemand) -> None:
    place.run.write_text("a file")
    refused(place, "ps", message=rf"{place.run}", hint="ls -ld PATH|remove it, or choose")
    place.run.unlink()


def test_no_permission(place: OnDemand, busybox_tar: Path) -> None:
    place.ok("import", str(busybox_tar), "busybox")
    for path in (place.base.parent, place.base, place.run):
        path.chmod(0o755)
    argv = ["run", "--rm", "busybox", "true"]
    refused(
        place, *argv, message=rf"cannot use the engine at {place.socket}: permission denied", hint="group `ambi`",
        user=65534, group=65534, extra_groups=[],
    )  # fmt: skip
    place.ok("engine", "stop")
    refused(
        place,
        *argv,
        message="only root can start one",
        hint="sudo ambi engine start",
        user=65534,
        group=65534,
        extra_groups=[],
    )
    assert not place.socket.exists() and place.ok("ps", "-aq") == ""


def test_second_engine_on_the_same_roots(place: OnDemand) -> None:
    place.ok("engine", "start")
    other = ["engine", "--socket", str(place.base / "other.sock")]
    refused(place, *other, message=rf"another engine \(pid {place.pid}\) uses {place.run}", hint="ambi engine stop")
    assert not (place.base / "other.sock").exists()


def test_socket_in_use(place: OnDemand) -> None:
    path = place.base / "taken.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        refused(place, "engine", "--socket", str(path), message=rf"{path}: another process answers", hint="--socket")
        assert path.is_socket()
    path.unlink()
    path.write_text("kept")
    refused(place, "engine", "--socket", str(path), message=rf"{path}: it exists and is no socket", hint=f"remove {path}")
    assert path.read_text() == "kept"


def test_data_root_of_another_format(place: OnDemand) -> None:
    place.ok("engine", "start")
    place.ok("engine", "stop")
    (place.data / "format.json").write_text('{"format": 999}')
    refused(place, "ps", message=rf"data root {place.data} has format 999", hint="the newer ambi, or another --data-root")
    (place.data / "format.json").write_text("nonsense")
    refused(place, "ps", message=r"format\.json is damaged", hint='"format": 1')
    (place.data / "format.json").write_text('{"format": 1}')
    assert place.ok("ps", "-aq") == ""


@pytest.mark.parametrize("name", ["state.db", "images"])
def test_newer_database(place: OnDemand, name: str) -> None:
    place.ok("engine", "start")
    place.ok("engine", "stop")
    path = place.data / name if name == "state.db" else next((place.data / name).glob("*.db"))
    with contextlib.closing(sqlite3.connect(path)) as database:
        (version,) = database.execute("PRAGMA user_version").fetchone()
        database.execute("PRAGMA user_version = 999")
        database.commit()
        refused(place, "ps", message=rf"{path.name}.*999|999.*{path.name}|999", hint="newer|other")
        database.execute(f"PRAGMA user_version = {version}")
        database.commit()
    assert place.ok("ps", "-aq") == ""


@pytest.mark.needs("qemu")
def test_no_qemu(short_tmp: Path, busybox_tar: Path) -> None:
    """An engine in a mount namespace where QEMU's programs are not there."""
    it = OnDemand(short_tmp / "p")
    it.start()
    hidden = [path for name in ("qemu-system-x86_64", "qemu-kvm") if (path := shutil.which(name))]
    script = "".join(f"mount --bind /dev/null {path}; " for path in hidden)
    argv = ["unshare", "--mount", "sh", "-c", f'{script}exec "$@"', "sh", *it.argv]
    with open(it.base / "engine.out", "ab") as output:
        it.process = subprocess.Popen(
            argv, stdout=output, stderr=output, stdin=subprocess.DEVNULL, env=it.environment, cwd=ROOT
        )
    it.wait_ready()
    it.ok("import", str(busybox_tar), "busybox")
    before = made(it)
    refused(
        it, "run", "--rm", "--isolation", "vm", "busybox", "true", message="there is no QEMU", hint="apt-get install qemu"
    )
    assert made(it) == before
    assert it.ok("run", "--rm", "busybox", "echo", "a container runs") == "a container runs\n"
    it.destroy()


@pytest.mark.needs("qemu")
def test_no_kvm_is_said_once(engines: Callable[[str], OnDemand]) -> None:
    done = engines("vm").ambi("run", "--rm", "--isolation", "vm", "busybox", "echo", "out")
    assert done.stdout == b"out\n" and done.returncode == 0
    lines = done.stderr.decode().splitlines()
    assert len(lines) == (NEEDS_OF_HOST["kvm"]() is not None)
    assert all(line.startswith("note: virtual machines run emulated (TCG)") for line in lines)


def test_full_disk(short_tmp: Path, busybox_tar: Path) -> None:
    """Nothing is made, and what was there works again when there is room."""
    it = OnDemand(short_tmp / "p")
    it.start(vm=False)
    disk = short_tmp / "disk"
    with open(disk, "wb") as file:
        file.truncate(160 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", disk], check=True)
    subprocess.run(["mount", "-o", "loop", disk, it.data], check=True)
    try:
        it.ok("import", str(busybox_tar), "busybox")
        before = made(it)
        with open(it.data / "ballast", "wb", buffering=0) as ballast, contextlib.suppress(OSError):
            while True:
                ballast.write(b"x" * 4096)
        refused(it, "import", str(busybox_tar), "made", message="No space left|space|full", hint="ambi image")
        assert made(it) == before
        (it.data / "ballast").unlink()
        assert it.ok("run", "--rm", "busybox", "echo", "again") == "again\n"
        it.ok("engine", "stop")
    finally:
        subprocess.run(["umount", it.data], check=True)
