"""The state database: what the engine knows of its instances, in SQLite. All writes of the engine go through here.

`PRAGMA user_version` is the schema's version. A change copies `state.db.VERSION.bak` and migrates forward, one step a
version, in one transaction. A commit survives the death of any process; after a power cut the last ones may be gone, and
then the `record.json` of an instance rebuilds its row (ambi/engine/adopt.py).
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ambi.core.errors import AmbiError, Conflict, Corrupt, Internal, StorageFull, Unsupported
from ambi.core.model import IdMap, IdRange, InstanceId, Isolation, Status, Workload
from ambi.engine.types import CreateSpec, Event, State

EVENTS_KEPT = 4096

_SCHEMA_1 = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE instances (
    id TEXT PRIMARY KEY, name TEXT NOT NULL UNIQUE, workload TEXT NOT NULL, isolation TEXT NOT NULL,
    image_id TEXT NOT NULL, image TEXT NOT NULL, spec TEXT NOT NULL, id_map TEXT, created_ns INTEGER NOT NULL,
    status TEXT NOT NULL, pid INTEGER NOT NULL, exit_code INTEGER NOT NULL, error TEXT NOT NULL,
    oom_killed INTEGER NOT NULL, started_ns INTEGER NOT NULL, finished_ns INTEGER NOT NULL,
    restart_count INTEGER NOT NULL, boot_id TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE addresses (
    instance TEXT NOT NULL REFERENCES instances (id) ON DELETE CASCADE, network TEXT NOT NULL,
    family INTEGER NOT NULL CHECK (family IN (4, 6)), address TEXT NOT NULL, prefix INTEGER NOT NULL, mac TEXT NOT NULL,
    PRIMARY KEY (network, address)
) WITHOUT ROWID;
CREATE INDEX addresses_of ON addresses (instance);
CREATE TABLE execs (
    id TEXT PRIMARY KEY, instance TEXT NOT NULL REFERENCES instances (id) ON DELETE CASCADE, config TEXT NOT NULL,
    pid INTEGER NOT NULL, exit_code INTEGER, boot_id TEXT NOT NULL
) WITHOUT ROWID;
CREATE INDEX execs_of ON execs (instance);
CREATE TABLE events (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, time_ns INTEGER NOT NULL, type TEXT NOT NULL, action TEXT NOT NULL,
    actor TEXT NOT NULL, attributes TEXT NOT NULL
);
"""

_SCHEMA_2 = """
CREATE TABLE networks (id TEXT PRIMARY KEY, name TEXT NOT NULL UNIQUE, body TEXT NOT NULL, created_ns INTEGER NOT NULL)
    WITHOUT ROWID;
CREATE TABLE endpoints (
    instance TEXT NOT NULL REFERENCES instances (id) ON DELETE CASCADE, network TEXT NOT NULL, body TEXT NOT NULL,
    PRIMARY KEY (instance, network)
) WITHOUT ROWID;
CREATE TABLE volumes (name TEXT PRIMARY KEY, body TEXT NOT NULL, created_ns INTEGER NOT NULL) WITHOUT ROWID;
ALTER TABLE instances ADD COLUMN mounts TEXT NOT NULL DEFAULT '[]';
ALTER TABLE instances ADD COLUMN held INTEGER NOT NULL DEFAULT 0;
"""

# MIGRATIONS[n] brings a database of version n to n + 1; version 0 is an empty file.
MIGRATIONS: tuple[str, ...] = (_SCHEMA_1, _SCHEMA_2)
VERSION = len(MIGRATIONS)


class Row(NamedTuple):
    """One instance as it is stored. boot_id: of the boot in which `state` was true.

    mounts: resolved mount points, see docs/design/0004-networks.md. held: the user stopped it, no policy starts it again.
    """

    id: InstanceId
    name: str
    workload: Workload
    isolation: Isolation
    image_id: str
    image: str
    spec: CreateSpec
    id_map: IdMap | None
    created_ns: int
    state: State
    restart_count: int
    boot_id: str
    mounts: tuple[dict[str, Any], ...] = ()
    held: bool = False


class ExecRow(NamedTuple):
    id: str
    instance: str
    config: dict[str, Any]
    pid: int
    exit_code: int | None
    boot_id: str


