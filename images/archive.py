"""Archives of whole images: what `docker save` writes, old (`HEX/layer.tar`) and new, and OCI image layouts.

The archive is taken apart in a worker; here each member becomes a file of the ingest directory with its digest, and only
what a manifest names is kept. Every digest and diff ID is checked. Layers of any compression are told by their first bytes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from ambi.core.errors import Corrupt, InvalidRequest, Unsupported
from ambi.core.events import Progress, ProgressSink
from images import legacy, manifest, reference
from images.content import Ingest, digest_of, parse_json
from images.database import LayerRow
from images.importer import NewLayer, layer_row
from images.layers.decoder import compression_of
from images.layers.supervisor import Worker
from images.members import Members, clean, split
from images.snapshots import discard

if TYPE_CHECKING:
    from images.store import Store

_READ = 256 << 10
_MAX_MEMBERS = 20_000
_MAX_NESTING = 4  # of indexes
_MAX_LAYERS = 500
_DOCKER, _OCI = "manifest.json", "index.json"
_NAME, _SHORT_NAME = "io.containerd.image.name", "org.opencontainers.image.ref.name"
LAYER_TYPES = ("application/vnd.oci.image.layer.", "application/vnd.docker.image.rootfs.")


class Plan(NamedTuple):
    """One image of an archive. layers: their members, the lowest first. manifest: as stored, or None."""

    config: bytes
    diff_ids: tuple[str, ...]
    layers: tuple[Ingest, ...]
    names: tuple[reference.Reference, ...]
    manifest: bytes | None


def load(store: Store, source: BinaryIO, progress: ProgressSink) -> list[Any]:
    """The images of the archive, in its order, with the names that it gives them. Nothing is stored of one that is refused;
    those before it stay."""
    with Members() as members:
        split(store.content, source, members, progress)
        found = [(store_plan(store, plan, progress), plan.names) for plan in plans(members)]
    return [image._replace(names=tuple(x.familiar for x in names if x.tag), digests=()) for image, names in found]


def plans(members: Members) -> list[Plan]:
    """The images of an archive; Corrupt, Unsupported or InvalidRequest when it is none."""
    if members.find(_DOCKER) is not None:
        return [_as_stored(members, plan) for plan in _docker_plans(members)]
    if members.find(_OCI) is not None:
        return _oci_plans(members)
    if members.find(legacy.REPOSITORIES) is not None:
        return [_plan(config, layers, names, None) for config, layers, names in legacy.images(members)]
    raise InvalidRequest(
        f"not an image archive: it has neither {_DOCKER} nor {_OCI}",
        hint="a root file system is imported with `ambi image import FILE NAME`",
    )


def check_diff_id(found: str, wanted: str, what: str) -> None:
    if found != wanted:
        raise Corrupt(f"layer {what} is damaged: its content has the digest {found}, the image says {wanted}")


def _docker_plans(members: Members) -> list[Plan]:
    import json

    try:
        entries = json.loads(members.get(_DOCKER).read())
        return [_docker_plan(members, entry) for entry in entries]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise Corrupt(f"{_DOCKER} of the image archive is damaged: {error}") from error


def _as_stored(members: Members, plan: Plan) -> Plan:
    """`plan` with the manifest that an OCI layout in the same archive has for it, so that its digest stays."""
    if members.find(_OCI) is None:
        return plan
    index = parse_json(members.get(_OCI).read(), f"{_OCI} of the image archive")
    wanted = [digest_of(plan.config), *(layer.digest for layer in plan.layers)]
    for entry in _list(index, "manifests"):
        data = _manifest(members, entry, 0)
        body = parse_json(data, "manifest of the image archive") if data else {}
        blobs = [body.get("config"), *(body.get("layers") or ())]
        if data and [blob.get("digest") if isinstance(blob, dict) else None for blob in blobs] == wanted:
            return plan._replace(manifest=data)
    return plan


def _docker_plan(members: Members, entry: dict[str, Any]) -> Plan:
    config_name = clean(str(entry["Config"]))
    file = members.get(config_name)
    named = config_name.removesuffix(".json").rpartition("/")[2]
    if len(named) == 64 and file.digest != f"sha256:{named}":
        raise Corrupt(f"config {config_name} of the image archive is damaged: its digest is {file.digest}")
    layers = tuple(members.get(clean(str(name))) for name in entry["Layers"] or ())
    for name, layer in zip(entry["Layers"] or (), layers, strict=True):
        if name.startswith("blobs/sha256/") and layer.digest != f"sha256:{name[13:]}":
            raise Corrupt(f"layer {name} of the image archive is damaged: its digest is {layer.digest}")
    names = tuple(reference.parse(name) for name in entry.get("RepoTags") or ())
    return _plan(file.read(), layers, names, None)


def _oci_plans(members: Members) -> list[Plan]:
    layout = parse_json(members.get("oci-layout").read(), "oci-layout of the image archive")
    if layout.get("imageLayoutVersion") != "1.0.0":
        raise Unsupported(f"image archive has layout version {layout.get('imageLayoutVersion')!r}, this version reads 1.0.0")
    index = parse_json(members.get(_OCI).read(), f"{_OCI} of the image archive")
    plans = []
    for descriptor in _list(index, "manifests"):
        found = _manifest(members, descriptor, 0)
        if found is not None:
            plans.append(_oci_plan(members, found, _names(descriptor)))
    if not plans:
        raise Unsupported("image archive has no image for linux/amd64", hint="save it for --platform linux/amd64")
    return plans


def _list(body: dict[str, Any], key: str) -> list[Any]:
    value = body.get(key)
    if not isinstance(value, list):
        raise Corrupt(f"image archive has a document without {key}")
    return value


def _manifest(members: Members, descriptor: object, depth: int) -> bytes | None:
    """The manifest for this machine that `descriptor` leads to, or None."""
    if depth > _MAX_NESTING:
        raise Corrupt("image archive has indexes nested too deeply")
    platform = descriptor.get("platform") if isinstance(descriptor, dict) else None
    if isinstance(platform, dict) and (platform.get("os"), platform.get("architecture")) != ("linux", "amd64"):
        return None
    data = members.blob(descriptor, "manifest").read()
    body = parse_json(data, "manifest of the image archive")
    if "manifests" in body:
        for below in _list(body, "manifests"):
            found = _manifest(members, below, depth + 1)
            if found is not None:
                return found
        return None
    if body.get("schemaVersion") != 2:
        raise Unsupported(f"manifest has schema version {body.get('schemaVersion')!r}, this version reads 2")
    return data


def _names(descriptor: dict[str, Any]) -> tuple[reference.Reference, ...]:
    annotations = descriptor.get("annotations")
    if not isinstance(annotations, dict):
        return ()
    name = annotations.get(_NAME) or annotations.get(_SHORT_NAME)
    if not isinstance(name, str) or not name:
        return ()
    if _NAME not in annotations and not any(x in name for x in ":/"):
        return ()  # a bare tag says nothing of the repository
    return (reference.parse(name),)


def _oci_plan(members: Members, data: bytes, names: tuple[reference.Reference, ...]) -> Plan:
    body = parse_json(data, "manifest of the image archive")
    config = members.blob(body.get("config"), "config").read()
    layers = []
    for descriptor in _list(body, "layers"):
        media_type = descriptor.get("mediaType") if isinstance(descriptor, dict) else None
        if not isinstance(media_type, str) or not media_type.startswith(LAYER_TYPES):
            raise Unsupported(f"image archive has a layer of type {media_type!r}, which is no file system")
        layers.append(members.blob(descriptor, "layer"))
    return _plan(config, tuple(layers), names, data)


def _plan(config: bytes, layers: tuple[Ingest, ...], names: tuple[reference.Reference, ...], stored: bytes | None) -> Plan:
    body = parse_json(config, "config of the image archive")
    manifest.check_config(body, f"config {digest_of(config)} of the image archive")
    if (body.get("os") or "linux") != "linux":
        raise Unsupported(f"image is for {body['os']}, not for linux")
    rootfs = body.get("rootfs")
    diff_ids = rootfs.get("diff_ids") if isinstance(rootfs, dict) else None
    if not isinstance(diff_ids, list) or len(diff_ids) != len(layers) or not all(isinstance(x, str) for x in diff_ids):
        raise Corrupt(f"config {digest_of(config)} of the image archive does not list its {len(layers)} layers")
    if not layers:
        raise Unsupported(f"image {digest_of(config)} has no layers", hint="it cannot be run")
    if len(layers) > _MAX_LAYERS:
        raise Unsupported(f"image has {len(layers)} layers, more than {_MAX_LAYERS}")
    return Plan(config, tuple(diff_ids), layers, names, stored)


def store_plan(store: Store, plan: Plan, progress: ProgressSink) -> Any:
    """The image of `plan`, stored whole or not at all."""
    with store.hold(plan.diff_ids), _converted(store, plan, progress) as layers:
        return store.commit(plan.config, plan.manifest, layers, plan.names)


@contextmanager
def _converted(store: Store, plan: Plan, progress: ProgressSink) -> Iterator[Sequence[NewLayer]]:
    """The layers of `plan`, converted by a worker for each processor; what is not published goes afterwards."""
    jobs = list(enumerate(zip(plan.layers, plan.diff_ids, strict=True)))
    done: dict[int, NewLayer] = {}
    workers = min(len(jobs), len(os.sched_getaffinity(0)))

    def run(part: int) -> None:
        missing = [job for job in jobs[part::workers] if store.known_layer(job[1][1]) is None]
        for number, (blob, diff_id) in jobs[part::workers]:
            row = store.known_layer(diff_id)
            if row is not None:
                done[number] = NewLayer(_known(blob, diff_id, row), blob, None)
        if missing:
            with Worker() as worker:
                for number, (blob, diff_id) in missing:
                    progress(Progress(diff_id[7:19], "Extracting", 0, blob.size))
                    done[number] = _convert(store, worker, blob, diff_id)
                    progress(Progress(diff_id[7:19], "Extracted", blob.size, blob.size))

    try:
        with ThreadPoolExecutor(workers, "layers") as pool:
            for result in [pool.submit(run, part) for part in range(workers)]:
                result.result()
        for file in {id(layer.blob): layer.blob for layer in done.values() if layer.blob is not None}.values():
            file.sync()
        yield [done[number] for number, _ in jobs]
    finally:
        for layer in done.values():  # blobs are the archive's: another image of it may have the same
            if layer.prepared is not None:
                discard(layer.prepared.path)


def _convert(store: Store, worker: Worker, blob: Ingest, diff_id: str) -> NewLayer:
    fd = os.open(blob.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        prepared = store.snapshots.prepare(store.layer_form()[0], worker, fd)
    finally:
        os.close(fd)
    layer = NewLayer(layer_row(blob, prepared.converted), blob, prepared)
    if prepared.converted.diff_id != diff_id:
        discard(prepared.path)
        check_diff_id(prepared.converted.diff_id, diff_id, blob.digest)
    return layer


def _known(blob: Ingest, diff_id: str, sizes: tuple[int, int]) -> LayerRow:
    """A row for a layer that the store has, whichever compression this archive uses."""
    compression = compression_of(os.pread(blob.fd, 6, 0))
    return LayerRow(diff_id, *sizes, blob.digest, manifest.layer_media_type(compression), blob.size)
