"""PAX records: `LENGTH KEY=VALUE\\n`, where LENGTH counts the whole record in bytes and VALUE may hold anything.

Sparse files of format 0.0 repeat two keys, in an order that matters; they are gathered into `GNU.sparse.map`, the way of
format 0.1. `GNU.sparse` itself is set when any key of the family is there.
"""

from __future__ import annotations

import base64
import binascii
from urllib.parse import unquote_to_bytes

from ambi.core.errors import Corrupt
from images.layers.limits import MAX_NAME, MAX_XATTRS

Extensions = dict[str, bytes]

_SCHILY, _LIBARCHIVE = "SCHILY.xattr.", "LIBARCHIVE.xattr."
# An image's own overlay attributes would let it point anywhere in the lower layers.
_REFUSED_XATTRS = (b"trusted.overlay.", b"user.overlay.")


def parse_pax(body: bytes, base: Extensions) -> Extensions:
    """`base` with the records of `body`; an empty value takes a key away."""
    found = dict(base)
    pieces: list[bytes] = []
    position = 0
    while position < len(body):
        blank = body.find(b" ", position, position + 20)
        digits = body[position:blank]
        if blank < 0 or not digits.isdigit():
            raise Corrupt(f"PAX header has {body[position : position + 20]!r} where a length belongs")
        end = position + int(digits)
        key, equals, value = body[blank + 1 : end - 1].partition(b"=")
        if end > len(body) or end <= blank or body[end - 1 : end] != b"\n" or not equals or not key:
            raise Corrupt(f"PAX header has a damaged record {body[position : position + 40]!r}")
        position = end
        _put(found, key.decode("utf-8", "surrogateescape"), value, pieces)
    if pieces:
        found["GNU.sparse.map"] = b",".join(pieces)
    return found


def _put(found: Extensions, key: str, value: bytes, pieces: list[bytes]) -> None:
    if key.startswith("GNU.sparse."):
        found["GNU.sparse"] = b"sparse"
        if key in ("GNU.sparse.offset", "GNU.sparse.numbytes"):
            pieces.append(value)
            return
    if not value and not key.startswith((_SCHILY, _LIBARCHIVE)):
        found.pop(key, None)
    else:
        if key in ("path", "linkpath", "GNU.sparse.name") and b"\0" in value:
            raise Corrupt(f"tar entry has a NUL in its {key}")
        found[key] = value


def xattrs_of(path: bytes, extensions: Extensions) -> dict[bytes, bytes]:
    """Extended attributes by full name; those that overlayfs would read are left out."""
    found: dict[bytes, bytes] = {}
    for key, value in extensions.items():
        if key.startswith(_SCHILY):
            name = key[len(_SCHILY) :].encode("utf-8", "surrogateescape")
        elif key.startswith(_LIBARCHIVE):
            name = unquote_to_bytes(key[len(_LIBARCHIVE) :])
            if name in found:
                continue
        else:
            continue
        if not name or len(name) > MAX_NAME or b"\0" in name:
            raise Corrupt(f"tar entry {path!r} has an extended attribute with an impossible name")
        if not name.startswith(_REFUSED_XATTRS):
            found[name] = value if key.startswith(_SCHILY) else _from_base64(path, value)
    if sum(len(name) + len(value) for name, value in found.items()) > MAX_XATTRS:
        raise Corrupt(f"tar entry {path!r} has more than {MAX_XATTRS} bytes of extended attributes")
    return found


def _from_base64(path: bytes, text: bytes) -> bytes:
    try:
        return base64.b64decode(text + b"=" * (-len(text) % 4))
    except binascii.Error:
        raise Corrupt(f"tar entry {path!r} has a damaged extended attribute") from None
