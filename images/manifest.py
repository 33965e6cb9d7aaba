"""Manifests and configs of images that arrive without one, in the canonical JSON of which the digest is taken."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from images.database import LayerRow
from images.times import format_ns

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
_LAYER = "application/vnd.oci.image.layer.v1.tar"
_SUFFIXES = {"": "", "gzip": "+gzip", "zstd": "+zstd"}


def layer_media_type(compression: str) -> str:
    """The OCI type of a layer; those of xz and bzip2 are not registered, and read by what is in them."""
    return _LAYER + _SUFFIXES.get(compression, f"+{compression}")


def encode(body: dict[str, Any]) -> bytes:
    return json.dumps(body, separators=(",", ":"), sort_keys=True).encode()


def imported_config(config: dict[str, Any], diff_ids: Sequence[str], created_ns: int, message: str) -> bytes:
    """The config of an image that is one imported root file system."""
    created = format_ns(created_ns)
    return encode({
        "architecture": "amd64",
        "config": config,
        "created": created,
        "history": [{"comment": message, "created": created}],
        "os": "linux",
        "rootfs": {"diff_ids": list(diff_ids), "type": "layers"},
    })  # fmt: skip


def manifest_of(config_digest: str, config_size: int, layers: Sequence[LayerRow]) -> bytes:
    return encode({
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": {"mediaType": CONFIG, "digest": config_digest, "size": config_size},
        "layers": [{"mediaType": x.media_type, "digest": x.blob, "size": x.blob_bytes} for x in layers],
    })  # fmt: skip
