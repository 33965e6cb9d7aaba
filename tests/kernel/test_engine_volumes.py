"""Volumes of a real engine: what is in them, who uses them, and what is left of them."""

from __future__ import annotations

import functools
import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.harness import EngineUnderTest
from tests.rawclient import RawClient

PREPARE = (
    "mkdir -p /data/deep && echo hello > /data/deep/file && ln /data/deep/file /data/other && ln -s deep /data/link &&"
    " chown 5:6 /data/deep/file && chmod 1750 /data/deep && chown 7:8 /data && mkfifo /data/pipe && touch -d @1000 /data/old"
)


@pytest.fixture(scope="module")
def engine(busybox_tar: Path) -> Iterator[EngineUnderTest]:
    made = EngineUnderTest(Path(tempfile.mkdtemp(prefix="ambi-", dir="/tmp")))
    made.start(vm=False)
    try:
        _prepare(made, busybox_tar)
        yield made
    finally:
        made.destroy()


def _prepare(made: EngineUnderTest, busybox_tar: Path) -> None:
    """The image `filled`, with a volume declared at /data and something in it."""
    made.load_busybox(busybox_tar)
    run(made, "--name", "maker", "busybox", "sh", "-c", PREPARE, check=True)
    change = ["-c", "VOLUME /data"]
    assert made.docker("commit", *change, "maker", "filled").returncode == 0
    made.docker("rm", "maker")


def run(engine: EngineUnderTest, *args: str, check: bool = False) -> subprocess.CompletedProcess[bytes]:
    done = engine.docker("run", "--network", "none", *args)
    assert not check or done.returncode == 0, done.stderr.decode()
    return done


def out(engine: EngineUnderTest, *args: str) -> str:
    done = engine.docker(*args)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode().strip()


def names(engine: EngineUnderTest, *args: str) -> list[str]:
    return out(engine, "volume", "ls", "-q", *args).split()


def succeeds(engine: EngineUnderTest, command: list[str]) -> bool:
    return engine.docker(*command).returncode == 0


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.2)


def test_a_new_volume_has_what_the_image_has_there(engine: EngineUnderTest) -> None:
    look = "cd /data; stat -c '%n %u:%g %a %h' deep deep/file other pipe .; stat -c %Y old; readlink link; cat other"
    seen = run(engine, "--rm", "-v", "first:/data", "filled", "sh", "-c", look, check=True).stdout.decode().splitlines()
    assert seen == [
        "deep 0:0 1750 2", "deep/file 5:6 644 2", "other 5:6 644 2", "pipe 0:0 644 1", ". 7:8 755 3", "1000", "deep",
        "hello",
    ]  # fmt: skip
    run(engine, "--rm", "-v", "first:/data", "filled", "rm", "/data/other", check=True)
    assert run(engine, "--rm", "-v", "first:/data", "filled", "ls", "/data").stdout.split() == [
        b"deep",
        b"link",
        b"old",
        b"pipe",
    ]
    assert run(engine, "--rm", "-v", "second:/data:nocopy", "filled", "ls", "/data").stdout == b""
    done = run(engine, "--rm", "-v", "third:/data:ro", "filled", "sh", "-c", "ls /data/deep; touch /data/x")
    assert done.returncode == 1 and done.stdout == b"file\n" and b"Read-only file system" in done.stderr
    assert set(names(engine)) >= {"first", "second", "third"}
    out(engine, "volume", "rm", "first", "second", "third")


def test_a_volume_is_filled_when_its_instance_is_made(engine: EngineUnderTest) -> None:
    """By the create alone, as with Docker: others see it at once, and what is taken out of it stays out."""
    for number, runtime in enumerate(("runc", "vm")):
        name = f"early-{number}"
        out(engine, "create", "--runtime", runtime, "--name", name, "-v", f"{name}:/data:ro", "filled", "ls", "/data")
        look = ["stat", "-c", "%n %u:%g %a", "/other/deep/file", "/other"]
        seen = run(engine, "--rm", "-v", f"{name}:/other", "busybox", *look)
        assert seen.stdout.decode().splitlines() == ["/other/deep/file 5:6 644", "/other 7:8 755"]
    instance = engine.data / "instances" / out(engine, "inspect", "-f", "{{.Id}}", "early-1")
    assert sorted(path.name for path in instance.iterdir()) == ["record.json", "upper"]
    assert not list((instance / "upper").iterdir())
    assert not engine.shims() and not (engine.run / "instances" / instance.name).exists()

    run(engine, "--rm", "-v", "early-0:/other", "busybox", "sh", "-c", "rm -r /other/*", check=True)
    assert out(engine, "start", "-a", "early-0") == ""
    out(engine, "rm", "early-0", "early-1")
    out(engine, "volume", "rm", "early-0", "early-1")


