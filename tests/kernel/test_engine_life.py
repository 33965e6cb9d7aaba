"""The engine with a real store, real shims and real containers: life cycles, and what a kill of each process costs."""

import json
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ambi.core.deadline import Deadline
from ambi.core.errors import (
    AmbiError,
    CommandNotExecutable,
    CommandNotFound,
    Conflict,
    DeadlineExceeded,
    InvalidRequest,
    NotFound,
    NotModified,
    StorageFull,
    Unsupported,
)
from ambi.core.model import InstanceId, Status
from ambi.core.roots import Roots
from ambi.engine.engine import Engine
from ambi.engine.state import StateDb
from ambi.engine.types import Attach, CreateSpec, LogQuery
from ambi.shim import client
from tests.harness import EngineUnderTest

SECONDS = 20.0


@pytest.fixture
def roots(short_tmp: Path) -> Roots:
    return Roots.of(short_tmp / "data", short_tmp / "run", short_tmp / "run" / "ambi.sock")


class Opened:
    """The engine that is open now on `roots`."""

    def __init__(self, roots: Roots) -> None:
        self.roots = roots
        self.engine = Engine.open(roots)

    def again(self) -> Engine:
        """Open another engine; the present one is closed, if that has not been done."""
        self.engine = Engine.open(self.roots)
        return self.engine


@contextmanager
def opened_with_busybox(roots: Roots, busybox_tar: Path) -> Iterator[Opened]:
    """An engine in this process, with the image `busybox`; nothing of it is left afterwards."""
    opened = Opened(roots)
    with open(busybox_tar, "rb") as source:
        opened.engine.images.import_tar(source, "busybox", changes=["ENV PATH=/bin:/usr/bin"])
    yield opened
    for instance in opened.engine.list(all=True, filters={}):
        opened.engine.remove(instance.id, force=True)
    opened.engine.close()
    client.ZygoteClient(roots.run).stop()


@pytest.fixture
def opened(roots: Roots, busybox_tar: Path) -> Iterator[Opened]:
    roots.run.mkdir(parents=True, mode=0o711)
    with opened_with_busybox(roots, busybox_tar) as it:
        yield it


@pytest.fixture
def engine(opened: Opened) -> Engine:
    return opened.engine


def created(engine: Engine, *argv: str, name: str | None = None, **host: object) -> InstanceId:
    config = {"Image": "busybox", "Cmd": list(argv), "OpenStdin": bool(host.pop("OpenStdin", False))}
    return engine.create(name, CreateSpec(config, {"NetworkMode": "none", **host}, {}))[0]


def soon() -> Deadline:
    return Deadline.after(SECONDS)


def until(condition: Callable[[], bool], what: str) -> None:
    by = soon()
    while not condition():
        by.check(what)
        time.sleep(0.05)


def output(engine: Engine, id: str) -> bytes:
    return b"".join(entry.line for entry in engine.logs(id, LogQuery()) if entry is not None)


def ran(engine: Engine, *argv: str, **host: object) -> tuple[int, bytes]:
    """Exit code and output of a run to its end."""
    id = created(engine, *argv, **host)
    ticket = engine.wait(id, "next-exit")
    engine.start(id)
    return ticket.result(soon()).code, output(engine, id)


def read_all(sock: socket.socket) -> bytes:
    sock.settimeout(SECONDS)
    found = b""
    while block := sock.recv(65536):
        found += block
    return found


def attached(engine: Engine, id: str, *, stdin: bool = False, logs: bool = False, stream: bool = True) -> socket.socket:
    """The client's end of an attachment without frames."""
    ours, theirs = socket.socketpair()
    with theirs:
        how = Attach(stdin=stdin, stdout=True, stderr=True, logs=logs, stream=stream, framed=False)
        engine.attach(id, how, theirs, b"", lambda: None)
    return ours


