"""The volumes of an engine: records, life cycle, who uses them, events.

A volume is used by the instances whose mount points name it, running or not, by those that have it attached, and by a create
that is on its way. Nothing else is counted, so nothing can be wrong after a death.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ambi.core.errors import AmbiError, Conflict, InvalidRequest, NotFound
from ambi.core.model import Isolation
from ambi.engine import localvolume as local
from ambi.engine import mounts
from ambi.engine.bus import attributes_of
from ambi.engine.filters import Filters, has_labels
from ambi.engine.localvolume import Volume
from ambi.engine.mountedvolumes import KINDS, Mounts
from ambi.engine.mountpoints import Asked, Point, VolumeAsk, points_of

if TYPE_CHECKING:
    from ambi.engine.core import Core
    from ambi.engine.records import Record
    from ambi.engine.state import Row

log = logging.getLogger(__name__)

_WITH_VOLUMES = "with-volumes"  # in the directory of an instance that is being removed
ANONYMOUS_LABEL = "com.docker.volume.anonymous"


class Volumes:
    """Safe to use from any thread. The lock is a leaf but for the registry's own and the database's."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._lock = threading.RLock()
        self._volumes: dict[str, Volume] = {}
        self._claims: Counter[str] = Counter()  # by creates that are on their way
        self._mounts = Mounts(core.roots.volumes)

    def restore(self) -> None:
        """What the directories say is true; the database follows."""
        self._volumes = local.found(self._core.roots.volumes)
        stored = {str(body["name"]) for body in self._core.db.volumes()}
        for name in stored - self._volumes.keys():
            self._core.db.delete_volume(name)
        for name in self._volumes.keys() - stored:
            volume = self._volumes[name]
            self._core.db.insert_volume(name, volume.body(), volume.created_ns)

    def adopted(self) -> None:
        """The instances are there: volumes of those that a death kept from being made go away."""
        root = self._core.roots.volumes
        self.drop([v.name for v in self.all() if local.settle(root, v.name) and not self.users(v.name)])

    def all(self) -> list[Volume]:
        with self._lock:
            return sorted(self._volumes.values(), key=lambda v: v.name)

    def find(self, name: str) -> Volume:
        """Raises NotFound with Docker's words."""
        with self._lock:
            volume = self._volumes.get(name)
        if volume is None:
            raise NotFound(f"get {name}: no such volume", hint="`ambi volume ls` lists what there is")
        return volume

    def mountpoint(self, volume: Volume) -> str:
        return str(local.mountpoint(self._core.roots.volumes, volume.name))

    def used_bytes(self, volume: Volume) -> int:
        return local.used_bytes(self._core.roots.volumes, volume.name)

    def users(self, name: str) -> list[Record]:
        return [record for record in self._core.registry if name in _names_of(record)]

    def create(
        self,
        name: str,
        driver: str = "",
        options: dict[str, str] | None = None,
        labels: dict[str, str] | None = None,
        *,
        making: bool = False,
    ) -> Volume:
        """The volume `name`, made unless it is there; without a name an anonymous one.

        making: it is for an instance that is not there yet.
        """
        if not name:
            name, labels = secrets.token_hex(32), {**(labels or {}), ANONYMOUS_LABEL: ""}
        driver = driver or local.DRIVER
        with self._lock:
            volume = self._volumes.get(name)
            if volume is not None and driver == volume.driver:
                return volume
            local.check(name, driver, options)
            volume = Volume(name, driver, labels, options, time.time_ns())
            local.make(self._core.roots, volume, making=making)
            try:
                self._core.db.insert_volume(name, volume.body(), volume.created_ns)
            except AmbiError:
                local.discard(name, local.detach(self._core.roots.volumes, name))
                raise
            self._volumes[name] = volume
        self._publish(name, "create")
        return volume

    def remove(self, name: str, *, force: bool = False, owner: str = "") -> None:
        """Raises NotFound (unless `force`), Conflict (in use). owner: an instance that does not count."""
        with self._lock:
            if name not in self._volumes and force:
                return
            self.find(name)
            users = [record.id for record in self.users(name) if record.id != owner]
            if users or self._claims[name]:
                raise Conflict(
                    f"remove {name}: volume is in use - [{', '.join(users)}]",
                    hint=f"ambi rm {users[0][:12]}" if users else "wait until the instance is made",
                )
            old = local.detach(self._core.roots.volumes, name)
            del self._volumes[name]
            self._core.db.delete_volume(name)
        local.discard(name, old)
        self._publish(name, "destroy")

    def prune(self, filters: Filters, *, everything: bool) -> tuple[list[str], int]:
        """Remove what nobody uses, without `everything` only anonymous ones; names and bytes."""
        removed, freed = [], 0
        for volume in self.all():
            labels = volume.labels or {}
            if not everything and ANONYMOUS_LABEL not in labels:
                continue
            if not has_labels(labels, filters.get("label", ())):
                continue
            if any(has_labels(labels, [value]) for value in filters.get("label!", ())) or self.users(volume.name):
                continue
            size = self.used_bytes(volume)
            try:
                self.remove(volume.name)
            except (Conflict, NotFound):  # used or removed since
                continue
            removed.append(volume.name)
            freed += size
        self._core.bus.publish("volume", "prune", "", {"reclaimed": str(freed)})
        return removed, freed

    @contextmanager
    def claimed(self, asked: Asked, isolation: Isolation) -> Iterator[tuple[Point, ...]]:
        """The mount points of an instance that is being made, by target. Its volumes stay until the end of the `with`.

        Volumes made for it are removed when it fails.
        """
        points: dict[str, Point] = {point.target: point for point in self._inherited(asked)}
        own = (
            {item.target for item in asked.points}
            | {item.target for item in asked.volumes}
            | {str(m["destination"]) for m in asked.tmpfs}
        )
        points = {target: point for target, point in points.items() if target not in own or self._implied(asked, target)}
        with self._lock:
            names = [point.name for point in points.values() if point.name]
            for name in names:
                self.find(name)  # the instance that it comes from may be gone since, with its volumes
            self._claims.update(names)
        made: list[str] = []
        try:
            _refuse_disks(points.values(), isolation)
            points.update({point.target: point for point in asked.points})
            for ask in asked.volumes:
                if ask.target not in points or ask.name:
                    points[ask.target] = self._point(ask, isolation, names, made)
            yield tuple(points.values())
            for name in made:
                local.settle(self._core.roots.volumes, name)
        except BaseException:
            with self._lock:
                self._claims.subtract(names)
                names = []
            self.drop(made)
            raise
        finally:
            with self._lock:
                self._claims.subtract(names)

    @staticmethod
    def _implied(asked: Asked, target: str) -> bool:
        """Whether `target` is there only because the image or `-v PATH` says that it is to be a volume."""
        return any(ask.target == target and not ask.name for ask in asked.volumes)

    def _inherited(self, asked: Asked) -> Iterator[Point]:
        for source in asked.inherits:
            for point in points_of(self._core.registry.find(source.instance).row.mounts):
                words = tuple(word for word in point.words if word != "ambi.copy")
                yield point._replace(words=words, readonly=point.readonly or source.readonly, mode=source.mode or point.mode)

    def _point(self, ask: VolumeAsk, isolation: Isolation, names: list[str], made: list[str]) -> Point:
        with self._lock:
            known = ask.name in self._volumes
            volume = self.create(ask.name, ask.driver, ask.options, ask.labels, making=True)
            names.append(volume.name)
            self._claims[volume.name] += 1
        if not known:
            made.append(volume.name)
        return local.point(self._core.roots.volumes, volume, ask, isolation)

    def drop(self, names: list[str], owner: str = "") -> None:
        """Remove volumes with the instance that they were made for; one that another than `owner` uses stays."""
        for name in names:
            try:
                self.remove(name, force=True, owner=owner)
            except Conflict:
                continue
            except AmbiError as error:
                log.warning("volume %s: %s", name[:12], error)

    def check_start(self, record: Record) -> None:
        """Raises Conflict when a disk of it is another running instance's, and for a source that must be there."""
        points = points_of(record.row.mounts)
        for point in points:
            self._check_disk(point, [other for other in self.users(point.name) if other is not record])
        mounts.make_sources(points)
        mounts.check_propagation(points)

    @staticmethod
    def _check_disk(point: Point, others: list[Record]) -> None:
        for other in others if point.what == "ambi.disk" else ():
            if other.state.running:
                raise Conflict(
                    f"volume {point.name} is a disk and in use by {other.name}: one virtual machine at a time",
                    hint=f"ambi stop {other.name}",
                )

    def check_attach(self, record: Record, point: Point) -> None:
        """The same of one that `record`, which runs, is to get."""
        self._check_disk(point, self.users(point.name))
        mounts.make_sources((point,))
        mounts.check_propagation((point,))

    def settled(self) -> None:
        """It is known what runs: nothing else stays mounted."""
        self._mounts.settle(
            {v.name: [r.id for r in self.users(v.name) if r.state.running] for v in self.all() if v.kind in KINDS}
        )

    def hold(self, record: Record) -> None:
        """Mount what `record` needs, until `unmounted`. Raises an AmbiError with Docker's words."""
        for name in self._of(record):
            self._mounts.hold(name, self.find(name).options or {}, record.id)

    def _of(self, record: Record) -> set[str]:
        """Its volumes that are to be mounted."""
        return self._kept_mounted((*points_of(record.row.mounts), *record.attached()))

    def _kept_mounted(self, points: Iterable[Point]) -> set[str]:
        names = {point.name for point in points if point.name and point.what == "bind"}
        with self._lock:
            return {name for name in names if name in self._volumes and self._volumes[name].kind in KINDS}

    def keep(self, point: Point) -> None:
        """The volume of `point`, should it have been made for it, stays whatever comes."""
        if point.name:
            local.settle(self._core.roots.volumes, point.name)

    def hold_one(self, record: Record, point: Point) -> None:
        """As `hold`, of a mount that `record` is about to get."""
        for name in self._kept_mounted((point,)):
            self._mounts.hold(name, self.find(name).options or {}, record.id)

    def let_go(self, record: Record, point: Point) -> None:
        """`record` does not have `point` any more; another of its mounts may be of the same volume."""
        for name in self._kept_mounted((point,)) - self._of(record):
            self._mounts.release(name, record.id)

    def mounted(self, record: Record) -> None:
        for point in points_of(record.row.mounts):
            self.tell_mounted(record, point)

    def tell_mounted(self, record: Record, point: Point) -> None:
        if point.name:
            self._publish(
                point.name, "mount", container=record.id, destination=point.target, propagation=point.propagation,
                **{"read/write": "false" if point.readonly else "true"},
            )  # fmt: skip

    def unmounted(self, record: Record) -> None:
        for name in self._of(record):
            self._mounts.release(name, record.id)
        for point in (*points_of(record.row.mounts), *record.attached()):
            self.tell_unmounted(record, point)

    def tell_unmounted(self, record: Record, point: Point) -> None:
        if point.name:
            self._publish(point.name, "unmount", container=record.id)

    def _publish(self, name: str, action: str, **own: str) -> None:
        self._core.bus.publish("volume", action, name, attributes_of(None, driver=local.DRIVER, **own))


