"""Log-ins at registries, where docker keeps them: `~/.docker/config.json` ($DOCKER_CONFIG) and its credential helpers.

    {"auths": {HOST: {"auth": base64 of USER:PASSWORD, "identitytoken": ...}}, "credsStore": NAME,
     "credHelpers": {HOST: NAME}}

A helper is the program `docker-credential-NAME`, which speaks JSON on stdin and stdout.
"""

from __future__ import annotations

import base64
import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ambi.core.errors import AmbiError, InvalidRequest, NotFound, from_os_error

HUB = "https://index.docker.io/v1/"  # docker's key of docker.io
_TOKEN_USER = "<token>"
_HELPER_SECONDS = 60


def path() -> Path:
    return Path(os.environ.get("DOCKER_CONFIG") or Path.home() / ".docker") / "config.json"


def key_of(domain: str) -> str:
    return HUB if domain in ("", "docker.io", "index.docker.io") else domain


def header(image: str) -> str:
    """X-Registry-Auth for the registry of `image`; empty credentials when nobody has logged in there."""
    return _encoded(find(key_of(domain_of(image))))


def headers(images: Iterable[str]) -> str:
    """X-Registry-Config for the registries of `images`."""
    return _encoded({domain: find(key_of(domain)) for domain in {domain_of(image) or "docker.io" for image in images}})


def domain_of(image: str) -> str:
    """The registry in the name of an image; "" for Docker Hub."""
    first, slash, _ = image.partition("/")
    return first if slash and (any(c in first for c in ".:") or first == "localhost") else ""


def _encoded(body: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(body).encode()).decode()


def find(key: str) -> dict[str, str]:
    """`{"username", "password"}` or `{"identitytoken"}`, with `serveraddress`; {} when there are none."""
    config = _load()
    if helper := _helper(config, key):
        found = _ask(helper, "get", key)
        if found is None:
            return {}
        user, secret = str(found.get("Username") or ""), str(found.get("Secret") or "")
        own = {"identitytoken": secret} if user == _TOKEN_USER else {"username": user, "password": secret}
        return {**own, "serveraddress": key}
    entry = (config.get("auths") or {}).get(key) or {}
    if token := entry.get("identitytoken"):
        return {"identitytoken": str(token), "serveraddress": key}
    try:
        user, _, password = base64.b64decode(entry.get("auth") or "").decode().partition(":")
    except ValueError as error:
        raise InvalidRequest(f"the log-in for {key} in {path()} is damaged", hint=f"ambi logout {key}") from error
    return {"username": user, "password": password, "serveraddress": key} if user else {}


def store(key: str, username: str, password: str) -> str:
    """Keep a log-in; returns a warning when it is kept in the clear, else ""."""
    config = _load()
    if helper := _helper(config, key):
        _ask(helper, "store", json.dumps({"ServerURL": key, "Username": username, "Secret": password}))
        config.setdefault("auths", {})[key] = {}
        _write(config)
        return ""
    config.setdefault("auths", {})[key] = {"auth": base64.b64encode(f"{username}:{password}".encode()).decode()}
    _write(config)
    return f"the password is stored unencrypted in {path()}; a credential helper (credsStore) avoids that"


def erase(key: str) -> bool:
    """Forget a log-in; false when there was none."""
    config = _load()
    known = key in (config.get("auths") or {})
    if helper := _helper(config, key):
        known = _ask(helper, "get", key) is not None or known
        _ask(helper, "erase", key)
    if known:
        (config.get("auths") or {}).pop(key, None)
        _write(config)
    return known


def _load() -> dict[str, Any]:
    try:
        config = json.loads(path().read_bytes())
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise from_os_error("cannot read the log-ins", error) from error
    except ValueError as error:
        raise InvalidRequest(f"{path()} is not JSON: {error}", hint="mend it, or move it away and log in again") from error
    if not isinstance(config, dict):
        raise InvalidRequest(f"{path()} is not a JSON object", hint="mend it, or move it away and log in again")
    return config


def _write(config: dict[str, Any]) -> None:
    target = path()
    try:
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd, beside = tempfile.mkstemp(dir=target.parent, prefix="config.json.")
        with os.fdopen(fd, "w") as file:
            json.dump(config, file, indent="\t")
        os.replace(beside, target)
    except OSError as error:
        raise from_os_error("cannot keep the log-in", error) from error


def _helper(config: dict[str, Any], key: str) -> str:
    return str((config.get("credHelpers") or {}).get(key) or config.get("credsStore") or "")


def _ask(helper: str, verb: str, text: str) -> dict[str, Any] | None:
    """Run a helper. None when it has nothing."""
    import subprocess

    program = f"docker-credential-{helper}"
    try:
        done = subprocess.run(
            [program, verb], input=text, capture_output=True, text=True, timeout=_HELPER_SECONDS, check=False
        )
    except FileNotFoundError:
        raise NotFound(
            f"{program} is not there, but {path()} names it", hint="install it, or remove credsStore there"
        ) from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise AmbiError(f"{program} {verb} failed: {error}", hint=f"try it: echo HOST | {program} get") from error
    if done.returncode:
        if verb in ("get", "erase"):
            return None
        said = done.stdout.strip() or done.stderr.strip()
        raise AmbiError(f"{program} {verb} failed: {said}", hint="see the helper's own manual")
    try:
        return dict(json.loads(done.stdout)) if verb == "get" else {}
    except (ValueError, TypeError) as error:
        raise AmbiError(f"{program} get answered no JSON", hint="see the helper's own manual") from error
