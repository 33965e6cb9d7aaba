"""What belongs to an image in its registry: signatures, bills of materials and other artifacts whose `subject` it is.

OCI distribution-spec 1.1, "Listing Referrers" and "Pushing Manifests with Subject": a registry that knows subjects lists
them itself and says so at a push (`OCI-Subject`); for one that does not, a tag `sha256-HEX` names an index of them, which
clients keep. Both are read and written here, in whichever way each of the two registries wants it. cosign's tags (`.sig`,
`.att`, `.sbom` behind the same name) are older than both and are copied as they are.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from ambi.core.errors import Corrupt, NotFound, Unsupported
from images.registry.client import Descriptor, Document, Repository, descriptor

INDEX = "application/vnd.oci.image.index.v1+json"
_COSIGN = (".sig", ".att", ".sbom")
_MOST, _DEEPEST = 200, 4  # a signature of a bill of materials of an image is three deep


def copy(source: Repository, target: Repository, digest: str, send: Callable[[Descriptor], object]) -> int:
    """Copy what refers to the manifest `digest`, and what refers to that; how many. `send` copies one blob.

    Entries whose manifest has another subject are left out: a list is only a claim.
    """
    seen, waiting = {digest}, [(digest, 1)]
    while waiting:
        subject, depth = waiting.pop()
        for suffix in _COSIGN:
            _tagged(source, target, fallback_tag(subject) + suffix, send)
        for entry in source.referrers(subject):
            own = descriptor(entry, f"list of referrers of {subject} in {source.name}")
            if own.digest in seen:
                continue
            seen.add(own.digest)
            if len(seen) > _MOST or depth > _DEEPEST:
                raise Unsupported(f"{source.name}@{digest} has more than {_MOST} referrers, or deeper than {_DEEPEST}")
            if _one(source, target, entry, subject, send):
                waiting.append((own.digest, depth + 1))
    return len(seen) - 1


def _one(
    source: Repository, target: Repository, entry: dict[str, Any], subject: str, send: Callable[[Descriptor], object]
) -> bool:
    try:
        found = source.manifest(str(entry["digest"]))
    except NotFound:  # the list outlives what it lists
        return False
    told = found.body.get("subject")
    if not isinstance(told, dict) or told.get("digest") != subject:
        return False
    for blob in _blobs(found, source.name):
        send(blob)
    if target.put_manifest(found.digest, found.data, found.media_type) != subject:
        _list(target, subject, entry)
    return True


def _tagged(source: Repository, target: Repository, tag: str, send: Callable[[Descriptor], object]) -> None:
    try:
        found = source.manifest(tag)
    except NotFound:
        return
    for blob in _blobs(found, source.name):
        send(blob)
    target.put_manifest(tag, found.data, found.media_type)


def _blobs(found: Document, name: str) -> list[Descriptor]:
    what = f"manifest {found.digest} of {name}"
    layers = found.body.get("layers")
    if not isinstance(layers, list):
        raise Corrupt(f"{what} refers to an image and has no list of layers")
    return list(dict.fromkeys(descriptor(entry, what) for entry in (found.body.get("config"), *layers)))


def _list(target: Repository, subject: str, entry: dict[str, Any]) -> None:
    """Add `entry` to the index under the tag of `subject`; the specification has no way to do it for two at once."""
    tag = fallback_tag(subject)
    try:
        known = target.manifest(tag).body.get("manifests")
    except NotFound:
        known = []
    listed = [x for x in known if isinstance(x, dict)] if isinstance(known, list) else []
    if any(x.get("digest") == entry["digest"] for x in listed):
        return
    body = {"schemaVersion": 2, "mediaType": INDEX, "manifests": [*listed, entry]}
    target.put_manifest(tag, json.dumps(body).encode(), INDEX)


def fallback_tag(digest: str) -> str:
    return digest.replace(":", "-", 1)