def test_filling_leaves_the_parked_shim_to_a_start(engine: EngineUnderTest) -> None:
    def parked() -> list[str]:
        zygote = engine.zygote()
        children = Path(f"/proc/{zygote}/task/{zygote}/children").read_text().split()
        return [pid for pid in children if pid not in map(str, engine.shims().values())]

    wait_until(lambda: len(parked()) == 1)
    (waiting,) = parked()
    out(engine, "create", "--name", "calm", "-v", "calm:/data", "filled")
    assert waiting in parked()
    out(engine, "rm", "calm")
    out(engine, "volume", "rm", "calm")


def test_an_engine_that_dies_while_it_fills_a_volume(engine: EngineUnderTest) -> None:
    """Nothing stays but the volume that somebody else made, and whoever fills it next does it whole."""
    many = "mkdir /many && cd /many && i=0; while [ $i -lt 3000 ]; do : > $i; i=$((i+1)); done"
    run(engine, "--name", "maker", "busybox", "sh", "-c", many, check=True)
    out(engine, "commit", "maker", "many")
    out(engine, "rm", "maker")
    out(engine, "volume", "create", "slow")
    volume = engine.data / "volumes" / "slow" / "_data"
    before = set((engine.data / "instances").iterdir())
    argv = ["docker", "-H", f"unix://{engine.socket}", "create", "--name", "cut", "-v", "slow:/many", "many"]
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as client:
        while not list(volume.iterdir()):
            assert client.poll() is None, "it is filled before it could be cut"
        engine.kill()
    assert (volume / ".ambi-copying").exists()
    engine.start(vm=False)
    wait_until(lambda: set((engine.data / "instances").iterdir()) == before and not engine.shims())
    out(engine, "create", "--name", "cut", "-v", "slow:/many", "many")
    assert len(list(volume.iterdir())) == 3000
    out(engine, "rm", "cut")
    out(engine, "volume", "rm", "slow")


def test_volumes_are_used_by_the_instances_that_name_them(engine: EngineUnderTest) -> None:
    out(engine, "volume", "create", "--label", "a=b", "kept")
    assert out(engine, "volume", "create", "kept") == "kept"
    run(engine, "--name", "one", "-v", "kept:/kept:ro", "-v", "/anon", "filled", "true", check=True)
    mounts = json.loads(out(engine, "inspect", "one"))[0]["Mounts"]
    shown = {m["Destination"]: (m["Type"], m["Name"], m["Driver"], m["Mode"], m["RW"]) for m in mounts}
    anonymous = {m["Destination"]: m["Name"] for m in mounts if m["Name"] != "kept"}
    assert shown["/kept"] == ("volume", "kept", "local", "ro", False) and set(anonymous) == {"/anon", "/data"}
    assert set(names(engine, "-f", "dangling=false")) == {"kept", *anonymous.values()}
    engine.kill()
    engine.start(vm=False)
    id = out(engine, "inspect", "-f", "{{.Id}}", "one")
    for name in ("kept", anonymous["/anon"]):
        refused = engine.docker("volume", "rm", name)
        assert refused.returncode == 1 and f"remove {name}: volume is in use - [{id}]".encode() in refused.stderr
    out(engine, "volume", "prune", "-f")
    assert set(names(engine)) == {"kept", *anonymous.values()}
    run(engine, "--name", "two", "--volumes-from", "one:ro", "busybox", "sh", "-c", "touch /data/x", check=False)
    two = json.loads(out(engine, "inspect", "two"))[0]["Mounts"]
    assert {m["Destination"]: (m["Name"], m["RW"]) for m in two} == {
        "/kept": ("kept", False), "/anon": (anonymous["/anon"], False), "/data": (anonymous["/data"], False),
    }  # fmt: skip
    out(engine, "rm", "-v", "one")
    assert set(names(engine)) == {"kept", *anonymous.values()}  # the other one has them still
    out(engine, "rm", "-v", "two")
    assert names(engine) == ["kept"]
    run(engine, "--rm", "-v", "kept:/kept", "-v", "/anon", "filled", "true", check=True)
    assert names(engine) == ["kept"]
    gone = engine.docker("volume", "rm", "missing")
    assert b"get missing: no such volume" in gone.stderr
    assert engine.docker("volume", "rm", "-f", "missing").returncode == 0
    out(engine, "volume", "rm", "kept")


