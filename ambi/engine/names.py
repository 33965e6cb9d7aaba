"""Names and ids of instances."""

from __future__ import annotations

import secrets
from collections.abc import Container

from ambi.core.errors import InvalidRequest

_ADJECTIVES = (
    "able amber ample bold brave breezy bright brisk calm candid cheerful clear clever cosy crisp curious daring deep deft"
    " eager early earnest easy fair famous fervent fine firm fleet fond frank fresh gentle glad golden grand happy hardy"
    " hearty honest humble jolly keen kind lively loyal lucid lucky mellow merry mild modest neat noble patient placid"
    " plucky polite proud quick quiet rapid ready robust serene sharp silent sincere smart snug solid sound spry stable"
    " steady sturdy subtle sunny swift tender tidy trusty upbeat vivid warm wise witty young zesty"
)
_SURNAMES = (
    "adleman allen babbage backus bartik berners booch boole brooks cerf church clarke codd conway cray curie dahl dijkstra"
    " easley engelbart erdos euler feinler fermat floyd franklin galois gauss goedel goldberg gosling hamilton hamming"
    " hoare holberton hopper huffman iverson johnson kay kernighan kleene knuth lamarr lamport leibniz liskov lovelace"
    " mcafee mccarthy meitner metcalfe milner moore naur nelson neumann newell noether nygaard perlis perlman postel rabin"
    " ritchie rivest sammet shamir shannon simon spaerck stallings steele tarjan thompson torvalds turing ullman wegner"
    " wescoff wiener wilkes wilkinson wirth yao zuse"
)
_FIRST = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789")
_REST = _FIRST | frozenset("_.-")


def new_id() -> str:
    """64 hexadecimal digits whose short form is not a number, so that no tool takes it for one."""
    while True:
        made = secrets.token_hex(32)
        if not made[:12].isdigit():
            return made


def random_name(taken: Container[str]) -> str:
    """Two words that are not in `taken`."""
    adjectives, surnames = _ADJECTIVES.split(), _SURNAMES.split()
    for attempt in range(1000):
        name = f"{secrets.choice(adjectives)}_{secrets.choice(surnames)}"
        if attempt >= 5:
            name += str(secrets.randbelow(10 ** (attempt // 5)))
        if name not in taken:
            return name
    return f"instance_{secrets.token_hex(8)}"


def checked(name: str) -> str:
    """`name` without Docker's leading slash. Raises InvalidRequest."""
    plain = name.removeprefix("/")
    if len(plain) < 2 or plain[0] not in _FIRST or not all(c in _REST for c in plain) or len(plain) > 255:
        raise InvalidRequest(
            f"Invalid container name ({name}), only [a-zA-Z0-9][a-zA-Z0-9_.-] are allowed",
            hint="2 to 255 letters, digits, `_`, `.` and `-`, the first a letter or digit: --name web-1",
        )
    return plain
