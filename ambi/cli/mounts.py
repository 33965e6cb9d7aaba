"""What is mounted or passed on from the host: --volume, --mount, --tmpfs, --device."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from ambi.cli.humanize import parse_size
from ambi.core.errors import InvalidRequest

_PROPAGATIONS = ("private", "rprivate", "shared", "rshared", "slave", "rslave")


def binds(texts: Sequence[str], volumes: dict[str, Any]) -> list[str]:
    """`SRC:DST[:OPTIONS]` each, a source that begins with a dot made absolute. A bare DST goes to `volumes`."""
    out = []
    for text in texts:
        source, separator, rest = text.partition(":")
        if not separator:
            volumes[text] = {}
            continue
        if not source or not rest:
            raise InvalidRequest(f"invalid value for --volume: '{text}'", hint="as in --volume /srv/data:/data:ro")
        if source.startswith("."):
            source = os.path.abspath(source)
        out.append(f"{source}:{rest}")
    return out


def tmpfs(texts: Sequence[str]) -> dict[str, str]:
    """Path to options of `DST[:OPTIONS]`."""
    return {path: options for path, _, options in (text.partition(":") for text in texts)}


def device(text: str) -> dict[str, str]:
    """`SRC[:DST][:rwm]` as docker's object."""
    source, *more = text.split(":")
    target, permissions = source, "rwm"
    if len(more) == 2:
        target, permissions = more
    elif len(more) == 1 and is_device_mode(more[0]):
        permissions = more[0]
    elif len(more) == 1:
        target = more[0]
    if not source.startswith("/") or not target.startswith("/") or not is_device_mode(permissions) or len(more) > 2:
        raise InvalidRequest(f"invalid value for --device: '{text}'", hint="as in --device /dev/fuse:/dev/fuse:rw")
    return {"PathOnHost": source, "PathInContainer": target, "CgroupPermissions": permissions}


def is_device_mode(text: str) -> bool:
    return bool(text) and set(text) <= set("rwm") and len(set(text)) == len(text)


def mount(text: str) -> dict[str, Any]:
    """`type=bind|volume|tmpfs,KEY[=VALUE],...` as docker's object; a field in double quotes may have commas in it."""
    import csv

    out: dict[str, Any] = {"Type": "volume"}
    options: dict[str, dict[str, Any]] = {"bind": {}, "volume": {}, "tmpfs": {}}
    try:
        fields = next(csv.reader([text], strict=True), [])
    except csv.Error as error:
        raise _bad(text, str(error)) from None
    for field in fields:
        key, separator, value = field.partition("=")
        key = key.lower()
        if key in ("readonly", "ro"):
            out["ReadOnly"] = _switch(text, key, value if separator else "true")
        elif key in _FLAGS:
            kind, name = _FLAGS[key]
            options[kind][name] = _switch(text, key, value if separator else "true")
        elif not separator:
            raise _bad(text, f"'{field}' has no value")
        elif key == "type":
            out["Type"] = value.lower()
        elif key in ("source", "src"):
            out["Source"] = os.path.abspath(value) if value.startswith(".") else value
        elif key in ("target", "dst", "destination"):
            out["Target"] = value
        elif key == "consistency":
            out["Consistency"] = value.lower()
        else:
            _option(text, key, value, options)
    return _checked(text, out, options)


_FLAGS = {"bind-nonrecursive": ("bind", "NonRecursive"), "volume-nocopy": ("volume", "NoCopy")}
_RECURSIONS = {
    "enabled": {},
    "disabled": {"NonRecursive": True},
    "writable": {"ReadOnlyNonRecursive": True},
    "readonly": {"ReadOnlyForceRecursive": True},
}


def _option(text: str, key: str, value: str, options: dict[str, dict[str, Any]]) -> None:
    """A field that only one type of mount has."""
    if key == "bind-propagation" and value in _PROPAGATIONS:
        options["bind"]["Propagation"] = value
    elif key == "bind-recursive" and value in _RECURSIONS:
        options["bind"].update(_RECURSIONS[value])
    elif key == "volume-label":
        name, _, rest = value.partition("=")
        options["volume"].setdefault("Labels", {})[name] = rest
    elif key == "volume-driver":
        options["volume"].setdefault("DriverConfig", {})["Name"] = value
    elif key == "volume-opt":
        name, _, rest = value.partition("=")
        options["volume"].setdefault("DriverConfig", {}).setdefault("Options", {})[name] = rest
    elif key == "volume-subpath":
        options["volume"]["Subpath"] = value
    elif key == "tmpfs-size":
        options["tmpfs"]["SizeBytes"] = parse_size("--mount tmpfs-size", value)
    elif key == "tmpfs-mode":
        options["tmpfs"]["Mode"] = _octal(text, value)
    else:
        raise _bad(text, f"'{key}={value}' is not supported")


def _checked(text: str, out: dict[str, Any], options: dict[str, dict[str, Any]]) -> dict[str, Any]:
    kind = out["Type"]
    if kind not in options:
        raise _bad(text, f"type={kind} is not supported")
    if not out.get("Target"):
        raise _bad(text, "target is missing")
    if kind == "bind" and not out.get("Source"):
        raise _bad(text, "type=bind needs a source")
    if kind == "tmpfs" and "Source" in out:
        raise _bad(text, "type=tmpfs has no source")
    if any(given for other, given in options.items() if other != kind):
        raise _bad(text, f"an option of another type than {kind}")
    if out.get("ReadOnly") is False:
        del out["ReadOnly"]
    if options[kind]:
        out[f"{kind.capitalize()}Options"] = options[kind]
    return out


def _switch(text: str, key: str, value: str) -> bool:
    if value.lower() in ("1", "t", "true"):
        return True
    if value.lower() in ("0", "f", "false"):
        return False
    raise _bad(text, f"{key}={value} is neither true nor false")


def _octal(text: str, value: str) -> int:
    try:
        return int(value, 8)
    except ValueError:
        raise _bad(text, f"tmpfs-mode={value} is not octal") from None


def _bad(text: str, cause: str) -> InvalidRequest:
    return InvalidRequest(
        f"invalid value for --mount: '{text}': {cause}", hint="as in --mount type=bind,src=/srv,dst=/data,readonly"
    )
