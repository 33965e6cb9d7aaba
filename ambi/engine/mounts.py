"""Mounts of a config.json: the default ones as Docker lists them, then what the client asks for."""

from __future__ import annotations

import os
import posixpath
from typing import TYPE_CHECKING

from ambi.core.errors import InvalidRequest, from_os_error
from ambi.engine.body import Body
from ambi.engine.mountpoints import Asked, Inherit, Mount, Point, VolumeAsk
from ambi.linux.mount import table as mounted

if TYPE_CHECKING:
    from ambi.engine.state import Row

SHM_BYTES = 64 << 20
_PROPAGATION = ("private", "rprivate", "shared", "rshared", "slave", "rslave")
_NO_EFFECT = ("z", "Z", "consistent", "cached", "delegated")  # for SELinux and for other hosts
_TMPFS_DEFAULTS = ("noexec", "nosuid", "nodev")
TMPFS_FLAGS = frozenset(
    f"{prefix}{name}" for name in ("exec", "suid", "dev", "atime", "diratime", "relatime") for prefix in ("", "no")
) | {"ro", "rw", "strictatime", "sync", "async", "dirsync"}
TMPFS_VALUES = frozenset(("size", "mode", "uid", "gid", "nr_inodes", "nr_blocks", "mpol"))
_BIND_OPTIONS = ("Propagation", "NonRecursive", "CreateMountpoint", "ReadOnlyNonRecursive", "ReadOnlyForceRecursive")


def parse(config: Body, host: Body) -> Asked:
    """What Volumes of a Config and Binds, Mounts, Tmpfs and VolumesFrom of a HostConfig ask for. Raises InvalidRequest."""
    driver = host.text("VolumeDriver")
    found = [_volume(text, driver) for text in host.strings("Binds")]
    tmpfs = [_tmpfs(target, options.split(",") if options else []) for target, options in host.texts("Tmpfs").items()]
    found += [_mount_of(entry, driver) for entry in host.objects("Mounts")]
    targets: set[str] = set()
    for target in [item.target for item in found] + [m["destination"] for m in tmpfs]:
        if target in targets:
            raise InvalidRequest(f"Duplicate mount point: {target}", hint="mount one thing at each path")
        targets.add(target)
    for path in config.object("Volumes").data:
        target = _target(path, path)
        if target not in targets:
            found.append(VolumeAsk(target, driver=driver))
            targets.add(target)
    points = tuple(item for item in found if isinstance(item, Point))
    volumes = tuple(item for item in found if isinstance(item, VolumeAsk))
    return Asked(tuple(_inherit(text) for text in host.strings("VolumesFrom")), points, volumes, tuple(tmpfs))


def _inherit(text: str) -> Inherit:
    """`NAME[:MODE]`."""
    name, _, mode = text.partition(":")
    if not name or mode not in ("", "ro", "rw", "z", "Z"):
        raise InvalidRequest(f"invalid volumes-from specification: '{text}'", hint="--volumes-from NAME[:ro]")
    return Inherit(name, mode == "ro", mode)


def _target(path: str, what: str) -> str:
    if not path.startswith("/"):
        raise InvalidRequest(
            f"invalid mount config for '{what}': mount path must be absolute: '{path}'",
            hint="the path inside begins with `/`, for example -v /srv:/data",
        )
    clean = clean_target(path)
    if clean == "/":
        raise InvalidRequest(
            f"invalid mount config for '{what}': destination can't be '/'", hint="mount below the root, for example at /data"
        )
    return clean


def clean_target(path: str) -> str:
    """An absolute path inside as it is kept."""
    return posixpath.normpath("/" + path.lstrip("/"))


def _volume(text: str, driver: str) -> Point | VolumeAsk:
    """`SOURCE:TARGET[:OPTION,...]`: a path of the host, or the name of a volume."""
    source, _, rest = text.partition(":")
    target, _, modes = rest.partition(":")
    if not target or not source or ":" in modes:
        raise InvalidRequest(f"invalid volume specification: '{text}'", hint="-v SOURCE:TARGET[:ro]")
    readonly, propagation, copy = _modes(text, modes)
    if not source.startswith("/"):
        if propagation:
            raise InvalidRequest(f"invalid mode: {modes} in volume '{text}'", hint="a propagation is for paths of the host")
        return VolumeAsk(_target(target, text), source, modes, readonly, copy, driver=driver)
    if not copy:
        raise InvalidRequest(f"invalid volume specification: '{text}': nocopy is for named volumes", hint="leave nocopy out")
    return _bind_point(source, _target(target, text), propagation, readonly=readonly)._replace(mode=modes, make_source=True)


def _modes(text: str, modes: str) -> tuple[bool, str, bool]:
    """Whether it is read-only, the propagation or "", and whether an empty volume is filled."""
    readonly, propagation, copy = False, "", True
    for mode in modes.split(",") if modes else []:
        if mode in ("ro", "rw"):
            readonly = mode == "ro"
        elif mode in _PROPAGATION:
            propagation = mode
        elif mode == "nocopy":
            copy = False
        elif mode not in _NO_EFFECT:
            raise InvalidRequest(
                f"invalid mode: {mode} in volume '{text}'", hint="modes: ro, rw, nocopy, or a propagation such as rslave"
            )
    return readonly, propagation, copy


