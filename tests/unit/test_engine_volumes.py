"""Volumes as directories and options: what is accepted, what a death leaves, and what config.json gets."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from ambi.core.errors import InvalidRequest, NotFound, StorageFull, Unsupported
from ambi.core.model import Isolation
from ambi.core.roots import Roots
from ambi.engine import localvolume as local
from ambi.engine import mountedvolumes, mounts
from ambi.engine.body import Body
from ambi.engine.localvolume import Volume
from ambi.engine.mountpoints import Point, VolumeAsk

TMPFS = {"type": "tmpfs", "device": "tmpfs", "o": "size=1m,mode=700,noexec"}
BIND = {"type": "none", "device": "/srv/./x", "o": "rbind,ro"}


def roots(tmp_path: Path) -> Roots:
    return Roots.of(tmp_path / "data", tmp_path / "run", tmp_path / "socket")


def volume(name: str = "db", **options: str) -> Volume:
    return Volume(name, "local", {"a": "b"}, options or None, 7)


@pytest.mark.parametrize(
    "name,driver,options,kind,text",
    [
        ("db", "fly", None, NotFound, 'error looking up volume plugin fly: plugin "fly" not found'),
        ("d", "local", None, InvalidRequest, "too short"),
        ("../x", "local", None, InvalidRequest, "invalid characters"),
        (".new-x", "local", None, InvalidRequest, "invalid characters"),
        ("x\n", "local", None, InvalidRequest, "invalid characters"),
        ("x" * 201, "local", None, InvalidRequest, "invalid characters"),
        ("db", "local", {"fly": "1"}, InvalidRequest, 'create db: invalid option: "fly"'),
        ("db", "local", {"type": "tmpfs"}, InvalidRequest, 'missing required option: "device"'),
        ("db", "local", {"o": "ro", "type": "tmpfs"}, InvalidRequest, 'missing required option: "device"'),
        ("db", "local", {"size": "1g"}, InvalidRequest, "quota size requested but no quota support"),
        ("db", "local", {"type": "disk"}, InvalidRequest, "has a size and nothing else"),
        ("db", "local", {"type": "disk", "size": "1x"}, InvalidRequest, "invalid size: '1x'"),
        ("db", "local", {"type": "none", "device": "x", "o": "bind"}, InvalidRequest, "absolute path"),
        ("db", "local", {"type": "none", "device": "/x"}, InvalidRequest, "absolute path"),
        ("db", "local", {"type": "tmpfs", "device": "tmpfs", "o": "upperdir=/etc"}, InvalidRequest, "upperdir=/etc"),
        ("db", "local", {"type": "none", "device": "/x", "o": "bind,ambi.subpath=../y"}, InvalidRequest, "ambi.subpath"),
        ("db", "local", {"type": "btrfs", "device": "/dev/x"}, Unsupported, "volumes of type btrfs"),
        ("db", "local", {"type": "nfs", "device": ":/x"}, InvalidRequest, "needs the address of its server"),
    ],
)
def test_what_cannot_be_a_volume(name: str, driver: str, options: Any, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind) as caught:
        local.check(name, driver, options)
    assert text in str(caught.value)


@pytest.mark.parametrize("options", [None, {}, TMPFS, BIND, {"type": "disk", "size": "512m"}])
def test_what_can(options: Any) -> None:
    local.check("db.1_x-y", "local", options)


def test_a_directory_appears_whole_and_tells_what_it_is(tmp_path: Path) -> None:
    at = roots(tmp_path)
    local.make(at, volume())
    assert (at.volumes / "db/_data").is_dir() and local.found(at.volumes) == {"db": volume()}
    for left in (".new-half", ".old-half"):
        (at.volumes / left / "_data").mkdir(parents=True)
    (at.volumes / "stranger").mkdir()
    assert local.found(at.volumes) == {"db": volume()}
    assert sorted(path.name for path in at.volumes.iterdir()) == ["db", "stranger"]
    local.discard("db", local.detach(at.volumes, "db"))
    assert local.detach(at.volumes, "db") is None
    assert local.found(at.volumes) == {} and (at.volumes / "stranger").is_dir()


def test_one_that_cannot_be_made_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at = roots(tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "volume.json")

    monkeypatch.setattr("ambi.engine.localvolume.os.rename", full)
    with pytest.raises(StorageFull, match="cannot create volume 'db'"):
        local.make(at, volume())
    assert list(at.volumes.iterdir()) == []


def test_what_a_volume_is_to_config_json() -> None:
    base = Path("/d/volumes")
    ask = VolumeAsk("/t", "db", subpath="a/b")

    def entry(made: Volume, wanted: VolumeAsk, kind: Isolation = Isolation.CONTAINER) -> dict[str, Any]:
        return local.point(base, made, wanted, kind).entry()

    plain = entry(volume(), ask)
    assert (plain["type"], plain["source"]) == ("bind", "/d/volumes/db/_data")
    assert plain["options"] == ["rbind", "rprivate", "ambi.copy", "ambi.subpath=a/b"]
    quiet = entry(volume(), VolumeAsk("/t", "db", readonly=True, copy=False))
    assert quiet["options"] == ["rbind", "rprivate", "ro", "rro"]
    bound = entry(volume(**BIND), VolumeAsk("/t", "db", copy=False))
    assert (bound["source"], bound["options"]) == ("/srv/x", ["rbind", "rprivate", "ro", "rro"])
    ram = entry(volume(**TMPFS), VolumeAsk("/t", "db"))
    assert (ram["type"], ram["source"], ram["options"][:2]) == ("bind", "/d/volumes/db/_data", ["rbind", "rprivate"])
    disk = volume(type="disk", size="1g")
    whole = entry(disk, VolumeAsk("/t", "db", readonly=True), Isolation.VM)
    assert (whole["type"], whole["source"], whole["options"]) == ("ambi.disk", "/d/volumes/db/disk.img", ["ro"])
    for made, kind in ((disk, Isolation.CONTAINER), (disk, Isolation.VM)):
        with pytest.raises(InvalidRequest):
            entry(made, ask, kind)


def test_what_is_asked_for_is_sorted_out() -> None:
    host = {
        "Binds": ["/a:/b:ro", "db:/d:nocopy,ro,z"],
        "Tmpfs": {"/t": ""},
        "Mounts": [{"Type": "volume", "Target": "/e"}, {"Type": "tmpfs", "Target": "/f", "ReadOnly": True}],
        "VolumesFrom": ["one", "two:ro"],
        "VolumeDriver": "local",
    }
    asked = mounts.parse(Body("Config", {"Volumes": {"/t": {}, "/d": {}, "/g/": {}}}), Body("HostConfig", host))
    assert [point.target for point in asked.points] == ["/b", "/f"] and asked.points[0].make_source
    assert [(v.target, v.name, v.readonly, v.copy, v.driver) for v in asked.volumes] == [
        ("/d", "db", True, False, "local"), ("/e", "", False, True, "local"), ("/g", "", False, True, "local"),
    ]  # fmt: skip
    assert [(i.instance, i.readonly) for i in asked.inherits] == [("one", False), ("two", True)]
    for point in asked.points:
        assert Point.of(point.stored()) == point


def test_the_name_of_a_server_becomes_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of IPv4 before IPv6, as docker has it; the words beside it stay in their order."""
    rows = [(socket.AF_INET6, 1, 6, "", ("fd00::9", 0, 0, 0)), (socket.AF_INET, 1, 6, "", ("10.1.2.3", 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: rows)
    options = {"type": "nfs", "device": ":/x", "o": "soft,addr=files.test,vers=4"}
    words = ["soft", "addr=files.test", "vers=4"]
    assert mountedvolumes._with_address(options, words) == ["addr=10.1.2.3", "soft", "vers=4"]
    rows.pop()
    assert mountedvolumes._with_address(options, words)[0] == "addr=fd00::9"
