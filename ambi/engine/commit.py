"""An image of what an instance has changed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ambi.core.errors import Conflict, InvalidRequest, NotFound, Unsupported
from ambi.engine.core import Core
from ambi.engine.lifecycle import soon
from ambi.engine.records import Record
from ambi.engine.trees import looking, received
from ambi.shim.client import ShimConnection
from images import commit as images_commit
from images.commit import Wanted

__all__ = ["Wanted", "commit"]


def commit(core: Core, id: str, wanted: Wanted, *, pause: bool) -> str:
    """The id of the new image. `wanted.config` is what the caller wants different from the instance's own.

    pause: the instance stands still while it is read, where that can be done.
    """
    record = core.registry.find(id)
    own = record.row.spec.config
    given = {key: value for key, value in wanted.config.items() if value}
    command = wanted.created_by or " ".join(own.get("Cmd") or own.get("Entrypoint") or [])
    wanted = wanted._replace(config={**own, **given}, created_by=command)
    with core.claim(record.row.image_id):
        try:
            base = core.store.resolve(record.row.image_id)
        except NotFound as error:
            raise NotFound(f"No such image: {record.row.image}", hint=error.hint) from error
        images_commit.check(base, wanted)
        with (
            looking(core, record) as connection,
            _still(record, connection, pause),
            core.store.hold(base.layers),
            received(connection, verb="layer") as stream,
        ):
            image = images_commit.commit(core.store, base, stream, wanted)
    core.publish(record, "commit", comment=wanted.message, imageID=image.id, imageRef=wanted.name)
    if wanted.name:
        core.bus.publish("image", "tag", image.id, {"name": wanted.name})
    return image.id


@contextmanager
def _still(record: Record, connection: ShimConnection, pause: bool) -> Iterator[None]:
    """Nothing of a running instance runs in the `with`; one that was paused before stays so."""
    held = False
    if pause and record.state.status.value == "running":
        try:
            connection.call("pause", by=soon())
            held = True
        except (Conflict, InvalidRequest, Unsupported):  # it has ended, or its driver cannot
            pass
    try:
        yield
    finally:
        if held:
            connection.call("resume", by=soon())
