"""What the store gives out."""

from __future__ import annotations

from typing import Any, NamedTuple


class Image(NamedTuple):
    """id: digest of the config. names: familiar, with tag. digests: familiar, with digest. config: the OCI config.

    size_bytes: of the files of all layers. layers: diff IDs, the lowest first. manifest: its digest.
    """

    id: str
    names: tuple[str, ...]
    digests: tuple[str, ...]
    config: dict[str, Any]
    size_bytes: int
    created_ns: int
    layers: tuple[str, ...]
    manifest: str = ""


class Removed(NamedTuple):
    """One step of a removal: a `name` that went, or else the image `id`."""

    name: str = ""
    id: str = ""


class HistoryStep(NamedTuple):
    """id: of the image for its newest step, else empty. size_bytes: of the layer that the step made."""

    id: str
    created_ns: int
    created_by: str
    size_bytes: int
    comment: str
    names: tuple[str, ...]


class Usage(NamedTuple):
    """Bytes of files in layers, each layer once. shared: image id to what it has in common with others.

    reclaimable_bytes: in layers that only images without an instance have.
    """

    layers_bytes: int
    reclaimable_bytes: int
    shared: dict[str, int]