def test_a_run_from_create_to_destroy_in_dockers_order(engine: Engine) -> None:
    stream = engine.events(0, None, {"type": ["container"]})
    id = created(engine, "sh", "-c", "echo out; echo err >&2; exit 7", name="one", AutoRemove=True)
    with attached(engine, id) as sock:
        exited, removed = engine.wait(id, "next-exit"), engine.wait(id, "removed")
        engine.start(id)
        assert sorted(read_all(sock).split()) == [b"err", b"out"]
    assert exited.result(soon()).code == removed.result(soon()).code == 7
    with pytest.raises(NotFound, match="No such container: one"):
        engine.get("one")
    stream.close()
    past = engine.events(0, time.time_ns(), {"type": ["container"]})
    found = [event for event in past if event is not None]
    assert [event.action for event in found] == ["create", "attach", "start", "die", "destroy"]
    assert found[3].attributes["exitCode"] == "7" and found[3].attributes["name"] == "one"
    assert not list((engine.info().data_root / "instances").iterdir())


def test_the_states_of_an_instance(engine: Engine) -> None:
    id = created(engine, "sleep", "100", name="web")
    assert engine.get("web").state.status is Status.CREATED
    assert engine.wait(id).result(soon()).code == 0
    engine.start("web")
    with pytest.raises(NotModified):
        engine.start("web")
    got = engine.get(id[:8])
    assert got.state.running and Path(f"/proc/{got.state.pid}").exists() and got.state.started_ns > 0
    assert [i.id for i in engine.list(all=False, filters={"name": ["web"]})] == [id]
    with pytest.raises(DeadlineExceeded):
        engine.wait(id).result(Deadline.after(0))
    with pytest.raises(Conflict, match="Stop the container before"):
        engine.remove("web")
    engine.stop("web", 0)
    assert engine.get(id).state.exit_code == 137
    with pytest.raises(NotModified):
        engine.stop("web")
    with pytest.raises(Conflict, match="is not running"):
        engine.kill("web")
    engine.start("web")
    assert engine.get("web").state.running and engine.get("web").state.exit_code == 0
    engine.restart("web", 0)
    assert engine.get("web").state.running


def test_stop_asks_first_and_kill_gets_past_a_stop_that_waits(engine: Engine) -> None:
    polite = created(engine, "sh", "-c", "trap 'exit 9' TERM; echo ready; while :; do sleep 0.1; done")
    engine.start(polite)
    until(lambda: output(engine, polite) == b"ready\n", "the trap")
    engine.stop(polite, 30)
    assert engine.get(polite).state.exit_code == 9
    stubborn = created(engine, "sh", "-c", "trap '' TERM; while :; do sleep 0.1; done")
    engine.start(stubborn)
    stopping = threading.Thread(target=engine.stop, args=(stubborn, 300))
    stopping.start()
    engine.kill(stubborn)
    stopping.join(SECONDS)
    assert not stopping.is_alive() and engine.get(stubborn).state.exit_code == 137


def test_names_are_unique_and_change(engine: Engine) -> None:
    first = created(engine, "true", name="a1")
    with pytest.raises(Conflict, match=f'container name "/a1" is already in use by container "{first}"'):
        created(engine, "true", name="a1")
    second = created(engine, "true")
    with pytest.raises(Conflict, match="already in use"):
        engine.rename(second, "a1")
    engine.rename("a1", "b1")
    assert engine.get("b1").id == first
    created(engine, "true", name="a1")
    with pytest.raises(InvalidRequest, match="same name"):
        engine.rename("b1", "b1")


@pytest.mark.parametrize(
    "argv,kind,code", [(("nope",), CommandNotFound, 127), (("/nope",), CommandNotFound, 127),
                       (("/etc/passwd",), CommandNotExecutable, 126)]
)  # fmt: skip
def test_a_program_that_cannot_run(engine: Engine, argv: tuple[str, ...], kind: type[AmbiError], code: int) -> None:
    id = created(engine, *argv)
    with attached(engine, id) as sock:
        with pytest.raises(kind):
            engine.start(id)
        assert read_all(sock) == b""
    state = engine.get(id).state
    assert (state.status, state.exit_code, state.pid) == (Status.CREATED, code, 0) and argv[0] in state.error
    engine.remove(id)
    auto = created(engine, *argv, AutoRemove=True)
    removed = engine.wait(auto, "removed")
    with pytest.raises(kind):
        engine.start(auto)
    assert removed.result(soon()).code == code