def _bind_point(source: str, target: str, propagation: str, *, readonly: bool, bind: str = "rbind") -> Point:
    clean, spread = posixpath.normpath(source), propagation or "rprivate"
    return Point(
        "bind", target, "bind", clean, (bind, spread), readonly, bind == "rbind", shown=clean, propagation=spread
    )  # fmt: skip


def _mount_of(entry: Body, driver: str) -> Point | VolumeAsk:
    """An element of HostConfig.Mounts."""
    kind = entry.text("Type")
    if kind == "bind":
        return _bind(entry)
    if kind == "tmpfs":
        return _tmpfs_entry(entry)
    if kind == "volume":
        return _volume_entry(entry, driver)
    if kind in ("image", "npipe", "cluster"):
        raise InvalidRequest(f"--mount type={kind} is not supported", hint="use type=bind, type=volume or type=tmpfs")
    raise InvalidRequest(f"mount type unknown: {kind!r}", hint="use type=bind, type=volume or type=tmpfs")


def _bind(entry: Body) -> Point:
    """Its source has to be there."""
    source, target = entry.text("Source"), _target(entry.text("Target"), "bind")
    what = 'invalid mount config for type "bind"'
    if not source:
        raise InvalidRequest(f"{what}: field Source must not be empty", hint="give a path of the host: src=/srv/data")
    if not source.startswith("/"):
        raise InvalidRequest(
            f"{what}: invalid mount path: '{source}' mount path must be absolute",
            hint="give a path of the host that begins with `/`",
        )
    options = entry.object("BindOptions")
    propagation = options.text("Propagation")
    if propagation and propagation not in _PROPAGATION:
        raise InvalidRequest(
            f"{what}: invalid propagation: {propagation}", hint="propagations: " + " ".join(sorted(_PROPAGATION))
        )
    _only(options, "BindOptions", _BIND_OPTIONS)
    _only(entry, "Mounts", ("Type", "Source", "Target", "ReadOnly", "Consistency", "BindOptions"))
    make, readonly = options.flag("CreateMountpoint"), entry.flag("ReadOnly")
    if not make and not os.path.lexists(source):
        raise InvalidRequest(f"{what}: bind source path does not exist: {source}", hint=f"mkdir -p {source}")
    if options.flag("ReadOnlyForceRecursive") and (not readonly or options.flag("NonRecursive")):
        raise InvalidRequest(f"{what}: ReadOnlyForceRecursive needs ReadOnly and a recursive bind", hint="leave it out")
    bind = "bind" if options.flag("NonRecursive") else "rbind"
    point = _bind_point(source, target, propagation, readonly=readonly, bind=bind)
    recursive = point.recursive and not options.flag("ReadOnlyNonRecursive")
    return point._replace(make_source=make, recursive=recursive)


def _volume_entry(entry: Body, driver: str) -> VolumeAsk:
    _only(entry, "Mounts", ("Type", "Source", "Target", "ReadOnly", "Consistency", "VolumeOptions"))
    options = entry.object("VolumeOptions")
    _only(options, "VolumeOptions", ("NoCopy", "Labels", "DriverConfig", "Subpath"))
    maker = options.object("DriverConfig")
    name, subpath = entry.text("Source"), options.text("Subpath")
    if subpath and (subpath.startswith("/") or ".." in subpath.split("/")):
        raise InvalidRequest(
            f'invalid mount config for type "volume": subpath {subpath!r} is not inside the volume',
            hint="give a path relative to the volume, without `..`",
        )
    if subpath and not name:
        raise InvalidRequest(
            'invalid mount config for type "volume": a subpath needs a named volume', hint="name it: src=NAME"
        )
    return VolumeAsk(
        _target(entry.text("Target"), "volume"),
        name,
        readonly=entry.flag("ReadOnly"),
        copy=not options.flag("NoCopy"),
        subpath=subpath,
        driver=maker.text("Name") or driver,
        options=maker.texts("Options") or None,
        labels=options.texts("Labels") or None,
    )


def _tmpfs_entry(entry: Body) -> Point:
    if entry.text("Source"):
        raise InvalidRequest(
            'invalid mount config for type "tmpfs": field Source must not be specified', hint="leave src out"
        )
    _only(entry, "Mounts", ("Type", "Source", "Target", "ReadOnly", "Consistency", "TmpfsOptions"))
    options = entry.object("TmpfsOptions")
    _only(options, "TmpfsOptions", ("SizeBytes", "Mode"))
    words = []
    if size := options.number("SizeBytes"):
        words.append(f"size={size}")
    if mode := options.number("Mode"):
        words.append(f"mode={mode:o}")
    made = _tmpfs(entry.text("Target"), words)
    return Point("tmpfs", made["destination"], "tmpfs", "tmpfs", tuple(made["options"]), readonly=entry.flag("ReadOnly"))


