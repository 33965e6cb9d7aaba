"""Bills of materials of images with the databases of dpkg, apk, Python and npm in several layers."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import os
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from spdx_tools.spdx.parser.jsonlikedict.json_like_dict_parser import JsonLikeDictParser
from spdx_tools.spdx.validation.document_validator import validate_full_spdx_document

from ambi.core.errors import Corrupt, InvalidRequest, Unsupported
from images.model import Image
from images.sbom import databases
from images.sbom.document import bill_of_materials
from images.sbom.packages import packages
from images.store import Store
from tests import rpmkit
from tests.layerkit import directory, member, symlink, tar_bytes
from tests.registrykit import FaultyRegistry

GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"
DPKG = b"""Package: libc6
Status: install ok installed
Maintainer: GNU Libc <libc@example.org>
Architecture: amd64
Version: 2.36-9+deb12u4
Description: C library
 Package: not-one

Package: gone
Status: deinstall ok config-files
Version: 1
"""


@pytest.fixture
def store(short_tmp: Path) -> Iterator[Store]:
    it = Store.open(short_tmp / "images")
    yield it
    it.close()


def pulled(store: Store, *layers: bytes) -> Image:
    registry = FaultyRegistry()
    try:
        registry.add_image([(gzip.compress(x, 1), GZIP, "sha256:" + hashlib.sha256(x).hexdigest()) for x in layers])
        return store.pull(f"{registry.address}/app:1").image
    finally:
        registry.close()


def named(store: Store, image: Image) -> set[tuple[str, str, str]]:
    return {(x.kind, x.name, x.version) for x in packages(databases.read(store, image).files)}


def many(store: Store) -> Image:
    site = "usr/lib/python3/dist-packages"
    lower = tar_bytes(
        directory("etc"), member("usr/lib/os-release", b'ID="ubuntu"\n'), member("var/lib/dpkg/status", DPKG),
        member("var/lib/dpkg/status.d/base", b"Package: base-files\nVersion: 12\nArchitecture: all\n"),
        member("./lib/apk/db/installed", b"P:musl\nV:1.2-r1\nA:x86_64\nL:MIT\n\nP:zlib\nV:1.3-r0\nA:x86_64\nL:Zlib\n"),
        member(f"{site}/Two_Words-1.0.dist-info/METADATA", b"Name: Two_Words\nVersion: 1.0\n\nName: x\n"),
        member(f"{site}/old-1.dist-info/METADATA", b"Name: old\nVersion: 1\n"),
        member("app/node_modules/@team/it/package.json", b'{"name": "@team/it", "version": "3.1.0", "license": "ISC"}'),
        member("app/node_modules/it/package.json", b"not JSON"),
        member("data/node_modules/late/package.json", b'{"name": "late", "version": "1.0.0"}'),
        member("opt/dir/x.egg-info/PKG-INFO", b"Name: x\nVersion: 9\n"),
    )  # fmt: skip
    upper = tar_bytes(
        member(f"{site}/.wh.old-1.dist-info", b""), member("data/.wh..wh..opq", b""), symlink("opt/dir", "/elsewhere"),
        member("lib/apk/db/installed", b"P:musl\nV:1.2-r2\nA:x86_64\nL:MIT\n"),
    )  # fmt: skip
    return pulled(store, lower, upper)


def test_layers_on_top_win(store: Store) -> None:
    assert named(store, many(store)) == {
        ("deb", "libc6", "2.36-9+deb12u4"), ("deb", "base-files", "12"), ("apk", "musl", "1.2-r2"),
        ("pypi", "two-words", "1.0"), ("npm", "it", "3.1.0"),
    }  # fmt: skip


def test_documents_are_valid_and_the_same_each_time(store: Store) -> None:
    image = many(store)
    spdx, cyclonedx = (bill_of_materials(store, image, form) for form in ("spdx", "cyclonedx"))
    assert (spdx, cyclonedx) == tuple(bill_of_materials(store, image, form) for form in ("spdx", "cyclonedx"))
    document = JsonLikeDictParser().parse(json.loads(spdx))
    assert validate_full_spdx_document(document) == []
    purls = {ref.locator for package in document.packages for ref in package.external_references}
    assert "pkg:deb/ubuntu/libc6@2.36-9%2Bdeb12u4?arch=amd64" in purls and "pkg:npm/%40team/it@3.1.0" in purls
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(cyclonedx.decode()) is None
    assert {x["purl"] for x in json.loads(cyclonedx)["components"]} == purls
    with pytest.raises(InvalidRequest, match="'swid' is no format"):
        bill_of_materials(store, image, "swid")


SPEC = """Name: {name}
Version: 1.2
Release: 3
Epoch: {epoch}
Summary: a test
License: MIT and ISC
Vendor: Ann
BuildArch: noarch
%description
%files
"""


@pytest.mark.needs("rpm")
def test_a_real_rpm_database(store: Store, short_tmp: Path) -> None:
    """What rpm's own tools have built and installed, and nothing of what its older forms would hold."""
    for name, epoch in (("first", 0), ("second", 7)):
        (short_tmp / f"{name}.spec").write_text(SPEC.format(name=name, epoch=epoch))
        built = ["rpmbuild", "-bb", "--quiet", "--define", f"_topdir {short_tmp}", f"{name}.spec"]
        subprocess.run(built, check=True, cwd=short_tmp, capture_output=True)
    found = list(short_tmp.glob("RPMS/noarch/*.rpm"))
    argv = ["rpm", "--dbpath", f"{short_tmp}/db", "--install", "--justdb", "--nodeps", *map(str, found)]
    subprocess.run(argv, check=True, capture_output=True)
    data = (short_tmp / "db" / "rpmdb.sqlite").read_bytes()
    image = pulled(
        store,
        tar_bytes(member("etc/os-release", b"ID=fedora\n"), member("usr/lib/sysimage/rpm/rpmdb.sqlite", data)),
        tar_bytes(member("var/lib/rpm/Packages", b"Berkeley DB")),
    )
    assert named(store, image) == {("rpm", "first", "1.2-3"), ("rpm", "second", "7:1.2-3")}
    written = bill_of_materials(store, image, "spdx")
    document = json.loads(written)
    purls = {ref["referenceLocator"] for package in document["packages"] for ref in package.get("externalRefs", ())}
    assert "pkg:rpm/fedora/second@1.2-3?arch=noarch&epoch=7" in purls
    assert b"var/lib/rpm/Packages could not be read" in written
    assert b"rpmdb.sqlite could not" not in written
    assert b"var/lib/rpm/Packages could not be read" in bill_of_materials(store, image, "cyclonedx")
    assert {x.get("licenseComments") for x in document["packages"] if x["name"] == "first"} == {"declared as: MIT and ISC"}


