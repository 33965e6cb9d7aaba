"""The launch plan: what the engine produces and the drivers consume. The waist of the hourglass.

A plan is an OCI runtime `config.json` (runtime-spec 1.0.2), a root file system, and what config.json has no words for.
It is written to `launch.json` in the instance's data directory, because it crosses from the engine to the shim and must
survive both:

    {"format": 1, "id": ID, "isolation": "container" | "vm", "config": {...}, "rootfs": ROOTFS, "files": [FILE, ...],
     "vm": {vcpus, memory_bytes, kernel, disk_bytes} | null, "id_map": {"uids": [[in, out, n]], "gids": ...} | null,
     "data_dir": PATH, "run_dir": PATH, "layers_dir": PATH, "guest_dir": PATH, "stdin": true | false,
     "supervision": SUPERVISION}
    ROOTFS = {"kind": "layers", "lowers": [{name, form, path, size_bytes}, ...], "upper": PATH}
           | {"kind": "directory", "path": PATH}
    FILE   = {"path": PATH INSIDE, "mode": int, "content": text}

Fields of config.json that mean something of their own here:

- `process.user.username` (the spec has it for Windows only): the user as the image or the caller wrote it,
  `NAME|UID[:GROUP|GID]`. When present and not empty the *driver* resolves it against /etc/passwd and /etc/group of the
  instance's own root, with its supplementary groups, adds `additionalGids`, and sets HOME when `env` has none.
- `process.user.additionalGroups` (ours): names of further supplementary groups, which the driver resolves in the same way
  and adds to `additionalGids`; one that /etc/group does not have is an InvalidRequest, "Unable to find group NAME".
- `linux.cgroupsPath` is always given and absolute. `root.path` is ignored, `root.readonly` counts.
- `process.args[0]` is looked up along PATH of `process.env` inside the root by the driver.
- a network namespace without path means a fresh one in which only `lo` is up.
- `annotations`: `ambi.init` = `1` runs the program under a reaping init of ours (docker's --init); `ambi.disposable` = `1`
  says that the upper is worthless after this run, so that its file system need not be synced when the run ends.
- a mount of type `bind` has an absolute source on the host; the engine has checked that it exists. Options may have
  `ambi.copy` (an empty source gets what the root has at the destination), `ambi.subpath=PATH` (resolved in the source),
  `ambi.of=PATH` (the source is looked up in the mount namespace at PATH, another container's).
- a mount of type `ambi.disk` has an image file of ext4 as its source; VMs alone can have one.
"""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

from ambi.core.errors import Corrupt
from ambi.core.model import IdMap, IdRange, InstanceId, Isolation, VmShape

FORMAT = 1
LAUNCH_FILE = "launch.json"  # in the instance's data directory


class Layer(NamedTuple):
    """One read-only layer, ready to be mounted. `name` is short (at most 12 characters) and unique in the data root."""

    name: str
    form: Literal["erofs", "dir"]
    path: Path
    size_bytes: int


class Layers(NamedTuple):
    """A stack of layers, the lowest first, below a private writable one.

    upper: an existing directory of the instance. A container keeps `fs/` and `work/` of its overlay in it, a VM `disk.img`.
    """

    lowers: tuple[Layer, ...]
    upper: Path


class Directory(NamedTuple):
    """A root tree that is already there, mounted by somebody else."""

    path: Path


Rootfs = Layers | Directory


class File(NamedTuple):
    """A small file that the engine makes anew at each start and the driver binds over `path`, writable.

    A container keeps it below `data_dir/files`, a VM on its writable disk outside the root.
    """

    path: PurePosixPath
    mode: int
    content: str


class Supervision(NamedTuple):
    """What the shim, not the driver, needs to know.

    log: path of the json-file log, None for no log; rotated at log_max_bytes (0: never), log_max_files kept.
    open_stdin: the process has a stdin; stdin_once: it is closed when the first attached client closes its side.
    """

    log: Path | None = None
    log_max_bytes: int = 0
    log_max_files: int = 1
    open_stdin: bool = False
    stdin_once: bool = False


