"""Lists of NAME=VALUE, from flags and from files."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from ambi.core.errors import InvalidRequest, from_os_error


def env_list(files: Sequence[str], flags: Sequence[str]) -> list[str]:
    """`NAME=VALUE` each, files first. A bare NAME takes this process's value; without one, a flag unsets it inside."""
    out = [line for path in files for line in _env_file(path)]
    for text in flags:
        name, separator, _ = text.partition("=")
        if not name:
            raise InvalidRequest(f"invalid value for --env: '{text}' has no name", hint="as in --env NAME=VALUE")
        out.append(text if separator or name not in os.environ else f"{name}={os.environ[name]}")
    return out


def _env_file(path: str) -> Iterator[str]:
    for line in _lines("--env-file", path):
        name, separator, _ = line.partition("=")
        if separator:
            yield line
        elif name in os.environ:
            yield f"{name}={os.environ[name]}"


def key_values(flag: str, files: Sequence[str], flags: Sequence[str]) -> dict[str, str]:
    """NAME to VALUE, files first, the last of a name wins; a bare NAME has the value ""."""
    texts = [line for path in files for line in _lines(f"{flag}-file", path)]
    out = {}
    for text in [*texts, *flags]:
        name, _, value = text.partition("=")
        if not name:
            raise InvalidRequest(f"invalid value for {flag}: '{text}' has no name", hint=f"as in {flag} NAME=VALUE")
        out[name] = value
    return out


def _lines(flag: str, path: str) -> Iterator[str]:
    """Lines of a file of NAME=VALUE, without comments and empty ones. Raises InvalidRequest for a name with blanks."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            lines = file.read().splitlines()
    except UnicodeDecodeError:
        raise InvalidRequest(f"the file of {flag} is not UTF-8: {path}", hint="a line is NAME=VALUE, in UTF-8") from None
    except OSError as error:
        raise from_os_error(f"cannot read the file of {flag}", error) from error
    for number, line in enumerate((line.lstrip() for line in lines), 1):
        if not line or line.startswith("#"):
            continue
        name = line.partition("=")[0]
        if not name or name != "".join(name.split()):
            raise InvalidRequest(
                f"{path}:{number}: the name '{name}' is empty or has blanks in it", hint="a line is NAME=VALUE"
            )
        yield line


def split_name(name: str) -> tuple[str, str]:
    """Repository and tag, "" without one; a port is no tag."""
    repository, colon, tag = name.rpartition(":")
    return (repository, tag) if colon and "/" not in tag else (name, "")
