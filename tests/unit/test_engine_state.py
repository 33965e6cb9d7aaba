"""The state database: versions, migration, what comes back."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from ambi.core.errors import Conflict, Corrupt, Unsupported
from ambi.core.model import IdMap, IdRange, InstanceId, Isolation, Status, Workload
from ambi.engine import create, state
from ambi.engine.state import ExecRow, Row, StateDb
from ambi.engine.types import CreateSpec, Event, State


def row(id: str = "aa" * 32, name: str = "one") -> Row:
    return Row(
        id=InstanceId(id),
        name=name,
        workload=Workload.OCI,
        isolation=Isolation.VM,
        image_id="sha256:1",
        image="debian",
        spec=CreateSpec({"Image": "debian", "Env": ["Ä=ü"]}, {"Memory": 1}, {}),
        id_map=IdMap((IdRange(0, 100000, 65536),), (IdRange(0, 100000, 65536),)),
        created_ns=5,
        state=State(Status.CREATED),
        restart_count=0,
        boot_id="b1",
    )


@pytest.fixture
def db(tmp_path: Path) -> Iterator[StateDb]:
    with closing(StateDb(tmp_path / "state.db")) as opened:
        yield opened


def test_instances_come_back_as_they_were(db: StateDb, tmp_path: Path) -> None:
    db.insert(row())
    ended = State(Status.EXITED, 0, 137, "the shim was killed", True, 10, 20)
    db.set_state(row().id, ended, "b2")
    db.set_name(row().id, "two")
    db.close()
    with closing(StateDb(tmp_path / "state.db")) as again:
        assert again.instances() == [row()._replace(name="two", state=ended, boot_id="b2")]


def test_a_name_is_taken_once(db: StateDb) -> None:
    db.insert(row())
    with pytest.raises(Conflict):
        db.insert(row("bb" * 32))


def test_execs_go_with_their_instance(db: StateDb) -> None:
    db.insert(row())
    db.insert_exec(ExecRow("e1", row().id, {"Cmd": ["x"]}, 0, None, "b1"))
    db.set_exec("e1", 7, 3)
    assert db.execs() == [ExecRow("e1", row().id, {"Cmd": ["x"]}, 7, 3, "b1")]
    db.delete(row().id)
    assert db.execs() == [] and db.instances() == []


def test_events_are_a_bounded_ring(db: StateDb, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "EVENTS_KEPT", 10)
    for number in range(95):
        db.add_event(Event(number, "container", "start", "id", {"n": str(number)}))
    kept = list(db.events(0))
    assert 10 <= len(kept) < 20 and kept[-1].time_ns == 94
    assert [e.time_ns for e in db.events(93)] == [93, 94]


def test_a_newer_database_is_refused_and_untouched(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    with closing(sqlite3.connect(path)) as raw:
        raw.execute(f"PRAGMA user_version = {state.VERSION + 1}")
    before = path.read_bytes()
    with pytest.raises(Unsupported) as caught:
        StateDb(path)
    assert str(state.VERSION + 1) in caught.value.message and caught.value.hint
    assert path.read_bytes() == before


def test_a_change_of_schema_copies_then_migrates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.db"
    db = StateDb(path)
    db.insert(row())
    db.close()
    old = state.VERSION
    monkeypatch.setattr(state, "MIGRATIONS", (*state.MIGRATIONS, "CREATE TABLE added (x INTEGER)"))
    monkeypatch.setattr(state, "VERSION", old + 1)
    db = StateDb(path)
    assert db.instances() == [row()]
    db.close()
    with closing(sqlite3.connect(path)) as raw:
        assert raw.execute("PRAGMA user_version").fetchone() == (old + 1,)
        raw.execute("INSERT INTO added VALUES (1)")
    with closing(sqlite3.connect(tmp_path / f"state.db.{old}.bak")) as copy:
        assert copy.execute("PRAGMA user_version").fetchone() == (old,)
        assert copy.execute("SELECT name FROM instances").fetchone() == ("one",)


def test_a_migration_that_fails_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.db"
    StateDb(path).close()
    old = state.VERSION
    monkeypatch.setattr(state, "MIGRATIONS", (*state.MIGRATIONS, "CREATE TABLE added (x INTEGER); SELECT * FROM nowhere"))
    monkeypatch.setattr(state, "VERSION", old + 1)
    with pytest.raises(Corrupt):
        StateDb(path)
    with closing(sqlite3.connect(path)) as raw:
        assert raw.execute("PRAGMA user_version").fetchone() == (old,)
        assert raw.execute("SELECT COUNT(*) FROM sqlite_master WHERE name = 'added'").fetchone() == (0,)


def test_a_damaged_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "state.db").write_bytes(b"not a database at all" * 100)
    with pytest.raises(Corrupt) as caught:
        StateDb(tmp_path / "state.db")
    assert str(tmp_path / "state.db") in caught.value.message and caught.value.hint


def test_a_record_file_holds_all_but_the_state(tmp_path: Path) -> None:
    data = tmp_path / row().id
    data.mkdir()
    create.write_record(data, row()._replace(state=State(Status.RUNNING, 5), boot_id="b9"))
    assert create.read_record(data) == row()._replace(boot_id="")
    (data / create.RECORD_FILE).write_text('{"format": 1')
    assert create.read_record(data) is None
