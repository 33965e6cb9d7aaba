"""`/containers/{}/stats`: what an instance uses, once or every second.

The client computes the share of the processors from two samples, so one answer carries the sample before it as well,
but for `one-shot`, which takes a single one.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from ambi.api.exchange import Call, Reply, json_reply, to_json
from ambi.api.router import Route
from ambi.api.words import NEVER, rfc3339_nano
from ambi.core.errors import Conflict, NotFound, Unavailable
from ambi.core.model import Usage
from ambi.engine.types import Instance

if TYPE_CHECKING:
    from ambi.engine.engine import Engine

_INTERVAL_SECONDS = 1.0
_TICK_NS = 1_000_000_000 // os.sysconf("SC_CLK_TCK")


class Sample(NamedTuple):
    """Usage at one moment; None when the instance did not run.

    system_ns: time that all processors have spent. networks: rx_bytes, tx_packets, ... of each interface by its name.
    """

    usage: Usage | None
    system_ns: int
    time_ns: int
    networks: Mapping[str, Mapping[str, int]] = {}


def stats(call: Call) -> Reply | None:
    engine, instance = call.engine, call.engine.get(call.name)
    first = _sample(engine, instance)
    if call.query.flag("stream", default=True):
        _stream(call, instance, first)
        return None
    if call.query.flag("one-shot") or first.usage is None:
        return json_reply(shape(instance, first, None))
    time.sleep(_INTERVAL_SECONDS)
    return json_reply(shape(instance, _sample(engine, instance), first))


def _stream(call: Call, instance: Instance, first: Sample) -> None:
    """Until the client or the instance is gone."""
    stream, previous = call.stream(), None
    current = first
    while not call.connection.client_gone():
        stream.write(to_json(shape(instance, current, previous)))
        time.sleep(_INTERVAL_SECONDS)
        try:
            instance = call.engine.get(instance.id)
        except NotFound:
            break
        previous, current = current, _sample(call.engine, instance)
    stream.end()


def _sample(engine: Engine, instance: Instance) -> Sample:
    usage, networks = None, {}
    if instance.state.running:
        try:
            usage, networks = engine.usage(instance.id), engine.traffic(instance.id)
        except (Conflict, NotFound, Unavailable):
            pass  # it has ended meanwhile
    return Sample(usage, system_time_ns(), time.time_ns(), networks)


def system_time_ns() -> int:
    """The first line of /proc/stat without guest time, which is part of user time already."""
    with open("/proc/stat", "rb") as file:
        fields = file.readline().split()
    return sum(map(int, fields[1:9])) * _TICK_NS


def shape(instance: Instance, current: Sample, previous: Sample | None) -> dict[str, Any]:
    """Docker's Stats; everything is zero for an instance that does not run."""
    usage = current.usage
    memory: dict[str, Any] = {}
    pids: dict[str, Any] = {}
    if usage is not None:
        cache = usage.memory_cache_bytes
        memory = {
            "usage": usage.memory_bytes,
            "limit": usage.memory_limit_bytes or host_memory_bytes(),
            "stats": {"inactive_file": cache, "total_inactive_file": cache},
        }
        pids = {"current": usage.pids}
    networks = {name: {field: seen[field] for field in _NETWORK} for name, seen in current.networks.items() if seen}
    return {
        "read": rfc3339_nano(current.time_ns) if usage else NEVER,
        "preread": rfc3339_nano(previous.time_ns) if previous and previous.usage else NEVER,
        "pids_stats": pids,
        "blkio_stats": {**dict.fromkeys(_BLKIO), **(_block(usage) if usage else {})},
        "num_procs": 0,
        "storage_stats": {},
        "cpu_stats": _cpu(current),
        "precpu_stats": _cpu(previous),
        "memory_stats": memory,
        "name": f"/{instance.name}",
        "id": instance.id,
        **({"networks": networks} if networks else {}),
    }


_NETWORK = tuple(f"{way}_{noun}" for way in ("rx", "tx") for noun in ("bytes", "packets", "errors", "dropped"))


def _block(usage: Usage) -> dict[str, Any]:
    """Bytes of all devices together, as the device 0:0: clients add them up."""
    done = (("read", usage.block_read_bytes), ("write", usage.block_write_bytes))
    return {"io_service_bytes_recursive": [{"major": 0, "minor": 0, "op": op, "value": value} for op, value in done]}


_BLKIO = (
    "io_service_bytes_recursive", "io_serviced_recursive", "io_queue_recursive", "io_service_time_recursive",
    "io_wait_time_recursive", "io_merged_recursive", "io_time_recursive", "sectors_recursive",
)  # fmt: skip


def _cpu(sample: Sample | None) -> dict[str, Any]:
    usage = sample.usage if sample else None
    cpu: dict[str, Any] = {
        "cpu_usage": {
            "total_usage": usage.cpu_ns if usage else 0,
            "usage_in_kernelmode": usage.cpu_system_ns if usage else 0,
            "usage_in_usermode": usage.cpu_user_ns if usage else 0,
        },
        "throttling_data": {"periods": 0, "throttled_periods": 0, "throttled_time": 0},
    }
    if sample and usage:
        cpu["system_cpu_usage"] = sample.system_ns
        cpu["online_cpus"] = os.cpu_count() or 1
    return cpu


def host_memory_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


ROUTES = (Route("GET", "/containers/{}/stats", stats),)