def _tmpfs(target: str, words: list[str]) -> Mount:
    options = list(_TMPFS_DEFAULTS)
    for word in words:
        name, equals, value = word.partition("=")
        if (equals and (name not in TMPFS_VALUES or not value)) or (not equals and name not in TMPFS_FLAGS):
            raise InvalidRequest(f"invalid tmpfs option '{word}'", hint="for example --tmpfs /tmp:size=64m,mode=1777")
        opposite = name[2:] if name.startswith("no") else f"no{name}"
        options = [x for x in options if x not in (opposite, word)]
        options.append(word)
    return {"destination": _target(target, "tmpfs"), "type": "tmpfs", "source": "tmpfs", "options": options}


def _only(body: Body, name: str, allowed: tuple[str, ...]) -> None:
    for key, value in body.data.items():
        if value and key not in allowed and value != {}:
            raise InvalidRequest(f"{name}.{key} is not supported", hint=f"leave {key} out")


def upgraded(row: Row) -> Row:
    """`row` with its mount points, which versions without volumes did not store."""
    host = Body("HostConfig", row.spec.host)
    if row.mounts or not (host.data.get("Binds") or host.data.get("Mounts")):
        return row
    return row._replace(mounts=tuple(point.stored() for point in parse(Body("Config", {}), host).points))


def check_propagation(points: tuple[Point, ...]) -> None:
    """A mount that shares with the host, or follows it, is of a mount of the host that others can share or follow."""
    for point in points:
        spread = point.propagation.removeprefix("r")
        if point.kind != "bind" or spread not in ("shared", "slave"):
            continue
        place, fields = _mount_below(os.path.realpath(point.origin))
        if not any(field.startswith("shared:") or (spread == "slave" and field.startswith("master:")) for field in fields):
            kind = "a shared mount" if spread == "shared" else "a shared or slave mount"
            raise InvalidRequest(
                f"path {point.origin} is mounted on {place} but it is not {kind}", hint=f"mount --make-rshared {place}"
            )


def _mount_below(path: str) -> tuple[str, list[str]]:
    """Where the mount that has `path` is, and its optional fields (proc(5), mountinfo)."""
    best, found = "", []
    for place, fields in mounted():
        inside = path == place or path.startswith(place.rstrip("/") + "/")
        if inside and len(place) >= len(best):
            best, found = place, fields
    return best, found


def make_sources(points: tuple[Point, ...]) -> None:
    """See that every source exists; made as a directory where the client's way of asking allows it."""
    for point in points:
        if point.what != "bind" or os.path.lexists(point.origin):
            continue
        if not point.make_source:
            raise InvalidRequest(
                f'invalid mount config for type "bind": bind source path does not exist: {point.origin}',
                hint=f"mkdir -p {point.origin}",
            )
        try:
            os.makedirs(point.origin, 0o755, exist_ok=True)
        except OSError as error:
            raise from_os_error(f"cannot make the source of bind mount {point.target}", error) from error


def default_mounts(host: Body) -> list[Mount]:
    """What every instance has, in Docker's order."""
    privileged = host.flag("Privileged")
    readonly = [] if privileged else ["ro"]
    mounts = [
        _mount("/proc", "proc", "proc", ["nosuid", "noexec", "nodev"]),
        _mount("/dev", "tmpfs", "tmpfs", ["nosuid", "strictatime", "mode=755", "size=65536k"]),
        _mount("/dev/pts", "devpts", "devpts", ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]),
        _mount("/sys", "sysfs", "sysfs", ["nosuid", "noexec", "nodev", *readonly]),
        _mount("/sys/fs/cgroup", "cgroup", "cgroup", [*readonly, "nosuid", "noexec", "nodev", "relatime"]),
    ]
    ipc = host.text("IpcMode")
    if ipc == "host":
        return [
            *mounts,
            _mount("/dev/mqueue", "bind", "/dev/mqueue", ["rbind", "nosuid", "noexec", "nodev"]),
            _mount("/dev/shm", "bind", "/dev/shm", ["rbind", "nosuid", "noexec", "nodev"]),
        ]
    mounts.append(_mount("/dev/mqueue", "mqueue", "mqueue", ["nosuid", "noexec", "nodev"]))
    if ipc != "none":
        size = host.number("ShmSize") or SHM_BYTES
        if size < 0:
            raise InvalidRequest("SHM size can not be less than 0", hint="for example --shm-size 64m")
        mounts.append(_mount("/dev/shm", "tmpfs", "shm", ["nosuid", "noexec", "nodev", "mode=1777", f"size={size}"]))
    return mounts


def _mount(destination: str, kind: str, source: str, options: list[str]) -> Mount:
    return {"destination": destination, "type": kind, "source": source, "options": options}


def all_mounts(host: Body, own: list[Mount]) -> list[Mount]:
    """The default mounts but for those that the client replaces, then the client's, outer ones first."""
    targets = {m["destination"] for m in own}
    mounts = [m for m in default_mounts(host) if m["destination"] not in targets]
    return mounts + sorted(own, key=lambda m: str(m["destination"]).count("/"))
