"""A machine from its configuration to its end, in a process of its own."""

from __future__ import annotations

import os
import socket
import sys
from typing import Any, NoReturn

from ambi.core.errors import AmbiError, InvalidRequest
from ambi.core.loop import Loop
from hyper.vmm import filter as syscalls
from hyper.vmm import plugging, saving, snapshot
from hyper.vmm.config import Config
from hyper.vmm.control import Control
from hyper.vmm.machine import Ending, Machine

# How the process exits, by the cause of its end; 125 is any other.
STATUS = {
    "guest-shutdown": 0,
    "guest-reset": 3,
    "guest-panic": 4,
    "guest-crash": 5,
    "device": 6,
    "internal": 125,
    "setup": 125,
}
SWITCH_S = 0.0005  # at most until a vCPU's thread that needs us gets its turn from the loop's


def run(config: Config) -> NoReturn:
    """Make the machine, give up what is left of our freedom, run it, and end this process. Tells the driver why."""
    sys.setswitchinterval(SWITCH_S)
    loop = Loop()
    ending = Ending("internal")
    control = None
    try:
        machine = Machine(config, loop)
        _begin(machine)
        control = _control(machine, loop)
        machine.start()
        syscalls.load(os.getpid())
        ending = machine.run()
    except AmbiError as error:
        ending = Ending("setup", error.message, type(error).__name__)
    except Exception as error:  # whatever it is: the driver is told, and the process ends
        ending = Ending("internal", f"{type(error).__name__}: {error}")
    tell(config, control, ending)
    os._exit(STATUS[ending.cause])


def _begin(machine: Machine) -> None:
    """To its first instruction, or to where a saved one stood."""
    if machine.config.state < 0:
        machine.boot()
    else:
        saving.fill(machine)
        saving.restore(machine, snapshot.read_state(machine.config.state))


def tell(config: Config, control: Control | None, ending: Ending) -> None:
    """Say how it ended: to the driver, and in a line on standard error."""
    os.write(2, f"{ending.cause}: {ending.detail}\n".encode("utf-8", "replace") if ending.detail else b"")
    if control is None and config.control >= 0:
        control = Control(Loop(), socket.socket(fileno=config.control), {}, lambda: None)
    if control is not None:
        control.end(*ending)


def _control(machine: Machine, loop: Loop) -> Control | None:
    """The driver's hold of the machine. It ends when the driver is gone."""
    if machine.config.control < 0:
        return None
    verbs = {
        "figures": lambda *_: figures(machine),
        "memory": lambda request, _: _memory(machine, request),
        "resize": lambda request, _: {"bytes": machine.resize_disk(str(request.get("serial")))},
        "sysrq": lambda request, _: _sysrq(machine, request),
        "pause": lambda *_: _pause(machine),
        "resume": lambda *_: _resume(machine),
        "plug": lambda request, fds: plugging.plug(machine, request, fds),
        "unplug": lambda request, _: plugging.unplug(machine, request),
        "save": lambda _, fds: saving.save_into(machine, fds),
    }
    sock = socket.socket(fileno=machine.config.control)
    return Control(loop, sock, verbs, lambda: machine.end("internal", "the driver is gone"))


def figures(machine: Machine) -> dict[str, Any]:
    """What `ambi inspect` shows of the machine."""
    devices = machine.counters()
    return {
        "read_bytes": sum(counters.get("read_bytes", 0) for counters in devices.values()),
        "written_bytes": sum(counters.get("written_bytes", 0) for counters in devices.values()),
        "exits": machine.exits(),
        "kvm": machine.kernel_stats(),
        "devices": devices,
    }


def _pause(machine: Machine) -> dict[str, Any]:
    machine.pause()
    return {}


def _resume(machine: Machine) -> dict[str, Any]:
    machine.resume()
    return {}


def _memory(machine: Machine, request: dict[str, Any]) -> dict[str, Any]:
    """Ask for `bytes`, if given, beyond what the guest booted with; what it uses of it."""
    wanted = request.get("bytes")
    return {"plugged": machine.resize_memory(wanted) if isinstance(wanted, int) else machine.memory_plugged()}


def _sysrq(machine: Machine, request: dict[str, Any]) -> dict[str, Any]:
    """A break on the serial port, and `key` behind it."""
    key = str(request.get("key"))
    if len(key) != 1 or not key.isascii():
        raise InvalidRequest(f"{key!r} is no key of SysRq")
    machine.uart.send_sysrq(key.encode())
    return {}
