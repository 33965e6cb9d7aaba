"""What changes while a VM runs: its limits, and the sizes that follow from them. Values only."""

from __future__ import annotations

from typing import Any

from ambi.core.errors import InvalidRequest, Unsupported
from ambi.core.model import GUEST_OVERHEAD_BYTES
from ambi.core.plan import LaunchPlan
from hyper import translate
from hyper.guest.protocol import Items, SetupTag, Value
from hyper.validate import IGNORED_RESOURCES, RESOURCES

RESTART = "change it while it does not run: ambi stop, ambi update, ambi start"
NO_LIMIT = 0xFFFF_FFFF_FFFF_FFFF  # of LIMITS: a limit that was there goes


BLOCK = 4 << 20  # what a guest takes and gives
PAGE_TABLES = 64  # for so many bytes of new memory the guest spends one on knowing it


def updated(plan: LaunchPlan, resources: dict[str, Any], most: int = 0) -> LaunchPlan:
    """`plan` with what `resources` changes. most: bytes that the guest can get beyond what it booted with.

    Raises Unsupported naming what a running VM cannot change, InvalidRequest.
    """
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
    _check_memory(changed, resources, most)
    _check_cpus(changed, resources)
    return changed


def _check_memory(plan: LaunchPlan, resources: dict[str, Any], most: int) -> None:
    booted = translate.shape(plan).memory_bytes
    memory = (resources.get("memory") or {}).get("limit") or 0
    if memory <= 0 or (memory <= booted and not most):
        return
    if not most:
        raise Unsupported(
            f"the memory of this running virtual machine, {booted >> 20} MiB, cannot become {memory >> 20} MiB:"
            " its monitor cannot add any",
            hint=RESTART,
        )
    if more_memory(plan) > most:
        raise Unsupported(
            f"the memory of a running virtual machine that began with {booted >> 20} MiB cannot become {memory >> 20} MiB:"
            f" {max(0, booted + most - GUEST_OVERHEAD_BYTES) >> 20} MiB are the most, as this host has no more",
            hint=RESTART,
        )


def _check_cpus(plan: LaunchPlan, resources: dict[str, Any]) -> None:
    """Nothing can be more than the machine that the guest has: it has booted with it."""
    shape = translate.shape(plan)
    cpu = plan.config["linux"]["resources"].get("cpu") or {}
    quota, period = cpu.get("quota") or 0, cpu.get("period") or 100_000
    if "cpu" in resources and quota > shape.vcpus * period:
        raise Unsupported(
            f"a running virtual machine with {shape.vcpus} CPUs cannot use {quota / period:g}: it began with them",
            hint=RESTART,
        )


def more_memory(plan: LaunchPlan) -> int:
    """Bytes that the guest needs beyond what it booted with, so that its workload can have all of its limit."""
    limit = ((plan.config["linux"].get("resources") or {}).get("memory") or {}).get("limit") or 0
    more = max(0, limit + GUEST_OVERHEAD_BYTES - translate.shape(plan).memory_bytes)
    return -(-(more + more // PAGE_TABLES) // BLOCK) * BLOCK


def cpus(plan: LaunchPlan) -> int:
    """Whole CPUs that the workload's quota needs."""
    cpu = (plan.config["linux"].get("resources") or {}).get("cpu") or {}
    quota, period = cpu.get("quota") or 0, cpu.get("period") or 100_000
    vcpus = translate.shape(plan).vcpus
    return min(vcpus, -(-quota // period)) if quota > 0 else vcpus


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
