"""The `local` driver of volumes: names, options, directories, and what a volume is to config.json.

    VOLUMES/NAME/volume.json     {"format": 1, "driver", "labels", "options", "created_ns"}
    VOLUMES/NAME/_data/          the volume; also below a volume with options, which is then empty
    VOLUMES/NAME/disk.img        with type=disk instead: a file system for one virtual machine at a time
    VOLUMES/NAME/making          made for an instance that does not exist yet

A directory appears and disappears by rename, so `.new-NAME` and `.old-...` are what a death left behind. A volume whose
options name a file system has it mounted at `_data` while an instance with it runs: mountedvolumes.py.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import stat
from pathlib import Path
from typing import Any, NamedTuple

from ambi.core.errors import InvalidRequest, NotFound, Unsupported, from_os_error
from ambi.core.model import Isolation
from ambi.core.roots import Roots
from ambi.core.words import parse_size
from ambi.engine import mountedvolumes
from ambi.engine.mountpoints import Point, VolumeAsk

DRIVER = "local"
DATA, DISK, RECORD, MAKING = "_data", "disk.img", "volume.json", "making"
FORMAT = 1
HALF_MADE = (".new-", ".old-")
_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]+\Z")
_OPTIONS = frozenset(("type", "o", "device", "size"))
_NEEDS = {"device": ("type",), "type": ("device",), "o": ("device", "type")}
_BIND_WORDS = ("bind", "rbind")
_HOST_WORDS = ("defaults", "async")


class Volume(NamedTuple):
    """labels and options are None when they were not given, as clients see them."""

    name: str
    driver: str
    labels: dict[str, str] | None
    options: dict[str, str] | None
    created_ns: int

    @property
    def kind(self) -> str:
        """`dir`, or the type that its options name: `none`, `disk`, or one of mountedvolumes.KINDS."""
        return (self.options or {}).get("type", "dir")

    def body(self) -> dict[str, Any]:
        return {"format": FORMAT, **self._asdict()}

    @classmethod
    def of(cls, body: dict[str, Any]) -> Volume:
        return cls(body["name"], body["driver"], body["labels"], body["options"], body["created_ns"])


def mountpoint(volumes: Path, name: str) -> Path:
    return volumes / name / DATA


def check(name: str, driver: str, options: dict[str, str] | None) -> None:
    """Docker's rules, with its words. Raises NotFound (the driver), InvalidRequest, Unsupported."""
    if driver != DRIVER:
        raise NotFound(
            f'create {name}: error looking up volume plugin {driver}: plugin "{driver}" not found',
            hint="there is one driver: leave it out, or --driver local",
        )
    if len(name) < 2:
        raise InvalidRequest(
            f"create {name}: volume name is too short, names should be at least two alphanumeric characters",
            hint="give a longer name",
        )
    if not _NAME.match(name) or len(name) > 200:
        raise InvalidRequest(
            f'create {name}: "{name}" includes invalid characters for a local volume name, only'
            ' "[a-zA-Z0-9][a-zA-Z0-9_.-]" are allowed. If you intended to pass a host directory, use absolute path',
            hint="begin a path of the host with `/` or `./`",
        )
    if options:
        try:
            _check_options(options)
        except (InvalidRequest, Unsupported) as error:
            raise type(error)(f"create {name}: {error.message}", hint=error.hint) from None


def _check_options(options: dict[str, str]) -> None:
    for key in options:
        if key not in _OPTIONS:
            raise InvalidRequest(f'invalid option: "{key}"', hint="options of volumes: type, o, device, size")
    kind = options.get("type", "")
    if kind == "disk":
        if set(options) != {"type", "size"}:
            raise InvalidRequest("a volume of type disk has a size and nothing else", hint="-o type=disk -o size=1g")
        size_of(options["size"])
        return
    if "size" in options:
        raise InvalidRequest(
            "quota size requested but no quota support",
            hint="-o type=disk -o size=1g for a VM, or -o type=tmpfs -o o=size=1g",
        )
    for key, needed in _NEEDS.items():
        for other in needed:
            if key in options and not options.get(other):
                raise InvalidRequest(f'missing required option: "{other}"', hint=f"-o {other}=VALUE")
    words = words_of(options)
    if kind == "none" or _bound(words):
        if not _bound(words) or not options["device"].startswith("/"):
            raise InvalidRequest(
                "a volume of type none is a bind of an absolute path", hint="-o type=none -o o=bind -o device=/path"
            )
    elif kind in mountedvolumes.KINDS:
        mountedvolumes.check(options)
    else:
        raise Unsupported(
            f"volumes of type {kind} are not supported",
            hint="mount it on the host, and give its path: -o type=none -o o=bind -o device=/path",
        )
    if kind not in mountedvolumes.NETWORKED:  # whose options are the kernel's to check
        _check_words(kind, words)


def _check_words(kind: str, words: list[str]) -> None:
    """What no driver can read is refused here, not at the first start."""
    from ambi.engine.mounts import TMPFS_FLAGS, TMPFS_VALUES  # here, because mounts knows nothing of drivers

    for word in words:
        name, equals, value = word.partition("=")
        if word in (*_BIND_WORDS, *_HOST_WORDS) or word in TMPFS_FLAGS - {"sync", "dirsync"}:
            continue
        if kind == "tmpfs" and equals and value and name in TMPFS_VALUES:
            continue
        raise InvalidRequest(f'invalid option: "{word}" in "o"', hint="as in -o o=bind,ro or -o o=size=64m,mode=1777")


def words_of(options: dict[str, str]) -> list[str]:
    return [word for word in options.get("o", "").split(",") if word]


