"""The size of a running VM against a monitor that obeys, refuses, or is slow; the monitor and the guest are the test's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from ambi.core.deadline import Deadline
from ambi.core.errors import Conflict, Internal, Unavailable
from hyper.vm import sizes
from hyper.vm.cgroup import Limits
from hyper.vm.sizes import Sizes

MIB = 1 << 20
BY = Deadline.never()


class Guest:
    """A monitor and a cgroup: `can` is what the guest takes at most, `least` what it cannot give back."""

    memory_bytes = 100 * MIB

    def __init__(self) -> None:
        self.can, self.least, self.used, self.wanted = 1 << 40, 0, 0, 0
        self.limits: list[int] = []
        self.refuses = False

    def resize_memory(self, more_bytes: int, by: Deadline) -> int:
        if self.refuses:
            raise Internal("no")
        self.wanted = more_bytes
        return self.used

    def memory_plugged(self, by: Deadline) -> int:
        """A step of 4 MiB a look, as a guest does it."""
        goal = max(self.least, min(self.can, self.wanted))
        self.used += max(-4 * MIB, min(4 * MIB, goal - self.used))
        return self.used

    def limit(self, limits: Limits) -> None:
        self.limits.append(limits.memory_bytes // MIB)


class Looks:
    """A deadline that counts how often it was looked at, and knows no time."""

    def __init__(self) -> None:
        self.left = 100

    @classmethod
    def after(cls, seconds: float) -> Looks:
        return cls()

    def expired(self) -> bool:
        self.left -= 1
        return self.left < 0


@pytest.fixture
def guest() -> Guest:
    return Guest()


@pytest.fixture
def machine(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sizes]:
    monkeypatch.setattr(sizes, "LOOK_S", 0)
    monkeypatch.setattr(sizes, "Deadline", Looks)
    parts: Any = guest
    yield Sizes(parts, parts, parts, 1)


def test_the_hosts_limit_is_raised_before_and_lowered_after(guest: Guest, machine: Sizes) -> None:
    machine.grow_memory(40 * MIB, BY)
    assert (machine.more, guest.used, guest.limits) == (40 * MIB, 40 * MIB, [140])
    with pytest.raises(Conflict, match="40 MiB more memory than it began with"):
        machine.refuse_saving()
    assert machine.shrink_memory(12 * MIB, BY) == 0
    assert (machine.more, guest.limits) == (12 * MIB, [140, 112])
    assert machine.shrink_memory(0, BY) == 0
    machine.refuse_saving()


def test_a_guest_that_takes_too_little_gets_nothing(guest: Guest, machine: Sizes) -> None:
    guest.can = 16 * MIB
    with pytest.raises(Unavailable, match="took 16 MiB of 40 MiB"):
        machine.grow_memory(40 * MIB, BY)
    assert (machine.more, guest.used, guest.limits) == (0, 0, [140, 100])


def test_what_a_guest_cannot_give_is_told_and_stays_in_the_limit(guest: Guest, machine: Sizes) -> None:
    machine.grow_memory(40 * MIB, BY)
    guest.least = 24 * MIB
    assert machine.shrink_memory(0, BY) == 24 * MIB
    assert guest.limits == [140, 124]
    guest.refuses = True
    assert machine.shrink_memory(0, BY) == 24 * MIB, "a monitor that is gone is somebody else's business"


def test_a_monitor_that_refuses_changes_nothing(guest: Guest, machine: Sizes) -> None:
    guest.refuses = True
    with pytest.raises(Internal):
        machine.grow_memory(40 * MIB, BY)
    assert (machine.more, guest.used, guest.limits) == (0, 0, [140, 100])
