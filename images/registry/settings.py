"""How registries are reached: credentials, which of them need no TLS, mirrors, certificates.

`/etc/ambi/registries.json` (another file: $AMBI_REGISTRIES), read at every pull and push:

    {"insecure": ["registry.lan:5000"], "mirrors": {"docker.io": ["https://mirror.lan"]}}

Certificates lie as Docker has them, `certs.d/HOST[:PORT]/` with `*.crt` (authorities) and pairs `X.cert`, `X.key` (of ours),
below /etc/ambi and /etc/docker.
"""

from __future__ import annotations

import ipaddress
import json
import os
from pathlib import Path
from typing import NamedTuple

from ambi.core.errors import InvalidRequest

FILE_VARIABLE = "AMBI_REGISTRIES"
_FILE = "/etc/ambi/registries.json"
_CERTIFICATES = (Path("/etc/ambi/certs.d"), Path("/etc/docker/certs.d"))


class Credentials(NamedTuple):
    """What a client logs in with; identity_token is a refresh token that stands for both."""

    username: str = ""
    password: str = ""
    identity_token: str = ""

    @property
    def given(self) -> bool:
        return bool(self.username or self.identity_token)


class Settings(NamedTuple):
    """insecure: domains that are used without a valid certificate, or without TLS. mirrors: domain to base addresses."""

    insecure: frozenset[str] = frozenset()
    mirrors: dict[str, tuple[str, ...]] = {}

    def is_insecure(self, domain: str) -> bool:
        """Loopback always is, as with Docker."""
        if domain in self.insecure:
            return True
        host = domain.rpartition(":")[0] if domain.rpartition(":")[2].isdecimal() else domain
        if host == "localhost":
            return True
        try:
            return ipaddress.ip_address(host.strip("[]")).is_loopback
        except ValueError:
            return False


def load() -> Settings:
    """Raises InvalidRequest when the file is there and wrong."""
    path = Path(os.environ.get(FILE_VARIABLE) or _FILE)
    try:
        body = json.loads(path.read_bytes())
        insecure = frozenset(map(str, body.get("insecure") or ()))
        mirrors = {str(domain): tuple(map(str, bases)) for domain, bases in (body.get("mirrors") or {}).items()}
    except FileNotFoundError:
        return Settings()
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise InvalidRequest(
            f"{path} cannot be used: {error}",
            hint='it looks like {"insecure": ["HOST:PORT"], "mirrors": {"docker.io": ["URL"]}}',
        ) from error
    for base in (base for bases in mirrors.values() for base in bases):
        if not base.startswith(("http://", "https://")):
            raise InvalidRequest(f"{path}: mirror {base} is no http:// or https:// address", hint="https://HOST[:PORT]")
    return Settings(insecure, mirrors)


class Certificates(NamedTuple):
    """Files of one registry: authorities beside the system's, and pairs of certificate and key."""

    authorities: tuple[Path, ...] = ()
    own: tuple[tuple[Path, Path], ...] = ()


def certificates(domain: str) -> Certificates:
    """Raises InvalidRequest when a certificate has no key."""
    authorities: list[Path] = []
    own: list[tuple[Path, Path]] = []
    for directory in (root / domain for root in _CERTIFICATES):
        if not directory.is_dir():
            continue
        authorities += sorted(directory.glob("*.crt"))
        for path in sorted(directory.glob("*.cert")):
            key = path.with_suffix(".key")
            if not key.exists():
                raise InvalidRequest(f"{path} has no key beside it", hint=f"put the key of the certificate at {key}")
            own.append((path, key))
    return Certificates(tuple(authorities), tuple(own))
