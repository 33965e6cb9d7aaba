"""The variables that a link on the default bridge gives an instance, by Docker's old convention, which images still read:
`DB_PORT=tcp://172.17.0.2:5432`, `DB_PORT_5432_TCP_ADDR`, `DB_NAME=/web/db`, `DB_ENV_USER=...` for an alias `db`.

The variables for ranges of ports (`..._START`, `..._END`) are not among them.
"""

from __future__ import annotations

from collections.abc import Iterable

_NOT_PASSED = ("HOME", "PATH")


def variables(owner: str, alias: str, address: str, ports: Iterable[str], env: Iterable[str]) -> list[str]:
    """owner: who has the link. address, ports (`5432/tcp`), env: of whom it names."""
    prefix = alias.upper().replace("-", "_")
    exposed = sorted((int(number), protocol) for number, _, protocol in (text.partition("/") for text in ports))
    found = [f"{prefix}_PORT={protocol}://{address}:{number}" for number, protocol in exposed[:1]]
    for number, protocol in exposed:
        name = f"{prefix}_PORT_{number}_{protocol.upper()}"
        found += [f"{name}={protocol}://{address}:{number}", f"{name}_ADDR={address}", f"{name}_PORT={number}"]
        found.append(f"{name}_PROTO={protocol}")
    found.append(f"{prefix}_NAME=/{owner}/{alias}")
    own = (item.partition("=") for item in env)
    found += [f"{prefix}_ENV_{name}={value}" for name, equals, value in own if equals and name not in _NOT_PASSED]
    return found
