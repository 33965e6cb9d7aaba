"""Manifests and configs of images that arrive without one, in the canonical JSON of which the digest is taken."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ambi.core.errors import Corrupt
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


_TEXT, _TEXTS, _MAP = "a string", "a list of strings", "an object"
_CONFIG_SHAPES = {
    "Cmd": _TEXTS, "Entrypoint": _TEXTS, "Env": _TEXTS, "OnBuild": _TEXTS, "Shell": _TEXTS, "User": _TEXT,
    "WorkingDir": _TEXT, "StopSignal": _TEXT, "ExposedPorts": _MAP, "Volumes": _MAP, "Labels": _MAP,
}  # fmt: skip


def check_config(body: dict[str, Any], what: str) -> None:
    """Corrupt when a field of an OCI config has another shape than everybody who reads it expects."""
    config = body.get("config") or {}
    history = body.get("history") or []
    if not isinstance(config, dict) or not isinstance(history, list) or not all(isinstance(x, dict) for x in history):
        raise Corrupt(f"{what} has a damaged config or history")
    for key, shape in _CONFIG_SHAPES.items():
        if config.get(key) is not None and not _fits(config[key], shape):
            raise Corrupt(f"{what} has a damaged {key}: it must be {shape}")
    if any(not isinstance(x, str) for x in (config.get("Labels") or {}).values()):
        raise Corrupt(f"{what} has a label that is not a string")
    for key in ("architecture", "os", "author", "docker_version", "variant"):
        if not isinstance(body.get(key) or "", str):
            raise Corrupt(f"{what} has a damaged {key}: it must be a string")


def _fits(value: object, shape: str) -> bool:
    if shape == _TEXTS:
        return isinstance(value, list) and all(isinstance(x, str) for x in value)
    return isinstance(value, str if shape == _TEXT else dict)


def manifest_of(config_digest: str, config_size: int, layers: Sequence[LayerRow]) -> bytes:
    return encode({
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": {"mediaType": CONFIG, "digest": config_digest, "size": config_size},
        "layers": [{"mediaType": x.media_type, "digest": x.blob, "size": x.blob_bytes} for x in layers],
    })  # fmt: skip
