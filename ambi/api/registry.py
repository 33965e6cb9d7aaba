"""Images from and to registries and archives: pull, push, save, and the check of a log-in."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

from ambi.api.exchange import Call, Reply, json_reply
from ambi.api.http import Stream
from ambi.api.progress import ProgressStream
from ambi.api.router import Route
from ambi.core.errors import Forbidden, InvalidRequest, Unsupported
from images.reference import joined

LOCAL_PLATFORMS = ("", "linux", "linux/amd64", "linux/x86_64")
_AUTH_BYTES = 64 << 10
_DOCKER_HUB = ("https://index.docker.io/v1/", "index.docker.io", "registry-1.docker.io", "")


def pull(call: Call) -> None:
    """`fromImage`, with `tag` a tag or a digest; without either every tag of the repository."""
    query = call.query
    if query.text("platform") not in LOCAL_PLATFORMS:
        raise Unsupported(f"platform {query.text('platform')} cannot run here", hint="leave --platform away")
    images, credentials = call.engine.images, _credentials(call)
    with ProgressStream(call) as progress:
        for wanted in images.to_pull(query.text("fromImage"), query.text("tag"), credentials):
            pulled = images.pull(wanted, credentials, progress=progress)
            progress.line({"status": f"Digest: {pulled.digest}"})
            state = "Downloaded newer image" if pulled.new else "Image is up to date"
            progress.line({"status": f"Status: {state} for {wanted}"})


def push(call: Call) -> None:
    images, credentials = call.engine.images, _credentials(call)
    tag = call.query.text("tag")
    names = [joined(call.name, tag)] if tag else images.names_of(call.name)
    with ProgressStream(call) as progress:
        for name in names:
            pushed = images.push(name, credentials, progress=progress)
            progress.line({"status": f"{pushed.tag}: digest: {pushed.digest} size: {pushed.size}"})
            aux = {"Tag": pushed.tag, "Digest": pushed.digest, "Size": pushed.size}
            progress.line({"progressDetail": {}, "aux": aux})


class _Archive(io.RawIOBase):
    """The body of an answer as a file to write to. The head goes out with the first byte."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self.stream: Stream | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        if self.stream is None:
            self.stream = self._call.stream("application/x-tar")
        self.stream.write(bytes(data))
        return len(data)


def save(call: Call) -> None:
    archive = _Archive(call)
    names = [call.name] if call.name else [name for text in call.query.all("names") for name in text.split(",") if name]
    with io.BufferedWriter(archive, 1 << 20) as target:
        call.engine.images.save(names, target)
    if archive.stream is not None:
        archive.stream.end()


def copy(call: Call) -> None:
    """`from` and `to` in the words of `images.copy`; an archive comes as the body, or goes out as the answer. `all`: the
    whole of an index."""
    query = call.query
    source, target = query.text("from"), query.text("to")
    if not source or not target:
        raise InvalidRequest("from and to must name the places to copy between", hint="ambi image copy SOURCE TARGET")
    images, credentials, whole = call.engine.images, _by_domain(call), query.flag("all")
    upload = io.BufferedReader(call.request.body, 1 << 20) if _is_archive(source) else None
    if _is_archive(target):
        archive = _Archive(call)
        with io.BufferedWriter(archive, 1 << 20) as download:
            images.copy(source, target, credentials=credentials, upload=upload, download=download, whole_index=whole)
        if archive.stream is not None:
            archive.stream.end()
        return
    with ProgressStream(call) as progress:
        copied = images.copy(source, target, credentials=credentials, upload=upload, whole_index=whole, progress=progress)
        progress.line({"status": f"Digest: {copied.digest}"})


def _is_archive(text: str) -> bool:
    return text.startswith(("docker-archive:", "oci-archive:"))


def log_in(call: Call) -> Reply:
    """`docker login`: see whether the registry takes the credentials. Nothing is kept here."""
    body = call.json_body()
    server = str(body.get("serveraddress") or "")
    domain = (
        "docker.io" if server in _DOCKER_HUB else server.removeprefix("https://").removeprefix("http://").partition("/")[0]
    )
    try:
        call.engine.images.log_in(domain, _of_fields(body))
    except Forbidden as error:
        return json_reply({"message": error.message}, status=401)
    return json_reply({"Status": "Login Succeeded", "IdentityToken": ""})


def describe(call: Call) -> Reply:
    """What a registry has under a name, without pulling it."""
    found = call.engine.images.describe(call.name, _credentials(call))
    platforms = [entry.get("platform") for entry in found.body.get("manifests") or () if isinstance(entry, dict)]
    return json_reply({
        "Descriptor": {"mediaType": found.media_type, "digest": found.digest, "size": len(found.data)},
        "Platforms": [platform for platform in platforms if platform] or [{"architecture": "amd64", "os": "linux"}],
    })  # fmt: skip


def _credentials(call: Call) -> Any:
    return _of_fields(_header(call, "x-registry-auth"))


def _by_domain(call: Call) -> dict[str, Any]:
    """X-Registry-Config, as Docker's build has it: what X-Registry-Auth holds, for each domain."""
    found = _header(call, "x-registry-config")
    return {
        "docker.io" if key in _DOCKER_HUB else key: _of_fields(fields)
        for key, fields in found.items()
        if isinstance(fields, dict)
    }


def _header(call: Call, name: str) -> dict[str, Any]:
    """base64url of JSON. What cannot be read counts as none, as with Docker."""
    text = call.request.headers.get(name, "")[:_AUTH_BYTES]
    try:
        body = json.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))) if text else {}
    except (ValueError, RecursionError):
        body = {}
    return body if isinstance(body, dict) else {}


def _of_fields(body: dict[str, Any]) -> Any:
    from images.registry.settings import Credentials

    values = [body.get(key) or "" for key in ("username", "password", "identitytoken")]
    if not all(isinstance(value, str) for value in values):
        raise InvalidRequest("username, password and identitytoken must be strings")
    if not values[0] and isinstance(body.get("auth"), str):
        try:
            values[0], _, values[1] = base64.b64decode(body["auth"]).decode().partition(":")
        except ValueError:
            raise InvalidRequest("the member auth is no base64 of USER:PASSWORD") from None
    return Credentials(*values)


ROUTES = (
    Route("POST", "/ambi/images/copy", copy),
    Route("POST", "/auth", log_in),
    Route("GET", "/distribution/{}/json", describe),
    Route("GET", "/images/get", save),
    Route("GET", "/images/{}/get", save),
    Route("POST", "/images/{}/push", push),
)
