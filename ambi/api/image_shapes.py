"""An image as Docker's JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ambi.api.words import rfc3339_nano

if TYPE_CHECKING:
    from images.store import Image

_EMPTY_CONFIG: dict[str, Any] = {
    "Hostname": "", "Domainname": "", "User": "", "AttachStdin": False, "AttachStdout": False, "AttachStderr": False,
    "Tty": False, "OpenStdin": False, "StdinOnce": False, "Env": None, "Cmd": None, "Image": "", "Volumes": None,
    "WorkingDir": "", "Entrypoint": None, "OnBuild": None, "Labels": None,
}  # fmt: skip
_NONE = "<none>"


def labels(image: Image) -> dict[str, str]:
    return (image.config.get("config") or {}).get("Labels") or {}


def summary(image: Image, version: tuple[int, int], containers: int) -> dict[str, Any]:
    """A row of `/images/json`."""
    names, digests = list(image.names), list(image.digests)
    if version < (1, 43):  # untagged images had a placeholder, and sizes were told twice
        names, digests = names or [f"{_NONE}:{_NONE}"], digests or [f"{_NONE}@{_NONE}"]
    row: dict[str, Any] = {
        "Containers": containers,
        "Created": image.created_ns // 1_000_000_000,
        "Id": image.id,
        "Labels": labels(image) or None,
        "ParentId": "",
        "RepoDigests": digests,
        "RepoTags": names,
        "SharedSize": -1,
        "Size": image.size_bytes,
    }
    if version < (1, 44):
        row["VirtualSize"] = image.size_bytes
    return row


def inspect(image: Image, version: tuple[int, int]) -> dict[str, Any]:
    """The answer of `/images/NAME/json`."""
    body = image.config
    history = body.get("history") or []
    shown: dict[str, Any] = {
        "Id": image.id,
        "RepoTags": list(image.names),
        "RepoDigests": list(image.digests),
        "Parent": "",
        "Comment": history[-1].get("comment", "") if history else "",
        "Created": rfc3339_nano(image.created_ns),
        "Container": "",
        "ContainerConfig": _EMPTY_CONFIG,
        "DockerVersion": body.get("docker_version") or "",
        "Author": body.get("author") or "",
        "Config": {**_EMPTY_CONFIG, **(body.get("config") or {})},
        "Architecture": body.get("architecture") or "amd64",
        "Os": body.get("os") or "linux",
        "Size": image.size_bytes,
        "GraphDriver": {"Name": "ambi", "Data": None},
        "RootFS": {"Type": "layers", "Layers": list(image.layers)},
        "Metadata": {"LastTagTime": "0001-01-01T00:00:00Z"},
    }
    if body.get("variant"):
        shown["Variant"] = body["variant"]
    if version < (1, 44):
        shown["VirtualSize"] = image.size_bytes
    return shown
