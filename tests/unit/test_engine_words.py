"""Small vocabularies: names, signals, filters, detach keys, events, the daemon's options."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from ambi.core.errors import Conflict, Corrupt, InvalidRequest, NotFound, Unsupported
from ambi.core.model import Isolation, Status, Workload
from ambi.core.roots import FORMAT, Roots
from ambi.engine import daemon, filters, names, signals
from ambi.engine.bus import EventBus
from ambi.engine.mountpoints import Point
from ambi.engine.netstate import NetState
from ambi.engine.records import Record, Registry
from ambi.engine.state import StateDb
from ambi.engine.types import CreateSpec, Instance, State
from ambi.network.model import Port
from tests.unit.test_engine_state import row


@pytest.mark.parametrize("name", ["a", "", "/", "-ab", "a b", "a/b", "ä1", "ab\n", "x" * 256, "../x"])
def test_names_that_are_refused(name: str) -> None:
    with pytest.raises(InvalidRequest, match="only"):
        names.checked(name)


def test_names_that_are_taken_as_they_are() -> None:
    assert [names.checked(x) for x in ("/web", "a.b_c-1", "0x")] == ["web", "a.b_c-1", "0x"]
    assert names.checked(names.random_name(set()))
    assert len(names.new_id()) == 64 and not names.new_id()[:12].isdigit()


@pytest.mark.parametrize(
    "text,number", [("TERM", 15), ("SIGTERM", 15), ("sigkill", 9), ("9", 9), ("RTMIN+3", 37), ("SIGRTMAX-1", 63)]
)
def test_signals(text: str, number: int) -> None:
    assert signals.parse(text) == number


@pytest.mark.parametrize("text", ["", "0", "65", "-9", "FLY", "RTMIN+99", "SIGRTMIN+", "٩"])
def test_wrong_signals(text: str) -> None:
    with pytest.raises(InvalidRequest, match="Invalid signal"):
        signals.parse(text)


def instance(**changes: object) -> Instance:
    made = Instance(
        id=row().id,
        name="web-1",
        workload=Workload.OCI,
        isolation=Isolation.CONTAINER,
        image="debian",
        image_id="sha256:1",
        spec=CreateSpec(
            {"Labels": {"tier": "front"}, "ExposedPorts": {"80": {}, "53/udp": {}}},
            {"NetworkMode": "none", "Binds": ["/src:/dst:ro"]},
        ),
        argv=("true",),
        created_ns=1,
        state=State(Status.EXITED, 0, 3, finished_ns=9),
        restart_count=0,
        exec_ids=(),
        data_dir=Path("/d"),
        run_dir=Path("/r"),
        log_path=None,
        net=NetState(ports=(Port("tcp", "", 8080, 80, ()),)),
        mounts=(Point("bind", "/dst", "bind", "/src", shown="/src"),),
    )
    return made._replace(**changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "key,yes,no",
    [
        ("name", "^/web", "api"), ("name", "eb-1$", "^eb"), ("id", "aaaa", "bb"), ("label", "tier", "tie"),
        ("label", "tier=front", "tier=back"), ("status", "exited", "running"), ("exited", "3", "0"),
        ("network", "none", "host"), ("volume", "/dst", "/other"), ("isolation", "container", "vm"),
        ("is-task", "false", "true"), ("health", "none", "healthy"), ("expose", "70-90", "80/udp"),
        ("expose", "53/udp", "53"),
        ("publish", "8080", "80"), ("publish", "8000-9000/tcp", "8081-9000"),
    ],
)  # fmt: skip
def test_filters_of_instances(key: str, yes: str, no: str) -> None:
    assert filters.instance_matches(instance(), {key: [yes]})
    assert not filters.instance_matches(instance(), {key: [no]})


def test_labels_must_all_hold_and_other_values_once() -> None:
    assert filters.instance_matches(instance(), {"status": ["running", "exited"]})
    assert not filters.instance_matches(instance(), {"label": ["tier", "gone"]})
    for wrong in ({"status": ["flying"]}, {"exited": ["x"]}):
        with pytest.raises(InvalidRequest, match="invalid filter"):
            filters.check_values(wrong)
    with pytest.raises(InvalidRequest, match="invalid filter 'fly'"):
        filters.check({"fly": []}, filters.INSTANCE_KEYS)
    with pytest.raises(InvalidRequest, match="invalid filter"):
        filters.instance_matches(instance(), {"name": ["("]})


def test_records_are_found_by_id_name_and_unique_prefix() -> None:
    registry = Registry()
    first, second = Record(row("ab" * 32, "one")), Record(row("ac" * 32, "two"))
    registry.add(first)
    registry.add(second)
    assert registry.find("one") is registry.find("/one") is registry.find("ab" * 32) is registry.find("ab") is first
    with pytest.raises(InvalidRequest, match="Multiple IDs found with provided prefix: a"):
        registry.find("a")
    for unknown in ("three", ""):
        with pytest.raises(NotFound, match=f"No such container: {unknown}"):
            registry.find(unknown)


def test_a_name_is_reserved_for_one() -> None:
    registry = Registry()
    registry.reserve("web", "1")
    with pytest.raises(Conflict, match='The container name "/web" is already in use by container "1"'):
        registry.reserve("web", "2")
    registry.release("web")
    registry.reserve("web", "2")


@pytest.fixture
def bus(tmp_path: Path) -> Iterator[EventBus]:
    with closing(StateDb(tmp_path / "state.db")) as db:
        yield EventBus(db)


def test_events_are_replayed_then_live_and_end(bus: EventBus) -> None:
    bus.publish("container", "create", "id1", {"name": "web", "image": "debian", "tier": "front"})
    stream = bus.open(0, None, {"container": ["web"]})
    bus.publish("container", "start", "id2", {"name": "other"})
    bus.publish("container", "exec_start: sh", "id1", {"name": "web"})
    assert [e.action for e in (next(stream), next(stream)) if e] == ["create", "exec_start: sh"]
    assert next(stream) is None
    threading.Timer(0.01, stream.close).start()
    assert [e for e in stream if e] == []


@pytest.mark.parametrize(
    "wanted,count",
    [
        ({}, 3), ({"type": ["image"]}, 1), ({"event": ["exec_start"]}, 1), ({"event": ["exec"]}, 0),
        ({"label": ["tier"]}, 1), ({"label": ["tier=back"]}, 0), ({"image": ["debian"]}, 2),
        ({"container": ["id1"]}, 2), ({"network": ["x"]}, 0),
    ],
)  # fmt: skip
def test_filters_of_events(bus: EventBus, wanted: dict[str, list[str]], count: int) -> None:
    bus.publish("container", "create", "id1", {"name": "web", "image": "debian:latest", "tier": "front"})
    bus.publish("container", "exec_start: sh", "id1", {"name": "web"})
    bus.publish("image", "tag", "sha256:1", {"name": "debian:latest"})
    assert list(bus.open(0, 1, wanted)) == []  # the past ends at `until`
    assert len(list(bus.open(0, time.time_ns(), wanted))) == count


def test_an_unknown_event_filter_is_refused(bus: EventBus) -> None:
    with pytest.raises(InvalidRequest, match="invalid filter 'fly'"):
        bus.open(None, None, {"fly": ["x"]})


def test_a_stream_that_nobody_reads_is_cut_off(bus: EventBus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ambi.engine.bus._BACKLOG", 5)
    stream = bus.open(None, None, {})
    for number in range(10):
        bus.publish("container", "start", str(number), {})
    assert len(list(stream)) <= 5


def test_options_of_the_daemon(tmp_path: Path) -> None:
    assert daemon.parse([]).roots == Roots()
    got = daemon.parse(["--run-root", "/r", "--data-root=/d", "--detach"])
    assert got.roots == Roots(Path("/d"), Path("/r"), Path("/r/ambi.sock")) and got.detach
    for wrong in (["--socket"], ["--fly"], ["x"]):
        with pytest.raises(InvalidRequest, match="unknown or incomplete option"):
            daemon.parse(wrong)


def test_the_format_of_a_data_root_is_checked(tmp_path: Path) -> None:
    roots = Roots.of(tmp_path, tmp_path / "run", tmp_path / "s")
    daemon.check_format(roots)
    daemon.check_format(roots)
    for text, kind in ((f'{{"format": {FORMAT + 1}}}', Unsupported), ("{", Corrupt), ('{"format": "x"}', Corrupt)):
        roots.format_file.write_text(text)
        with pytest.raises(kind) as caught:
            daemon.check_format(roots)
        assert caught.value.hint
    roots.format_file.unlink()
    roots.state_db.touch()
    with pytest.raises(Corrupt, match=r"no format\.json"):
        daemon.check_format(roots)


def test_roots_are_locked_once_and_the_holder_is_named(tmp_path: Path) -> None:
    roots = Roots.of(tmp_path, tmp_path / "run", tmp_path / "s")
    other = Roots.of(tmp_path, tmp_path / "run2", tmp_path / "s2")
    daemon.prepare(roots)
    daemon.prepare(other)
    with daemon.Lock(roots):
        for again in (roots, other):
            with pytest.raises(Conflict, match=f"pid {os.getpid()}"), daemon.Lock(again):
                pass
    with daemon.Lock(roots):
        pass
