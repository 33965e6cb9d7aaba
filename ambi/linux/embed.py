"""Programs that are carried in a module of Python text, which the `build.py` of each writes. Not loaded but to build."""

from __future__ import annotations

import base64
import textwrap


def module(made_of: str, name: str, program: bytes) -> str:
    """The text of a module that has `program` under `name`. made_of: the sources, for its docstring."""
    text = textwrap.fill(base64.b64encode(program).decode(), 120)
    return (
        f'"""Made of {made_of} by build.py; {len(program)} bytes."""\n\nfrom __future__ import annotations\n\n'
        f'import binascii\n\n{name} = binascii.a2b_base64(\n    """\n{text}\n"""\n)\n'
    )