def test_nothing_is_half_made_when_create_fails(engine: Engine, roots: Roots) -> None:
    for config, host in (({"Image": "nope", "Cmd": ["x"]}, {}), ({"Image": "busybox", "Cmd": ["x"]}, {"Binds": ["v:/x"]}),
                         ({"Image": "busybox", "Cmd": ["x"]}, {"CapAdd": ["FLY"]})):  # fmt: skip
        with pytest.raises(AmbiError):
            engine.create("held", CreateSpec(config, host, {}))
    assert list((roots.data / "instances").iterdir()) == []
    created(engine, "true", name="held")


def test_a_start_that_fails_can_be_tried_again(engine: Engine, short_tmp: Path) -> None:
    source = short_tmp / "source"
    source.mkdir()
    mount = {"Type": "bind", "Source": str(source), "Target": "/x"}
    id = created(engine, "true", Mounts=[mount])
    source.rmdir()
    with pytest.raises(InvalidRequest, match="does not exist"):
        engine.start(id)
    source.mkdir()
    ticket = engine.wait(id, "next-exit")
    engine.start(id)
    assert ticket.result(soon()).code == 0


def test_what_the_image_and_the_request_say_reaches_the_process(engine: Engine) -> None:
    config = {"Image": "busybox", "Cmd": ["sh", "-c", "id -un; pwd; hostname; echo $A; cat /etc/resolv.conf"],
              "User": "alice", "WorkingDir": "/tmp", "Hostname": "box", "Env": ["A=b"]}  # fmt: skip
    id, _ = engine.create(None, CreateSpec(config, {"NetworkMode": "none", "Dns": ["9.9.9.9"]}, {}))
    ticket = engine.wait(id, "next-exit")
    engine.start(id)
    assert ticket.result(soon()).code == 0
    assert output(engine, id).split(b"\n")[:4] == [b"alice", b"/tmp", b"box", b"b"]
    assert b"nameserver 9.9.9.9" in output(engine, id)


def test_memory_that_runs_out_is_told(engine: Engine) -> None:
    id = created(engine, "sh", "-c", "a=x; while :; do a=$a$a; done", Memory=16 << 20)
    ticket = engine.wait(id, "next-exit")
    engine.start(id)
    assert ticket.result(soon()).oom_killed
    assert engine.get(id).state.oom_killed and engine.get(id).state.exit_code == 137
    actions = [e.action for e in engine.events(0, time.time_ns(), {"container": [id]}) if e]
    assert actions[-2:] == ["oom", "die"]


def test_stdin_goes_in_and_ends_with_its_client(engine: Engine) -> None:
    config = {"Image": "busybox", "Cmd": ["sh", "-c", "wc -c"], "OpenStdin": True, "StdinOnce": True}
    id, _ = engine.create(None, CreateSpec(config, {"NetworkMode": "none"}, {}))
    with attached(engine, id, stdin=True) as sock:
        engine.start(id)
        sock.sendall(b"x" * 300_000)
        sock.shutdown(socket.SHUT_WR)
        assert read_all(sock).strip() == b"300000"


def test_a_client_that_only_attached_and_left_costs_nothing(engine: Engine, roots: Roots) -> None:
    id = created(engine, "echo", "hi")
    attached(engine, id).close()
    ticket = engine.wait(id, "next-exit")
    engine.start(id)
    assert ticket.result(soon()).code == 0
    with attached(engine, id, logs=True, stream=False) as sock:
        assert read_all(sock) == b"hi\n"
    idle = created(engine, "true")
    with attached(engine, idle):
        engine.remove(idle)
    assert not roots.instance_run(idle).exists()