def _bound(words: list[str]) -> bool:
    return any(word in _BIND_WORDS for word in words)


def size_of(text: str) -> int:
    """Bytes of `512m` or `1g`. Raises InvalidRequest."""
    size = parse_size(text) or 0
    if not 1 << 20 <= size <= 64 << 40:
        raise InvalidRequest(f"invalid size: '{text}'", hint="from 1m to 64t, as -o size=1g")
    return size


def make(roots: Roots, volume: Volume, *, making: bool = False) -> None:
    """Have the volume's directory appear, whole. Nothing is left when it fails. making: see `settle`."""
    volumes = roots.volumes
    new = volumes / f".new-{volume.name}"
    try:
        volumes.mkdir(mode=0o711, parents=True, exist_ok=True)
        _clear(new)
        new.mkdir(0o711)
        _fill(roots, new, volume)
        if making:
            (new / MAKING).touch()
        os.rename(new, volumes / volume.name)
    except OSError as error:
        shutil.rmtree(new, ignore_errors=True)
        raise from_os_error(f"cannot create volume '{volume.name}'", error) from error
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise


def _fill(roots: Roots, new: Path, volume: Volume) -> None:
    if volume.kind == "disk":
        from hyper.vm import disk

        disk.ensure(new / DISK, size_of((volume.options or {})["size"]), roots.guest / "disks")
    else:
        (new / DATA).mkdir(0o755)
        os.chmod(new / DATA, 0o755)
    fd = os.open(new / RECORD, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(fd, "w", encoding="utf-8", errors="surrogateescape") as file:
        file.write(json.dumps(volume.body()))


def settle(volumes: Path, name: str) -> bool:
    """The instance that the volume was made for exists now, or never will: whether it was not settled before."""
    try:
        os.unlink(volumes / name / MAKING)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise from_os_error(f"cannot make volume '{name}'", error) from error
    return True


def detach(volumes: Path, name: str) -> Path | None:
    """Have the volume disappear at once: what is left of it, for `discard`; None when it was not there."""
    old = volumes / f".old-{name}-{secrets.token_hex(4)}"
    try:
        os.rename(volumes / name, old)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise from_os_error(f"cannot remove volume '{name}'", error) from error
    return old


def discard(name: str, old: Path | None) -> None:
    try:
        if old is not None:
            shutil.rmtree(old)
    except OSError as error:
        raise from_os_error(f"cannot remove what was in volume '{name}'", error) from error


def _clear(path: Path) -> None:
    if os.path.lexists(path):
        shutil.rmtree(path)


def found(volumes: Path) -> dict[str, Volume]:
    """The volumes that there are; what a death left half made or half removed is taken away."""
    there: dict[str, Volume] = {}
    try:
        names = sorted(os.listdir(volumes))
    except FileNotFoundError:
        return there
    for name in names:
        if name.startswith(HALF_MADE):
            shutil.rmtree(volumes / name, ignore_errors=True)
            continue
        try:
            body = json.loads((volumes / name / RECORD).read_bytes())
            if body["format"] == FORMAT and body["name"] == name:
                there[name] = Volume.of(body)
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return there


def point(volumes: Path, volume: Volume, ask: VolumeAsk, isolation: Isolation) -> Point:
    """What `volume` is to an instance that asks for it. Raises InvalidRequest: a disk for a container, a bad subpath."""
    shown = str(mountpoint(volumes, volume.name))
    options = volume.options or {}
    words: tuple[str, ...] = ("rbind", "rprivate")
    origin, what = shown, "bind"
    extra = tuple(
        word for word, wanted in (("ambi.copy", ask.copy), (f"ambi.subpath={ask.subpath}", bool(ask.subpath))) if wanted
    )
    readonly = ask.readonly
    if volume.kind == "disk":
        if isolation is not Isolation.VM:
            raise no_disk(volume.name)
        words, origin, what = (), str(volumes / volume.name / DISK), "ambi.disk"
        shown = origin
    elif volume.kind in mountedvolumes.KINDS and not _bound(words_of(options)):
        words = ("rbind", "rprivate")
    elif options:
        own = [word for word in words_of(options) if word not in _HOST_WORDS]
        readonly = readonly or "ro" in own
        own = [word for word in own if word not in ("ro", "rw")]
        kept = tuple(word for word in own if word not in _BIND_WORDS)
        words = (("rbind" if "rbind" in own else "bind"), "rprivate", *kept)
        origin = os.path.normpath(options["device"])
    if what != "bind" and ask.subpath:
        raise InvalidRequest(
            f"volume {volume.name} of type {volume.kind} has no subpaths", hint="mount it whole, or use another volume"
        )
    if what == "bind":
        words = (*words, *extra)
    return Point(
        "volume", ask.target, what, origin, words, readonly, what == "bind" and "bind" not in words, shown=shown,
        name=volume.name, mode=ask.mode, anonymous=not ask.name,
    )  # fmt: skip


def no_disk(name: str) -> InvalidRequest:
    return InvalidRequest(
        f"volume {name} is a disk, which a virtual machine alone can mount",
        hint="run it as a VM: --isolation vm, or make a volume without type=disk",
    )


def used_bytes(volumes: Path, name: str) -> int:
    """What the volume takes on disk, as far as it is allocated."""
    from ambi.engine.query import tree_bytes

    disk = volumes / name / DISK
    try:
        status = os.stat(disk, follow_symlinks=False)
        if stat.S_ISREG(status.st_mode):
            return status.st_blocks * 512
    except FileNotFoundError:
        pass
    return tree_bytes(str(mountpoint(volumes, name)))
