"""An image of what an instance has changed."""

from __future__ import annotations

from ambi.core.errors import NotFound
from ambi.engine.core import Core
from ambi.engine.trees import looking, received
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
            core.store.hold(base.layers),
            received(connection, verb="layer", still=pause) as stream,
        ):
            image = images_commit.commit(core.store, base, stream, wanted)
    core.publish(record, "commit", comment=wanted.message, imageID=image.id, imageRef=wanted.name)
    if wanted.name:
        core.bus.publish("image", "tag", image.id, {"name": wanted.name})
    return image.id