def test_what_deaths_leave_is_finished(engine: EngineUnderTest) -> None:
    for name in ("leaving", "staying"):
        run(engine, "--name", name, "-v", f"{name}:/n", "-v", "/anon", "busybox", "true", check=True)
    mounts = json.loads(out(engine, "inspect", "staying"))[0]["Mounts"]
    kept = {m["Name"] for m in mounts} | {"leaving"}
    unmade = out(engine, "volume", "create")
    id = out(engine, "inspect", "-f", "{{.Id}}", "leaving")
    engine.kill()
    (engine.data / "volumes" / unmade / "making").touch()  # killed before its instance was stored
    for volume in kept:
        (engine.data / "volumes" / volume / "making").touch()  # killed right after
    (engine.data / "volumes" / ".old-x-1" / "_data").mkdir(parents=True)  # in the middle of `volume rm`
    (engine.data / "instances" / id / "with-volumes").touch()  # in the middle of `rm -v`
    (engine.data / "instances" / id / "record.json").unlink()
    engine.start(vm=False)
    assert set(names(engine)) == kept - {"leaving"} and not (engine.data / "volumes" / ".old-x-1").exists()
    assert out(engine, "ps", "-a", "--format", "{{.Names}}") == "staying"
    out(engine, "rm", "-v", "staying")
    out(engine, "volume", "rm", "staying")
    assert names(engine) == []


def test_prune_takes_anonymous_ones_and_by_older_versions_all(engine: EngineUnderTest) -> None:
    def pruned(*args: str) -> set[str]:
        before = set(names(engine))
        out(engine, "volume", "prune", "-f", *args)
        return before - set(names(engine))

    out(engine, "volume", "create", "named")
    anonymous = out(engine, "volume", "create")
    assert pruned("--filter", "label=x") == set()
    assert pruned() == {anonymous}
    client = RawClient(engine.socket)  # speaks 1.41
    try:
        assert client.call("POST", "/volumes/prune?filters=%7B%22all%22%3A%5B%22maybe%22%5D%7D")[0] == 400
        assert client.call("POST", "/volumes/prune")[1]["VolumesDeleted"] == ["named"]
    finally:
        client.close()
    out(engine, "volume", "create", "--label", "keep", "named")
    assert pruned("-a", "--filter", "label!=keep") == set()
    assert pruned("-a") == {"named"}


@pytest.mark.parametrize(
    "args,status,text",
    [
        (["-v", "no/slash:/x"], 125, "includes invalid characters for a local volume name"),
        (["--mount", "src=x,dst=/x"], 125, "volume name is too short"),
        (["--volume-driver", "none", "-v", "vv:/x"], 125, "error looking up volume plugin none"),
        (["--mount", "type=bind,src=/no/such,dst=/x"], 125, 'for type "bind": bind source path does not exist: /no/such'),
        (["--mount", "type=volume,src=vv,dst=/x,volume-opt=type=btrfs,volume-opt=device=/x"], 125, "volumes of type btrfs"),
        (["--mount", "type=volume,src=vv,dst=/x,volume-opt=o=ro"], 125, 'missing required option: "device"'),
        (["--mount", "type=volume,src=vv,dst=/x,volume-opt=type=disk,volume-opt=size=64m"], 125, "a virtual machine alone"),
        (["--volumes-from", "nobody"], 125, "No such container: nobody"),
        (["-v", "good:/a", "-v", "other:/a"], 125, "Duplicate mount point: /a"),
        (["-v", "good:/a", "--name", "-bad"], 125, "Invalid container name"),
        (["-v", "good:/etc/passwd"], 125, "ot a directory"),
    ],
)  # fmt: skip
def test_bad_mounts_leave_nothing_behind(engine: EngineUnderTest, args: list[str], status: int, text: str) -> None:
    done = run(engine, "--rm", "--pull", "never", *args, "busybox", "true")
    assert (done.returncode, text in done.stderr.decode()) == (status, True), done.stderr
    assert set(names(engine)) <= {"good"} and out(engine, "ps", "-aq") == ""
    for name in names(engine):
        out(engine, "volume", "rm", name)


