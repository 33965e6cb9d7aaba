"""Sockets between a guest and its host, both ways, with our monitor and with QEMU."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from typing import Any

import pytest

from ambi.core.deadline import Deadline
from ambi.core.errors import Conflict, Unsupported
from ambi.linux import seccomp_profile
from hyper import backends
from hyper.vm import vsock
from tests import driverkit
from tests.driverkit import Rig
from tests.vm.test_vm_sizes import SOON, rig, shell

__all__ = ["rig"]
AF_VSOCK, HOST = 40, 2
BASE = 0x400000
SOCKET, DUP2, CONNECT, ACCEPT, BIND, LISTEN, EXECVE, EXIT = 41, 33, 42, 43, 49, 50, 59, 60


@pytest.fixture(params=[backends.OURS, backends.QEMU])
def vmm(request: pytest.FixtureRequest) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(backends.CHOICE, request.param)
        yield request.param


def call(number: int, *arguments: int | None) -> bytes:
    """A system call of x86-64; None is the descriptor that is kept in ebx."""
    code = b"\xb8" + struct.pack("<I", number)  # mov eax
    for mov, kept, value in zip(
        (b"\xbf", b"\xbe", b"\xba"), (b"\x89\xdf", b"\x89\xde", b"\x89\xda"), arguments, strict=False
    ):
        code += kept if value is None else mov + struct.pack("<I", value)
    return code + b"\x0f\x05"


KEEP = b"\x89\xc3"  # mov ebx, eax


def program(cid: int, port: int, *, listens: bool) -> bytes:
    """A static ELF file: a socket to (or from) the other side becomes stdin and stdout of /bin/cat."""
    data = BASE + 0x800
    argv = data + 32
    address = struct.pack("<HHII4x", AF_VSOCK, 0, port, cid)
    code = call(SOCKET, AF_VSOCK, 1, 0) + KEEP
    if listens:
        code += call(BIND, None, data, 16) + call(LISTEN, None, 1) + call(ACCEPT, None, 0, 0) + KEEP
    else:
        code += call(CONNECT, None, data, 16)
    code += call(DUP2, None, 0) + call(DUP2, None, 1) + call(EXECVE, data + 16, argv, 0) + call(EXIT, 1)
    head = b"\x7fELF\x02\x01\x01" + bytes(9)
    head += struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, BASE + 120, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    head += struct.pack("<IIQQQQQQ", 1, 7, 0, BASE, BASE, 0x1000, 0x1000, 0x1000)
    tail = address + b"/bin/cat".ljust(16, b"\0") + struct.pack("<QQ", data + 16, 0)
    return ((head + code).ljust(0x800, b"\0") + tail).ljust(0x1000, b"\0")


def talk(connection: socket.socket) -> None:
    """What cat does with a little more than a ring of it."""
    sent = bytes(range(256)) * 4096
    connection.settimeout(SOON)
    got = b""
    for at in range(0, len(sent), 1 << 16):
        connection.sendall(sent[at : at + (1 << 16)])
        while len(got) < at + (1 << 16):
            got += connection.recv(1 << 16)
    assert got == sent


def asked(rig: Rig, value: str) -> Any:
    plan = rig.plan(["sleep", "1000"])
    linux = {**plan.config["linux"], "seccomp": seccomp_profile.default_profile(driverkit.CAPABILITIES, vsock=True)}
    return plan._replace(config={**plan.config, "linux": linux, "annotations": {vsock.ANNOTATION: value}})


@pytest.mark.timeout(300)
def test_a_guest_and_its_host_connect_to_each_other(rig: Rig, vmm: str) -> None:
    with rig.started_plan(asked(rig, "auto")) as running:
        cid = running.created.inspect()["vsock_cid"]  # type: ignore[attr-defined]
        with socket.socket(socket.AF_VSOCK) as listener:
            listener.bind((socket.VMADDR_CID_ANY, 7001))
            listener.listen(1)
            listener.settimeout(SOON)
            running.exec(["sh", "-c", "cat > /out; chmod +x /out"], stdin=program(HOST, 7001, listens=False))
            client = running.start_exec(["/out"])
            connection, peer = listener.accept()
            with connection:
                assert peer[0] == cid
                talk(connection)
            assert client.finish().code == 0
        running.exec(["sh", "-c", "cat > /in; chmod +x /in"], stdin=program(socket.VMADDR_CID_ANY, 7002, listens=True))
        server = running.start_exec(["/in"])
        shell(running, "until grep -q '^in' /proc/[0-9]*/comm; do sleep 0.1; done; sleep 1")
        with socket.socket(socket.AF_VSOCK) as connection:
            connection.settimeout(SOON)
            connection.connect((cid, 7002))
            talk(connection)
        assert server.finish().code == 0
        with pytest.raises(Conflict, match=f"another VM of this host has the number {cid}"):
            vsock.take(asked(rig, str(cid)))
        save: Any = running.created.save  # type: ignore[attr-defined]
        with pytest.raises(Unsupported, match="sockets to its host cannot be saved"):
            save(rig.base / "snapshot", {}, Deadline.after(SOON))
    again = vsock.take(asked(rig, str(cid)))
    assert again is not None and again.cid == cid, "a number is free again when its VM has ended"
    os.close(again.fd)
