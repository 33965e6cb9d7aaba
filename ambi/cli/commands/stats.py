"""`ambi stats`."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from typing import Any

import click

from ambi.cli import complete, flags, humanize
from ambi.cli.app import App, DockerCommand, each, pass_app
from ambi.cli.names import on
from ambi.cli.table import Columns
from ambi.client.client import path_of
from ambi.core.errors import NotFound

INTERVAL_SECONDS = 1.0
COLUMNS = Columns(
    {
        "ID": "CONTAINER ID",
        "Name": "NAME",
        "CPUPerc": "CPU %",
        "MemUsage": "MEM USAGE / LIMIT",
        "MemPerc": "MEM %",
        "NetIO": "NET I/O",
        "BlockIO": "BLOCK I/O",
        "PIDs": "PIDS",
    },
    ("ID", "Name", "CPUPerc", "MemUsage", "MemPerc", "NetIO", "BlockIO", "PIDs"),
)


@click.command("stats", cls=DockerCommand)
@flags.switch("-a", "--all", "everything", help="Also those that do not run.")
@flags.format_option()
@flags.switch("--no-stream", help="Show them once.")
@flags.switch("--no-trunc", help="Do not shorten anything.")
@click.argument("instances", nargs=-1, metavar="[INSTANCE...]", shell_complete=complete.running)
@pass_app
def stats(
    app: App, instances: tuple[str, ...], everything: bool, template: str | None, no_stream: bool, no_trunc: bool
) -> None:
    """Show what instances use, live."""
    previous: dict[str, dict[str, Any]] = {}
    _sample(app, instances, everything, previous)  # names that do not exist are told before anything is shown
    live = sys.stdout.isatty() and not no_stream and template in (None, "table")
    while True:
        time.sleep(INTERVAL_SECONDS)
        rows = [_row(now, before, whole=no_trunc) for before, now in _sample(app, instances, everything, previous)]
        if live:
            sys.stdout.write("\033[H\033[J")
        COLUMNS.show(rows, template)
        sys.stdout.flush()
        if no_stream:
            return


def _sample(
    app: App, instances: tuple[str, ...], everything: bool, previous: dict[str, dict[str, Any]]
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(the sample before, a new one) of each instance; `previous` becomes the new ones."""
    found: list[tuple[dict[str, Any], dict[str, Any]]] = []

    @on(app)
    def take(name: str) -> None:
        query = {"stream": "0", "one-shot": "1"}
        try:
            now = app.client.get(path_of("containers", name, "stats"), query)
        except NotFound:
            if not instances:  # it has gone since it was listed
                return
            raise
        found.append((previous.get(now["id"], now), now))

    names = instances or [row["Id"] for row in app.client.get("/containers/json", {"all": "1"} if everything else {})]
    each(names, take)
    previous.clear()
    previous.update({now["id"]: now for _, now in found})
    return found


def _row(now: dict[str, Any], before: dict[str, Any], *, whole: bool) -> dict[str, object]:
    memory = now["memory_stats"]
    used = memory.get("usage", 0) - (memory.get("stats") or {}).get("inactive_file", 0)
    limit = memory.get("limit", 0)
    return {
        "ID": now["id"] if whole else now["id"][:12],
        "Name": now["name"].removeprefix("/"),
        "CPUPerc": f"{_cpu_percent(now['cpu_stats'], before['cpu_stats']):.2f}%",
        "MemUsage": f"{humanize.binary_size(max(0, used))} / {humanize.binary_size(limit)}",
        "MemPerc": f"{used / limit * 100 if limit else 0:.2f}%",
        "NetIO": _traffic(now.get("networks") or {}),
        "BlockIO": _blocks((now.get("blkio_stats") or {}).get("io_service_bytes_recursive") or ()),
        "PIDs": now["pids_stats"].get("current", 0),
    }


def _traffic(networks: dict[str, dict[str, int]]) -> str:
    """Received and sent by all interfaces."""
    return " / ".join(humanize.size(sum(nic[key] for nic in networks.values())) for key in ("rx_bytes", "tx_bytes"))


def _blocks(entries: Iterable[dict[str, Any]]) -> str:
    """Read from and written to all devices."""
    sums = {"r": 0, "w": 0}
    for entry in entries:
        kind = entry["op"][:1].lower()
        if kind in sums:
            sums[kind] += entry["value"]
    return f"{humanize.size(sums['r'])} / {humanize.size(sums['w'])}"


def _cpu_percent(now: dict[str, Any], before: dict[str, Any]) -> float:
    """Share of one CPU; docker's formula, so that two busy CPUs are 200%."""
    used = now["cpu_usage"]["total_usage"] - before["cpu_usage"]["total_usage"]
    spent = now.get("system_cpu_usage", 0) - before.get("system_cpu_usage", 0)
    return used / spent * now.get("online_cpus", 1) * 100 if used > 0 and spent > 0 else 0.0
