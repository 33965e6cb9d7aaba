"""HTTP to one registry: TLS, proxies, log-in, redirects, and trying again.

A request is tried again when the connection breaks before an answer, or the answer is 429 or 5xx: five times in all, after
1, 2, 4 and 8 s, or after what Retry-After says up to a minute. Credentials go to the registry and to the token service that
it names, never along a redirect to another host.
"""

from __future__ import annotations

import base64
import json
import ssl
import time
import urllib.request
from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import urlencode, urljoin, urlsplit

import urllib3
from urllib3.exceptions import HTTPError, SSLError

from ambi.core.errors import AmbiError, Corrupt, Forbidden, InvalidRequest, NotFound, Unavailable
from images.registry import challenge
from images.registry.settings import Credentials, Settings, certificates

urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)  # whoever names a registry insecure has been told

Response = urllib3.BaseHTTPResponse
Body = Any  # bytes, or a file: urllib3 takes both

CONNECT_S, READ_S = 10.0, 60.0
_ATTEMPTS = 5
_LONGEST_WAIT_S = 60.0
_REDIRECTS = 5
_BLOCK = 256 << 10  # of what is sent
_AGAIN = frozenset((429, 500, 502, 503, 504))
_MOVED = frozenset((301, 302, 303, 307, 308))
_ERROR_BYTES, _TOKEN_BYTES = 64 << 10, 1 << 20
_WORDLESS = {401: "authentication required", 403: "access denied"}  # an answer to HEAD has no words
_HOSTS = {"docker.io": "registry-1.docker.io"}


class Refusal(NamedTuple):
    """An answer that is no success. words: the registry's own, made harmless. code: of the specification, "" without."""

    status: int
    code: str
    words: str


def refusal(response: Response) -> Refusal:
    """Read the rest of `response` as an error."""
    try:
        data = response.read(_ERROR_BYTES) or b""
    except HTTPError:
        data = b""
    response.close()
    code, words = "", data.decode("utf-8", "replace")
    try:
        body = json.loads(data)
        if isinstance(body, dict) and isinstance(body.get("errors"), list) and body["errors"]:
            first = body["errors"][0]
            code, words = str(first.get("code") or ""), str(first.get("message") or "")
        elif isinstance(body, dict):
            words = str(body.get("message") or body.get("details") or body.get("error") or "")
    except (ValueError, AttributeError, RecursionError):
        pass
    return Refusal(
        response.status, harmless(code, 64), harmless(words) or _WORDLESS.get(response.status, f"status {response.status}")
    )


