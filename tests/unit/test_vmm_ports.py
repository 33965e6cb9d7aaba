"""The monitor's devices that are ports: serial port, power, PCI's configuration, and what becomes of the console."""

from __future__ import annotations

import os
import random

import pytest

from ambi.core.loop import Loop
from hyper.vmm import console
from hyper.vmm.bus import Bus
from hyper.vmm.pci import ConfigPorts
from hyper.vmm.power import ResetLine, SleepControl
from hyper.vmm.uart import IER, IIR_FCR, LCR, LSR, MCR, MSR, RX_TX, SCRATCH, Uart


class Line:
    """A serial port and what came out of it."""

    def __init__(self) -> None:
        self.sent = bytearray()
        self.edges = 0
        self.uart = Uart(self.sent.extend, self._edge)

    def _edge(self) -> None:
        self.edges += 1

    def put(self, register: int, value: int) -> None:
        self.uart.write(register, bytes((value,)))

    def get(self, register: int) -> int:
        return self.uart.read(register, 1)[0]


@pytest.fixture
def line() -> Line:
    return Line()


def test_what_is_sent_comes_out_and_there_is_always_room(line: Line) -> None:
    for byte in b"hello":
        assert line.get(LSR) == 0x60
        line.put(RX_TX, byte)
    assert line.sent == b"hello"
    assert line.edges == 0, "nobody asked for interrupts"


def test_the_divisor_is_not_sent(line: Line) -> None:
    line.put(LCR, 0x83)
    line.put(RX_TX, 0x34)
    line.put(IER, 0x12)
    assert (line.get(RX_TX), line.get(IER)) == (0x34, 0x12)
    line.put(LCR, 0x03)
    assert line.sent == b"" and line.get(IER) == 0 and line.get(LCR) == 3


def test_a_break_and_a_key_are_all_that_is_received(line: Line) -> None:
    """As Linux takes it: a status with a break, the zero that it stands for, and then the key."""
    line.uart.send_sysrq(b"s")
    assert line.edges == 0, "nobody has opened the port"
    line.put(IIR_FCR, 0x01)
    line.put(IER, 0x05)
    assert line.edges == 1, "what came before is told"
    assert (line.get(IIR_FCR), line.get(LSR), line.get(RX_TX)) == (0xC4, 0x71, 0)
    assert (line.get(IIR_FCR), line.get(LSR), line.get(RX_TX)) == (0xC4, 0x61, ord("s"))
    assert (line.get(IIR_FCR), line.get(LSR), line.get(RX_TX)) == (0xC1, 0x60, 0)
    line.uart.send_sysrq(b"u")
    assert line.edges == 2
    for _ in range(100):
        line.uart.send_sysrq(b"o")
    found = 0
    while line.get(LSR) & 1:
        line.get(RX_TX)
        found += 1
    assert found == 16, "a guest that does not read has its last ones"


def test_an_interrupt_for_each_time_that_the_transmitter_becomes_empty(line: Line) -> None:
    line.put(IIR_FCR, 0x01)
    line.put(IER, 0x02)
    assert line.edges == 1 and line.get(IIR_FCR) == 0xC2, "asked for: it is empty now"
    assert line.get(IIR_FCR) == 0xC1, "reading it was the acknowledgement"
    line.put(RX_TX, 0x41)
    line.put(IER, 0x02)
    assert line.edges == 2, "the same bit again asks for nothing"
    line.put(IER, 0)
    assert line.get(IIR_FCR) == 0xC1
    line.put(RX_TX, 0x42)
    assert line.edges == 2


def test_linux_finds_a_16550a(line: Line) -> None:
    """As autoconfig() of drivers/tty/serial/8250 does it."""
    line.put(IER, 0)
    assert line.get(IER) == 0
    line.put(IER, 0x0F)
    assert line.get(IER) == 0x0F
    line.put(IER, 0)
    line.put(MCR, 0x1A)  # loop, OUT2, RTS
    assert line.get(MSR) & 0xF0 == 0x90
    line.put(RX_TX, 0x55)
    assert line.get(LSR) & 1 and line.get(RX_TX) == 0x55 and not line.get(LSR) & 1
    line.put(MCR, 0)
    assert line.sent == b"" and line.get(MSR) == 0xB0
    line.put(IIR_FCR, 0x01)
    assert line.get(IIR_FCR) >> 6 == 3
    line.put(SCRATCH, 0xA5)
    assert line.get(SCRATCH) == 0xA5