@pytest.mark.needs("rpm")
@pytest.mark.needs("berkeley")
def test_rpms_older_databases(store: Store, short_tmp: Path) -> None:
    """Headers of rpm's own in a hash that Berkeley DB has written and rpm reads, and in ndb; large ones over many pages."""
    for number in range(9):
        files = "".join(f"%ghost /opt/{number}/{name}\n" for name in range(number * 90))
        (short_tmp / f"p{number}.spec").write_text(SPEC.format(name=f"p{number}", epoch=number % 2) + files)
        built = ["rpmbuild", "-bb", "--quiet", "--define", f"_topdir {short_tmp}", f"p{number}.spec"]
        subprocess.run(built, check=True, cwd=short_tmp, capture_output=True)
    found = list(short_tmp.glob("RPMS/noarch/*.rpm"))
    argv = ["rpm", "--dbpath", f"{short_tmp}/db", "--install", "--justdb", "--nodeps", *map(str, found)]
    subprocess.run(argv, check=True, capture_output=True)
    with contextlib.closing(sqlite3.connect(short_tmp / "db" / "rpmdb.sqlite")) as connection:
        headers = [row[0] for row in connection.execute("SELECT blob FROM Packages")]
    assert max(map(len, headers)) > 3 * 4096
    (short_tmp / "old").mkdir()
    rpmkit.load_berkeley(short_tmp / "old" / "Packages", headers)
    asked = ["rpm", "--define", "_db_backend bdb_ro", "--dbpath", f"{short_tmp}/old", "-qa", "--qf", "%{name} %{version}\n"]
    told = subprocess.run(asked, check=True, capture_output=True, text=True).stdout.split("\n")[:-1]
    assert sorted(told) == sorted(f"p{number} 1.2" for number in range(9))
    wanted = {("rpm", f"p{number}", "1:1.2-3" if number % 2 else "1.2-3") for number in range(9)}
    for path, data in (
        ("var/lib/rpm/Packages", (short_tmp / "old" / "Packages").read_bytes()),
        ("var/lib/rpm/Packages", rpmkit.berkeley(headers, ">")),
        ("usr/lib/sysimage/rpm/Packages.db", rpmkit.ndb(headers)),
    ):
        image = pulled(store, tar_bytes(member(path, data)))
        assert named(store, image) == wanted
        assert b"could not be read" not in bill_of_materials(store, image, "spdx")


