"""One repository of a registry: manifests, blobs, tags and uploads."""

from __future__ import annotations

from typing import Any, NamedTuple
from urllib.parse import quote, urlencode, urljoin

from urllib3.exceptions import HTTPError

from ambi.core.errors import AmbiError, Corrupt, Forbidden, NotFound, Unavailable, Unsupported
from images.content import digest_of, is_digest, parse_json
from images.reference import Reference
from images.registry.settings import Credentials, Settings
from images.registry.transport import Response, Transport, error_of, harmless, refusal

MANIFEST_TYPES = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
_SCHEMA_1 = "application/vnd.docker.distribution.manifest.v1"
MANIFEST_BYTES = 4 << 20  # what the specification asks registries to take
DOCUMENT_BYTES = 16 << 20
_TAG_PAGES = 1000
_REFERRER_PAGES = 20


class Document(NamedTuple):
    """A manifest or index as it came. media_type: as told by the registry, or by the document itself."""

    data: bytes
    digest: str
    media_type: str
    body: dict[str, Any]


class Descriptor(NamedTuple):
    media_type: str
    digest: str
    size: int
    urls: tuple[str, ...] = ()


class Repository:
    """`reference`'s repository. action: `pull` or `pull,push`. `name` is the familiar one, for messages."""

    def __init__(
        self, reference: Reference, settings: Settings, credentials: Credentials, *, action: str = "pull", base: str = ""
    ) -> None:
        self.reference = reference
        self.name = reference.repository
        self.transport = Transport(reference.domain, settings, credentials, base)
        self._path = f"/v2/{reference.path}"
        self._scope = f"repository:{reference.path}:{action}"

    def close(self) -> None:
        self.transport.close()

    def _request(self, method: str, target: str, **more: Any) -> Response:
        return self.transport.request(method, target, scope=self._scope, **more)

    # What is there

    def manifest(self, wanted: str) -> Document:
        """A manifest or index by tag or digest, its digest checked. NotFound and Forbidden in Docker's words."""
        response = self._request("GET", f"{self._path}/manifests/{wanted}", headers={"Accept": ", ".join(MANIFEST_TYPES)})
        if response.status != 200:
            raise self._denied(wanted, response)
        told = response.headers.get("Docker-Content-Digest") or ""
        media_type = (response.headers.get("Content-Type") or "").partition(";")[0].strip()
        data = _read(response, MANIFEST_BYTES, f"manifest {wanted} of {self.name}")
        digest = str(digest_of(data))
        expected = wanted if wanted.startswith("sha256:") else told if told.startswith("sha256:") else digest
        if digest != expected:
            raise Corrupt(f"manifest {wanted} of {self.name} is damaged: its digest is {digest}, not {harmless(expected)}")
        if media_type.startswith(_SCHEMA_1):
            raise Unsupported(
                f"{self.name}:{wanted} has a manifest of schema 1, which is no longer read",
                hint="push it again with a tool of today",
            )
        body = parse_json(data, f"manifest {wanted} of {self.name}")
        if body.get("schemaVersion") != 2:
            raise Unsupported(
                f"manifest {wanted} of {self.name} has schema version {harmless(repr(body.get('schemaVersion')), 40)},"
                " this version reads 2"
            )
        own = body.get("mediaType")
        return Document(data, digest, own if isinstance(own, str) else media_type, body)

    def _denied(self, wanted: str, response: Response) -> AmbiError:
        found = refusal(response)
        shown = f"{self.name}@{wanted}" if wanted.startswith("sha256:") else f"{self.name}:{wanted}"
        if found.status in (401, 403) or found.code in ("DENIED", "UNAUTHORIZED", "NAME_UNKNOWN"):
            return NotFound(
                f"pull access denied for {self.name}, repository does not exist or may require 'docker login': "
                + found.words,
                hint=f"see that {shown} is spelled right, or log in: ambi login {self.reference.domain}",
            )
        if found.status == 404:
            return NotFound(
                f"manifest for {shown} not found: manifest unknown: {found.words}", hint="look at the spelling of the tag"
            )
        return error_of(f"cannot pull {shown}", found)

    def document(self, wanted: Descriptor, what: str) -> bytes:
        """A small blob as a whole, its digest checked."""
        if wanted.size > DOCUMENT_BYTES:
            raise Corrupt(f"{what} {wanted.digest} of {self.name} has {wanted.size} bytes, more than {DOCUMENT_BYTES}")
        response = self.blob(wanted, 0)
        data = _read(response, DOCUMENT_BYTES, f"{what} {wanted.digest} of {self.name}")
        if digest_of(data) != wanted.digest:
            raise Corrupt(f"{what} {wanted.digest} of {self.name} is damaged: its digest is {digest_of(data)}")
        return data

    def blob(self, wanted: Descriptor, offset: int) -> Response:
        """The bytes of a blob from `offset` on: 206, or 200 from the start by a registry that knows no ranges."""
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        target = f"{self._path}/blobs/{wanted.digest}"
        response = self._request("GET", target, headers=headers)
        if response.status == 404 and wanted.urls:
            response.close()
            response = self._request("GET", wanted.urls[0], headers=headers)
        if response.status not in (200, 206):
            raise error_of(f"cannot get {wanted.digest} of {self.name}", refusal(response))
        return response

    def tags(self) -> list[str]:
        found: list[str] = []
        target = f"{self._path}/tags/list?n={_TAG_PAGES}"
        while target and len(found) < 100_000:
            response = self._request("GET", target)
            if response.status != 200:
                raise self._denied("", response)
            link = response.headers.get("Link") or ""
            body = parse_json(_read(response, MANIFEST_BYTES, f"tags of {self.name}"), f"tags of {self.name}")
            found += [tag for tag in body.get("tags") or () if isinstance(tag, str)]
            target = urljoin(target, link[link.find("<") + 1 : link.find(">")]) if 'rel="next"' in link else ""
        return found

    def referrers(self, digest: str) -> list[dict[str, Any]]:
        """Descriptors of the manifests whose subject is `digest`, by the registry's list or the tag that stands for one."""
        found: list[dict[str, Any]] = []
        target, what = f"{self._path}/referrers/{digest}", f"list of referrers of {digest} in {self.name}"
        for _ in range(_REFERRER_PAGES):
            response = self._request("GET", target, headers={"Accept": MANIFEST_TYPES[0]})
            if response.status != 200:
                refused = refusal(response)
                if refused.status >= 500:
                    raise error_of(f"cannot get the {what}", refused)
                break
            link = response.headers.get("Link") or ""
            found += _manifests(parse_json(_read(response, MANIFEST_BYTES, what), what))
            if 'rel="next"' not in link:
                return found
            target = urljoin(target, link[link.find("<") + 1 : link.find(">")])
        try:
            return found or _manifests(self.manifest(digest.replace(":", "-", 1)).body)
        except NotFound:
            return []

    # What is sent

    def has_blob(self, digest: str) -> bool:
        return self._has(f"{self._path}/blobs/{digest}", f"blob {digest}")

    def _has(self, target: str, what: str) -> bool:
        response = self._request("HEAD", target)
        response.close()
        if response.status in (200, 404):
            return response.status == 200
        raise self._push_denied(f"cannot look for {what} in {self.name}", response)

    def mount(self, digest: str, source: str) -> bool:
        """Have the registry take a blob from its repository `source`; false when it wants an upload instead."""
        query = urlencode({"mount": digest, "from": source})
        response = self._request("POST", f"{self._path}/blobs/uploads/?{query}", headers={"Content-Length": "0"})
        place = response.headers.get("Location")
        response.close()
        if response.status == 202 and place:  # an upload that we do not go on with
            self._request("DELETE", urljoin(self._base(), place)).close()
        return response.status == 201

    def upload(self, digest: str, size: int, source: object) -> None:
        """Send one blob in one piece. `source` has `read` and `seek`; it is read from its start at each attempt."""
        response = self._request("POST", f"{self._path}/blobs/uploads/", headers={"Content-Length": "0"})
        place = response.headers.get("Location")
        if response.status != 202 or not place:
            raise self._push_denied(f"cannot push to {self.name}", response)
        response.close()
        target = urljoin(self._base(), place)
        target += ("&" if "?" in target else "?") + urlencode({"digest": digest})
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(size)}
        response = self._request("PUT", target, headers=headers, body=source)
        if response.status != 201:
            raise self._push_denied(f"cannot push {digest} to {self.name}", response)
        response.close()

    def put_manifest(self, name: str, data: bytes, media_type: str) -> str:
        """The digest of its subject, from a registry that lists referrers itself; else ""."""
        target = f"{self._path}/manifests/{quote(name, safe=':')}"
        response = self._request("PUT", target, headers={"Content-Type": media_type}, body=data)
        if response.status not in (200, 201):
            raise self._push_denied(f"cannot push the manifest of {self.name}:{name}", response)
        response.close()
        return response.headers.get("OCI-Subject") or ""

    def _base(self) -> str:
        return self.transport.base + self._path

    def _push_denied(self, what: str, response: Response) -> AmbiError:
        found = refusal(response)
        if found.status in (401, 403):
            return Forbidden(
                f"denied: {what}: {found.words}", hint=f"log in with the right to push: ambi login {self.reference.domain}"
            )
        return error_of(what, found)

    def check(self) -> None:
        """See that the registry answers and takes our credentials; as `docker login` does."""
        response = self.transport.request("GET", "/v2/", scope="")
        if response.status != 200:
            raise error_of(f"registry {self.reference.domain} refused the log-in", refusal(response))
        response.close()


def descriptor(body: object, what: str) -> Descriptor:
    """A descriptor of a manifest; Corrupt names `what`."""
    if isinstance(body, dict):
        digest, size, kind, urls = body.get("digest"), body.get("size"), body.get("mediaType"), body.get("urls") or ()
        if (
            isinstance(digest, str) and is_digest(digest)
            and isinstance(size, int) and not isinstance(size, bool) and 0 <= size < 1 << 50
            and isinstance(kind, str) and isinstance(urls, (list, tuple))
        ):  # fmt: skip
            return Descriptor(kind, digest, size, tuple(x for x in urls if isinstance(x, str) and x.startswith("https://")))
    raise Corrupt(f"{what} is damaged: it has no media type, sha256 digest and size")


def _manifests(index: dict[str, Any]) -> list[dict[str, Any]]:
    listed = index.get("manifests")
    return [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []


def _read(response: Response, limit: int, what: str) -> bytes:
    try:
        data = response.read(limit + 1) or b""
    except HTTPError as error:
        raise Unavailable(f"{what}: the connection broke: {harmless(str(error))}", hint="try again") from error
    finally:
        response.close()
    if len(data) > limit:
        raise Corrupt(f"{what} is larger than {limit} bytes")
    return data
