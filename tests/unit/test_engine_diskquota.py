"""`--storage-opt size=`: what is understood, what is refused, and what a VM makes of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from ambi.core.errors import InvalidRequest, Unsupported
from ambi.core.model import Isolation
from ambi.engine import diskquota, resources
from ambi.engine.body import Body


def host(**options: object) -> Body:
    return Body("HostConfig", {"StorageOpt": options})


@pytest.mark.parametrize(
    "text,size",
    [("10G", 10 << 30), ("10gb", 10 << 30), ("512MiB", 512 << 20), ("1.5g", 3 << 29), ("40000000", 40_000_000),
     ("64 m", 64 << 20)],
)  # fmt: skip
def test_sizes(text: str, size: int) -> None:
    assert diskquota.wanted_bytes(host(size=text), Isolation.CONTAINER) == size
    assert resources.vm_shape(host(size=text)).disk_bytes == size


@pytest.mark.parametrize("text", ["", "G", "-1g", "1x", "0", "1e9", "9" * 30, "1gg", ".5g", "\u0661g", 7, None, "1..2g"])
def test_no_sizes(text: object) -> None:
    with pytest.raises(InvalidRequest, match="invalid size"):
        diskquota.wanted_bytes(host(size=text), Isolation.CONTAINER)


def test_what_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="Unknown option color"):
        diskquota.wanted_bytes(host(color="red"), Isolation.CONTAINER)
    with pytest.raises(InvalidRequest, match="too small for the disk of a VM"):
        diskquota.wanted_bytes(host(size="1m"), Isolation.VM)
    with pytest.raises(Unsupported, match="--storage-opt is supported only for overlay over xfs or ext4"):
        diskquota.check(Path("/dev/shm"), 1 << 30)
    diskquota.check(Path("/dev/shm"), 0)
    assert diskquota.wanted_bytes(host(), Isolation.VM) == 0