def _names_of(record: Record) -> set[str]:
    """The volumes that it names, and those that it has for this run."""
    return {str(m["name"]) for m in record.row.mounts} | {point.name for point in record.attached()}


def anonymous_of(row: Row) -> list[str]:
    """The volumes that go with the instance when it is removed with its volumes."""
    return [point.name for point in points_of(row.mounts) if point.anonymous]


def mark_volumes(data: Path) -> None:
    """Remember that the instance's volumes go with it, should the removal be cut short."""
    try:
        (data / _WITH_VOLUMES).touch()
    except OSError as error:  # a full disk: what makes room must work all the same
        log.info("%s: %s", data, error)


def marked_volumes(data: Path, row: Row) -> list[str]:
    return anonymous_of(row) if (data / _WITH_VOLUMES).exists() else []


def _refuse_disks(points: Iterable[Point], isolation: Isolation) -> None:
    for point in points:
        if point.what == "ambi.disk" and isolation is not Isolation.VM:
            raise local.no_disk(point.name)


def text_map(value: object, what: str) -> dict[str, str] | None:
    """An object of texts of a client's JSON, None when it is not given. Raises InvalidRequest."""
    if value is None:
        return None
    if not isinstance(value, dict) or not all(isinstance(x, str) for x in value.values()):
        raise InvalidRequest(f"{what} must be an object of strings")
    return value
