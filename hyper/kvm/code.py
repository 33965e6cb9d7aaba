"""A few bytes of machine code, run in this process: the time stamp counter, and a loop to compare a guest's speed with."""

from __future__ import annotations

import ctypes
import mmap
import time
from collections.abc import Callable

RDTSC = b"\x0f\x31\x48\xc1\xe2\x20\x48\x09\xd0\xc3"  # rdtsc; shl rdx, 32; or rax, rdx; ret
RET = b"\xc3"


class Code:
    """`code` in an executable page; calling the object runs it and returns rax as unsigned."""

    __slots__ = ("_call", "_page")

    def __init__(self, code: bytes) -> None:
        self._page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        self._page.write(code)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._page))
        self._call: Callable[[], int] = ctypes.CFUNCTYPE(ctypes.c_uint64)(address)

    def __call__(self) -> int:
        return self._call()


def loop(rounds: int) -> bytes:
    """Two instructions a round, the same bytes in 32 and 64 bits; it ends behind its last byte."""
    return b"\xb9" + rounds.to_bytes(4, "little") + b"\xff\xc9\x75\xfc"  # mov ecx, rounds; 1: dec ecx; jnz 1b


def native_loop_seconds(rounds: int) -> float:
    """What `loop` takes here without any KVM, the best of three."""
    code = Code(loop(rounds) + RET)
    times = []
    for _ in range(3):
        before = time.perf_counter()
        code()
        times.append(time.perf_counter() - before)
    return min(times)


def tsc_khz(seconds: float = 0.02) -> int:
    """The rate of the time stamp counter, right to about 0.01 %. Takes `seconds`.

    Each end is the tightest of five pairs of readings, so that being scheduled away in between does no harm.
    """
    tsc = Code(RDTSC)
    clock = time.CLOCK_MONOTONIC_RAW

    def pair() -> tuple[int, int]:
        best, result = 1 << 62, (0, 0)
        for _ in range(5):
            before = time.clock_gettime_ns(clock)
            count = tsc()
            after = time.clock_gettime_ns(clock)
            if after - before < best:
                best, result = after - before, (count, (before + after) // 2)
        return result

    count0, ns0 = pair()
    time.sleep(seconds)
    count1, ns1 = pair()
    return round((count1 - count0) * 1_000_000 / (ns1 - ns0))
