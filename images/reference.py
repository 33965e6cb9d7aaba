"""Docker's references: `[DOMAIN[:PORT]/]PATH[:TAG][@DIGEST]`, their familiar short form and their full one.

`foo` is `docker.io/library/foo:latest` and shown as `foo:latest`. Grammar: distribution/reference, reference.go.
"""

from __future__ import annotations

import re
from functools import cache
from typing import NamedTuple

from ambi.core.errors import InvalidRequest

DEFAULT_DOMAIN, OFFICIAL = "docker.io", "library"
_MAX_NAME = 255


@cache
def _patterns() -> tuple[re.Pattern[str], ...]:
    component = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
    label = r"(?:[a-zA-Z0-9]|[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9])"
    domain = re.compile(rf"(?:{label}(?:\.{label})*|\[[0-9a-fA-F:]+\])(?::[0-9]+)?")
    path = re.compile(rf"{component}(?:/{component})*")
    return domain, path, re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}"), re.compile(r"sha256:[0-9a-f]{64}")


class Reference(NamedTuple):
    """One of `tag` and `digest` is always given in what `parse` returns; both may be."""

    domain: str
    path: str
    tag: str = ""
    digest: str = ""

    @property
    def repository(self) -> str:
        """The familiar name without tag and digest."""
        if self.domain != DEFAULT_DOMAIN:
            return f"{self.domain}/{self.path}"
        short = self.path.removeprefix(f"{OFFICIAL}/")
        return self.path if "/" in short else short

    @property
    def familiar(self) -> str:
        return self.repository + self._suffix

    @property
    def canonical(self) -> str:
        return f"{self.domain}/{self.path}{self._suffix}"

    @property
    def _suffix(self) -> str:
        return (f":{self.tag}" if self.tag else "") + (f"@{self.digest}" if self.digest else "")


def parse(text: str) -> Reference:
    """The reference that `text` means, `latest` added where there is neither tag nor digest; InvalidRequest otherwise."""
    domain_form, path_form, tag_form, digest_form = _patterns()
    rest, _, digest = text.partition("@")
    name, tag = rest, ""
    if ":" in rest.rpartition("/")[2]:
        name, _, tag = rest.rpartition(":")
        if not tag_form.fullmatch(tag):
            raise _invalid(text)
    if ("@" in text and not digest_form.fullmatch(digest)) or not name:
        raise _invalid(text)
    domain, path = _split(name)
    if not path_form.fullmatch(path):
        if path_form.fullmatch(path.lower()):
            raise InvalidRequest(
                f"invalid reference format: repository name '{name}' must be lowercase", hint=f"use {name.lower()}"
            )
        raise _invalid(text)
    if not domain_form.fullmatch(domain) or len(domain) + len(path) > _MAX_NAME:
        raise _invalid(text)
    if re.fullmatch(r"[0-9a-f]{64}", name):
        raise InvalidRequest(
            f"invalid repository name '{name}': 64 hexadecimal digits are an image id", hint="choose a shorter name"
        )
    return Reference(domain, path, tag or ("" if digest else "latest"), digest)


def joined(repository: str, tag: str) -> str:
    """`repository` and `tag` as one reference's text; a tag that is a digest is joined with @, an empty one left out."""
    if not tag or not repository:
        return repository
    return f"{repository}@{tag}" if ":" in tag else f"{repository}:{tag}"


def _split(name: str) -> tuple[str, str]:
    first, slash, rest = name.partition("/")
    if not slash or (not any(x in first for x in ".:") and first != "localhost" and first.lower() == first):
        domain, path = DEFAULT_DOMAIN, name
    else:
        domain, path = first, rest
    if domain == "index.docker.io":
        domain = DEFAULT_DOMAIN
    if domain == DEFAULT_DOMAIN and "/" not in path:
        path = f"{OFFICIAL}/{path}"
    return domain, path


def _invalid(text: str) -> InvalidRequest:
    return InvalidRequest(
        f"invalid reference format: '{text}'", hint="a name looks like debian:bookworm or host:5000/team/app:1.0"
    )
