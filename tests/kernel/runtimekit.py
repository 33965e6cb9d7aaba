"""Fixtures of the container driver's own tests: a rig over a busybox tree that a test may spoil first."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import driverkit


@pytest.fixture
def tree(busybox_tar: Path) -> Iterator[Path]:
    """A busybox root of this test's own; removed with everything beside it."""
    base = Path(tempfile.mkdtemp(prefix="ambi-", dir="/tmp"))
    yield driverkit.unpack(busybox_tar, base / "tree")
    shutil.rmtree(base)


@pytest.fixture
def rig(tree: Path) -> Iterator[driverkit.Rig]:
    """The container driver over `tree`."""
    with driverkit.layers_namespace():
        yield driverkit.Rig("container", tree.parent, (driverkit.make_layer(tree, "dir", tree.parent / "x"),), tree.parent)
