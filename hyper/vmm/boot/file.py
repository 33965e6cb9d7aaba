"""Reading a kernel or an initramfs: hostile files, of which every byte that is asked for is there or the file is refused."""

from __future__ import annotations

import os
import stat

from ambi.core.errors import Corrupt, InvalidRequest, from_os_error


class BootFile:
    """A regular file behind a descriptor, which stays the caller's. `what` is `kernel` or `initramfs`, for messages."""

    __slots__ = ("fd", "size", "what")

    def __init__(self, fd: int, what: str) -> None:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise InvalidRequest(f"the {what} is not a regular file")
        if status.st_size == 0:
            raise Corrupt(f"the {what} is an empty file")
        self.fd = fd
        self.size = status.st_size
        self.what = what

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset`. Corrupt when they are not there."""
        self._check(offset, length)
        data = os.pread(self.fd, length, offset)
        if len(data) != length:
            raise self.truncated(offset + length)
        return data

    def into(self, view: memoryview, offset: int) -> None:
        """Fill `view` from `offset`, without a copy in between. Corrupt when the file is too short."""
        self._check(offset, len(view))
        done = 0
        while done < len(view):
            try:
                got = os.preadv(self.fd, [view[done:]], offset + done)
            except OSError as error:
                raise from_os_error(f"cannot read the {self.what}", error) from error
            if not got:
                raise self.truncated(offset + len(view))
            done += got

    def _check(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise self.truncated(offset + length)

    def truncated(self, needed: int) -> Corrupt:
        return Corrupt(
            f"the {self.what} is truncated: it has {self.size} bytes and says that it has {needed}",
            hint="build the guest's files again: python -m hyper.guest",
        )
