"""`/images`: what the store holds, and the ways in."""

from __future__ import annotations

import io
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from ambi.api import image_shapes as shapes
from ambi.api.exchange import Call, Reply, json_reply
from ambi.api.progress import ProgressStream
from ambi.api.query import Filters, one_flag
from ambi.api.registry import LOCAL_PLATFORMS, pull
from ambi.api.router import Route
from ambi.core.errors import InvalidRequest, Unsupported
from ambi.core.words import point_ns
from images.reference import joined

if TYPE_CHECKING:
    from images.store import Image, Removed

_LIST_FILTERS = frozenset(("before", "dangling", "label", "reference", "since", "until"))
_PRUNE_FILTERS = frozenset(("dangling", "label", "label!", "until"))
_BUFFER_BYTES = 1 << 20


def list_images(call: Call) -> Reply:
    filters = call.query.filters(_LIST_FILTERS)
    fits = _filter(call, filters)
    found = sorted(filter(fits, call.engine.images.list()), key=lambda image: -image.created_ns)
    rows = [shapes.summary(_shown(image, filters), call.version, -1) for image in found]
    if call.query.flag("shared-size"):
        shared = call.engine.images.usage().shared
        rows = [{**row, "SharedSize": shared.get(row["Id"], 0)} for row in rows]
    return json_reply(rows)


def _filter(call: Call, filters: Filters) -> Callable[[Image], bool]:
    """Whether an image passes every filter; of one filter's values one must hold, of labels every one."""
    tests: list[Callable[[Image], bool]] = []
    if "dangling" in filters:
        dangling = one_flag("dangling", filters["dangling"])
        tests.append(lambda image: not image.names if dangling else bool(image.names or image.digests))
    for wanted in filters.get("label", ()):
        tests.append(lambda image, wanted=wanted: has_label(shapes.labels(image), wanted))  # type: ignore[misc]
    if filters.get("reference"):
        tests.append(lambda image: any(matches(name, filters["reference"]) for name in (*image.names, *image.digests)))
    for name in filters.get("before", ()):
        before_ns = call.engine.images.resolve(name).created_ns
        tests.append(lambda image, limit=before_ns: image.created_ns < limit)  # type: ignore[misc]
    for name in filters.get("since", ()):
        since_ns = call.engine.images.resolve(name).created_ns
        tests.append(lambda image, limit=since_ns: image.created_ns > limit)  # type: ignore[misc]
    for text in filters.get("until", ()):
        until_ns = point_ns("until", text)
        tests.append(lambda image, limit=until_ns: image.created_ns <= limit)  # type: ignore[misc]
    return lambda image: all(test(image) for test in tests)


def has_label(labels: dict[str, str], wanted: str) -> bool:
    name, equals, value = wanted.partition("=")
    return name in labels and (not equals or labels[name] == value)


def matches(name: str, patterns: list[str]) -> bool:
    """A pattern fits the whole of `repository:tag` or the repository, part by part, as Docker's does."""
    repository = name.partition("@")[0] if "@" in name else name.rpartition(":")[0]
    return any(_fits(text, pattern.replace("[^", "[!")) for pattern in patterns for text in (name, repository))


def _fits(text: str, pattern: str) -> bool:
    parts, wanted = text.split("/"), pattern.split("/")
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


def _shown(image: Image, filters: Filters) -> Image:
    """With a filter by reference only the names that fit are listed."""
    patterns = filters.get("reference")
    if not patterns:
        return image
    names, digests = (tuple(x for x in listed if matches(x, patterns)) for listed in (image.names, image.digests))
    return image._replace(names=names, digests=digests)


def inspect(call: Call) -> Reply:
    return json_reply(shapes.inspect(call.engine.images.resolve(call.name), call.version))


def create(call: Call) -> None:
    """Import (`fromSrc=-`) or pull (`fromImage`)."""
    query = call.query
    source = query.text("fromSrc")
    if not source:
        pull(call)
        return
    if source != "-":
        raise Unsupported(f"cannot import from {source}: only an uploaded archive can be imported", hint="use - and stdin")
    if query.text("platform") not in LOCAL_PLATFORMS:
        raise Unsupported(f"platform {query.text('platform')} cannot run here", hint="leave --platform away")
    with ProgressStream(call) as progress:
        image = call.engine.images.import_tar(
            _upload(call),
            joined(query.text("repo"), query.text("tag")),
            changes=query.all("changes"),
            message=query.text("message"),
            progress=progress,
        )
        progress.line({"status": image.id})


def load(call: Call) -> None:
    with ProgressStream(call, quiet=call.query.flag("quiet")) as progress:
        for image in call.engine.images.load(_upload(call), progress=progress):
            for name in image.names:
                progress.line({"stream": f"Loaded image: {name}\n"})
            if not image.names:
                progress.line({"stream": f"Loaded image ID: {image.id}\n"})


def _upload(call: Call) -> io.BufferedReader:
    return io.BufferedReader(call.request.body, _BUFFER_BYTES)


def tag(call: Call) -> Reply:
    repository = call.query.text("repo")
    if not repository:
        raise InvalidRequest("repo must be the new name of the image", hint="for example repo=team/app&tag=1.0")
    images = call.engine.images
    images.tag(images.resolve(call.name), joined(repository, call.query.text("tag")))
    return Reply(201)


def remove(call: Call) -> Reply:
    query = call.query
    removed = call.engine.images.remove(call.name, force=query.flag("force"), prune=not query.flag("noprune"))
    return json_reply([_removed(item) for item in removed])


def prune(call: Call) -> Reply:
    """Remove images without a name, with `dangling=false` every one that no instance uses. Tells the disk space freed."""
    filters = call.query.filters(_PRUNE_FILTERS)
    unwanted = filters.pop("label!", [])
    everything = bool(filters.get("dangling")) and not one_flag("dangling", filters.pop("dangling"))
    fits = _filter(call, filters)

    def wanted(image: Image) -> bool:
        return fits(image) and not any(has_label(shapes.labels(image), label) for label in unwanted)

    removed, freed_bytes = call.engine.images.prune(wanted, everything=everything)
    return json_reply({"ImagesDeleted": list(map(_removed, removed)) or None, "SpaceReclaimed": freed_bytes})


def _removed(item: Removed) -> dict[str, str]:
    return {"Untagged": item.name} if item.name else {"Deleted": item.id}


def history(call: Call) -> Reply:
    images = call.engine.images
    rows: list[dict[str, Any]] = []
    for step in images.history(images.resolve(call.name)):
        rows.append({
            "Comment": step.comment,
            "Created": step.created_ns // 1_000_000_000,
            "CreatedBy": step.created_by,
            "Id": step.id or "<missing>",
            "Size": step.size_bytes,
            "Tags": list(step.names) or None,
        })  # fmt: skip
    return json_reply(rows)


def search(call: Call) -> Reply:
    raise Unsupported("searching a registry is not supported", hint="look on the registry's own pages")


ROUTES = (
    Route("GET", "/images/json", list_images),
    Route("POST", "/images/create", create),
    Route("POST", "/images/load", load),
    Route("POST", "/images/prune", prune),
    Route("GET", "/images/search", search),
    Route("GET", "/images/{}/json", inspect),
    Route("GET", "/images/{}/history", history),
    Route("POST", "/images/{}/tag", tag),
    Route("DELETE", "/images/{}", remove),
)