def harmless(text: str, limit: int = 300) -> str:
    """One printable line of what a stranger wrote."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= limit else line[: limit - 3] + "..."


def error_of(what: str, found: Refusal) -> AmbiError:
    """The member of the tree for a refusal met while doing `what`."""
    message = f"{what}: {found.words}"
    if found.status in (401, 403):
        return Forbidden(message, hint="log in first: ambi login HOST")
    if found.status == 404:
        return NotFound(message, hint="look at the spelling of the name and the tag")
    if found.status == 429:
        return Unavailable(message, hint="the registry limits requests: wait, or log in")
    if found.status >= 500:
        return Unavailable(message, hint="the registry has a fault of its own: try again later")
    return InvalidRequest(message, hint="the registry refused it: see its own words")


class Transport:
    """Connections to the registry `domain`. Safe to use from several threads."""

    def __init__(self, domain: str, settings: Settings, credentials: Credentials, base: str = "") -> None:
        """base: the address of a mirror; credentials are for `domain` and not sent to it."""
        self.domain = domain
        self._insecure = settings.is_insecure(domain) if not base else base.startswith("http://")
        self._credentials = Credentials() if base else credentials
        self._headers: dict[str, str] = {}  # scope to Authorization
        host = _HOSTS.get(domain, domain)
        self._bases = [base.rstrip("/")] if base else [f"https://{host}"] + ([f"http://{host}"] if self._insecure else [])
        self._pool = _pool(urlsplit(self._bases[0]).netloc, verify=not self._insecure)

    @property
    def base(self) -> str:
        """The address that the registry's paths follow."""
        return self._bases[0]

    def close(self) -> None:
        self._pool.clear()

    def request(
        self, method: str, target: str, *, scope: str, headers: Mapping[str, str] | None = None, body: Body = None
    ) -> Response:
        """The final answer, whatever its status; its body is not read yet and it is the caller's to close.

        target: a path of the registry, or an address that it gave out. scope: `repository:PATH:pull` and the like. A `body`
        that is a file is sent from its start at each attempt. Raises Unavailable when nobody answers.
        """
        renewed = False
        for attempt in range(_ATTEMPTS):
            if hasattr(body, "seek"):
                body.seek(0)
            try:
                response = self._once(method, target, scope, headers or {}, body)
            except (HTTPError, OSError) as error:
                if attempt + 1 == _ATTEMPTS or _permanent(error):
                    raise self._unreachable(error) from error
                _pause(attempt, "")
                continue
            if response.status == 401 and not renewed and self._log_in(response, scope):
                renewed = True
                response.close()
                response = self._once_more(method, target, scope, headers or {}, body)
            if response.status not in _AGAIN or attempt + 1 == _ATTEMPTS:
                return response
            after = response.headers.get("Retry-After") or ""
            response.close()
            _pause(attempt, after)
        raise AssertionError("the last attempt returns or raises")

    def _once_more(self, method: str, target: str, scope: str, headers: Mapping[str, str], body: Body) -> Response:
        if hasattr(body, "seek"):
            body.seek(0)
        try:
            return self._once(method, target, scope, headers, body)
        except (HTTPError, OSError) as error:
            raise self._unreachable(error) from error

    def _once(self, method: str, target: str, scope: str, headers: Mapping[str, str], body: Body) -> Response:
        """One attempt: along redirects, and over http where a registry without TLS is allowed."""
        while True:
            bases = self._bases
            url = target if "://" in target else bases[0] + target
            try:
                return self._follow(method, url, scope, headers, body)
            except HTTPError:
                if not url.startswith(bases[0]) or len(bases) == 1:
                    raise
                self._bases = bases[1:]  # it does not speak TLS; another thread may have found out as well
                if hasattr(body, "seek"):
                    body.seek(0)

    def _follow(self, method: str, url: str, scope: str, headers: Mapping[str, str], body: Body) -> Response:
        for _ in range(_REDIRECTS + 1):
            sent = dict(headers)
            if _origin(url) == _origin(self._bases[0]) and scope in self._headers:
                sent["Authorization"] = self._headers[scope]
            response = self._pool.request(
                method, url, headers=sent, body=body, preload_content=False, redirect=False, retries=False,
                decode_content=False,
            )  # fmt: skip
            place = response.headers.get("Location")
            if response.status not in _MOVED or not place or method not in ("GET", "HEAD"):
                return response
            response.close()
            beyond = urljoin(url, place)
            if urlsplit(beyond).scheme not in ("https", "http") or (
                url.startswith("https:") and not self._may_be_plain(beyond)
            ):
                raise Forbidden(f"registry {self.domain} sends us on to {harmless(beyond)}, which is not safe")
            url = beyond
        raise Unavailable(f"registry {self.domain} sends us on more than {_REDIRECTS} times")

    def _may_be_plain(self, url: str) -> bool:
        return url.startswith("https:") or self._insecure

    def _unreachable(self, error: Exception) -> AmbiError:
        if isinstance(error, SSLError):
            authority = f"/etc/ambi/certs.d/{self.domain}/ca.crt"
            hint = f"put its authority at {authority}, or name it insecure in /etc/ambi/registries.json"
        else:
            hint = "see that the name is right and the network is up"
        return Unavailable(f"registry {self.domain} cannot be reached: {harmless(_cause(error))}", hint=hint)

    # Log-in

    def _log_in(self, response: Response, scope: str) -> bool:
        """Get what answers the challenges of a 401; false when we have nothing for it."""
        found = challenge.parse(response.headers.get("WWW-Authenticate") or "")
        for item in found:
            if item.scheme == "bearer" and item.values.get("realm"):
                self._headers[scope] = f"Bearer {self._token(item.values, scope)}"
                return True
        if any(item.scheme == "basic" for item in found) and self._credentials.username:
            self._headers[scope] = _basic(self._credentials)
            return True
        return False

    def _token(self, values: Mapping[str, str], scope: str) -> str:
        """Docker's token specification; a refresh token goes by OAuth2 (POST)."""
        realm, credentials = values["realm"], self._credentials
        if not realm.startswith("https://") and not (realm.startswith("http://") and self._insecure):
            raise Forbidden(f"registry {self.domain} wants us to log in at {harmless(realm)}, which is not safe")
        scopes = scope or values.get("scope") or ""
        query = [(key, value) for key, value in (("service", values.get("service") or ""), ("scope", scopes)) if value]
        headers: dict[str, str] = {}
        if credentials.identity_token:
            form = [
                *query,
                ("grant_type", "refresh_token"),
                ("refresh_token", credentials.identity_token),
                ("client_id", "ambi"),
            ]
            headers["Content-Type"] = "application/x-www-form-urlencoded"
            response = self._ask("POST", realm, headers, urlencode(form).encode())
        else:
            if credentials.username:
                headers["Authorization"] = _basic(credentials)
                query.append(("account", credentials.username))
            separator = "&" if "?" in realm else "?"
            response = self._ask("GET", realm + (separator + urlencode(query) if query else ""), headers, None)
        if response.status != 200:
            raise error_of(f"log-in for {self.domain} was refused", refusal(response))
        try:
            body = json.loads(response.read(_TOKEN_BYTES))
            token = body.get("token") or body.get("access_token")
        except (HTTPError, ValueError, AttributeError, RecursionError) as error:
            raise Corrupt(f"the token service of {self.domain} sent no token: {harmless(str(error))}") from error
        finally:
            response.close()
        if not isinstance(token, str) or not token.isascii() or not token.isprintable() or not token:
            raise Corrupt(f"the token service of {self.domain} sent no token")
        return token

    def _ask(self, method: str, url: str, headers: Mapping[str, str], body: bytes | None) -> Response:
        try:
            return self._pool.request(
                method, url, headers=dict(headers), body=body, preload_content=False, redirect=False, retries=False
            )
        except (HTTPError, OSError) as error:
            host = urlsplit(url).netloc
            raise Unavailable(
                f"the token service {host} of {self.domain} cannot be reached: {harmless(_cause(error))}"
            ) from error


