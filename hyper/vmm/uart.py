"""A 16550A that only sends: the guest's console. What is sent goes to a Sink at once, so the FIFO is always empty.

Quiet by construction: no errors, no changes of modem lines, and the one interrupt, "transmitter empty", is an edge whenever
it becomes due. It receives nothing but what Linux' SysRq needs, a break and one byte. Source: National's PC16550D data
sheet; Linux' drivers/tty/serial/8250.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

RX_TX, IER, IIR_FCR, LCR, MCR, LSR, MSR, SCRATCH = range(8)
IER_DATA = 0x01
IER_SENT = 0x02
IER_BITS = 0x0F
IIR_NONE = 0x01
IIR_SENT = 0x02
IIR_DATA = 0x04
IIR_FIFO = 0xC0
FCR_ENABLE = 0x01
LCR_DLAB = 0x80
MCR_LOOP = 0x10
MCR_BITS = 0x1F
LSR_EMPTY = 0x60  # transmitter and its FIFO
LSR_DATA = 0x01
LSR_BREAK = 0x10  # of the byte that is next, until it is read
MOST_RECEIVED = 16
MSR_READY = 0xB0  # carrier, data set ready, clear to send


class Uart:
    """Eight ports. sink: takes each run of bytes that is sent; interrupt: an edge on our line."""

    __slots__ = (
        "_divisor", "_fifo", "_ier", "_interrupt", "_lcr", "_looped", "_mcr", "_received", "_scratch", "_sent", "_sink",
    )  # fmt: skip

    def __init__(self, sink: Callable[[bytes], None], interrupt: Callable[[], None]) -> None:
        self._sink = sink
        self._interrupt = interrupt
        self._ier = self._lcr = self._mcr = self._scratch = 0
        self._divisor = 1
        self._fifo = False
        self._sent = False  # "transmitter empty" is due
        self._received: deque[tuple[int, int]] = deque(maxlen=MOST_RECEIVED)  # bytes, each with what is said of it
        self._looped = b""  # one byte that came back

    def send_sysrq(self, key: bytes) -> None:
        """A break and a byte to the guest: Linux does what the key stands for, if its console is open and its sysctl allows
        it. From the loop's thread."""
        self._received.extend(((0, LSR_BREAK), (key[0], 0)))
        if self._ier & IER_DATA:
            self._interrupt()

    def read(self, offset: int, length: int) -> bytes:
        return bytes((self._read(offset),)) if length == 1 else b"\xff" * length

    def _read(self, offset: int) -> int:
        if offset == LSR:  # the kernel's console asks before each run of bytes
            return LSR_EMPTY | self._pending()
        if offset in (RX_TX, IER) and self._lcr & LCR_DLAB:
            return self._divisor >> 8 * offset & 0xFF
        if offset == RX_TX:
            return self._next()
        if offset == IIR_FCR:
            return self._identify()
        if offset == MSR:
            return self._modem()
        return {IER: self._ier, LCR: self._lcr, MCR: self._mcr, SCRATCH: self._scratch}[offset]

    def _pending(self) -> int:
        if self._looped:
            return LSR_DATA
        return LSR_DATA | self._received[0][1] if self._received else 0

    def _next(self) -> int:
        data, self._looped = self._looped, b""
        if data:
            return data[0]
        return self._received.popleft()[0] if self._received else 0

    def _identify(self) -> int:
        fifo = IIR_FIFO if self._fifo else 0
        if self._received and self._ier & IER_DATA:
            return fifo | IIR_DATA
        if self._sent and self._ier & IER_SENT:
            self._sent = False  # reading is the acknowledgement
            return fifo | IIR_SENT
        return fifo | IIR_NONE

    def _modem(self) -> int:
        if not self._mcr & MCR_LOOP:
            return MSR_READY
        mcr = self._mcr  # DTR, RTS, OUT1, OUT2 come back as DSR, CTS, RI, DCD
        return (mcr & 1) << 5 | (mcr & 2) << 3 | (mcr & 4) << 4 | (mcr & 8) << 4

    def write(self, offset: int, data: bytes) -> None:
        value = data[0]
        if offset == RX_TX and not self._lcr & LCR_DLAB:
            self._send(data)
        elif offset in (RX_TX, IER) and self._lcr & LCR_DLAB:
            keep = 0xFF00 if offset == RX_TX else 0x00FF
            self._divisor = self._divisor & keep | value << 8 * offset
        elif offset == IER:
            self._enable(value & IER_BITS)
        elif offset == IIR_FCR:
            self._fifo = bool(value & FCR_ENABLE)
        elif offset == LCR:
            self._lcr = value
        elif offset == MCR:
            self._mcr = value & MCR_BITS
        elif offset == SCRATCH:
            self._scratch = value

    def _send(self, data: bytes) -> None:
        if self._mcr & MCR_LOOP:
            self._looped = data[-1:]
            return
        self._sink(data)
        self._due()

    def _enable(self, bits: int) -> None:
        newly = bits & ~self._ier
        self._ier = bits
        if newly & IER_SENT:
            self._due()
        if newly & IER_DATA and self._received:
            self._interrupt()

    def _due(self) -> None:
        self._sent = True
        if self._ier & IER_SENT:
            self._interrupt()

    def save(self) -> dict[str, int]:
        return {
            "ier": self._ier, "lcr": self._lcr, "mcr": self._mcr, "scratch": self._scratch, "divisor": self._divisor,
            "fifo": int(self._fifo), "sent": int(self._sent),
        }  # fmt: skip

    def restore(self, state: dict[str, int]) -> None:
        """The inverse of `save`; an interrupt that was owed is raised again, because its edge may have been lost."""
        self._ier, self._lcr = state["ier"] & IER_BITS, state["lcr"] & 0xFF
        self._mcr, self._scratch = state["mcr"] & MCR_BITS, state["scratch"] & 0xFF
        self._divisor = state["divisor"] & 0xFFFF
        self._fifo, self._sent = bool(state["fifo"]), bool(state["sent"])
        if self._sent and self._ier & IER_SENT:
            self._interrupt()
