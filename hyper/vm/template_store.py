"""Where templates are kept, below GUEST/templates. Files only; template.py makes and uses them.

    KEY/manifest.json   {"format", "key", "state_bytes", "state_blake2b", "memory_bytes", "memory_mtime_ns"}; its own mtime
                        is when the template was used last
    KEY/state           of the VMM and its devices, as the back-end wrote it
    KEY/memory          the guest's memory: sparse, as large as it
    KEY.failed          why the last try to make KEY failed; there is none for an hour
    new/                one that is being made, or was when its maker ended
    lock                held (flock) by who makes one

A directory KEY is complete: it is renamed to its name when all of it is on the disk. All of it is root's alone.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from _blake2 import blake2b  # hashlib brings OpenSSL with it, which a shim can do without
from pathlib import Path
from typing import NamedTuple

from ambi.core.errors import Corrupt, StorageFull

FORMAT = 1
KEEP = 6  # templates; one of a guest with 256 MiB has 90 MiB on the disk
RETRY_S = 3600.0
SPARE_BYTES = 256 << 20  # of the disk that a new template leaves free
MAX_STATE = 16 << 20
MANIFEST, STATE, MEMORY, NEW, LOCK, FAILED = "manifest.json", "state", "memory", "new", "lock", ".failed"


def key_of(*parts: object) -> str:
    """A name for `parts`, which are JSON values."""
    return blake2b(json.dumps([FORMAT, *parts]).encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()


class Template(NamedTuple):
    """One that is complete. memory: a descriptor for reading, the holder's to close."""

    key: str
    memory: int
    state: bytes


class Store:
    """Templates below `path`, which is made when it is needed."""

    __slots__ = ("_path",)

    def __init__(self, path: Path) -> None:
        self._path = path

    def open(self, key: str) -> Template | None:
        """The template, which counts as used; None when there is none. Raises Corrupt when it is damaged."""
        home = self._path / key
        try:
            manifest = json.loads((home / MANIFEST).read_bytes())
            with open(home / STATE, "rb") as file:
                state = file.read(MAX_STATE)
            memory = os.open(home / MEMORY, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError as error:
            if (home / MANIFEST).exists():
                raise Corrupt(f"{error.filename} is gone") from error
            return None
        except ValueError as error:
            raise Corrupt(f"{home / MANIFEST} is damaged: {error}") from error
        if manifest != _manifest(key, state, memory):
            os.close(memory)
            raise Corrupt(f"{home} is not as it was made")
        os.utime(home / MANIFEST)
        return Template(key, memory, state)

    def drop(self, key: str) -> None:
        """Forget it; who runs from it goes on."""
        _remove(self._path / key)

    def failed(self, key: str) -> bool:
        """Whether making it failed lately."""
        try:
            return abs(time.time() - (self._path / (key + FAILED)).stat().st_mtime) < RETRY_S
        except FileNotFoundError:
            return False

    def fail(self, key: str, reason: str) -> None:
        (self._path / (key + FAILED)).write_text(reason + "\n")

    def draft(self, key: str, memory_bytes: int) -> Draft | None:
        """A place to make it in; None while another one is being made. Raises StorageFull, OSError."""
        self._path.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(self._path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            found = os.statvfs(self._path)
            if found.f_bavail * found.f_frsize < memory_bytes + SPARE_BYTES:
                raise StorageFull(f"too little space for a template below {self._path}")
            return Draft(self._path, key, memory_bytes, lock)
        except BlockingIOError:
            os.close(lock)
            return None
        except BaseException:
            os.close(lock)
            raise


class Draft:
    """A template that is being made. memory: a descriptor of its empty file, for reading and writing."""

    __slots__ = ("_key", "_lock", "_path", "memory")

    def __init__(self, path: Path, key: str, memory_bytes: int, lock: int) -> None:
        self._path, self._key, self._lock = path, key, lock
        _remove(path / NEW)
        (path / NEW).mkdir(mode=0o700)
        self.memory = os.open(path / NEW / MEMORY, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        os.ftruncate(self.memory, memory_bytes)

    def publish(self, state: bytes) -> None:
        """Complete it; those that were not used for longest go."""
        new = self._path / NEW
        os.fsync(self.memory)
        for name, data in ((STATE, state), (MANIFEST, json.dumps(_manifest(self._key, state, self.memory)).encode())):
            with open(new / name, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        _remove(self._path / self._key)
        (self._path / (self._key + FAILED)).unlink(missing_ok=True)
        os.rename(new, self._path / self._key)
        self._prune()

    def _prune(self) -> None:
        used = []
        for entry in os.scandir(self._path):
            if entry.name.endswith(FAILED) and time.time() - entry.stat().st_mtime > RETRY_S:
                os.unlink(entry.path)
            if entry.is_dir(follow_symlinks=False) and entry.name != NEW:
                try:
                    used.append((os.stat(f"{entry.path}/{MANIFEST}").st_mtime_ns, entry.path))
                except FileNotFoundError:
                    used.append((0, entry.path))
        for _, path in sorted(used)[:-KEEP]:
            _remove(Path(path))

    def close(self) -> None:
        """What is not published is removed, and the lock let go."""
        os.close(self.memory)
        _remove(self._path / NEW)
        os.close(self._lock)


def _manifest(key: str, state: bytes, memory: int) -> dict[str, object]:
    info = os.fstat(memory)
    return {
        "format": FORMAT,
        "key": key,
        "state_bytes": len(state),
        "state_blake2b": blake2b(state, digest_size=32).hexdigest(),
        "memory_bytes": info.st_size,
        "memory_mtime_ns": info.st_mtime_ns,
    }


def _remove(home: Path) -> None:
    """Remove a template's directory, its manifest first; nothing when it is gone."""
    for name in (MANIFEST, STATE, MEMORY):
        try:
            (home / name).unlink(missing_ok=True)
        except NotADirectoryError:
            home.unlink(missing_ok=True)
            return
    try:
        home.rmdir()
    except FileNotFoundError:
        pass
