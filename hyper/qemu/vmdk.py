"""A disk of extents in QEMU's words: a VMDK descriptor that lists files handed over as descriptors."""

from __future__ import annotations

from hyper.vm.layers import Extent


def descriptor(extents: tuple[Extent, ...]) -> bytes:
    """The VMDK descriptor; QEMU opens descriptor N as /dev/fdset/N.

    No empty lines: QEMU (7.2 to 10) takes the extent that follows one twice.
    """
    lines = [
        "# Disk DescriptorFile", "version=1", "CID=fffffffe", "parentCID=ffffffff", 'createType="twoGbMaxExtentFlat"',
        *(f'RW {x.sectors} FLAT "/dev/fdset/{x.fd}" {x.offset}' for x in extents),
        'ddb.virtualHWVersion = "4"', 'ddb.adapterType = "ide"', "",
    ]  # fmt: skip
    return "\n".join(lines).encode()
