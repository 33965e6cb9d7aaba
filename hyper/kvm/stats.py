"""The counters of a VM or a vCPU by KVM_GET_STATS_FD, whose file describes itself."""

from __future__ import annotations

import errno
import os
import struct

from hyper.kvm import structs as s

_MOST = 1 << 20  # bytes; the real ones have a few thousand


def stats(fd: int) -> dict[str, int]:
    """Name to value: `exits`, `halt_exits`, `io_exits`, ... A histogram is the sum of its buckets. Raises OSError.

    The file: kvm_stats_header; `num_desc` descriptors, each kvm_stats_desc and a name of `name_size` bytes; 64-bit values.
    """
    header = s.kvm_stats_header.from_buffer_copy(_read(fd, 0, 24))
    each = 16 + header.name_size
    descriptors = _read(fd, header.desc_offset, header.num_desc * each)
    parsed = []
    for at in range(0, len(descriptors), each):
        descriptor = s.kvm_stats_desc.from_buffer_copy(descriptors, at)
        name = descriptors[at + 16 : at + each].split(b"\0", 1)[0].decode()
        parsed.append((name, descriptor.offset, descriptor.size))
    data = _read(fd, header.data_offset, max((offset + 8 * size for _, offset, size in parsed), default=0))
    return {name: sum(struct.unpack_from(f"<{size}Q", data, offset)) for name, offset, size in parsed}


def _read(fd: int, offset: int, length: int) -> bytes:
    if length > _MOST:
        raise OSError(errno.EPROTO, f"statistics of {length} bytes")
    data = os.pread(fd, length, offset)
    if len(data) != length:
        raise OSError(errno.EPROTO, f"statistics end at {offset + len(data)}, not at {offset + length}")
    return data
