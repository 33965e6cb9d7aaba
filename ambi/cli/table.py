"""Rows as docker lays them out: columns three blanks apart and at least ten wide, or one template a row, or JSON."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence

from ambi.cli.template import Template, to_escaped_json

GAP, MIN_WIDTH = 3, 10

Row = Mapping[str, object]


def render(rows: Iterable[Sequence[str]], *, min_width: int = MIN_WIDTH) -> str:
    """Lines of aligned columns; the last column of a row is not padded."""
    table = [[cell.replace("\t", " ").replace("\n", " ") for cell in row] for row in rows]
    widths: list[int] = []
    for row in table:
        for place, cell in enumerate(row[:-1]):
            if place == len(widths):
                widths.append(min_width)
            widths[place] = max(widths[place], len(cell) + GAP)
    lines = ("".join(cell.ljust(width) for cell, width in zip(row, [*widths, 0], strict=False)) for row in table)
    return "".join(f"{line}\n" for line in lines)


class Columns:
    """The columns of one command: placeholder to header, in docker's order, and which are shown when nothing is asked.

    methods: placeholders that take an argument (`{{.Label "a"}}`), to what makes the header of it.
    """

    __slots__ = ("_headers", "_methods", "_shown")

    def __init__(
        self, headers: Mapping[str, str], shown: Sequence[str], methods: Mapping[str, Callable[[str], str]] | None = None
    ) -> None:
        self._headers = headers
        self._shown = shown
        self._methods = methods or {}

    def show(self, rows: Iterable[Row], template: str | None, *, shown: Sequence[str] | None = None) -> None:
        """Print `rows` (placeholder to value) as `--format` asks: None or `table`, `json`, `table TEMPLATE`, TEMPLATE."""
        out = sys.stdout.write
        if template == "json":
            for row in rows:
                out(to_escaped_json({key: str(row[key]) for key in sorted(self._headers) if key in row}) + "\n")
        elif template is None or template == "table":
            names = shown or self._shown
            out(render([[self._headers[n] for n in names], *([str(row[n]) for n in names] for row in rows)]))
        elif template.startswith("table"):
            heads = {**self._headers, **self._methods}
            compiled = Template(template.removeprefix("table").strip(), heads)
            lines = [compiled.render(heads), *(compiled.render(row) for row in rows)]
            out(render(line.split("\t") for line in lines))
        else:
            compiled = Template(template, {**self._headers, **self._methods})
            for row in rows:
                out(compiled.render(row) + "\n")
