"""Memory that others map, too: filled from a template's file, or put in the place of memory that was ours alone."""

from __future__ import annotations

import errno
import os

from ambi.linux import holes

CHUNK = 2 << 20


def fill(view: memoryview, source: int, offset: int) -> None:
    """Read [offset, offset + len(view)) of the file `source` into `view`, which is all zeros, but for what is a hole there.

    One read after the other into the mapping: that has measured better than several threads, sendfile(2), writes to the
    memfd and huge pages, and it leaves the page tables made. Raises OSError.
    """
    for start, hole in holes.data(source, offset, offset + len(view)):
        at = start
        while at < hole:
            count = os.preadv(source, [view[at - offset : min(at + CHUNK, hole) - offset]], at)
            if not count:
                raise OSError(errno.EIO, "the file that memory is filled from has become shorter")
            at += count