def _pool(netloc: str, *, verify: bool) -> urllib3.PoolManager:
    if verify:
        context = ssl.create_default_context()
    else:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # to load this host's authorities would take 20 ms
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    files = certificates(netloc)
    try:
        for path in files.authorities:
            context.load_verify_locations(path)
        for certificate, key in files.own:
            context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        raise InvalidRequest(f"certificates for {netloc} cannot be used: {error}", hint="they must be PEM") from error
    timeout = urllib3.Timeout(connect=CONNECT_S, read=READ_S)
    proxy = urllib.request.getproxies().get("https" if verify else "http")
    if proxy and not urllib.request.proxy_bypass(netloc):
        return urllib3.ProxyManager(proxy, ssl_context=context, timeout=timeout, maxsize=8, blocksize=_BLOCK)
    return urllib3.PoolManager(ssl_context=context, timeout=timeout, maxsize=8, blocksize=_BLOCK)


def _basic(credentials: Credentials) -> str:
    return "Basic " + base64.b64encode(f"{credentials.username}:{credentials.password}".encode()).decode()


def _origin(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    return parts.scheme, parts.netloc


def _permanent(error: Exception) -> bool:
    """Whether another attempt would end as this one did."""
    return isinstance(error, SSLError) or "Name or service not known" in str(error) or "Connection refused" in str(error)


def _cause(error: Exception) -> str:
    """The innermost reason, without urllib3's addresses of objects."""
    inner = getattr(error, "reason", None) or (error.__cause__ if isinstance(error.__cause__, OSError) else None) or error
    text = str(inner)
    return text.rpartition(">: ")[2] if ">: " in text else text


def _pause(attempt: int, retry_after: str) -> None:
    seconds = float(min(2**attempt, 8))
    if retry_after.isdecimal() and len(retry_after) < 9:
        seconds = max(0.1, float(retry_after))
    time.sleep(min(seconds, _LONGEST_WAIT_S))
