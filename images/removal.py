"""What `docker rmi` removes, and when it refuses. Under the store's mutex."""

from __future__ import annotations

from collections.abc import Callable

from ambi.core.errors import Conflict, InvalidRequest
from images import reference
from images.database import Database
from images.model import Image, Removed

_ID_LENGTH = 64  # of an instance's
_TOLD = 5


def remove(database: Database, image: Image, name: str, *, force: bool, in_use: Callable[[str], list[str]]) -> list[Removed]:
    """Remove `image`, found as `name`: by name only that name, unless it is the last; by id the image."""
    canonical = _as_name(database, image, name)
    everything = database.names(image.id)
    users = in_use(image.id)
    if canonical is not None and _others(canonical, everything):
        return _untag(database, [canonical, *_with_it(canonical, everything)])
    if canonical is not None and users and force:
        return _leave_to_users(database, image, everything)
    if canonical is not None and users:
        raise Conflict(
            f'conflict: unable to remove repository reference "{name}" (must force) - '
            f"container {_shown(users[0])} is using its referenced image {image.id[7:19]}",
            hint=_hint(users),
        )
    repositories = {reference.parse(x).repository for x in everything}
    if canonical is None and not force and (len(repositories) > 1 or users):
        why = (
            f"image is being used by container {_shown(users[0])}"
            if users
            else "image is referenced in multiple repositories"
        )
        raise Conflict(
            f"conflict: unable to delete {image.id[7:19]} (must be forced) - {why}",
            hint=_hint(users) if users else "remove it by name, or use --force",
        )
    if users:  # its instances need the layers: it only loses its names
        if not everything:
            raise Conflict(
                f"conflict: unable to delete {image.id[7:19]} (cannot be forced) - "
                f"image is being used by container {_shown(users[0])}",
                hint=_hint(users),
            )
        return _leave_to_users(database, image, everything)
    return remove_image(database, image)


def remove_unused(database: Database, resolve: Callable[[str], Image], in_use: Callable[[str], list[str]]) -> list[Removed]:
    """Remove what was left to instances that are gone."""
    gone = [image_id for image_id in database.removed() if not in_use(image_id)]
    return [item for image_id in gone for item in remove_image(database, resolve(image_id))]


def _others(canonical: str, names: list[str]) -> bool:
    """Whether something but `canonical` names the image: the digest of a pull goes with the last tag of its repository."""
    own = reference.parse(canonical)
    rest = [reference.parse(name) for name in names if name != canonical]
    return any(not x.digest or x.repository != own.repository for x in rest) or bool(own.digest and rest)


def _shown(user: str) -> str:
    return user[:12] if len(user) == _ID_LENGTH else user


def _hint(users: list[str]) -> str:
    """Names whatever holds the image."""
    ids = [_shown(user) for user in users if len(user) == _ID_LENGTH]
    if not ids:
        return "wait until it is there, and remove it first"
    more = f" and {len(ids) - _TOLD} more" if len(ids) > _TOLD else ""
    return f"remove what uses it first: `ambi rm {' '.join(ids[:_TOLD])}`{more}"


def _with_it(canonical: str, names: list[str]) -> list[str]:
    """The digests of its repository that go with `canonical`, the last tag there."""
    gone = reference.parse(canonical)
    same = [x for x in map(reference.parse, names) if x.repository == gone.repository and x != gone]
    return [x.canonical for x in same] if not gone.digest and all(x.digest for x in same) else []


def remove_image(database: Database, image: Image) -> list[Removed]:
    """Remove an unused image with all its names."""
    removed = _untag(database, database.names(image.id))
    with database.transaction():
        database.delete_image(image.id)
    return [*removed, Removed(id=image.id)]


def _leave_to_users(database: Database, image: Image, names: list[str]) -> list[Removed]:
    """Take every name away; the image goes with the last instance that uses it."""
    with database.transaction():
        removed = _drop_names(database, names)
        database.set_removed(image.id)
    return removed


def _untag(database: Database, names: list[str]) -> list[Removed]:
    with database.transaction():
        return _drop_names(database, names)


def _drop_names(database: Database, names: list[str]) -> list[Removed]:
    for name in names:
        database.delete_name(name)
    return [Removed(name=reference.parse(name).familiar) for name in names]


def _as_name(database: Database, image: Image, name: str) -> str | None:
    """The canonical name that the caller used, or None when it was an id."""
    try:
        canonical = reference.parse(name).canonical
    except InvalidRequest:
        return None
    return canonical if canonical in database.names(image.id) else None