def test_options_of_the_local_driver(engine: EngineUnderTest, tmp_path: Path) -> None:
    (tmp_path / "seen").touch()
    bind = ["-o", "type=none", "-o", "o=bind", "-o", f"device={tmp_path}"]
    out(engine, "volume", "create", *bind, "bound")
    out(engine, "volume", "create", "-o", "type=tmpfs", "-o", "device=tmpfs", "-o", "o=size=1m,mode=700", "ram")
    look = "ls /bound; touch /bound/new; stat -c %a /ram; df -k /ram | tail -1 | awk '{print $2}'"
    seen = run(engine, "--rm", "-v", "bound:/bound", "-v", "ram:/ram", "busybox", "sh", "-c", look, check=True).stdout
    assert seen == b"seen\n700\n1024\n" and (tmp_path / "new").exists()
    out(engine, "volume", "rm", "bound", "ram")
    assert (tmp_path / "seen").exists()


def mounts_of(engine: EngineUnderTest, volume: str) -> list[str]:
    place = out(engine, "volume", "inspect", "--format", "{{.Mountpoint}}", volume)
    return [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if line.split()[4] == place]


def test_memory_is_shared_while_somebody_uses_it(engine: EngineUnderTest) -> None:
    """Mounted once on the host, for every instance that runs with it, also over the death of the engine."""
    out(engine, "volume", "create", "-o", "type=tmpfs", "-o", "device=tmpfs", "-o", "o=size=2m,noexec", "shared")
    assert not mounts_of(engine, "shared")
    for name in ("one", "two"):
        run(engine, "-d", "--name", name, "-v", "shared:/v", "busybox", "sleep", "1000", check=True)
    out(engine, "exec", "one", "sh", "-c", "echo hello > /v/greeting")
    assert out(engine, "exec", "two", "cat", "/v/greeting") == "hello"
    (mounted,) = mounts_of(engine, "shared")
    assert "noexec" in mounted
    engine.kill()
    engine.start()
    assert out(engine, "exec", "two", "cat", "/v/greeting") == "hello" and len(mounts_of(engine, "shared")) == 1
    out(engine, "rm", "-f", "one")
    assert len(mounts_of(engine, "shared")) == 1
    out(engine, "rm", "-f", "two")
    wait_until(lambda: not mounts_of(engine, "shared"))
    out(engine, "volume", "rm", "shared")


def test_a_file_system_that_cannot_be_mounted_is_named(engine: EngineUnderTest) -> None:
    nfs = ("volume", "create", "-o", "type=nfs", "-o", "device=:/x", "-o")
    out(engine, *nfs, "o=addr=127.0.0.1,vers=4,timeo=1,retrans=0,ro", "far")
    out(engine, *nfs, "o=addr=no-such-host.invalid", "nowhere")
    for name, text in (("far", b"failed to mount local volume: mount :/x:"), ("nowhere", b"lookup no-such-host.invalid")):
        done = run(engine, "--rm", "-v", f"{name}:/v", "busybox", "true")
        assert done.returncode == 125 and text in done.stderr, done.stderr
        assert not mounts_of(engine, name)
        out(engine, "volume", "rm", name)


def test_a_subpath_stays_in_its_volume(engine: EngineUnderTest) -> None:
    make = "mkdir -p /v/in/deep; echo x > /v/in/deep/f; ln -s / /v/out; ln -s in/deep /v/fine; ln -s ../../../etc /v/up"
    run(engine, "--rm", "-v", "sub:/v", "busybox", "sh", "-c", make, check=True)
    for path, shown in (("in/deep", b"f\n"), ("fine", b"f\n"), ("in/deep/f", b"/x\n")):
        mount = f"type=volume,src=sub,dst=/x,volume-subpath={path}"
        assert run(engine, "--rm", "--mount", mount, "busybox", "ls", "/x", check=True).stdout == shown
    for path, text in (("out", b"leaves its volume"), ("up", b"leaves its volume"), ("none", b"no such file or directory")):
        done = run(engine, "--rm", "--mount", f"type=volume,src=sub,dst=/x,volume-subpath={path}", "busybox", "ls", "/x")
        assert done.returncode in (125, 127) and text in done.stderr
    swap = "cd /v; while :; do ln -sfn / flip; rm flip; mkdir flip; touch flip/mine; rm -r flip; done"
    run(engine, "-d", "--name", "swapper", "-v", "sub:/v", "busybox", "sh", "-c", swap, check=True)
    for _ in range(12):
        done = run(engine, "--rm", "--mount", "type=volume,src=sub,dst=/x,volume-subpath=flip", "busybox", "ls", "/x")
        assert done.returncode == 125 or done.stdout in (b"mine\n", b""), done
    out(engine, "rm", "-f", "swapper")
    out(engine, "volume", "rm", "sub")


