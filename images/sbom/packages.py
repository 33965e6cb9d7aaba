"""Packages out of databases: dpkg's, apk's, rpm's, Python's METADATA, npm's package.json. All of it untrusted."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import NamedTuple

_NAME_BYTES, _LICENCE_BYTES, _MAX_PACKAGES = 256, 1024, 200_000


class Package(NamedTuple):
    """kind: type of its package URL, `deb`, `apk`, `rpm`, `pypi`, `npm`; namespace: of that URL. path: where it is told."""

    kind: str
    namespace: str
    name: str
    version: str
    architecture: str
    licence: str
    supplier: str
    path: str


def packages(found: Mapping[str, bytes]) -> list[Package]:
    """Every package that the databases tell of, sorted. Entries without name or version are left out."""
    system = _distribution(found)
    listed: set[Package] = set()
    for path, data in found.items():
        for package in _of(path, data, system):
            if package.name and package.version and len(package.name) <= _NAME_BYTES >= len(package.version):
                listed.add(
                    package._replace(licence=package.licence[:_LICENCE_BYTES], supplier=package.supplier[:_NAME_BYTES])
                )
            if len(listed) > _MAX_PACKAGES:
                break
    return sorted(listed)


def _distribution(found: Mapping[str, bytes]) -> str:
    """`debian`, `alpine` and the like, by os-release."""
    for path in ("etc/os-release", "usr/lib/os-release"):
        for line in _text(found.get(path, b"")).splitlines():
            key, _, value = line.partition("=")
            if key == "ID":
                return value.strip("\"' \t").lower()
    return ""


def _of(path: str, data: bytes, system: str) -> Iterator[Package]:
    base = path.rpartition("/")[2]
    if path.startswith("var/lib/dpkg/"):
        return _dpkg(path, data, system or "debian", whole="/status.d/" in path)
    if path.endswith("lib/apk/db/installed"):
        return _apk(path, data, system or "alpine")
    if base == "package.json":
        return _npm(path, data)
    if path.startswith(("var/lib/rpm/", "usr/lib/sysimage/rpm/")):
        return _rpm(path, data, system or "fedora")
    if base in ("METADATA", "PKG-INFO") or base.endswith(".egg-info"):
        return _python(path, data)
    return iter(())


def _text(data: bytes) -> str:
    """No control characters but line ends: the text goes into documents and onto terminals."""
    text = data.decode("utf-8", "replace").replace("\r\n", "\n")
    return "".join(c if (c >= " " and c != "\x7f") or c in "\n\t" else "\ufffd" for c in text)


def _paragraphs(data: bytes) -> Iterator[dict[str, str]]:
    """Paragraphs of `Key: value` lines; of a value that goes on in further lines only the first is kept."""
    for block in _text(data).split("\n\n"):
        fields: dict[str, str] = {}
        for line in block.split("\n"):
            key, colon, value = line.partition(":")
            if colon and not line.startswith((" ", "\t")):
                fields.setdefault(key, value.strip())
        if fields:
            yield fields


def _dpkg(path: str, data: bytes, system: str, *, whole: bool) -> Iterator[Package]:
    """whole: of `status.d`, where what is there is installed."""
    for it in _paragraphs(data):
        if whole or it.get("Status", "").endswith(" installed"):
            fields = it.get("Package", ""), it.get("Version", ""), it.get("Architecture", "")
            yield Package("deb", system, *fields, "", it.get("Maintainer", ""), path)


def _apk(path: str, data: bytes, system: str) -> Iterator[Package]:
    for it in _paragraphs(data):
        yield Package(
            "apk", system, it.get("P", ""), it.get("V", ""), it.get("A", ""), it.get("L", ""), it.get("m", ""), path
        )


def _rpm(path: str, data: bytes, system: str) -> Iterator[Package]:
    """Of what the worker has made of the database: lines of JSON."""
    for line in data.splitlines():
        it = {
            key: _text(value.encode("utf-8", "replace")) for key, value in json.loads(line).items() if isinstance(value, str)
        }
        if it.get("name") != "gpg-pubkey":  # keys are kept in the database as packages
            name, version, machine = it.get("name", ""), it.get("version", ""), it.get("architecture", "")
            yield Package("rpm", system, name, version, machine, it.get("licence", ""), it.get("supplier", ""), path)


def _python(path: str, data: bytes) -> Iterator[Package]:
    it = next(_paragraphs(data), {})
    licence = it.get("License-Expression") or it.get("License") or ""
    name = it.get("Name", "").lower().replace("_", "-")
    yield Package("pypi", "", name, it.get("Version", ""), "", licence, it.get("Author", ""), path)


def _npm(path: str, data: bytes) -> Iterator[Package]:
    try:
        body = json.loads(_text(data))
    except (ValueError, RecursionError):  # somebody's test data, mostly
        return
    if not isinstance(body, dict):
        return
    name, version, licence = (x if isinstance(x, str) else "" for x in map(body.get, ("name", "version", "license")))
    scope, slash, rest = name.partition("/")
    yield Package("npm", scope if slash else "", rest if slash else name, version, "", licence, "", path)
