"""References and metadata: SQLite in `images.db`, one connection, used under the store's mutex.

`PRAGMA user_version` is the schema's version. A migration first copies the file to `images.db.VERSION.bak`; a newer
database is refused.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from ambi.core.errors import Corrupt, Unsupported

VERSION = 2

# names.name: canonical reference. layers: what is known of an archive whatever its compression. image_layers: one row a
# layer of an image, lowest first, with the blob that its manifest lists. snapshots: forms of a layer that are ready.
# removed: images that go with the last instance that uses them.
_REMOVED = "CREATE TABLE removed (image_id TEXT PRIMARY KEY REFERENCES images (id) ON DELETE CASCADE) STRICT;"
_SCHEMA = f"""
CREATE TABLE images (
    id TEXT PRIMARY KEY, manifest TEXT NOT NULL, manifest_size INTEGER NOT NULL, created_ns INTEGER NOT NULL
) STRICT;
CREATE TABLE names (
    name TEXT PRIMARY KEY, image_id TEXT NOT NULL REFERENCES images (id) ON DELETE CASCADE
) STRICT;
CREATE TABLE layers (
    diff_id TEXT PRIMARY KEY, tar_bytes INTEGER NOT NULL, content_bytes INTEGER NOT NULL
) STRICT;
CREATE TABLE image_layers (
    image_id TEXT NOT NULL REFERENCES images (id) ON DELETE CASCADE, position INTEGER NOT NULL,
    diff_id TEXT NOT NULL REFERENCES layers (diff_id), blob TEXT NOT NULL, media_type TEXT NOT NULL,
    blob_bytes INTEGER NOT NULL, PRIMARY KEY (image_id, position)
) STRICT;
CREATE INDEX image_layers_by_diff_id ON image_layers (diff_id);
CREATE TABLE snapshots (
    diff_id TEXT NOT NULL REFERENCES layers (diff_id), form TEXT NOT NULL, name TEXT NOT NULL UNIQUE,
    size_bytes INTEGER NOT NULL, PRIMARY KEY (diff_id, form)
) STRICT;
{_REMOVED}
"""
# Step N leads from version N + 1 to N + 2. Never edit one that has been released.
_MIGRATIONS: tuple[str, ...] = (_REMOVED,)


class ImageRow(NamedTuple):
    id: str
    manifest: str
    manifest_size: int
    created_ns: int


class LayerRow(NamedTuple):
    """One layer of one image."""

    diff_id: str
    tar_bytes: int
    content_bytes: int
    blob: str
    media_type: str
    blob_bytes: int


class SnapshotRow(NamedTuple):
    diff_id: str
    form: str
    name: str
    size_bytes: int


class Database:
    """Rows in, rows out. Methods that change something run inside `transaction`."""

    def __init__(self, path: Path) -> None:
        try:
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            try:
                self._db.execute("PRAGMA journal_mode = WAL")
                self._db.execute("PRAGMA synchronous = FULL")
                self._db.execute("PRAGMA foreign_keys = ON")
                self._upgrade(path)
            except BaseException:
                self._db.close()
                raise
        except sqlite3.DatabaseError as error:
            raise Corrupt(
                f"image database {path} cannot be used: {error}", hint=f"restore {path} from a backup, or move it away"
            ) from error

    def _upgrade(self, path: Path) -> None:
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version > VERSION:
            raise Unsupported(
                f"image database {path} has format {version}, this version reads {VERSION}",
                hint="use the newer ambi that wrote it, or another --data-root",
            )
        if version == VERSION:
            return
        if version:
            self._db.execute("VACUUM INTO ?", (str(path.with_name(f"{path.name}.{version}.bak")),))
        steps = _MIGRATIONS[version - 1 :] if version else (_SCHEMA,)
        script = "".join(steps)
        self._db.executescript(f"BEGIN IMMEDIATE;{script}PRAGMA user_version = {VERSION};COMMIT;")

    def close(self) -> None:
        self._db.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def add_image(self, row: ImageRow, layers: list[LayerRow]) -> None:
        """Does nothing to an image that is there already."""
        if self._db.execute("INSERT OR IGNORE INTO images VALUES (?, ?, ?, ?)", row).rowcount == 0:
            return
        for position, layer in enumerate(layers):
            self._db.execute("INSERT OR IGNORE INTO layers VALUES (?, ?, ?)", layer[:3])
            self._db.execute(
                "INSERT INTO image_layers VALUES (?, ?, ?, ?, ?, ?)",
                (row.id, position, layer.diff_id, layer.blob, layer.media_type, layer.blob_bytes),
            )

    def delete_image(self, image_id: str) -> None:
        self._db.execute("DELETE FROM images WHERE id = ?", (image_id,))

    def set_name(self, name: str, image_id: str) -> None:
        self._db.execute("INSERT OR REPLACE INTO names VALUES (?, ?)", (name, image_id))
        self.keep(image_id)

    def set_removed(self, image_id: str) -> None:
        """It goes with the last instance that uses it, unless it is kept meanwhile."""
        self._db.execute("INSERT OR IGNORE INTO removed VALUES (?)", (image_id,))

    def keep(self, image_id: str) -> None:
        self._db.execute("DELETE FROM removed WHERE image_id = ?", (image_id,))

    def removed(self) -> list[str]:
        return [row[0] for row in self._db.execute("SELECT image_id FROM removed ORDER BY image_id")]

    def delete_name(self, name: str) -> None:
        self._db.execute("DELETE FROM names WHERE name = ?", (name,))

    def add_snapshot(self, row: SnapshotRow) -> None:
        self._db.execute("INSERT INTO snapshots VALUES (?, ?, ?, ?)", row)

    def image(self, image_id: str) -> ImageRow | None:
        row = self._db.execute("SELECT * FROM images WHERE id = ?", (image_id,)).fetchone()
        return ImageRow(*row) if row else None

    def images(self) -> list[ImageRow]:
        return [ImageRow(*row) for row in self._db.execute("SELECT * FROM images ORDER BY created_ns DESC, id")]

    def image_ids(self, prefix: str) -> list[str]:
        """Ids that start with `prefix` (`sha256:` and hexadecimal digits), or have such a manifest."""
        end = prefix[:-1] + chr(ord(prefix[-1]) + 1)
        query = "SELECT id FROM images WHERE (id >= ?1 AND id < ?2) OR manifest = ?1 LIMIT 2"
        return [row[0] for row in self._db.execute(query, (prefix, end))]

    def image_of(self, name: str) -> str | None:
        row = self._db.execute("SELECT image_id FROM names WHERE name = ?", (name,)).fetchone()
        return row[0] if row else None

    def names(self, image_id: str) -> list[str]:
        return [row[0] for row in self._db.execute("SELECT name FROM names WHERE image_id = ? ORDER BY name", (image_id,))]

    def layers(self, image_id: str) -> list[LayerRow]:
        query = """SELECT diff_id, tar_bytes, content_bytes, blob, media_type, blob_bytes
                   FROM image_layers JOIN layers USING (diff_id) WHERE image_id = ? ORDER BY position"""
        return [LayerRow(*row) for row in self._db.execute(query, (image_id,))]

    def layer(self, diff_id: str) -> tuple[int, int] | None:
        """tar_bytes and content_bytes."""
        row = self._db.execute("SELECT tar_bytes, content_bytes FROM layers WHERE diff_id = ?", (diff_id,)).fetchone()
        return (row[0], row[1]) if row else None

    def snapshot(self, diff_id: str, form: str) -> SnapshotRow | None:
        row = self._db.execute("SELECT * FROM snapshots WHERE diff_id = ? AND form = ?", (diff_id, form)).fetchone()
        return SnapshotRow(*row) if row else None

    def snapshot_names(self) -> set[str]:
        return {row[0] for row in self._db.execute("SELECT name FROM snapshots")}

    def blobs(self) -> set[str]:
        """Every blob that some image needs."""
        query = "SELECT id FROM images UNION SELECT manifest FROM images UNION SELECT blob FROM image_layers"
        return {row[0] for row in self._db.execute(query)}

    def drop_unused_layers(self, held: set[str]) -> None:
        """Forget layers, and their snapshots, that no image has and `held` does not name."""
        query = "SELECT diff_id FROM layers WHERE diff_id NOT IN (SELECT diff_id FROM image_layers)"
        unused = [row for row in self._db.execute(query).fetchall() if row[0] not in held]
        self._db.executemany("DELETE FROM snapshots WHERE diff_id = ?", unused)
        self._db.executemany("DELETE FROM layers WHERE diff_id = ?", unused)