def test_logs_follow_to_the_end_of_the_run(engine: Engine) -> None:
    id = created(engine, "sh", "-c", "for i in 1 2 3; do echo $i; sleep 0.1; done; echo err >&2")
    engine.start(id)
    followed = b"".join(e.line for e in engine.logs(id, LogQuery(follow=True)) if e is not None)
    assert sorted(followed.split()) == [b"1", b"2", b"3", b"err"]
    assert [e.line for e in engine.logs(id, LogQuery(tail=2, stdout=False)) if e] == [b"err\n"]
    with pytest.raises(Unsupported, match="does not support reading"):
        engine.logs(created(engine, "true", LogConfig={"Type": "none"}), LogQuery())


def test_an_exec_has_its_code_when_its_stream_has_ended(engine: Engine) -> None:
    id = created(engine, "sleep", "100")
    with pytest.raises(Conflict, match="is not running"):
        engine.exec_create(id, {"Cmd": ["true"]})
    engine.start(id)
    for number in range(20):
        exec_id = engine.exec_create(id, {"Cmd": ["sh", "-c", f"echo {number}; exit {number}"], "AttachStdout": True})
        ours, theirs = socket.socketpair()
        with theirs:
            engine.exec_start(exec_id, Attach(False, True, True, framed=False), theirs, b"", lambda: None)
        with ours:
            assert read_all(ours) == f"{number}\n".encode()
        got = engine.exec_get(exec_id)
        assert (got.exit_code, got.running) == (number, False)
    with pytest.raises(Conflict, match="already running"):
        engine.exec_start(exec_id, None)
    missing = engine.exec_create(id, {"Cmd": ["nope"]})
    with pytest.raises(CommandNotFound):
        engine.exec_start(missing, None)
    assert engine.exec_get(missing).exit_code == 127
    left = engine.exec_create(id, {"Cmd": ["sleep", "100"]})
    engine.exec_start(left, None)
    assert engine.exec_get(left).running and engine.exec_get(left).pid > 0
    assert {row["command"] for row in engine.top(id)} >= {"sleep 100"}
    assert engine.usage(id).pids == 2
    engine.kill(id)
    assert engine.exec_get(left).exit_code == 137


def test_prune_takes_what_does_not_run(engine: Engine) -> None:
    running = created(engine, "sleep", "100")
    engine.start(running)
    kept, gone = created(engine, "true", name="kept"), created(engine, "true", name="gone")
    assert engine.prune({"label": ["x"]})[0] == ()
    assert set(engine.prune({})[0]) == {kept, gone}
    assert [i.id for i in engine.list(all=True, filters={})] == [running]


def test_an_image_in_use_stays(engine: Engine) -> None:
    id = created(engine, "true")
    with pytest.raises(Conflict, match=id[:12]):
        engine.images.remove("busybox")
    engine.remove(id)
    engine.images.remove("busybox")
    with pytest.raises(NotFound, match="No such image: busybox:latest"):
        created(engine, "true")


def shim_pid(roots: Roots, id: str) -> int:
    return int(json.loads((roots.instance_run(id) / "shim.json").read_text())["pid"])


def test_a_killed_shim_ends_its_instance_and_is_swept_after(engine: Engine, roots: Roots) -> None:
    id = created(engine, "sh", "-c", "echo before; sleep 1000")
    engine.start(id)
    until(lambda: output(engine, id) == b"before\n", "the first line")
    pid, ticket = engine.get(id).state.pid, engine.wait(id, "next-exit")
    os.kill(shim_pid(roots, id), signal.SIGKILL)
    assert ticket.result(soon()).code == 137
    assert engine.get(id).state.error == "the shim was killed"
    assert output(engine, id) == b"before\n"
    until(lambda: not Path(f"/proc/{pid}").exists(), "the end of init")
    engine.start(id)
    assert engine.get(id).state.running


def test_a_killed_zygote_is_started_again(engine: Engine) -> None:
    running = created(engine, "sleep", "100")
    engine.start(running)
    os.kill(engine.info().zygote_pid, signal.SIGKILL)
    assert ran(engine, "echo", "again") == (0, b"again\n")
    assert engine.get(running).state.running


