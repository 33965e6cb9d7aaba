"""A hundred thousand nearly right inputs for each parser of strangers' bytes; `scripts/fuzz` runs more."""

from __future__ import annotations

import itertools

import pytest

from tests.fuzz.targets import TARGETS, failures

SEEDS: dict[str, tuple[int, ...]] = {}  # target to what once failed


@pytest.mark.parametrize("name", TARGETS)
def test_only_errors_of_ours(name: str) -> None:
    found = list(
        itertools.islice(failures(TARGETS[name], itertools.chain(SEEDS.get(name, ()), range(TARGETS[name].inputs))), 3)
    )
    assert not found, f"scripts/fuzz {name} --seed {found[0][0]}: {found[0][1]!r}"
