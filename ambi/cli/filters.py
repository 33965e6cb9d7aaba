"""`--filter KEY=VALUE`, as the API takes it."""

from __future__ import annotations

import json
from collections.abc import Sequence

from ambi.core.errors import InvalidRequest


def filter_query(texts: Sequence[str], **more: str) -> dict[str, str]:
    """The query `filters={"key": {"value": true}}`, or none. Raises InvalidRequest for a filter without `=`."""
    found: dict[str, dict[str, bool]] = {}
    for text in [*texts, *(f"{key}={value}" for key, value in more.items())]:
        key, separator, value = text.partition("=")
        if not separator:
            raise InvalidRequest(f"invalid value for --filter: '{text}'", hint="a filter looks like KEY=VALUE")
        found.setdefault(key.strip().lower(), {})[value.strip()] = True
    return {"filters": json.dumps(found, separators=(",", ":"))} if found else {}