def test_instances_live_through_a_stop_of_the_engine(engine: Engine, opened: Opened) -> None:
    id = created(engine, "sh", "-c", "while ! [ -e /go ]; do sleep 0.1; done; echo after; exit 5")
    engine.start(id)
    exec_id = engine.exec_create(id, {"Cmd": ["sh", "-c", "while ! [ -e /tmp/go ]; do sleep 0.1; done; exit 6"]})
    engine.exec_start(exec_id, None)
    sock = attached(engine, id)
    pid = engine.get(id).state.pid
    engine.close()
    engine = opened.again()
    assert engine.get(id).state.running and engine.get(id).state.pid == pid
    assert engine.exec_get(exec_id).running
    ticket = engine.wait(id, "next-exit")
    engine.exec_start(engine.exec_create(id, {"Cmd": ["touch", "/tmp/go"]}), None)
    until(lambda: engine.exec_get(exec_id).exit_code == 6, "the end of the adopted exec")
    engine.exec_start(engine.exec_create(id, {"Cmd": ["touch", "/go"]}), None)
    assert ticket.result(soon()).code == 5
    with sock:
        assert read_all(sock) == b"after\n"


def test_an_end_without_an_engine_is_found(engine: Engine, roots: Roots, opened: Opened) -> None:
    """The engine is closed when the run ends, and the shim cannot start one: no engine.json here."""
    id = created(engine, "sh", "-c", "sleep 0.5; echo last; exit 3")
    removed = created(engine, "sh", "-c", "sleep 0.5", AutoRemove=True)
    killed = created(engine, "sleep", "1000")
    for each in (id, removed, killed):
        engine.start(each)
    victim = shim_pid(roots, killed)
    engine.close()
    os.kill(victim, signal.SIGKILL)
    until((roots.instance_data(id) / "exit.json").exists, "exit.json")
    engine = opened.again()
    state = engine.get(id).state
    assert (state.status, state.exit_code) == (Status.EXITED, 3) and output(engine, id) == b"last\n"
    assert (engine.get(killed).state.exit_code, engine.get(killed).state.error) == (137, "the shim was killed")
    until(lambda: removed not in [i.id for i in engine.list(all=True, filters={})], "the automatic removal")


def test_records_of_another_boot_have_ended(engine: Engine, roots: Roots, opened: Opened) -> None:
    id = created(engine, "true", name="old")
    engine.close()
    db = StateDb(roots.state_db)
    row = db.instances()[0]
    db.set_state(id, row.state._replace(status=Status.RUNNING, pid=1, started_ns=5), "another boot")
    db.close()
    engine = opened.again()
    state = engine.get("old").state
    assert (state.status, state.exit_code, state.pid, state.error) == (Status.EXITED, 255, 0, "the host was restarted")


def test_the_directories_rebuild_the_database(engine: Engine, roots: Roots, opened: Opened) -> None:
    id = created(engine, "sh", "-c", "exit 4", name="kept")
    ticket = engine.wait(id, "next-exit")
    engine.start(id)
    ticket.result(soon())
    half = roots.data / "instances" / ("ee" * 32)
    (half / "upper").mkdir(parents=True)
    engine.close()
    for path in roots.data.glob("state.db*"):
        path.unlink()
    engine = opened.again()
    got = engine.get("kept")
    assert (got.id, got.state.status, got.state.exit_code) == (id, Status.EXITED, 4)
    assert got.argv == ("sh", "-c", "exit 4")
    assert not half.exists()


def test_a_removal_that_was_cut_short_is_finished(engine: Engine, roots: Roots, opened: Opened) -> None:
    id = created(engine, "true", name="cut")
    engine.close()
    (roots.instance_data(id) / "record.json").unlink()
    engine = opened.again()
    assert engine.list(all=True, filters={}) == [] and not roots.instance_data(id).exists()
    created(engine, "true", name="cut")


def test_eight_clients_at_once(engine: Engine) -> None:
    failures: list[str] = []

    def work(number: int) -> None:
        for turn in range(5):
            code, text = ran(engine, "sh", "-c", f"echo {number}-{turn}; exit {turn}")
            if (code, text) != (turn, f"{number}-{turn}\n".encode()):
                failures.append(f"{number}-{turn}: {code} {text!r}")

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not failures and not any(thread.is_alive() for thread in threads)


