"""What is fed with mutated input. Each target may raise errors of our tree and nothing else."""

from __future__ import annotations

import gzip
import json
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from backports import zstd

from ambi.core.errors import AmbiError
from images import manifest, reference
from images.content import parse_json
from images.layers.convert import convert
from images.layers.decoder import Decoder
from images.layers.erofs import ErofsWriter
from images.layers.tar import TarReader
from images.registry import challenge
from images.registry.client import descriptor
from images.sbom import rpm
from tests import rpmkit
from tests.layerkit import directory, hard_link, member, symlink, tar_bytes


class Target(NamedTuple):
    """good: inputs that are right. feed: takes one; what it raises beyond AmbiError is a fault. inputs: in the suite."""

    good: Sequence[bytes]
    feed: Callable[[bytes], object]
    inputs: int = 100_000


def _tar(data: bytes) -> None:
    for _ in TarReader(iter([data[:700], data[700:]])):
        pass


def _sealed_tar(data: bytes) -> None:
    """With the check sums of all headers made right, so that their fields are read."""
    _tar(_sealed(data))


def _sealed(data: bytes) -> bytes:
    blocks = bytearray(data)
    for start in range(0, len(blocks) - 511, 512):
        if blocks[start + 257 : start + 262] == b"ustar":
            blocks[start + 148 : start + 156] = b" " * 8
            blocks[start + 148 : start + 156] = b"%06o\0 " % sum(blocks[start : start + 512])
    return bytes(blocks)


def _layer(data: bytes) -> None:
    """All that a worker does: the tree and its file too. What it takes is the same in whatever pieces it comes."""
    data, made = _sealed(data), []
    for step in (700, len(data) or 1):
        with open(os.memfd_create("layer"), "r+b") as file:
            pieces = [data[start : start + step] for start in range(0, len(data), step)]
            done = convert(pieces, ErofsWriter(file.fileno()), 1 << 20)
            made.append((done, os.pread(file.fileno(), done.size_bytes, 0)))
    assert made[0] == made[1]


def _gzip(data: bytes) -> None:
    for _ in Decoder(iter([data[:50], data[50:]])):
        pass


def _manifest(data: bytes) -> None:
    body = parse_json(data, "manifest")
    descriptor(body.get("config"), "manifest")
    layers = body.get("layers")
    for entry in layers if isinstance(layers, list) else ():
        descriptor(entry, "manifest")


def _config(data: bytes) -> None:
    manifest.check_config(parse_json(data, "config"), "config")


def _rpm_database(data: bytes) -> None:
    for _ in rpm.packages(bytearray(data)):
        pass


def _reference(data: bytes) -> None:
    text = data.decode("utf-8", "surrogateescape")
    parsed = reference.parse(text)
    assert reference.parse(parsed.canonical) == parsed, text
    assert reference.parse(parsed.familiar) == parsed, text


_DIGEST = "sha256:" + "ab" * 32
_GOOD_MANIFEST = json.dumps({
    "schemaVersion": 2, "mediaType": manifest.MANIFEST,
    "config": {"mediaType": manifest.CONFIG, "digest": _DIGEST, "size": 7},
    "layers": [{"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "digest": _DIGEST, "size": 9, "urls": ["https://x"]}],
}).encode()  # fmt: skip
_GOOD_CONFIG = json.dumps({
    "architecture": "amd64", "os": "linux", "history": [{"created": "2026-01-01T00:00:00Z"}],
    "config": {"Cmd": ["a"], "Env": ["A=b"], "Labels": {"a": "b"}, "ExposedPorts": {"80/tcp": {}}, "User": "root"},
    "rootfs": {"type": "layers", "diff_ids": [_DIGEST]},
}).encode()  # fmt: skip


_RPM = struct.pack(
    ">18I", 4, 17, *(63, 7, 0, 16), *(1000, 6, 0, 1), *(1003, 4, 12, 1), *(1014, 9, 4, 1)
) + b"abc\0ISC\0pad\0\0\0\0\7\0"  # fmt: skip


def _tars() -> list[bytes]:
    members = (
        directory("d"), member("d/f", b"x" * 600), symlink("l", "d/f"), hard_link("h", "d/f"),
        member("n" * 60 + "/" + "m" * 90, b"y"),
        member("p", b"z", pax={"SCHILY.xattr.user.a": "b", "mtime": "1.5"}),
    )  # fmt: skip
    return [tar_bytes(*members, format=form) for form in (0, 1, 2)]


TARGETS = {
    "reference": Target(
        [b"debian", b"debian:12", b"host.example:5000/team/app:1.0@" + _DIGEST.encode(), b"a/b__c/d-e"], _reference
    ),
    "manifest": Target([_GOOD_MANIFEST], _manifest),
    "config": Target([_GOOD_CONFIG], _config),
    "challenge": Target(
        [b'Bearer realm="https://auth/token",service="s",scope="repository:a:pull"', b'Basic realm="x", Digest a=b'],
        lambda data: challenge.parse(data.decode("latin-1")),
    ),
    "rpm header": Target([_RPM], rpm.fields),
    "rpm database": Target(
        [rpmkit.berkeley([_RPM, _RPM * 8], "<"), rpmkit.berkeley([_RPM * 4], ">"), rpmkit.ndb([_RPM])], _rpm_database, 20_000
    ),
    "tar": Target(_tars(), _tar),
    "sealed tar": Target(_tars(), _sealed_tar),
    "layer": Target(_tars(), _layer, 1_500),
    "zstd": Target([zstd.compress(b"x" * 5000), zstd.compress(bytes(range(256)) * 4)], _gzip),
    "gzip": Target([gzip.compress(b"x" * 5000, mtime=0), gzip.compress(bytes(range(256)) * 4, mtime=0)], _gzip),
}  # fmt: skip


def failures(target: Target, seeds: Iterator[int]) -> Iterator[tuple[int, BaseException]]:
    """Seeds whose input did what it must not."""
    from tests.fuzz.mutate import mutated

    for seed in seeds:
        data = mutated(target.good, seed)
        try:
            target.feed(data)
        except AmbiError:
            continue
        except BaseException as error:
            yield seed, error
