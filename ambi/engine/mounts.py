"""Mounts of a config.json: the default ones as Docker lists them, then what the client asks for."""

from __future__ import annotations

import os
import posixpath
from typing import Any, NamedTuple

from ambi.core.errors import InvalidRequest, from_os_error
from ambi.engine.body import Body

SHM_BYTES = 64 << 20
_PROPAGATION = ("private", "rprivate", "shared", "rshared", "slave", "rslave")
_NO_EFFECT = ("z", "Z", "consistent", "cached", "delegated")  # for SELinux and for other hosts
_TMPFS_DEFAULTS = ("noexec", "nosuid", "nodev")
_TMPFS_FLAGS = frozenset(
    f"{prefix}{name}" for name in ("exec", "suid", "dev", "atime", "diratime", "relatime") for prefix in ("", "no")
) | {"ro", "rw", "strictatime", "sync", "async", "dirsync"}
_TMPFS_VALUES = frozenset(("size", "mode", "uid", "gid", "nr_inodes", "nr_blocks", "mpol"))

Mount = dict[str, Any]  # OCI runtime-spec: destination, type, source, options


class Bind(NamedTuple):
    """A bind mount that a client asks for. make_source: a source that is missing is made, as a directory (`-v`)."""

    source: str
    target: str
    options: tuple[str, ...]
    make_source: bool

    def mount(self) -> Mount:
        return {"destination": self.target, "type": "bind", "source": self.source, "options": list(self.options)}


class Mounts(NamedTuple):
    binds: tuple[Bind, ...]
    tmpfs: tuple[Mount, ...]

    @property
    def targets(self) -> set[str]:
        return {b.target for b in self.binds} | {str(m["destination"]) for m in self.tmpfs}


def parse(host: Body) -> Mounts:
    """What Binds, Mounts and Tmpfs of a HostConfig ask for. Raises InvalidRequest."""
    binds = [_volume(text) for text in host.strings("Binds")]
    tmpfs = [_tmpfs(target, options.split(",") if options else []) for target, options in host.texts("Tmpfs").items()]
    for entry in host.objects("Mounts"):
        kind = entry.text("Type")
        if kind == "bind":
            binds.append(_bind(entry))
        elif kind == "tmpfs":
            tmpfs.append(_tmpfs_entry(entry))
        else:
            raise InvalidRequest(f"--mount type={kind} is not supported yet", hint="use type=bind or type=tmpfs")
    seen: set[str] = set()
    for target in [b.target for b in binds] + [m["destination"] for m in tmpfs]:
        if target in seen:
            raise InvalidRequest(f"Duplicate mount point: {target}", hint="mount one thing at each path")
        seen.add(target)
    return Mounts(tuple(binds), tuple(tmpfs))


def _target(path: str, what: str) -> str:
    if not path.startswith("/"):
        raise InvalidRequest(
            f"invalid mount config for '{what}': mount path must be absolute: '{path}'",
            hint="the path inside begins with `/`, for example -v /srv:/data",
        )
    clean = posixpath.normpath("/" + path.lstrip("/"))
    if clean == "/":
        raise InvalidRequest(
            f"invalid mount config for '{what}': destination can't be '/'", hint="mount below the root, for example at /data"
        )
    return clean


def _volume(text: str) -> Bind:
    """`SOURCE:TARGET[:OPTION,...]`."""
    source, _, rest = text.partition(":")
    target, _, modes = rest.partition(":")
    if not target or ":" in modes:
        raise InvalidRequest(f"invalid volume specification: '{text}'", hint="-v SOURCE:TARGET[:ro]")
    if not source.startswith("/"):
        raise InvalidRequest(
            f"--volume {text}: named volumes are not supported yet", hint="give an absolute path of the host as source"
        )
    readonly, propagation, nocopy = False, "rprivate", False
    for mode in modes.split(",") if modes else []:
        if mode in ("ro", "rw"):
            readonly = mode == "ro"
        elif mode in _PROPAGATION:
            propagation = mode
        elif mode == "nocopy":
            nocopy = True
        elif mode not in _NO_EFFECT:
            raise InvalidRequest(
                f"invalid mode: {mode} in volume '{text}'", hint="modes: ro, rw, or a propagation such as rslave"
            )
    if nocopy:
        raise InvalidRequest(f"invalid volume specification: '{text}': nocopy is for named volumes", hint="leave nocopy out")
    options = ("rbind", propagation) + (("ro",) if readonly else ())
    return Bind(posixpath.normpath(source), _target(target, text), options, True)


