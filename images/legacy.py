"""Archives of docker before 1.10: `repositories`, and for each layer `ID/json` with its parent, and `ID/layer.tar`.

    repositories    {"team/app": {"1.0": ID}}
    ID/json         {"id": ID, "parent": ID, "created": TIME, "architecture": ..., "os": ..., "config": {...}}

Such an image has neither config nor diff IDs. They are made here: the config of the last layer is the image's.
"""

from __future__ import annotations

import os
from typing import Any

from ambi.core.errors import Corrupt, Unsupported
from images import manifest, reference
from images.content import Ingest, is_digest, parse_json
from images.layers.decoder import compression_of
from images.members import Members

REPOSITORIES = "repositories"
_MAX_LAYERS = 500
_KEPT = ("architecture", "author", "created", "docker_version", "os", "variant")


def images(members: Members) -> list[tuple[bytes, tuple[Ingest, ...], tuple[reference.Reference, ...]]]:
    """Config, layers with the lowest first, and names of each image. Raises Corrupt, Unsupported, InvalidRequest."""
    named: dict[str, list[reference.Reference]] = {}
    for repository, tags in parse_json(members.get(REPOSITORIES).read(), f"{REPOSITORIES} of the image archive").items():
        if not isinstance(tags, dict) or not all(isinstance(x, str) for x in tags.values()):
            raise Corrupt(f"{REPOSITORIES} of the image archive is damaged: {repository[:100]!r} has no list of tags")
        for tag, layer_id in tags.items():
            named.setdefault(layer_id, []).append(reference.parse(f"{repository}:{tag}"))
    return [(*_image(members, layer_id), tuple(names)) for layer_id, names in named.items()]


def _image(members: Members, top: str) -> tuple[bytes, tuple[Ingest, ...]]:
    steps: list[dict[str, Any]] = []
    layers: list[Ingest] = []
    layer_id: object = top
    while layer_id:
        if not isinstance(layer_id, str) or not is_digest(f"sha256:{layer_id}"):
            raise Corrupt(f"the image archive has the layer {str(layer_id)[:80]!r}, which is no id")
        if len(layers) == _MAX_LAYERS:
            raise Unsupported(f"image {top} has more than {_MAX_LAYERS} layers, or its parent links lead in a circle")
        steps.append(parse_json(members.get(f"{layer_id}/json").read(), f"{layer_id}/json of the image archive"))
        layers.append(members.get(f"{layer_id}/layer.tar"))
        layer_id = steps[-1].get("parent")
    if any(compression_of(os.pread(layer.fd, 6, 0)) for layer in layers):
        raise Unsupported(f"image {top} has a compressed layer in an archive of the old form", hint="save it again")
    body = {key: steps[0][key] for key in _KEPT if key in steps[0]}
    config = {
        **body,
        "architecture": body.get("architecture") or "amd64",
        "os": body.get("os") or "linux",
        "config": steps[0].get("config") or {},
        "history": [{"created": x["created"]} if isinstance(x.get("created"), str) else {} for x in reversed(steps)],
        "rootfs": {"type": "layers", "diff_ids": [layer.digest for layer in reversed(layers)]},
    }
    return manifest.encode(config), tuple(reversed(layers))
