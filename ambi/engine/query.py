"""Lists of instances, and prune."""

from __future__ import annotations

import os
from typing import NamedTuple

from ambi.core.errors import AmbiError, NotFound
from ambi.core.model import InstanceId
from ambi.engine import filters as f
from ambi.engine import lifecycle
from ambi.engine.core import Core
from ambi.engine.types import Instance

_PRUNE_KEYS = frozenset(("label", "label!", "until"))


class Page(NamedTuple):
    """Which part of a list: at most `limit` (0: all), only those created before or since an instance."""

    all: bool
    limit: int = 0
    before: str | None = None
    since: str | None = None


def list_instances(core: Core, page: Page, filters: f.Filters) -> list[Instance]:
    """Newest first."""
    f.check(filters, f.INSTANCE_KEYS)
    f.check_values(filters)
    before = [*filters.get("before", ()), *([page.before] if page.before else [])]
    since = [*filters.get("since", ()), *([page.since] if page.since else [])]
    upper = min((core.registry.find(x).row.created_ns for x in before), default=None)
    lower = max((core.registry.find(x).row.created_ns for x in since), default=None)
    ancestors = _images(core, filters.get("ancestor", ()))
    every = page.all or page.limit > 0 or bool(filters.get("status") or filters.get("exited"))
    found = []
    for record in sorted(core.registry, key=lambda r: -r.row.created_ns):
        created = record.row.created_ns
        if (upper is not None and created >= upper) or (lower is not None and created <= lower):
            continue
        if not (every or record.state.alive):
            continue
        if ancestors is not None and not ({record.row.image_id, record.row.image} & ancestors):
            continue
        instance = record.snapshot(core.roots)
        if f.instance_matches(instance, filters):
            found.append(instance)
            if 0 < page.limit == len(found):
                break
    return found


def _images(core: Core, names: list[str] | tuple[str, ...]) -> set[str] | None:
    if not names:
        return None
    found = set(names)
    for name in names:
        try:
            found.add(core.store.resolve(name).id)
        except NotFound:
            continue
    return found


def prune(core: Core, filters: f.Filters) -> tuple[tuple[InstanceId, ...], int]:
    """Remove what does not run; returns the ids and the bytes of their directories."""
    f.check(filters, _PRUNE_KEYS)
    until = [f.seconds(value) for value in filters.get("until", ())]
    removed, freed = [], 0
    for record in core.registry:
        labels = record.row.spec.config.get("Labels") or {}
        if record.state.alive or (until and record.row.created_ns >= min(until) * 1e9):
            continue
        if not f.has_labels(labels, filters.get("label", ())):
            continue
        if any(f.has_labels(labels, [value]) for value in filters.get("label!", ())):
            continue
        size = tree_bytes(str(core.roots.instance_data(record.id)))
        try:
            lifecycle.remove(core, record.id, False)
        except AmbiError:  # started or removed since
            continue
        removed.append(record.id)
        freed += size
    return tuple(removed), freed


def tree_bytes(path: str) -> int:
    """Allocated bytes below `path`; what cannot be read counts nothing."""
    total = 0
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                try:
                    total += entry.stat(follow_symlinks=False).st_blocks * 512
                except FileNotFoundError:  # removed meanwhile, as running instances do
                    continue
                if entry.is_dir(follow_symlinks=False):
                    total += tree_bytes(entry.path)
    except OSError:  # the directory itself is gone, or was never made
        pass
    return total