class LaunchPlan(NamedTuple):
    """Everything a driver may use. It creates nothing that the plan does not name.

    data_dir, run_dir: the instance's own directories; layers_dir: where layers are mounted, once for all (see
    ambi/shim/README.md); guest_dir: kernels and the initramfs.
    stdin: whether init gets a stdin pipe; else it reads /dev/null. `config["process"]["terminal"]` asks for a terminal.
    """

    id: InstanceId
    isolation: Isolation
    config: dict[str, Any]
    rootfs: Rootfs
    data_dir: Path
    run_dir: Path
    layers_dir: Path
    guest_dir: Path
    files: tuple[File, ...] = ()
    stdin: bool = False
    vm: VmShape | None = None
    id_map: IdMap | None = None
    supervision: Supervision = Supervision()

    def to_json(self) -> str:
        return json.dumps(_encode(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | bytes) -> LaunchPlan:
        """Raises Corrupt when `text` is not a plan of this format."""
        try:
            return _decode(json.loads(text))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Corrupt(f"launch plan is damaged: {type(error).__name__}: {error}") from error

    @classmethod
    def load(cls, data_dir: Path) -> LaunchPlan:
        return cls.from_json((data_dir / LAUNCH_FILE).read_bytes())


def _encode(plan: LaunchPlan) -> dict[str, Any]:
    rootfs: dict[str, Any]
    if isinstance(plan.rootfs, Layers):
        lowers = [{**x._asdict(), "path": str(x.path)} for x in plan.rootfs.lowers]
        rootfs = {"kind": "layers", "lowers": lowers, "upper": str(plan.rootfs.upper)}
    else:
        rootfs = {"kind": "directory", "path": str(plan.rootfs.path)}
    supervision = plan.supervision._asdict()
    supervision["log"] = str(plan.supervision.log) if plan.supervision.log else None
    return {
        "format": FORMAT,
        "id": plan.id,
        "isolation": plan.isolation.value,
        "config": plan.config,
        "rootfs": rootfs,
        "data_dir": str(plan.data_dir),
        "run_dir": str(plan.run_dir),
        "layers_dir": str(plan.layers_dir),
        "guest_dir": str(plan.guest_dir),
        "files": [{"path": str(f.path), "mode": f.mode, "content": f.content} for f in plan.files],
        "stdin": plan.stdin,
        "vm": plan.vm._asdict() if plan.vm else None,
        "id_map": {"uids": plan.id_map.uids, "gids": plan.id_map.gids} if plan.id_map else None,
        "supervision": supervision,
    }


def _decode(body: dict[str, Any]) -> LaunchPlan:
    if body["format"] != FORMAT:
        raise Corrupt(f"launch plan has format {body['format']}, this version reads {FORMAT}")
    root = body["rootfs"]
    rootfs: Rootfs
    if root["kind"] == "layers":
        lowers = tuple(Layer(x["name"], x["form"], Path(x["path"]), x["size_bytes"]) for x in root["lowers"])
        rootfs = Layers(lowers, Path(root["upper"]))
    else:
        rootfs = Directory(Path(root["path"]))
    ids = body["id_map"]
    supervision = dict(body["supervision"])
    supervision["log"] = Path(supervision["log"]) if supervision["log"] else None
    return LaunchPlan(
        id=body["id"],
        isolation=Isolation(body["isolation"]),
        config=body["config"],
        rootfs=rootfs,
        data_dir=Path(body["data_dir"]),
        run_dir=Path(body["run_dir"]),
        layers_dir=Path(body["layers_dir"]),
        guest_dir=Path(body["guest_dir"]),
        files=tuple(File(PurePosixPath(f["path"]), f["mode"], f["content"]) for f in body["files"]),
        stdin=body["stdin"],
        vm=VmShape(**body["vm"]) if body["vm"] else None,
        id_map=IdMap(_ranges(ids["uids"]), _ranges(ids["gids"])) if ids else None,
        supervision=Supervision(**supervision),
    )


def _ranges(rows: list[list[int]]) -> tuple[IdRange, ...]:
    return tuple(IdRange(*row) for row in rows)
