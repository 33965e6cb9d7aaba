"""One more layer on an image, from an archive of what an instance has changed, and the config that goes with it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ambi.core.errors import InvalidRequest
from ambi.core.events import ignore
from images import manifest, reference
from images.changes import apply_changes
from images.importer import NewLayer, Source, about, receive_layer
from images.model import Image
from images.times import format_ns

if TYPE_CHECKING:
    from images.store import Store

KEYS = (
    "User", "ExposedPorts", "Env", "Entrypoint", "Cmd", "Volumes", "WorkingDir", "Labels", "StopSignal", "Healthcheck",
    "OnBuild", "Shell", "ArgsEscaped",
)  # fmt: skip

DECLARED = ("Volumes", "Healthcheck", "Shell")


class Wanted(NamedTuple):
    """What is told of the image. config: of the instance, of which an image keeps KEYS; changes: Dockerfile instructions."""

    name: str
    config: dict[str, Any]
    changes: Sequence[str] = ()
    author: str = ""
    message: str = ""
    created_by: str = ""


def check(base: Image, wanted: Wanted) -> tuple[reference.Reference | None, dict[str, Any]]:
    """The name and the config of the image, before anything is read. Raises InvalidRequest.

    What only an image declares comes from `base`.
    """
    name = reference.parse(wanted.name) if wanted.name else None
    if name is not None and name.digest:
        raise InvalidRequest(
            f"cannot commit to {wanted.name}: a digest cannot be chosen", hint="give a name and a tag, as in team/app:1.0"
        )
    declared = {key: value for key, value in (base.config.get("config") or {}).items() if key in DECLARED}
    config = {**declared, **{key: wanted.config[key] for key in KEYS if wanted.config.get(key)}}
    config = {key: dict(value) if isinstance(value, dict) else value for key, value in config.items()}
    apply_changes(config, wanted.changes)
    return name, config


def commit(store: Store, base: Image, source: Source, wanted: Wanted) -> Image:
    """`base` and the archive that `source` gives, as an image. Nothing is left of it when it fails.

    The caller sees to it that `base` is not removed meanwhile.
    """
    name, config = check(base, wanted)
    rows = store.image_layers(base)
    with about(f"cannot commit to {name.familiar if name else 'an image'}"):
        form = store.layer_form()[0]
        layer = receive_layer(source, form, content=store.content, snapshots=store.snapshots, progress=ignore)
    try:
        diff_ids = [row.diff_id for row in rows] + [layer.row.diff_id]
        body = _body(base, config, diff_ids, wanted)
        return store.commit(body, None, [*(NewLayer(row, None, None) for row in rows), layer], [name] if name else [])
    finally:
        layer.discard()


def _body(base: Image, config: dict[str, Any], diff_ids: list[str], wanted: Wanted) -> bytes:
    created = format_ns(time.time_ns())
    step = {"created": created, "created_by": wanted.created_by, "author": wanted.author, "comment": wanted.message}
    kept = {key: value for key, value in base.config.items() if key in ("architecture", "os", "variant", "os.version")}
    body = {
        **kept,
        "created": created,
        "config": config,
        "history": [*(base.config.get("history") or ()), {key: value for key, value in step.items() if value}],
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    }
    return manifest.encode(body | ({"author": wanted.author} if wanted.author else {}))