def dumps(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


class StateDb:
    """The open database. Safe to use from any thread."""

    def __init__(self, path: Path) -> None:
        """Open or create `path`. Raises Unsupported when it is newer than this version, Corrupt when it is damaged."""
        self.fresh = not path.exists()
        self._lock = threading.Lock()
        self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None, cached_statements=64)
        try:
            self._prepare(path)
        except sqlite3.DatabaseError as error:
            self._db.close()
            hint = f"move {path} away: the instances' own directories hold enough to rebuild it"
            raise Corrupt(f"state database {path}: {error}", hint=hint) from error
        except BaseException:
            self._db.close()
            raise
        self._events = self._db.execute("SELECT COUNT(*) FROM events").fetchone()[0]

    def _prepare(self, path: Path) -> None:
        found = self._db.execute("PRAGMA user_version").fetchone()[0]
        if found > VERSION:
            raise Unsupported(
                f"state database {path} has version {found}, this ambi knows up to {VERSION}",
                hint=f"use the newer ambi, or go back to {path}.{VERSION}.bak if it exists",
            )
        path.chmod(0o600)
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = NORMAL")
        self._db.execute("PRAGMA foreign_keys = ON")
        if 0 < found < VERSION:
            self._backup(path.with_name(f"{path.name}.{found}.bak"))
        for version in range(found, VERSION):
            self._db.executescript(f"BEGIN;{MIGRATIONS[version]};PRAGMA user_version = {version + 1};COMMIT;")

    def _backup(self, target: Path) -> None:
        target.unlink(missing_ok=True)
        copy = sqlite3.connect(target)
        try:
            self._db.backup(copy)
        finally:
            copy.close()

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def _write(self, sql: str, values: tuple[object, ...]) -> None:
        """Raises StorageFull or Internal."""
        with self._lock:
            try:
                self._db.execute(sql, values)
            except sqlite3.OperationalError as error:
                raise _failure(error) from error
            except sqlite3.IntegrityError as error:  # what it belongs to has been removed meanwhile, or a name is taken
                raise Conflict(f"state database: {error}", hint="try again") from error

    def meta(self, key: str, default: Callable[[], str]) -> str:
        """The stored value of `key`; `default()` is stored when there is none."""
        with self._lock:
            row = self._db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
            if row is None:
                row = (default(),)
                self._db.execute("INSERT INTO meta VALUES (?, ?)", (key, row[0]))
        return str(row[0])

    # Instances

    def instances(self) -> list[Row]:
        with self._lock:
            rows = self._db.execute("SELECT * FROM instances ORDER BY created_ns").fetchall()
        return [_row(columns) for columns in rows]

    def insert(self, row: Row) -> None:
        ids = dumps({"uids": row.id_map.uids, "gids": row.id_map.gids}) if row.id_map else None
        state = row.state
        self._write(
            "INSERT INTO instances VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)",
            (
                row.id, row.name, row.workload.value, row.isolation.value, row.image_id, row.image, dumps(row.spec), ids,
                row.created_ns, state.status.value, state.pid, state.exit_code, state.error, int(state.oom_killed),
                state.started_ns, state.finished_ns, row.restart_count, row.boot_id,
                dumps(row.mounts), int(row.held),
            ),
        )  # fmt: skip

    def set_state(self, instance: str, state: State, boot_id: str) -> None:
        self._write(
            "UPDATE instances SET status=?, pid=?, exit_code=?, error=?, oom_killed=?, started_ns=?, finished_ns=?,"
            " boot_id=? WHERE id=?",
            (
                state.status.value, state.pid, state.exit_code, state.error, int(state.oom_killed), state.started_ns,
                state.finished_ns, boot_id, instance,
            ),
        )  # fmt: skip

    def set_name(self, instance: str, name: str) -> None:
        self._write("UPDATE instances SET name=? WHERE id=?", (name, instance))

    def set_held(self, instance: str, held: bool) -> None:
        self._write("UPDATE instances SET held=? WHERE id=?", (int(held), instance))

    def set_restart_count(self, instance: str, count: int) -> None:
        self._write("UPDATE instances SET restart_count=? WHERE id=?", (count, instance))

    def set_spec(self, instance: str, spec: CreateSpec) -> None:
        self._write("UPDATE instances SET spec=? WHERE id=?", (dumps(spec), instance))

    def delete(self, instance: str) -> None:
        self._write("DELETE FROM instances WHERE id=?", (instance,))

    # Networks, endpoints, volumes: a body of JSON each, whose shape is that of their owner

    def networks(self) -> list[dict[str, Any]]:
        return [json.loads(row[0]) for row in self._read("SELECT body FROM networks ORDER BY created_ns")]

    def insert_network(self, id: str, name: str, body: dict[str, Any], created_ns: int) -> None:
        self._write("INSERT INTO networks VALUES (?,?,?,?)", (id, name, dumps(body), created_ns))

    def delete_network(self, id: str) -> None:
        self._write("DELETE FROM networks WHERE id=?", (id,))

    def endpoints(self) -> list[tuple[str, str, dict[str, Any]]]:
        """Instance, network, body."""
        return [(r[0], r[1], json.loads(r[2])) for r in self._read("SELECT instance, network, body FROM endpoints")]

    def put_endpoint(self, instance: str, network: str, body: dict[str, Any]) -> None:
        """Nothing is stored of an instance that has been removed meanwhile."""
        self._write(
            "INSERT OR REPLACE INTO endpoints SELECT ?1, ?2, ?3 WHERE EXISTS (SELECT 1 FROM instances WHERE id=?1)",
            (instance, network, dumps(body)),
        )

    def delete_endpoint(self, instance: str, network: str) -> None:
        self._write("DELETE FROM endpoints WHERE instance=? AND network=?", (instance, network))

    def volumes(self) -> list[dict[str, Any]]:
        return [json.loads(row[0]) for row in self._read("SELECT body FROM volumes ORDER BY created_ns")]

    def insert_volume(self, name: str, body: dict[str, Any], created_ns: int) -> None:
        self._write("INSERT INTO volumes VALUES (?,?,?)", (name, dumps(body), created_ns))

    def delete_volume(self, name: str) -> None:
        self._write("DELETE FROM volumes WHERE name=?", (name,))

    def _read(self, sql: str) -> list[tuple[Any, ...]]:
        with self._lock:
            return self._db.execute(sql).fetchall()

    # Execs

    def execs(self) -> list[ExecRow]:
        with self._lock:
            rows = self._db.execute("SELECT id, instance, config, pid, exit_code, boot_id FROM execs").fetchall()
        return [ExecRow(r[0], r[1], json.loads(r[2]), r[3], r[4], r[5]) for r in rows]

    def insert_exec(self, row: ExecRow) -> None:
        values = (row.id, row.instance, dumps(row.config), row.pid, row.exit_code, row.boot_id)
        self._write("INSERT INTO execs VALUES (?,?,?,?,?,?)", values)

    def set_exec(self, exec_id: str, pid: int, exit_code: int | None) -> None:
        self._write("UPDATE execs SET pid=?, exit_code=? WHERE id=?", (pid, exit_code, exec_id))

    def delete_execs(self, exec_ids: list[str]) -> None:
        with self._lock:
            self._db.executemany("DELETE FROM execs WHERE id=?", [(x,) for x in exec_ids])

    # Events

    def add_event(self, event: Event) -> None:
        """Append to the ring, which keeps between EVENTS_KEPT and twice as many."""
        values = (event.time_ns, event.type, event.action, event.actor_id, dumps(event.attributes))
        self._write("INSERT INTO events (time_ns, type, action, actor, attributes) VALUES (?,?,?,?,?)", values)
        with self._lock:
            self._events += 1
            if self._events >= 2 * EVENTS_KEPT:
                self._db.execute("DELETE FROM events WHERE seq <= (SELECT MAX(seq) FROM events) - ?", (EVENTS_KEPT,))
                self._events = EVENTS_KEPT

    def events(self, since_ns: int) -> Iterator[Event]:
        """What is still in the ring from `since_ns` on, oldest first."""
        with self._lock:
            rows = self._db.execute(
                "SELECT time_ns, type, action, actor, attributes FROM events WHERE time_ns >= ? ORDER BY seq", (since_ns,)
            ).fetchall()
        return (Event(r[0], r[1], r[2], r[3], json.loads(r[4])) for r in rows)


def _failure(error: sqlite3.OperationalError) -> AmbiError:
    if error.sqlite_errorcode == sqlite3.SQLITE_FULL:
        return StorageFull(
            "state database: no space left on device",
            hint="free space: `ambi image ls` shows what uses it, `ambi image rm` removes images",
        )
    return Internal(f"state database: {error}")


def _row(c: tuple[Any, ...]) -> Row:
    ids = json.loads(c[7]) if c[7] else None
    id_map = IdMap(_ranges(ids["uids"]), _ranges(ids["gids"])) if ids else None
    state = State(Status(c[9]), c[10], c[11], c[12], bool(c[13]), c[14], c[15])
    spec = CreateSpec(*json.loads(c[6]))
    return Row(
        c[0],
        c[1],
        Workload(c[2]),
        Isolation(c[3]),
        c[4],
        c[5],
        spec,
        id_map,
        c[8],
        state,
        c[16],
        c[17],
        tuple(json.loads(c[18])),
        bool(c[19]),
    )


def _ranges(rows: list[list[int]]) -> tuple[IdRange, ...]:
    return tuple(IdRange(*row) for row in rows)