def test_a_full_disk_leaves_no_half_of_a_copy(engine: EngineUnderTest, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", small], check=True)
    try:
        out(engine, "volume", "create", "-o", "type=none", "-o", "o=bind", "-o", f"device={small}", "tiny")
        run(
            engine, "--name", "big", "busybox", "sh", "-c", "mkdir /d; echo a > /d/a; dd if=/dev/zero of=/d/b bs=1k count=99"
        )
        out(engine, "commit", "big", "big")
        done = run(engine, "--rm", "-v", "tiny:/d", "big", "true")
        assert done.returncode == 125 and b"No space left on device" in done.stderr
        assert list(small.iterdir()) == []
        assert out(engine, "ps", "-aq", "--filter", "volume=tiny") == ""
        out(engine, "rm", "big")
        out(engine, "volume", "rm", "tiny")

        (small / "mounted").touch()  # since the shims' zygote began: who looks into what does not run sees it all the same
        out(engine, "create", "--name", "looked", "-v", f"{small}:/d", "busybox", "true")
        copied = engine.docker("cp", "looked:/d", "-")
        assert copied.returncode == 0 and b"d/mounted" in copied.stdout
        out(engine, "rm", "looked")
    finally:
        subprocess.run(["umount", small], check=True)


def test_mounts_propagate_as_asked(engine: EngineUnderTest, tmp_path: Path) -> None:
    place = tmp_path / "p"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", place], check=True)
    try:
        refused = run(engine, "--rm", "-v", f"{place}:/p:rshared", "busybox", "true")
        assert b"but it is not a shared mount" in refused.stderr or refused.returncode == 0
        subprocess.run(["mount", "--make-shared", place], check=True)
        for name in ("shared", "slave", "private"):
            (place / name).mkdir()
            (place / f"host-{name}").mkdir()
            mount = f"mount -t tmpfs tmpfs /p/{name} && touch /p/{name}/file && sleep 99"
            options = ["--privileged", "-v", f"{place}:/p:r{name}"]
            run(engine, "-d", "--name", name, *options, "busybox", "sh", "-c", mount, check=True)
            mounted = ["exec", name, "test", "-e", f"/p/{name}/file"]
            wait_until(functools.partial(succeeds, engine, mounted))
            assert (place / name / "file").exists() is (name == "shared")
            subprocess.run(["mount", "-t", "tmpfs", "tmpfs", place / f"host-{name}"], check=True)
            (place / f"host-{name}" / "seen").touch()
            seen = engine.docker("exec", name, "test", "-e", f"/p/host-{name}/seen").returncode == 0
            assert seen is (name != "private")
            out(engine, "rm", "-f", name)
    finally:
        subprocess.run(["umount", "-R", place], check=True)


def test_readonly_reaches_what_is_mounted_below(engine: EngineUnderTest, tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", tmp_path / "below"], check=True)
    try:
        (tmp_path / "below/file").touch()
        touch = ["busybox", "sh", "-c", "touch /p/below/new"]
        mount = f"type=bind,src={tmp_path},dst=/p,ro"
        assert b"Read-only" in run(engine, "--rm", "--mount", mount, *touch).stderr
        assert run(engine, "--rm", "--mount", f"{mount},bind-recursive=writable", *touch).returncode == 0
        alone = run(
            engine, "--rm", "--mount", f"type=bind,src={tmp_path},dst=/p,bind-nonrecursive", "busybox", "ls", "/p/below"
        )
        assert alone.stdout == b""
    finally:
        subprocess.run(["umount", tmp_path / "below"], check=True)


def test_events_tell_what_happens_to_a_volume(engine: EngineUnderTest) -> None:
    since = str(time.time())
    run(engine, "--rm", "-v", "told:/t", "busybox", "true", check=True)
    out(engine, "volume", "rm", "told")
    told = out(
        engine, "events", "--since", since, "--until", str(time.time() + 0.1), "-f", "type=volume", "--format", "{{json .}}"
    )
    events = [json.loads(line) for line in told.splitlines()]
    assert [(e["Action"], e["Actor"]["ID"]) for e in events] == [
        ("create", "told"), ("mount", "told"), ("unmount", "told"), ("destroy", "told"),
    ]  # fmt: skip
    attributes = events[1]["Actor"]["Attributes"]
    assert attributes["destination"] == "/t" and attributes["read/write"] == "true" and attributes["driver"] == "local"
