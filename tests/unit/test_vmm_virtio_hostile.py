"""A hundred thousand nearly right drivers on our devices; `scripts/fuzz` runs more. What once failed is kept in SEEDS."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest

from tests.fuzz.devices import DEVICES
from tests.fuzz.targets import failures

# Inputs for each, more where a device costs less: 100,000 in all.
COUNTS = {
    "virtio console": 7000, "virtio blk": 20000, "virtio layers": 15000, "virtio rng": 10000, "virtio net": 15000,
    "virtio balloon": 15000, "virtio mem": 10000, "virtio pmem": 8000,
}  # fmt: skip
SEEDS: dict[str, tuple[int, ...]] = {}
MOST_GROWTH = 8 << 20  # bytes that the process may grow by: the devices keep nothing of what a guest sends


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_every_device_has_its_count() -> None:
    assert set(COUNTS) == set(DEVICES) and sum(COUNTS.values()) == 100_000


@pytest.mark.parametrize("name", DEVICES)
def test_hostile_drivers(name: str) -> None:
    target = DEVICES[name]
    for program in target.good:
        target.feed(program)
    before = resident()
    seeds = itertools.chain(SEEDS.get(name, ()), range(COUNTS[name]))
    found = list(itertools.islice(failures(target, seeds), 3))
    assert not found, f"scripts/fuzz {name!r} --seed {found[0][0]}: {found[0][1]!r}"
    assert resident() - before < MOST_GROWTH
