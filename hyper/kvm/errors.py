"""What can go wrong in here. This package imports nothing of ours, so its errors are OSErrors with words."""

from __future__ import annotations

import os


class KvmError(OSError):
    """The kernel refused. `ioctl` is the name of the call, `subject` what it was about (`vCPU 3`, `slot 2 at 0x0`)."""

    def __init__(self, errno: int, ioctl: str, subject: str = "", needs: str = "") -> None:
        about = f" ({subject})" if subject else ""
        lacking = f"; it needs {needs}" if needs else ""
        super().__init__(errno, f"{ioctl}{about}: {os.strerror(errno)}{lacking}")
        self.ioctl = ioctl
        self.subject = subject


class Lacking(KvmError):
    """This KVM has not the capability that was asked for; errno is EOPNOTSUPP."""
