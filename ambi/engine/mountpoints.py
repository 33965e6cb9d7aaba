"""Mount points of an instance, resolved at its creation, as Docker's MountPoint shows them and as config.json has them."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

Mount = dict[str, Any]  # OCI runtime-spec: destination, type, source, options


class Point(NamedTuple):
    """One mount point. It is stored with the instance (`Row.mounts`), so the instance keeps the volumes that it names.

    kind: Docker's type of it; what: the type of the mount in config.json, with `origin` as its source and `words` as its
    options, but for those that say read-only. shown: Docker's Source. name: of a volume; anonymous: it goes with `rm -v`.
    mode, propagation: as Docker shows them. make_source: a source that is missing is made, as a directory (`-v`).
    recursive: read-only goes for what is mounted below, too.
    """

    kind: Literal["bind", "volume", "tmpfs"]
    target: str
    what: str
    origin: str
    words: tuple[str, ...] = ()
    readonly: bool = False
    recursive: bool = False
    shown: str = ""
    name: str = ""
    mode: str = ""
    propagation: str = ""
    make_source: bool = False
    anonymous: bool = False

    def entry(self) -> Mount:
        """The entry of config.json."""
        options = list(self.words)
        if self.readonly:
            options += ["ro", "rro"] if self.recursive else ["ro"]
        return {"destination": self.target, "type": self.what, "source": self.origin, "options": options}

    def stored(self) -> dict[str, Any]:
        return {**self._asdict(), "words": list(self.words)}

    @classmethod
    def of(cls, stored: dict[str, Any]) -> Point:
        return cls(**{**stored, "words": tuple(stored["words"])})


def points_of(stored: tuple[dict[str, Any], ...]) -> tuple[Point, ...]:
    """The points of `Row.mounts`."""
    return tuple(Point.of(item) for item in stored)


class VolumeAsk(NamedTuple):
    """A volume that a client wants at `target`; without a name an anonymous one.

    driver, options, labels: of a volume that is made for it. copy: an empty one gets what the image has there.
    """

    target: str
    name: str = ""
    mode: str = ""
    readonly: bool = False
    copy: bool = True
    subpath: str = ""
    driver: str = ""
    options: dict[str, str] | None = None
    labels: dict[str, str] | None = None


class Inherit(NamedTuple):
    """`--volumes-from`: all mount points of another instance."""

    instance: str
    readonly: bool
    mode: str


class Asked(NamedTuple):
    """What a client asks for. points: what needs no volume; tmpfs: of `--tmpfs`, which are no mount points to Docker."""

    inherits: tuple[Inherit, ...]
    points: tuple[Point, ...]
    volumes: tuple[VolumeAsk, ...]
    tmpfs: tuple[Mount, ...]
