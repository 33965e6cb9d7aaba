"""References, changes, times and the database's versions."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import pytest

from ambi.core.errors import Corrupt, InvalidRequest, Unsupported
from images import times
from images.changes import apply_changes
from images.database import _MIGRATIONS, VERSION, Database
from images.reference import parse

D = "sha256:" + "a" * 64


@pytest.mark.parametrize(
    "text,familiar,canonical",
    [
        ("foo", "foo:latest", "docker.io/library/foo:latest"),
        ("foo:1", "foo:1", "docker.io/library/foo:1"),
        ("docker.io/foo", "foo:latest", "docker.io/library/foo:latest"),
        ("index.docker.io/library/foo", "foo:latest", "docker.io/library/foo:latest"),
        ("team/foo", "team/foo:latest", "docker.io/team/foo:latest"),
        ("library/a/b", "library/a/b:latest", "docker.io/library/a/b:latest"),
        ("localhost/foo", "localhost/foo:latest", "localhost/foo:latest"),
        ("host:5000/a/b:c", "host:5000/a/b:c", "host:5000/a/b:c"),
        ("ghcr.io/x/y__z", "ghcr.io/x/y__z:latest", "ghcr.io/x/y__z:latest"),
        ("Host/foo", "Host/foo:latest", "Host/foo:latest"),
        (f"foo@{D}", f"foo@{D}", f"docker.io/library/foo@{D}"),
        (f"foo:1@{D}", f"foo:1@{D}", f"docker.io/library/foo:1@{D}"),
    ],
)
def test_references(text: str, familiar: str, canonical: str) -> None:
    reference = parse(text)
    assert (reference.familiar, reference.canonical) == (familiar, canonical)
    assert parse(familiar) == reference
    assert parse(canonical) == reference


@pytest.mark.parametrize(
    "text",
    ["", ":", "a:", "a@", "a b", "A", "a/B", "-a", "a..b", "a:b:c", "a/", "/a", "a//b", f"a@{D[:-1]}", "a:" + "t" * 129,
     "x" * 300, "a" * 64, "a\n", "../a", "host:port/a"],
)  # fmt: skip
def test_what_is_no_reference(text: str) -> None:
    with pytest.raises(InvalidRequest, match="invalid re"):
        parse(text)


def test_changes() -> None:
    config: dict[str, Any] = {}
    lines = [
        'CMD ["a", "b"]', "ENTRYPOINT run it", "ENV A=1 B='two words'", "ENV A 3", "EXPOSE 80 53/udp", "LABEL x=y",
        "USER bob",
        'VOLUME ["/data"]', "WORKDIR /srv", "WORKDIR sub", "STOPSIGNAL SIGINT", "ONBUILD RUN x",
    ]  # fmt: skip
    apply_changes(config, lines)
    assert config == {
        "Cmd": ["a", "b"], "Entrypoint": ["/bin/sh", "-c", "run it"], "Env": ["A=3", "B=two words"],
        "ExposedPorts": {"80/tcp": {}, "53/udp": {}}, "Labels": {"x": "y"}, "User": "bob", "Volumes": {"/data": {}},
        "WorkingDir": "/srv/sub", "StopSignal": "SIGINT", "OnBuild": ["RUN x"],
    }  # fmt: skip


@pytest.mark.parametrize("line", ["RUN x", "CMD", "ENV A", "EXPOSE 70000", "EXPOSE 1/quic", "LABEL 'open", ""])
def test_changes_that_are_refused(line: str) -> None:
    with pytest.raises(InvalidRequest):
        apply_changes({}, [line])


def test_times() -> None:
    assert times.parse_ns("1970-01-01T00:00:01.5Z") == 1_500_000_000
    assert times.parse_ns("2026-01-02T03:04:05.123456789+01:00") == times.parse_ns("2026-01-02T02:04:05.123456789Z")
    assert [times.parse_ns(x) for x in (None, "", "soon", "0001-01-01T00:00:00Z")] == [0, 0, 0, 0]
    assert times.format_ns(1_500_000_000) == "1970-01-01T00:00:01.5Z"
    assert times.parse_ns(times.format_ns(1_795_522_322_166_024_437)) == 1_795_522_322_166_024_437


def test_a_newer_database_is_refused_and_a_damaged_one_named(tmp_path: Path) -> None:
    path = tmp_path / "images.db"
    Database(path).close()
    db = sqlite3.connect(path)
    db.execute(f"PRAGMA user_version = {VERSION + 1}")
    db.close()
    with pytest.raises(Unsupported, match=f"format {VERSION + 1}") as refused:
        Database(path)
    assert refused.value.hint
    other = tmp_path / "other.db"
    other.write_bytes(b"not a database" * 1000)
    with pytest.raises(Corrupt, match=r"other\.db"):
        Database(other)


def test_an_older_database_is_copied_and_migrated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "images.db"
    Database(path).close()
    monkeypatch.setattr("images.database.VERSION", VERSION + 1)
    monkeypatch.setattr("images.database._MIGRATIONS", (*_MIGRATIONS, "ALTER TABLE images ADD COLUMN extra TEXT;"))
    Database(path).close()
    db = sqlite3.connect(path)
    assert "extra" in [row[1] for row in db.execute("PRAGMA table_info(images)")]
    assert db.execute("PRAGMA user_version").fetchone() == (VERSION + 1,)
    db.close()
    backup = sqlite3.connect(tmp_path / f"images.db.{VERSION}.bak")
    assert backup.execute("PRAGMA user_version").fetchone() == (VERSION,)
    backup.close()