def test_the_process_is_refused_a_second_time_and_ends_on_sigterm(
    new_engine: Callable[..., EngineUnderTest], short_tmp: Path
) -> None:
    first = new_engine()
    again = subprocess.run(first.argv, check=False, capture_output=True, text=True, timeout=60)
    assert again.returncode == 125
    assert first.process is not None and f"pid {first.process.pid}" in again.stderr and "hint: " in again.stderr
    assert json.loads((first.run / "engine.json").read_text())["argv"][1:4] == ["-I", "-m", "ambi.engine"]
    assert (first.run / "engine.lock").read_text().strip() == str(first.process.pid)
    assert first.run.stat().st_mode & 0o777 == 0o711 and (first.run / "instances").stat().st_mode & 0o777 == 0o700
    first.process.terminate()
    assert first.process.wait(SECONDS) == 0
    assert not first.socket.exists()
    assert shutil.which("docker") is None or first.docker("ps").returncode != 0


def test_a_shim_that_finds_no_engine_starts_one(new_engine: Callable[..., EngineUnderTest], busybox_tar: Path) -> None:
    engine = new_engine()
    engine.load_busybox(busybox_tar)
    names = {"ended": "sleep 1; exit 4", "runs": "sleep 1000"}
    for name, script in names.items():
        done = engine.docker("run", "-d", "--name", name, "--network", "none", "busybox", "/bin/sh", "-c", script)
        assert done.returncode == 0, done.stderr
    engine.kill()
    engine.wait_ready()
    successor = int((engine.run / "engine.lock").read_text())
    try:
        states = engine.docker("inspect", "-f", "{{.State.Status}} {{.State.ExitCode}}", "ended", "runs").stdout
        assert states.split() == [b"exited", b"4", b"running", b"0"]
        assert engine.docker("rm", "-f", "ended", "runs").returncode == 0
    finally:
        os.kill(successor, signal.SIGTERM)
    until(lambda: status_of(successor) == "Z", "the end of the successor")


def status_of(pid: int) -> str:
    """The state letter of a process, Z for one that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def test_a_removed_image_leaves_no_mounted_layer(engine: Engine, roots: Roots) -> None:
    assert ran(engine, "true")[0] == 0
    mounted = [path for path in roots.layers.iterdir() if path.is_dir()]
    assert len(mounted) == (engine.info().layer_form[0] == "erofs")
    engine.remove(engine.list(all=True, filters={})[0].id)
    engine.images.remove("busybox")
    until(lambda: not any(path.exists() for path in mounted), "the end of the mounts")


@pytest.fixture
def small_disk(roots: Roots) -> Iterator[None]:
    """The data root is a file system of 200 MiB; the image store keeps some of a disk free."""
    roots.data.mkdir(mode=0o711)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200m", "tmpfs", roots.data], check=True)
    yield
    subprocess.run(["umount", "-l", roots.data], check=True)


def test_a_full_disk_leaves_nothing_half_made(small_disk: None, engine: Engine, roots: Roots) -> None:
    kept = created(engine, "true", name="kept")
    running = created(engine, "sleep", "0.5")
    ticket = engine.wait(running, "next-exit")
    engine.start(running)
    fill(roots.data / "ballast")
    with pytest.raises(StorageFull) as caught:
        for _ in range(2000):  # a page of the journal may still have room for some
            created(engine, "true")
    assert caught.value.hint
    assert ticket.result(soon()).code == 0
    (roots.data / "ballast").unlink()
    present = {path.name for path in (roots.data / "instances").iterdir()}
    assert present == {i.id for i in engine.list(all=True, filters={})}
    assert engine.get("kept").id == kept
    assert ran(engine, "true")[0] == 0


def fill(path: Path) -> None:
    """Write until there is no room."""
    with open(path, "wb", buffering=0) as file:
        for size in (1 << 20, 4096, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                continue
