"""Where we differ from Debian 12's dockerd (20.10) on purpose, and why."""

from __future__ import annotations

from tests.cli.transcript.script import Difference

DIFFERENCES: tuple[Difference, ...] = ()
