"""From a request's target to the handler and the version it is asked to speak.

Paths are `/NOUN/VERB`, `/NOUN/NAME` or `/NOUN/NAME/VERB`, below an optional `/vMAJOR.MINOR`. A NAME may have slashes in
it (`/images/registry:5000/team/app/json`), so the last segment is tried as a verb first.
"""

from __future__ import annotations

from typing import NamedTuple
from urllib.parse import unquote

from ambi.api.exchange import API_VERSION, MIN_API_VERSION, Handler
from ambi.core.errors import AmbiError, InvalidRequest, NotFound

_VERSION = frozenset("0123456789.")
_IMAGES_VERSION = (1, 22)  # which skopeo and podman ask for in `docker-daemon:`; images were the same then


class MethodNotAllowed(AmbiError):
    http_status = 405


class Route(NamedTuple):
    """One row of a noun's table. path: `/containers/json`, with one placeholder `/containers/{}/start`, or with a second one
    at the end, `/containers/{}/checkpoints/{}`: the name is then that of both, with a slash in between."""

    method: str
    path: str
    handler: Handler


class Match(NamedTuple):
    handler: Handler
    version: tuple[int, int]
    name: str
    query: str


class Router:
    """All routes, in two tables: whole paths, and (noun, verb) around a name; each maps methods to handlers."""

    def __init__(self, *tables: tuple[Route, ...]) -> None:
        self._whole: dict[str, dict[str, Handler]] = {}
        self._named: dict[tuple[str, str], dict[str, Handler]] = {}
        for route in (route for table in tables for route in table):
            noun, placeholder, verb = route.path.partition("/{}")
            if placeholder:
                methods = self._named.setdefault((noun[1:], verb[1:]), {})
            else:
                methods = self._whole.setdefault(route.path, {})
            assert route.method not in methods, f"two routes for {route.method} {route.path}"
            methods[route.method] = route.handler

    def match(self, method: str, target: str) -> Match:
        """Raises InvalidRequest (a version that is not spoken), NotFound, MethodNotAllowed."""
        path, _, query = target.partition("?")
        path = path.partition("#")[0]
        if "%" in path:
            path = unquote(path, errors="replace")
        version, path = split_version(path)
        if method == "HEAD":
            method = "GET"
        others: set[str] = set()
        for name, methods in self._candidates(path):
            handler = methods.get(method)
            if handler is not None:
                return Match(handler, version, name, query)
            others.update(methods)
        if others:
            allowed = ", ".join(sorted(others))
            raise MethodNotAllowed(f"method {method} is not allowed for {path}", hint=f"allowed: {allowed}")
        raise NotFound("page not found")

    def _candidates(self, path: str) -> list[tuple[str, dict[str, Handler]]]:
        """(name, methods) of every row that `path` fits, the best first."""
        found = []
        whole = self._whole.get(path)
        if whole is not None:
            found.append(("", whole))
        parts = path.split("/")
        for count in (2, 1):  # `attach/ws` is a verb too
            verb = "/".join(parts[-count:])
            for depth in (2, 1):  # and `ambi/instances` a noun
                noun = "/".join(parts[1 : 1 + depth])
                if len(parts) > 1 + depth + count and (named := self._named.get((noun, verb))) is not None:
                    found.append(("/".join(parts[1 + depth : -count]), named))
        if len(parts) > 4 and (named := self._named.get((parts[1], f"{parts[-2]}/{{}}"))) is not None and parts[-1]:
            found.append(("/".join((*parts[2:-2], parts[-1])), named))
        if len(parts) > 2 and (named := self._named.get((parts[1], ""))) is not None:
            found.append(("/".join(parts[2:]), named))
        return [(name, methods) for name, methods in found if methods is whole or (name and name[0] != "/")]


def split_version(path: str) -> tuple[tuple[int, int], str]:
    """The version that `/v1.44/...` asks for and the rest of the path; without one the newest.

    Raises InvalidRequest in Docker's words when that version is not spoken here.
    """
    if not path.startswith("/v"):
        return API_VERSION, path
    text, slash, rest = path[2:].partition("/")
    if not text or not _VERSION.issuperset(text) or not slash:
        return API_VERSION, path
    numbers = [int(part[:9] or "0") for part in text.split(".")] + [0]
    version = (numbers[0], numbers[1])
    if version > API_VERSION:
        newest = "{}.{}".format(*API_VERSION)
        raise InvalidRequest(f"client version {text} is too new. Maximum supported API version is {newest}")
    oldest_here = _IMAGES_VERSION if rest.startswith("images/") else MIN_API_VERSION
    if version < oldest_here:
        oldest = "{}.{}".format(*MIN_API_VERSION)
        raise InvalidRequest(
            f"client version {text} is too old. Minimum supported API version is {oldest}, "
            "please upgrade your client to a newer version"
        )
    return version, slash + rest
