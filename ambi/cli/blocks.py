"""Limits of block I/O of single disks, as `/dev/sda:1mb`."""

from __future__ import annotations

from typing import Any

from ambi.cli import humanize
from ambi.core.errors import InvalidRequest

_BYTES = {"device_read_bps": "BlkioDeviceReadBps", "device_write_bps": "BlkioDeviceWriteBps"}
_COUNTS = {"device_read_iops": "BlkioDeviceReadIOps", "device_write_iops": "BlkioDeviceWriteIOps"}


def block_limits(flags: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Docker's members of HostConfig. Raises InvalidRequest."""
    found = {"BlkioWeightDevice": [_entry("blkio_weight_device", "Weight", text) for text in flags["blkio_weight_device"]]}
    for name, key in (*_BYTES.items(), *_COUNTS.items()):
        found[key] = [_entry(name, "Rate", text) for text in flags[name]]
    return found


def _entry(name: str, member: str, text: str) -> dict[str, Any]:
    """`DEV:NUMBER`; a number of bytes may have a unit."""
    flag = "--" + name.replace("_", "-")
    path, _, value = text.rpartition(":")
    if not path.startswith("/dev/"):
        raise InvalidRequest(f"invalid value for {flag}: '{text}' names no device", hint=f"as in {flag} /dev/sda:100")
    if name in _BYTES:
        number = humanize.parse_size(flag, value)
    elif value.isascii() and value.isdigit():
        number = int(value)
    else:
        raise InvalidRequest(f"invalid value for {flag}: '{value}' is no number", hint=f"as in {flag} {path}:100")
    return {"Path": path, member: number}
