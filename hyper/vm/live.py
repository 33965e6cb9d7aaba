"""What changes while a VM runs: its limits. Values only."""

from __future__ import annotations

from typing import Any

from ambi.core.errors import InvalidRequest, Unsupported
from ambi.core.plan import LaunchPlan
from hyper import translate
from hyper.guest.protocol import Items, SetupTag, Value
from hyper.validate import IGNORED_RESOURCES, RESOURCES

RESTART = "change it while it does not run: ambi stop, ambi update, ambi start"
NO_LIMIT = 0xFFFF_FFFF_FFFF_FFFF  # of LIMITS: a limit that was there goes


def updated(plan: LaunchPlan, resources: dict[str, Any]) -> LaunchPlan:
    """`plan` with what `resources` changes. Raises Unsupported naming what a running VM cannot change, InvalidRequest."""
    for name, value in resources.items():
        if name in IGNORED_RESOURCES or not value:
            continue
        if not isinstance(value, dict):
            raise InvalidRequest(f"linux.resources.{name} is no object")
        for key, limit in value.items():
            if limit and key not in RESOURCES.get(name, ()):
                raise Unsupported(f"a virtual machine does not support linux.resources.{name}.{key}")
    linux = plan.config["linux"]
    merged = {**(linux.get("resources") or {})}
    for name, value in resources.items():
        if isinstance(value, dict):
            merged[name] = {**(merged.get(name) or {}), **{key: limit for key, limit in value.items() if limit}}
    changed = plan._replace(config={**plan.config, "linux": {**linux, "resources": merged}})
    _check_size(changed, resources)
    return changed


def _check_size(plan: LaunchPlan, resources: dict[str, Any]) -> None:
    """Nothing can be more than the machine that the guest has: it has booted with it."""
    shape = translate.shape(plan)
    memory = (resources.get("memory") or {}).get("limit") or 0
    if memory > shape.memory_bytes:
        raise Unsupported(
            f"the memory of a running virtual machine, {shape.memory_bytes >> 20} MiB, cannot become {memory >> 20} MiB",
            hint=RESTART,
        )
    cpu = plan.config["linux"]["resources"].get("cpu") or {}
    quota, period = cpu.get("quota") or 0, cpu.get("period") or 100_000
    if "cpu" in resources and quota > shape.vcpus * period:
        raise Unsupported(
            f"a running virtual machine with {shape.vcpus} CPUs cannot use {quota / period:g}: their number is fixed",
            hint=RESTART,
        )


def limits(plan: LaunchPlan, resources: dict[str, Any]) -> Items:
    """The fields of LIMITS: what `resources` changes, as the updated `plan` has it."""
    merged = plan.config["linux"]["resources"]
    pairs = (
        (SetupTag.MEMORY, "memory", "limit"),
        (SetupTag.CPU_QUOTA, "cpu", "quota"),
        (SetupTag.CPU_PERIOD, "cpu", "period"),
        (SetupTag.PIDS, "pids", "limit"),
        (SetupTag.CPU_SHARES, "cpu", "shares"),
    )
    items: list[tuple[int, Value]] = []
    for tag, name, key in pairs:
        asked = resources.get(name) or {}
        value = (merged.get(name) or {}).get(key)
        if value and (asked.get(key) or (name == "cpu" and key in ("quota", "period") and asked)):
            items.append((tag, value if value > 0 else NO_LIMIT))
    return items
