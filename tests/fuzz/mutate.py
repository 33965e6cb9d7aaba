"""Inputs that are nearly right: copies of good ones with a few bytes, runs or numbers changed. A seed gives one input."""

from __future__ import annotations

import random
from collections.abc import Sequence

_NUMBERS = (b"0", b"-1", b"255", b"65536", b"4294967295", b"99999999999999999999", b"0777777777777", b"1e309")


def mutated(good: Sequence[bytes], seed: int) -> bytes:
    """One input made of one or two of `good`."""
    chance = random.Random(seed)
    data = bytearray(chance.choice(good))
    for _ in range(chance.choice((1, 1, 1, 2, 3, 8))):
        _STEPS[chance.randrange(len(_STEPS))](data, chance, good)
    return bytes(data)


def _flip(data: bytearray, chance: random.Random, _: Sequence[bytes]) -> None:
    if data:
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)


def _set(data: bytearray, chance: random.Random, _: Sequence[bytes]) -> None:
    if data:
        data[chance.randrange(len(data))] = chance.choice((0, 0x20, 0x2F, 0x7F, 0x80, 0xFF, chance.randrange(256)))


def _cut(data: bytearray, chance: random.Random, _: Sequence[bytes]) -> None:
    if data:
        del data[chance.randrange(len(data)) :]


def _drop(data: bytearray, chance: random.Random, _: Sequence[bytes]) -> None:
    if data:
        start = chance.randrange(len(data))
        del data[start : start + chance.choice((1, 2, 16, 512))]


def _repeat(data: bytearray, chance: random.Random, _: Sequence[bytes]) -> None:
    if data:
        start = chance.randrange(len(data))
        piece = data[start : start + chance.choice((1, 4, 64, 512))]
        data[start:start] = piece * chance.choice((1, 2, 8))


def _splice(data: bytearray, chance: random.Random, good: Sequence[bytes]) -> None:
    other = chance.choice(good)
    if other:
        start, at = chance.randrange(len(other)), chance.randrange(len(data) + 1)
        data[at:at] = other[start : start + chance.choice((1, 16, 128, 1024))]


def _number(data: bytearray, chance: random.Random, _: Sequence[bytes]) -> None:
    if data:
        start = chance.randrange(len(data))
        value = chance.choice(_NUMBERS)
        data[start : start + chance.choice((0, len(value)))] = value


_STEPS = (_flip, _set, _cut, _drop, _repeat, _splice, _number)
