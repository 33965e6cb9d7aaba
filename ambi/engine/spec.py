"""From a completed request to a launch plan: Docker's Config and HostConfig, the layers, an OCI `config.json`.

Pure but for reading the host's devices and resolver settings, so it also serves as the check at create.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from ambi.core.errors import InvalidRequest
from ambi.core.model import InstanceId, Isolation
from ambi.core.plan import File, LaunchPlan, Layers, Supervision
from ambi.core.roots import Roots
from ambi.engine import annotation, cgroups, logopts, mounts, netfiles, resources, security
from ambi.engine.body import Body
from ambi.engine.mountpoints import Point
from ambi.engine.netnames import Names
from ambi.engine.request import argv_of
from ambi.engine.types import CreateSpec
from ambi.linux.capabilities import NAMES

DEFAULT_PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
HIGHEST_ID = (1 << 31) - 1  # Docker's limit of users and groups


class Prepared(NamedTuple):
    """What a plan is made of, before the layers are known. points: sources of binds are made at start."""

    config: dict[str, Any]
    points: tuple[Point, ...]
    files: tuple[File, ...]
    supervision: Supervision


def prepare(
    instance: InstanceId,
    isolation: Isolation,
    spec: CreateSpec,
    data_dir: Path,
    net: Names | None = None,
    points: tuple[Point, ...] | None = None,
) -> Prepared:
    """Everything that can be wrong with `spec` raises InvalidRequest here. net: at a start, how it is on its networks.

    points: its mount points, once they are resolved.
    """
    config, host = Body("Config", spec.config), Body("HostConfig", spec.host)
    asked = mounts.parse(config, host)
    points = asked.points if points is None else points
    own = [point.entry() for point in points] + list(asked.tmpfs)
    targets = {str(entry["destination"]) for entry in own}
    options = security.parse_options(host)
    oci = {
        "ociVersion": "1.0.2",
        "process": _process(config, host, options, net.env if net is not None else ()),
        "root": {"path": "rootfs", "readonly": host.flag("ReadonlyRootfs")},
        "hostname": config.text("Hostname"),
        "domainname": config.text("Domainname"),
        "mounts": mounts.all_mounts(host, own),
        "linux": _linux(instance, isolation, host, options),
        "annotations": _annotations(host),
    }
    made = netfiles.build(config, host, net)
    files = tuple(File(PurePosixPath(path), 0o644, text) for path, text in made.items() if path not in targets)
    log = data_dir / f"{instance}-json.log"
    return Prepared(oci, points, files, logopts.supervision(config, host, log))


def plan(
    instance: InstanceId, isolation: Isolation, spec: CreateSpec, layers: Layers, roots: Roots, prepared: Prepared
) -> LaunchPlan:
    """The plan of one run."""
    return LaunchPlan(
        id=instance,
        isolation=isolation,
        config=prepared.config,
        rootfs=layers,
        data_dir=roots.instance_data(instance),
        run_dir=roots.instance_run(instance),
        layers_dir=roots.layers,
        guest_dir=roots.guest,
        files=prepared.files,
        stdin=bool(spec.config.get("OpenStdin")),
        vm=resources.vm_shape(Body("HostConfig", spec.host)) if isolation is Isolation.VM else None,
        supervision=prepared.supervision,
    )


def environment(config: Body, linked: Sequence[str] = ()) -> list[str]:
    """Docker's own variables and those of links, replaced in place by those of the config, then the rest of the config's.

    A name without a value takes Docker's own away.
    """
    own = config.strings("Env")
    values = {item.partition("=")[0]: item for item in own}
    base = [DEFAULT_PATH, f"HOSTNAME={config.text('Hostname')}"] + (["TERM=xterm"] if config.flag("Tty") else []) + [*linked]
    names = {item.partition("=")[0] for item in base}
    merged = [values.get(item.partition("=")[0], item) for item in base]
    return [x for x in merged + [x for x in own if x.partition("=")[0] not in names] if "=" in x]


def _annotations(host: Body) -> dict[str, str]:
    """What is removed at its end need not be written out before: see ambi/core/plan.py."""
    asked = {"ambi.init": host.flag("Init"), "ambi.disposable": host.flag("AutoRemove")}
    return {**annotation.wanted(host), **{name: "1" for name, wanted in asked.items() if wanted}}


def _process(config: Body, host: Body, options: security.SecurityOptions, linked: Sequence[str]) -> dict[str, Any]:
    process: dict[str, Any] = {
        "terminal": config.flag("Tty"),
        "user": _user(config.text("User"), host.strings("GroupAdd")),
        "args": list(argv_of(config.data)),
        "env": environment(config, linked),
        "cwd": config.text("WorkingDir") or "/",
        "capabilities": security.capability_sets(security.capabilities(host)),
        "noNewPrivileges": options.no_new_privileges,
    }
    if adjustment := host.number("OomScoreAdj"):
        if not -1000 <= adjustment <= 1000:
            raise InvalidRequest(
                f"Invalid value {adjustment}, range for oom score adj is [-1000, 1000]", hint="--oom-score-adj 0"
            )
        process["oomScoreAdj"] = adjustment
    if limits := resources.rlimits(host):
        process["rlimits"] = limits
    size = host.data.get("ConsoleSize")
    if config.flag("Tty") and isinstance(size, list) and len(size) == 2 and all(isinstance(x, int) and x > 0 for x in size):
        process["consoleSize"] = {"height": size[0], "width": size[1]}
    return process


def _user(name: str, groups: list[str]) -> dict[str, Any]:
    """`username` and names of groups are resolved by the driver inside the root, see ambi/core/plan.py."""
    user: dict[str, Any] = {"uid": 0, "gid": 0}
    if name:
        user["username"] = name
    for group in groups:
        if not (group.isascii() and group.isdigit()):
            user.setdefault("additionalGroups", []).append(group)
        elif len(group) > 10 or int(group) > HIGHEST_ID:
            raise InvalidRequest(
                f"--group-add {group}: uids and gids must be in range 0-{HIGHEST_ID}",
                hint="give the name or the number of a group",
            )
        else:
            user.setdefault("additionalGids", []).append(int(group))
    return user


def _linux(instance: InstanceId, isolation: Isolation, host: Body, options: security.SecurityOptions) -> dict[str, Any]:
    names = security.capabilities(host)
    vm = isolation is Isolation.VM
    devices = [] if vm else resources.devices(host)
    limits = resources.limits(host)
    limits["devices"] = resources.device_rules(host, devices)
    linux: dict[str, Any] = {
        "namespaces": _namespaces(host),
        "cgroupsPath": cgroups.path(host, instance),
        "resources": limits,
        "sysctl": resources.sysctls(host, vm=vm),
        "maskedPaths": security.paths(host, "MaskedPaths", security.MASKED_PATHS),
        "readonlyPaths": security.paths(host, "ReadonlyPaths", security.READONLY_PATHS),
        "devices": [{k: v for k, v in device.items() if k != "access"} for device in devices],
    }
    filter = security.seccomp(host, options, names)
    if filter is not None:
        linux["seccomp"] = filter
    return linux


def _namespaces(host: Body) -> list[dict[str, str]]:
    kinds = ["mount", "cgroup"]
    if host.text("NetworkMode") != "host":
        kinds.append("network")
    for kind, key in (("uts", "UTSMode"), ("pid", "PidMode"), ("ipc", "IpcMode")):
        if host.text(key) != "host":
            kinds.append(kind)
    return [{"type": kind} for kind in kinds]


def exec_process(spec: CreateSpec, config: Body, linked: Sequence[str] = ()) -> dict[str, Any]:
    """The OCI `process` of an exec: Docker's ExecConfig over the instance's own settings. linked: variables of its links.

    Privileged raises capabilities alone, as in Docker; the seccomp program stays the instance's.
    """
    base, host = Body("Config", spec.config), Body("HostConfig", spec.host)
    names = NAMES if config.flag("Privileged") else security.capabilities(host)
    own = config.strings("Env")
    taken = {item.partition("=")[0] for item in own}
    env = [x for x in environment(base, linked) if x.partition("=")[0] not in taken]
    if config.flag("Tty") and not any(x.startswith("TERM=") for x in env + own):
        env.append("TERM=xterm")
    process: dict[str, Any] = {
        "terminal": config.flag("Tty"),
        "user": _user(config.text("User") or base.text("User"), host.strings("GroupAdd")),
        "args": config.strings("Cmd"),
        "env": env + [x for x in own if "=" in x],
        "cwd": config.text("WorkingDir") or base.text("WorkingDir") or "/",
        "capabilities": security.capability_sets(tuple(names)),
        "noNewPrivileges": security.parse_options(host).no_new_privileges,
    }
    if limits := resources.rlimits(host):
        process["rlimits"] = limits
    return process
