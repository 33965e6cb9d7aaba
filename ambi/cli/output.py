"""What people read: errors and hints, warnings, progress. Colour only where a terminal shows it and nobody forbids it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import TextIO

from ambi.core.errors import AmbiError

RED, YELLOW, CYAN = "31;1", "33;1", "36;1"


def coloured(stream: TextIO) -> bool:
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb" and stream.isatty()


def paint(text: str, colour: str, stream: TextIO) -> str:
    return f"\033[{colour}m{text}\033[0m" if coloured(stream) else text


def one_line(text: str) -> str:
    """`text` on one line and without control characters: a message can quote what an image or a guest has made up."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in text.strip())


def print_error(error: AmbiError) -> None:
    """`error: ...` and, where there is one, `hint: ...` on stderr."""
    say("error", error.message, RED)
    if error.hint:
        hint(error.hint)


def hint(text: str) -> None:
    say("hint", text, CYAN)


def note(text: str) -> None:
    say("note", text, CYAN)


def warn(text: str) -> None:
    say("warning", text, YELLOW)


def say(word: str, text: str, colour: str) -> None:
    print(f"{paint(word, colour, sys.stderr)}: {one_line(text)}", file=sys.stderr, flush=True)


def nearest(name: str, names: Iterable[str]) -> str:
    """What `name` was probably meant to be, "" when nothing is near."""
    import difflib

    bare = {other.lstrip("-"): other for other in names}
    found = difflib.get_close_matches(name.lstrip("-"), bare, n=1, cutoff=0.65)
    return bare[found[0]] if found else ""
