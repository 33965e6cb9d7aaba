"""Docker's small grammars that both the command line and the API speak."""

from __future__ import annotations

from ambi.core.errors import InvalidRequest


def human_duration(seconds: float) -> str:
    """`5 minutes`, `About an hour`: as docker ps says it (go-units HumanDuration)."""
    whole, hours = int(seconds), int(seconds / 3600 + 0.5)
    if whole < 1:
        return "Less than a second"
    if whole == 1:
        return "1 second"
    if whole < 60:
        return f"{whole} seconds"
    minutes = int(seconds / 60)
    if minutes == 1:
        return "About a minute"
    if minutes < 60:
        return f"{minutes} minutes"
    if hours == 1:
        return "About an hour"
    for limit, unit, name in (
        (48, 1, "hours"),
        (24 * 14, 24, "days"),
        (24 * 60, 24 * 7, "weeks"),
        (24 * 730, 24 * 30, "months"),
    ):
        if hours < limit:
            return f"{hours // unit} {name}"
    return f"{int(seconds / 3600) // 24 // 365} years"


def detach_keys(text: str) -> bytes:
    """`ctrl-p,ctrl-q` as the bytes that a terminal sends: letters as they are, `ctrl-` with a letter or one of `@[\\]^_`.

    Raises InvalidRequest.
    """
    keys = bytearray()
    for key in text.split(","):
        control = key[5:].lower() if key.lower().startswith("ctrl-") else ""
        if len(key) == 1 and key.isascii():
            keys.append(ord(key))
        elif len(control) == 1 and control in "abcdefghijklmnopqrstuvwxyz@[\\]^_":
            keys.append(ord(control.upper()) & 0x1F)
        else:
            hint = "use keys like ctrl-p,ctrl-q or a,b"
            raise InvalidRequest(f"Invalid detach keys ({text}) provided: {key!r} is no key", hint=hint)
    return bytes(keys)


def is_address(text: str) -> bool:
    """Whether `text` is an IPv4 or IPv6 address, without a zone."""
    import socket  # rarely needed, and not free where a fresh interpreter starts

    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.inet_pton(family, text)
        except OSError:  # not of this family
            continue
        return True
    return False