def test_of_several_databases_the_newest_counts(store: Store) -> None:
    old = member("var/lib/rpm/Packages.db", rpmkit.ndb([]))
    new = member("var/lib/rpm/rpmdb.sqlite", _rpm_database(bytes(8)))
    assert databases.read(store, pulled(store, tar_bytes(old))).unread == []
    assert databases.read(store, pulled(store, tar_bytes(old, new))).unread == ["var/lib/rpm/Packages.db"]


def _rpm_database(*headers: object, table: str = "Packages") -> bytes:
    connection = sqlite3.connect(":memory:")
    connection.execute(f"CREATE TABLE {table} (hnum INTEGER PRIMARY KEY, blob BLOB)")
    connection.executemany(f"INSERT INTO {table} (blob) VALUES (?)", [(header,) for header in headers])
    connection.commit()
    return bytes(connection.serialize())


@pytest.mark.parametrize(
    "data,text",
    [(b"SQLite format 3\0", "var/lib/rpm/rpmdb.sqlite: .* cut short"), (_rpm_database(b"short"), "has 5 bytes"),
     (_rpm_database("text"), "something else"),
     (_rpm_database(table="Other"), "no table of packages"), (_rpm_database(b"\xff" * 900), "cut short"),
     (_rpm_database(b"\0\0\0\1\0\0\0\0" + bytes([0, 0, 3, 0xE8, 0, 0, 0, 6, 0, 0, 0, 9, 0, 0, 0, 1])), "beyond its 0 bytes"),
     (_rpm_database(*[bytes(8)] * 9000)[:20000], "damaged")],
)  # fmt: skip
def test_hostile_rpm_databases(store: Store, data: bytes, text: str) -> None:
    image = pulled(store, tar_bytes(member("var/lib/rpm/rpmdb.sqlite", data)))
    with pytest.raises(Corrupt, match=text):
        databases.read(store, image)


def test_hostile_databases(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control characters, names without end and deep JSON come to nothing; what is too large is refused, and by name."""
    deep = b"[" * 100_000
    text = b"Package: a\x1b[31m\nStatus: install ok installed\nVersion: 1\n\nPackage: " + b"n" * 300 + b"\nVersion: 1\n"
    image = pulled(
        store, tar_bytes(member("var/lib/dpkg/status", text), member("node_modules/deep/package.json", deep),
                         member("node_modules/up/package.json", b'{"name": {}, "version": []}'))
    )  # fmt: skip
    assert named(store, image) == {("deb", "a\ufffd[31m", "1")}
    monkeypatch.setattr("images.sbom.databases.FILE_BYTES", 10)
    with pytest.raises(Unsupported, match=r"var/lib/dpkg/status has .* bytes or is sparse"):
        databases.read(store, image)
    monkeypatch.undo()
    blob = store.content.path(store.image_layers(image)[0].blob)
    os.truncate(blob, blob.stat().st_size // 2)
    with pytest.raises(Corrupt, match="cut short"):
        databases.read(store, image)


def test_a_real_status_file(store: Store) -> None:
    """Every package that this host's dpkg says is installed."""
    image = store.import_tar(
        io.BytesIO(tar_bytes(member("var/lib/dpkg/status", Path("/var/lib/dpkg/status").read_bytes()))), ""
    )
    told = subprocess.run(["dpkg-query", "-W", "-f", "${db:Status-Status} ${Package} ${Version}\n"], capture_output=True,
                          text=True, check=True).stdout  # fmt: skip
    wanted = {("deb", *line.split()[1:]) for line in told.splitlines() if line.startswith("installed ")}
    assert named(store, image) == wanted
