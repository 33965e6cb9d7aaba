"""Starts from a template: an idle guest that was booted once, saved, and goes on as a copy for each VM that fits.

A template knows nothing of a workload. Its machine has all devices that the VM's has, in the same order, but no driver is
bound to disks and NICs, so nothing of what is behind them is known to the guest; the agent binds them when it is told of
them. Two copies share what the kernel chose at random at boot (where it lies, seeds of its hash tables), not what it hands
out: HELLO brings entropy, and the agent has the pool reseeded before anything else runs. A guest changes its private copy.

Shapes are few on purpose: a VM without a network, or with one interface, has the NICs of one with a few more.
"""

from __future__ import annotations

import os
import select
import socket
import sys
from pathlib import Path

from ambi.core.deadline import Deadline
from ambi.core.errors import AmbiError, DeadlineExceeded, Unavailable
from hyper.guest.protocol import SYNC, Decoder
from hyper.vm import nic
from hyper.vm.backend import Backend, Handles, Place, Templates
from hyper.vm.hardware import Hardware, Memory, Nic
from hyper.vm.monitor import Monitor, end
from hyper.vm.snapshots import Snapshot
from hyper.vm.template_store import Draft, Store, Template, key_of

CHOICE = "AMBI_TEMPLATES"  # in the environment: `off`, and every guest boots
DIRECTORY = "templates"  # below the guest directory
WORD = "ambi.template"  # of the kernel's command line: the agent binds no disks and NICs until it is told of them
NICS = 1 + nic.SPARE  # at least


def start(backend: Backend, hardware: Hardware, guest_dir: Path, place: Place, by: Deadline) -> Monitor:
    """`backend.start`, from a template where that can be: it is made first where there is none.

    A template that is damaged, or cannot be made, is a line of our log, and the guest boots. Raises as `start` does.
    """
    templates = backend.templates()
    if templates is not None and _fits(hardware, templates):
        monitor = _copy(templates, hardware, Store(guest_dir / DIRECTORY), place, by)
        if monitor is not None:
            return monitor
    return backend.start(hardware, place)


def _fits(hardware: Hardware, templates: Templates) -> bool:
    """Whether a copy can be this machine: a file tree by virtiofs is a connection that no saved guest has, so it must be one
    that the back-end can add; a connection to the host's sockets is none either."""
    if hardware.vsock is not None:
        return False
    layered = hardware.layers is not None and hardware.disk is not None
    return (templates.shares or (layered and not hardware.shares)) and os.environ.get(CHOICE) != "off"


def _copy(templates: Templates, hardware: Hardware, store: Store, place: Place, by: Deadline) -> Monitor | None:
    """The machine as a copy, or None when it is to boot."""
    hardware = _common(hardware)
    key = key_of(templates.words(hardware), _file(hardware.kernel), _file(hardware.initramfs))
    try:
        template = store.open(key) or _made(templates, hardware, store, key, place, by)
        if template is None:
            return None
        try:
            memory = Memory(template.memory, shared=False)
            return templates.restore(hardware._replace(memory=memory), template.state, place, _half(by))
        finally:
            os.close(template.memory)
    except (AmbiError, OSError) as error:
        _tell(key, error)
        if not isinstance(error, DeadlineExceeded):  # which tells of a slow host, or of a caller in haste
            store.drop(key)
        return None


def _half(by: Deadline) -> Deadline:
    """Of the time that is left: a guest that has to boot after all needs the other one."""
    left = by.remaining()
    return by if left is None else Deadline.after(left / 2)


def _tell(key: str, error: Exception) -> None:
    print(f"ambi: the guest boots; template {key}: {error}", file=sys.stderr, flush=True)


def _common(hardware: Hardware) -> Hardware:
    """The machine with what its template has: more NICs, and the kernel's words of the most demanding workload."""
    spare = tuple(Nic(nic.device_mac(number), -1, None) for number in range(len(hardware.nics), NICS))
    return hardware._replace(nics=hardware.nics + spare, tracing=True, words=(*hardware.words, WORD))


def completed(hardware: Hardware, snapshot: Snapshot) -> Hardware:
    """The machine with the devices that it had when it was saved."""
    if snapshot.common:
        hardware = _common(hardware)
    spare = tuple(Nic(nic.device_mac(number), -1, None) for number in range(len(hardware.nics), snapshot.nics))
    return hardware._replace(nics=hardware.nics + spare)


def _file(fd: int) -> list[int]:
    info = os.fstat(fd)
    return [info.st_size, info.st_mtime_ns]


def _made(templates: Templates, hardware: Hardware, store: Store, key: str, place: Place, by: Deadline) -> Template | None:
    """The template, made here; None while somebody makes one, or when that failed lately or now."""
    if store.failed(key):
        return None
    draft = store.draft(key, hardware.memory_bytes)
    if draft is None:
        return None
    try:
        if (found := store.open(key)) is not None:  # made between our look and our lock
            return found
        _make(templates, hardware, draft, place, _half(by))
    except (AmbiError, OSError) as error:
        _tell(key, error)
        if not isinstance(error, DeadlineExceeded):
            store.fail(key, str(error))
        return None
    finally:
        draft.close()
    return store.open(key)


def _make(templates: Templates, hardware: Hardware, draft: Draft, place: Place, by: Deadline) -> None:
    """Boot a blank machine until its agent answers, and save it."""
    output = os.memfd_create("words of the VMM", os.MFD_CLOEXEC)
    with Handles() as handles:
        handles.add(output)
        agent, agent_fd = handles.socket_pair()
        console, console_fd = handles.socket_pair()
        blank = hardware._replace(agent=agent_fd, console=console_fd, memory=Memory(draft.memory, shared=True), blank=True)
        with agent, console:
            try:
                monitor = templates.boot(blank, place._replace(output=output, handles=handles), by)
                state = _saved(templates, monitor, agent, by)
            except Unavailable as error:
                raise type(error)(f"{error.message}{_last_words(console, output)}") from error
    draft.publish(state)


def _saved(templates: Templates, monitor: Monitor, agent: socket.socket, by: Deadline) -> bytes:
    """The state of the guest once its agent answers; its VMM is ended."""
    try:
        _meet(agent, monitor.child.pidfd, by)
        return templates.save(monitor, by)
    finally:
        end(monitor)


def _meet(agent: socket.socket, ended: int, by: Deadline) -> None:
    """Wait until the guest's agent answers: from then on it waits for its host."""
    decoder = Decoder()
    agent.sendall(SYNC)
    poll = select.poll()
    poll.register(agent, select.POLLIN)
    poll.register(ended, select.POLLIN)
    while not decoder.synced:
        by.check("an answer of the guest's agent")
        ready = {fd for fd, _ in poll.poll(by.milliseconds())}
        try:
            data = agent.recv(1 << 16) if agent.fileno() in ready else b""
        except OSError:  # reset: the VMM ended with something unread
            data = b""
        if ready and not data:
            raise Unavailable("the VMM of a template ended")
        for _ in decoder.feed(data):
            pass


def _last_words(console: socket.socket, output: int) -> str:
    """The last line that guest or VMM said, behind a colon."""
    try:
        said = console.recv(1 << 16, socket.MSG_DONTWAIT)
    except OSError:
        said = b""
    said += os.pread(output, 1 << 16, 0)
    lines = [line for line in said.decode("utf-8", "replace").splitlines() if line.strip() and "warning:" not in line]
    return f": {lines[-1].strip()[:300]}" if lines else ""
