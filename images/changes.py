"""`--change`: Dockerfile instructions that set an image's config."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterable
from typing import Any

from ambi.core.errors import InvalidRequest

Config = dict[str, Any]


def apply_changes(config: Config, changes: Iterable[str]) -> None:
    """Change `config` in place. InvalidRequest names an instruction that is unknown or damaged."""
    for line in changes:
        word, _, rest = line.strip().partition(" ")
        change = _CHANGES.get(word.upper())
        if change is None:
            raise InvalidRequest(
                f"'{word}' is not a change that an image can take", hint="use " + ", ".join(sorted(_CHANGES))
            )
        if not rest.strip():
            raise InvalidRequest(f"{word.upper()} needs an argument", hint="for example 'CMD echo hello' or 'ENV A=b'")
        change(config, rest.strip())


def _array(rest: str) -> list[str] | None:
    if not rest.startswith("["):
        return None
    try:
        words = json.loads(rest)
    except ValueError:
        return None
    return words if isinstance(words, list) and all(isinstance(word, str) for word in words) else None


def _command(rest: str) -> list[str]:
    words = _array(rest)
    return ["/bin/sh", "-c", rest] if words is None else words


def _cmd(config: Config, rest: str) -> None:
    config["Cmd"] = _command(rest)


def _entrypoint(config: Config, rest: str) -> None:
    config["Entrypoint"] = _command(rest)


def _words(rest: str) -> list[str]:
    try:
        return shlex.split(rest)
    except ValueError as error:
        raise InvalidRequest(f"'{rest}' cannot be split into words: {error}") from None


def _pairs(instruction: str, rest: str) -> list[tuple[str, str]]:
    """`A=1 B="two words"`, or the old `A the rest`."""
    first, blank, value = rest.partition(" ")
    if "=" not in first:
        if not blank:
            raise InvalidRequest(f"{instruction} {rest}: must be NAME=VALUE", hint=f"{instruction} NAME=VALUE")
        return [(first, value.strip())]
    pairs = []
    for word in _words(rest):
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise InvalidRequest(f"{instruction} {word}: must be NAME=VALUE", hint=f"{instruction} NAME=VALUE")
        pairs.append((name, value))
    return pairs


def _env(config: Config, rest: str) -> None:
    env = dict(item.partition("=")[::2] for item in config.get("Env") or ())
    env.update(_pairs("ENV", rest))
    config["Env"] = [f"{name}={value}" for name, value in env.items()]


def _label(config: Config, rest: str) -> None:
    config["Labels"] = {**(config.get("Labels") or {}), **dict(_pairs("LABEL", rest))}


def _expose(config: Config, rest: str) -> None:
    ports = config.setdefault("ExposedPorts", {})
    for word in rest.split():
        port, _, protocol = word.partition("/")
        if not port.isdecimal() or not 0 < int(port) < 65536 or protocol.lower() not in ("", "tcp", "udp", "sctp"):
            raise InvalidRequest(f"EXPOSE {word}: must be PORT[/tcp|udp|sctp]", hint="for example EXPOSE 80/tcp")
        ports[f"{int(port)}/{protocol.lower() or 'tcp'}"] = {}


def _volume(config: Config, rest: str) -> None:
    words = _array(rest)
    for path in _words(rest) if words is None else words:
        config.setdefault("Volumes", {})[path] = {}


def _user(config: Config, rest: str) -> None:
    config["User"] = rest


def _workdir(config: Config, rest: str) -> None:
    base = config.get("WorkingDir") or "/"
    config["WorkingDir"] = rest if rest.startswith("/") else f"{base.rstrip('/')}/{rest}"


def _stopsignal(config: Config, rest: str) -> None:
    config["StopSignal"] = rest


def _onbuild(config: Config, rest: str) -> None:
    config.setdefault("OnBuild", []).append(rest)


_CHANGES: dict[str, Callable[[Config, str], None]] = {
    "CMD": _cmd,
    "ENTRYPOINT": _entrypoint,
    "ENV": _env,
    "EXPOSE": _expose,
    "LABEL": _label,
    "ONBUILD": _onbuild,
    "STOPSIGNAL": _stopsignal,
    "USER": _user,
    "VOLUME": _volume,
    "WORKDIR": _workdir,
}