def test_what_is_no_byte_is_nothing(line: Line) -> None:
    assert line.uart.read(LSR, 4) == b"\xff" * 4
    for register in range(8):
        line.uart.write(register, b"\xff\xff\xff\xff")
        line.uart.read(register, 2)


def test_a_saved_port_goes_on_and_owes_what_it_owed(line: Line) -> None:
    line.put(IIR_FCR, 0x01)
    line.put(IER, 0x02)
    state = line.uart.save()
    other = Line()
    other.uart.restore(state)
    assert other.edges == 1 and other.get(IIR_FCR) == 0xC2
    assert other.uart.save() == {**state, "sent": 0}


def test_only_sleep_state_five_powers_off() -> None:
    off: list[int] = []
    control = SleepControl(lambda: off.append(1))
    for offset, value in ((0, 5 << 2), (0, 1 << 5), (0, 1 << 5 | 3 << 2), (1, 0x34), (1, 0x80)):
        control.write(offset, bytes((value,)))
        assert not off
    control.write(0, bytes((1 << 5 | 5 << 2,)))
    assert off == [1] and control.read(1, 1) == b"\0"


def test_only_a_pulse_resets() -> None:
    pulses: list[int] = []
    line = ResetLine(lambda: pulses.append(1))
    for offset, value in ((0, 0xFE), (4, 0xFF), (4, 0xF0), (4, 0)):
        line.write(offset, bytes((value,)))
    assert not pulses
    line.write(4, b"\xfe")
    assert pulses == [1]
    assert line.read(4, 1) == b"\1", "not busy: a kernel that resets does not wait"


def test_whatever_a_guest_does_to_its_ports(line: Line) -> None:
    """100,000 accesses of any size and value: answers of the right length, state of the right width, and no interrupt that
    nobody enabled."""
    seed = random.randrange(1 << 32)
    dice = random.Random(seed)
    bus, calls = Bus(), list[int]()
    bus.add(0x3F8, 8, line.uart)
    bus.add(0x60, 5, ResetLine(lambda: calls.append(1)))
    bus.add(0x600, 2, SleepControl(lambda: calls.append(2)))
    bus.add(0xCF8, 8, ConfigPorts())
    bases = (0x3F8, 0x3F8, 0x60, 0x600, 0xCF8)
    for _ in range(50_000):
        address, size = dice.choice(bases) + dice.randrange(9), dice.choice((1, 1, 2, 4))
        bus.write(address, dice.randbytes(size))
        assert len(bus.read(dice.choice(bases) + dice.randrange(9), size)) == size, seed
    state = line.uart.save()
    assert all(0 <= state[name] <= 0xFF for name in ("ier", "lcr", "mcr", "scratch")), seed
    assert state["divisor"] <= 0xFFFF and set(calls) <= {1, 2}, seed


def test_pci_is_there_and_empty() -> None:
    ports = ConfigPorts()
    ports.write(0, (0x8000_0000).to_bytes(4, "little"))
    ports.write(3, b"\1")
    ports.write(4, b"\1\2\3\4")
    assert ports.read(0, 4) == b"\0\0\0\x80" and ports.read(4, 4) == b"\xff" * 4 and ports.read(6, 2) == b"\xff\xff"


@pytest.mark.parametrize(
    "text,panic,restarted",
    [
        (b"[ 1.2] Kernel panic - not syncing: oops\r\n[ 1.3] CPU: 0\r\n", "[ 1.2] Kernel panic - not syncing: oops", False),
        (b"reboot: Restarting system\r\n", "", True),
        (b"reboot: machine restart\n", "", True),
        (b"a panic? no\n", "", False),
        (b"reboot: Restarting system\n" + b"x" * 5000, "", False),
        (b"\x1b[2JKernel panic - not syncing: \x07" + b"y" * 1000, ".[2JKernel panic - not syncing: ." + "y" * 267, False),
    ],
)
def test_last_words_tell_how_it_ended(text: bytes, panic: str, restarted: bool) -> None:
    reader, writer = os.pipe()
    loop = Loop()
    said = console.Console(loop, writer)
    try:
        for at in range(0, len(text), 7):
            said.put(text[at : at + 7])
        assert (said.panic(), said.restarted()) == (panic, restarted)
        loop.step()
        assert os.read(reader, 65536) == text
    finally:
        said.close()
        os.close(reader)
        os.close(writer)
