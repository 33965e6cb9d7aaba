"""A machine saved, and another made to go on where it stood. snapshot.py has the file, this what is in its sections.

    machine   JSON: {"shape": SHAPE, "kvm": of hyper.kvm.state, "uart": ..., "devices": [of each transport, by slot]}
    SHAPE     {"vcpus", "memory_bytes", "slots", "devices": [device id of each slot]}: a machine of another shape is refused

Order of saving: the vCPUs stand still, then the devices are drained, then registers and interrupt controllers are read; of
restoring: memory, registers and controllers, devices, and what may have been owed to the guest is raised again at the go.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from ambi.core.errors import Conflict, Corrupt, Unsupported
from hyper.kvm import state as kvm_state
from hyper.kvm.errors import KvmError
from hyper.vmm import snapshot, snapshot_memory
from hyper.vmm.machine import Machine
from hyper.vmm.snapshot import Host, Saved

SECTION = "machine"


def save(machine: Machine, state: int, memory: int | None = None, chain: snapshot_memory.Chain | None = None) -> str:
    """Pause the machine and write its state to the descriptor `state`, and its memory to `memory`, an empty file; without
    one, the memory is where it is: in a file of the caller's. `chain`: what the memory may be told as a difference to.

    The result is the snapshot's id. The machine stands still afterwards, until `resume`. Raises an AmbiError of the files.
    """
    machine.pause()
    more = machine.memory_plugged()
    if more:
        raise Conflict(f"the guest uses {more >> 20} MiB more than it booted with: take it back before it is saved")
    found = _collect(machine)
    sections = {SECTION: json.dumps(found, separators=(",", ":")).encode()}
    regions = _regions(machine)
    if memory is not None:
        sections |= snapshot_memory.write_memory(memory, machine.booted, chain, look=_look(machine))
    parent = chain.top.id if chain else None
    return snapshot.write_state(state, this_host(machine), regions, sections, parent=parent)


def _look(machine: Machine) -> snapshot_memory.Look | None:
    """Memory that others map, too, is not ours to know."""
    config = machine.config
    if config.pagemap < 0 or (config.memory >= 0 and config.memory_shared):
        return None
    return snapshot_memory.Look(config.pagemap, config.memory)


def save_into(machine: Machine, fds: list[int]) -> dict[str, Any]:
    """The operation `save` of PROTOCOL.md: descriptors of state, of memory or not, and of a chain of earlier ones."""
    state, memory, *earlier = [*fds, None] if len(fds) == 1 else fds
    assert state is not None
    chain = snapshot_memory.Chain(_layers(zip(earlier[::2], earlier[1::2], strict=True))) if earlier else None
    if chain is not None and chain.top.regions != _regions(machine):
        chain = None
    return {"snapshot": save(machine, state, memory, chain), "whole": chain is None}


def _layers(pairs: Iterable[tuple[Any, Any]]) -> list[tuple[Saved, int]]:
    return [(snapshot.read_state(state), memory) for state, memory in pairs]


def _regions(machine: Machine) -> tuple[tuple[int, int], ...]:
    return tuple((region.gpa, region.end - region.gpa) for region in machine.booted.regions)


def fill(machine: Machine) -> None:
    """The memory of a fresh machine from the chain that it goes on from; one whose memory is in a file has none.

    Raises Corrupt, Unsupported.
    """
    if not machine.config.chain:
        return
    chain = snapshot_memory.Chain(_layers(machine.config.chain))
    if chain.top.regions != _regions(machine):
        raise Unsupported(f"the saved machine has its memory at {chain.top.regions}, and this one at {_regions(machine)}")
    chain.load(machine.booted)


def _collect(machine: Machine) -> dict[str, Any]:
    devices = [transport.save() for transport in machine.transports]
    return {
        "shape": _shape(machine),
        "kvm": kvm_state.save_machine(machine.vm, list(machine.vcpus.all), machine.kvm.msr_indices()),
        "uart": machine.uart.save(),
        "devices": devices,
    }


def this_host(machine: Machine) -> Host:
    return snapshot.this_host(machine.kvm.supported_cpuid())


def _shape(machine: Machine) -> dict[str, Any]:
    return {
        "vcpus": machine.config.vcpus,
        "memory_bytes": machine.config.memory_bytes,
        "slots": machine.slots,
        "devices": [transport.device.device_id for transport in machine.transports],
    }


def restore(machine: Machine, saved: Saved) -> None:
    """Make a fresh machine, whose memory has what was saved, ready to go on; `run` lets it.

    Raises Unsupported (another host or another shape), Corrupt (the state makes no sense).
    """
    snapshot.refuse_other_host(saved.host, this_host(machine))
    try:
        found = json.loads(saved.sections[SECTION])
        _check_shape(found["shape"], _shape(machine))
        kvm_state.restore_machine(machine.vm, list(machine.vcpus.all), found["kvm"])
        machine.uart.restore(found["uart"])
        for transport, state in zip(machine.transports, found["devices"], strict=False):
            transport.restore(state)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Corrupt(f"the saved machine makes no sense: {error!r}", hint="make it again") from error
    except KvmError as error:
        raise Unsupported(f"this host cannot hold the saved machine: {error}", hint="start it from its image") from error


def _check_shape(saved: dict[str, Any], here: dict[str, Any]) -> None:
    """Devices may have come behind those that were saved: into slots that were spare."""
    for name in ("vcpus", "memory_bytes", "slots"):
        if saved[name] != here[name]:
            raise Unsupported(f"the saved machine has {saved[name]} as its {name}, and this one has {here[name]}")
    if here["devices"][: len(saved["devices"])] != saved["devices"]:
        raise Unsupported(f"the saved machine has the devices {saved['devices']}, and this one has {here['devices']}")
