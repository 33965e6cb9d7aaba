"""A point in time that is passed down the stack, instead of a timeout that every layer starts anew."""

from __future__ import annotations

import time

from ambi.core.errors import DeadlineExceeded


class Deadline:
    """A point on the monotonic clock; `Deadline.never()` is no limit."""

    __slots__ = ("_at",)

    def __init__(self, at: float | None) -> None:
        self._at = at

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        return cls(time.monotonic() + seconds)

    @classmethod
    def never(cls) -> Deadline:
        return cls(None)

    def remaining(self) -> float | None:
        """Seconds left, never negative; None without a limit."""
        return None if self._at is None else max(0.0, self._at - time.monotonic())

    def milliseconds(self) -> int | None:
        """What is left as `poll` takes it: rounded up, so that it does not wake before the point; None without a limit."""
        left = self.remaining()
        return None if left is None else int(left * 1000 + 0.999)

    def timeout(self) -> float | None:
        """What is left as `settimeout` takes it: never 0, which would mean not to block; None without a limit."""
        left = self.remaining()
        return None if left is None else max(left, 0.001)

    def expired(self) -> bool:
        return self._at is not None and time.monotonic() >= self._at

    def check(self, what: str) -> None:
        """Raise DeadlineExceeded, naming `what` was awaited, when the point has passed."""
        if self.expired():
            raise DeadlineExceeded(f"{what} did not happen in time")