def _bind(entry: Body) -> Bind:
    """An element of HostConfig.Mounts of type bind; its source has to be there."""
    source, target = entry.text("Source"), _target(entry.text("Target"), "bind")
    if not source.startswith("/"):
        raise InvalidRequest(
            f"invalid mount config for type \"bind\": invalid mount path: '{source}' mount path must be absolute",
            hint="give a path of the host that begins with `/`",
        )
    options = entry.object("BindOptions")
    propagation = options.text("Propagation") or "rprivate"
    if propagation not in _PROPAGATION:
        raise InvalidRequest(
            f'invalid mount config for type "bind": invalid propagation: {propagation}',
            hint="propagations: " + " ".join(sorted(_PROPAGATION)),
        )
    _only(options, "BindOptions", ("Propagation", "NonRecursive", "CreateMountpoint"))
    _only(entry, "Mounts", ("Type", "Source", "Target", "ReadOnly", "Consistency", "BindOptions"))
    make = options.flag("CreateMountpoint")
    if not make and not os.path.lexists(source):
        raise InvalidRequest(
            f'invalid mount config for type "bind": bind source path does not exist: {source}', hint=f"mkdir -p {source}"
        )
    flags = ["bind" if options.flag("NonRecursive") else "rbind", propagation]
    if entry.flag("ReadOnly"):
        flags.append("ro")
    return Bind(posixpath.normpath(source), target, tuple(flags), make)


def _tmpfs_entry(entry: Body) -> Mount:
    if entry.text("Source"):
        raise InvalidRequest(
            'invalid mount config for type "tmpfs": field Source must not be specified', hint="leave src out"
        )
    _only(entry, "Mounts", ("Type", "Source", "Target", "ReadOnly", "Consistency", "TmpfsOptions"))
    options = entry.object("TmpfsOptions")
    _only(options, "TmpfsOptions", ("SizeBytes", "Mode"))
    words = ["ro"] if entry.flag("ReadOnly") else []
    if size := options.number("SizeBytes"):
        words.append(f"size={size}")
    if mode := options.number("Mode"):
        words.append(f"mode={mode:o}")
    return _tmpfs(entry.text("Target"), words)


def _tmpfs(target: str, words: list[str]) -> Mount:
    options = list(_TMPFS_DEFAULTS)
    for word in words:
        name, equals, value = word.partition("=")
        if (equals and (name not in _TMPFS_VALUES or not value)) or (not equals and name not in _TMPFS_FLAGS):
            raise InvalidRequest(f"invalid tmpfs option '{word}'", hint="for example --tmpfs /tmp:size=64m,mode=1777")
        opposite = name[2:] if name.startswith("no") else f"no{name}"
        options = [x for x in options if x not in (opposite, word)]
        options.append(word)
    return {"destination": _target(target, "tmpfs"), "type": "tmpfs", "source": "tmpfs", "options": options}


def _only(body: Body, name: str, allowed: tuple[str, ...]) -> None:
    for key, value in body.data.items():
        if value and key not in allowed and value != {}:
            raise InvalidRequest(f"{name}.{key} is not supported", hint=f"leave {key} out")


def make_sources(binds: tuple[Bind, ...]) -> None:
    """See that every source exists; made as a directory where the client's way of asking allows it."""
    for bind in binds:
        if os.path.lexists(bind.source):
            continue
        if not bind.make_source:
            raise InvalidRequest(
                f'invalid mount config for type "bind": bind source path does not exist: {bind.source}',
                hint=f"mkdir -p {bind.source}",
            )
        try:
            os.makedirs(bind.source, 0o755, exist_ok=True)
        except OSError as error:
            raise from_os_error(f"cannot make the source of bind mount {bind.target}", error) from error


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


def all_mounts(host: Body, own: Mounts) -> list[Mount]:
    """The default mounts but for those that the client replaces, then the client's, outer ones first."""
    targets = own.targets
    mounts = [m for m in default_mounts(host) if m["destination"] not in targets]
    asked = [b.mount() for b in own.binds] + list(own.tmpfs)
    return mounts + sorted(asked, key=lambda m: m["destination"].count("/"))
