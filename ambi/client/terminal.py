"""The user's terminal: its size, and raw mode that is always undone."""

from __future__ import annotations

import os
import signal
import termios
from collections.abc import Callable
from types import FrameType, TracebackType


def size(fd: int) -> tuple[int, int]:
    """Rows and columns of the terminal at `fd`; (0, 0) when it is none."""
    try:
        columns, rows = os.get_terminal_size(fd)
    except OSError:
        return 0, 0
    return rows, columns


class Raw:
    """Within it, the terminal at `fd` is raw (cfmakeraw of termios(3)); without a terminal there, nothing happens."""

    __slots__ = ("_fd", "_saved")

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._saved: list[int | list[bytes | int]] | None = None

    def __enter__(self) -> Raw:
        if os.isatty(self._fd):
            self._saved = termios.tcgetattr(self._fd)
            mode = termios.tcgetattr(self._fd)
            mode[0] &= ~(
                termios.IGNBRK | termios.BRKINT | termios.PARMRK | termios.ISTRIP
                | termios.INLCR | termios.IGNCR | termios.ICRNL | termios.IXON
            )  # fmt: skip
            mode[1] &= ~termios.OPOST
            mode[2] = (mode[2] & ~(termios.CSIZE | termios.PARENB)) | termios.CS8
            mode[3] &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.ISIG | termios.IEXTEN)
            mode[6][termios.VMIN], mode[6][termios.VTIME] = 1, 0
            termios.tcsetattr(self._fd, termios.TCSADRAIN, mode)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._saved is not None:
            termios.tcsetattr(self._fd, termios.TCSADRAIN, self._saved)
            self._saved = None


class OnResize:
    """Within it, `action(rows, columns)` is called whenever the terminal at `fd` changes its size."""

    __slots__ = ("_action", "_fd", "_previous")

    def __init__(self, fd: int, action: Callable[[int, int], None]) -> None:
        self._fd = fd
        self._action = action

    def __enter__(self) -> OnResize:
        self._previous = signal.signal(signal.SIGWINCH, self._changed)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        signal.signal(signal.SIGWINCH, self._previous)

    def _changed(self, number: int, frame: FrameType | None) -> None:
        rows, columns = size(self._fd)
        if rows and columns:
            self._action(rows, columns)
