"""What clients are told, from real values: JSON shapes, times, filters, frames, and the tables of logs and top."""

from __future__ import annotations

import json
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest

from ambi.api import events, images, instance_shapes, logs, stats, streams, top, words
from ambi.api.query import Query, one_flag
from ambi.api.router import Router
from ambi.api.routes import ROUTER
from ambi.core.errors import InvalidRequest, NotFound
from ambi.core.model import ExecId, InstanceId, Isolation, Status, Usage, Workload
from ambi.core.version import VERSION
from ambi.engine import mounts
from ambi.engine.body import Body
from ambi.engine.types import CreateSpec, Event, Exec, Instance, LogEntry, State

ROOT = Path(__file__).parents[2]
START = 1_700_000_000_120_000_000


def instance(*, state: State | None = None, host: dict[str, Any] | None = None, **config: Any) -> Instance:
    return Instance(
        id=InstanceId("ab" * 32),
        name="web",
        workload=Workload.OCI,
        isolation=Isolation.VM,
        image="debian",
        image_id="sha256:" + "cd" * 32,
        spec=CreateSpec(config, host or {}),
        argv=("sh", "-c", "echo hi"),
        created_ns=START,
        state=state or State(Status.CREATED),
        restart_count=0,
        exec_ids=(),
        data_dir=Path("/d"),
        run_dir=Path("/r"),
        log_path=Path("/d/x.log"),
        mounts=mounts.parse(Body("Config", {}), Body("HostConfig", host or {})).points,
    )


def test_the_version_is_the_package_s() -> None:
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == VERSION


@pytest.mark.parametrize(
    "ns,text",
    [
        (0, "0001-01-01T00:00:00Z"),
        (START, "2023-11-14T22:13:20.12Z"),
        (1_700_000_000_000_000_000, "2023-11-14T22:13:20Z"),
        (1_700_000_000_000_000_001, "2023-11-14T22:13:20.000000001Z"),
    ],
)
def test_times_as_go_writes_them(ns: int, text: str) -> None:
    assert words.rfc3339_nano(ns) == text


def test_log_times_have_nine_digits() -> None:
    assert words.log_time(START) == "2023-11-14T22:13:20.120000000Z"


def test_status_texts() -> None:
    now = time.time_ns()
    for state, text in (
        (State(Status.CREATED), "Created"),
        (State(Status.RUNNING, pid=1, started_ns=now - 5_000_000_000), "Up 5 seconds"),
        (State(Status.PAUSED, pid=1, started_ns=now - 5_000_000_000), "Up 5 seconds (Paused)"),
        (State(Status.EXITED, exit_code=137, finished_ns=now - 120_000_000_000), "Exited (137) 2 minutes ago"),
        (State(Status.REMOVING), "Removal In Progress"),
        (State(Status.DEAD), "Dead"),
    ):
        assert instance_shapes.status_text(instance(state=state)) == text


def test_summary_has_what_clients_read() -> None:
    row = instance_shapes.summary(instance(host={"NetworkMode": "none"}, Labels={"a": "b"}))
    assert row["Names"] == ["/web"] and row["Command"] == "sh -c 'echo hi'" and row["Image"] == "debian"
    assert row["HostConfig"] == {"NetworkMode": "none"} and list(row["NetworkSettings"]["Networks"]) == ["none"]
    assert row["Labels"] == {"a": "b"} and row["Ports"] == [] and row["Mounts"] == [] and row["Created"] == 1_700_000_000


def test_inspect_gives_back_what_was_given_and_docker_s_defaults() -> None:
    host = {
        "Binds": ["/a:/b:ro"],
        "LogConfig": {"Type": "", "Config": {}},
        "Memory": 7,
        "CapAdd": None,
        "Tmpfs": {"/t": "size=1m"},
    }
    shown = instance_shapes.inspect(instance(host=host, Cmd=["x"], Env=["A"], Entrypoint=None, StopSignal="SIGINT"), (1, 44))
    assert shown["HostConfig"]["Memory"] == 7 and shown["HostConfig"]["CapAdd"] is None
    assert shown["HostConfig"]["Tmpfs"] == {"/t": "size=1m"} and shown["HostConfig"]["Runtime"] == "vm"
    assert shown["HostConfig"]["LogConfig"] == {"Type": "json-file", "Config": {}}
    assert shown["HostConfig"]["PortBindings"] == {} and shown["HostConfig"]["Dns"] == []
    assert "/proc/kcore" in shown["HostConfig"]["MaskedPaths"]
    assert shown["Config"]["Env"] == ["A"] and shown["Config"]["StopSignal"] == "SIGINT"
    assert shown["Config"]["Entrypoint"] is None and shown["Config"]["Labels"] == {} and "Healthcheck" not in shown["Config"]
    assert shown["State"]["FinishedAt"] == words.NEVER and shown["State"]["Running"] is False
    assert shown["ExecIDs"] is None and shown["Path"] == "sh" and shown["Args"] == ["-c", "echo hi"]
    assert shown["Mounts"] == [
        {"Type": "bind", "Source": "/a", "Destination": "/b", "Mode": "ro", "RW": False, "Propagation": "rprivate"}
    ]
    assert shown["NetworkSettings"]["Ports"] == {} and json.dumps(shown)


def test_privileged_masks_nothing() -> None:
    shown = instance_shapes.host_config(instance(host={"Privileged": True}))
    assert shown["MaskedPaths"] is None and shown["ReadonlyPaths"] is None


@pytest.mark.parametrize("shape", ['{"label":["a=b","c"]}', '{"label":{"a=b":true,"c":true,"d":false}}'])
def test_filters_in_both_shapes(shape: str) -> None:
    assert Query(f"filters={shape}").filters(frozenset(("label",))) == {"label": ["a=b", "c"]}


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"label":"x"}', '{"label":{"x":1}}', '{"label":[1]}', '{"other":["x"]}', "[" * 9999]
)
def test_filters_that_are_none(text: str) -> None:
    with pytest.raises(InvalidRequest):
        Query(f"filters={text}").filters(frozenset(("label",)))


def test_flags_numbers_and_times() -> None:
    query = Query("a=1&b=0&c=&d=false&e=True&n=12&t=1700000000.25&neg=-1.5&z=0")
    assert [query.flag(name) for name in "abcdex"] == [True, False, False, False, True, False]
    assert query.flag("x", default=True) and query.number("n") == 12 and query.number("x") is None
    assert query.time_ns("t") == 1_700_000_000_250_000_000 and query.time_ns("x") is None and query.time_ns("z") == 0
    assert query.time_ns("neg") == -1_500_000_000
    for text in ("t=x", "t=1e5", "t=1.2.3", "t=²"):
        with pytest.raises(InvalidRequest):
            Query(text).time_ns("t")
    with pytest.raises(InvalidRequest):
        Query("n=1.5").number("n")
    with pytest.raises(InvalidRequest):
        Query("&".join(f"a{n}=1" for n in range(300)))
    assert one_flag("dangling", ["1"]) and not one_flag("dangling", ["false"])
    with pytest.raises(InvalidRequest):
        one_flag("dangling", ["perhaps"])


def test_log_lines_framed_and_raw() -> None:
    entry = LogEntry("stderr", START, b"hello\n")
    plain = logs.Renderer(instance(), times=False, details=False)
    assert plain(entry) == b"\x02\0\0\0\0\0\0\x06hello\n"
    host = {"LogConfig": {"Type": "json-file", "Config": {"labels": "tier,none", "env": "A"}}}
    decorated = logs.Renderer(
        instance(host=host, Tty=True, Env=["A=1", "B=2"], Labels={"tier": "x"}), times=True, details=True
    )
    assert decorated(entry) == b"2023-11-14T22:13:20.120000000Z A=1,tier=x hello\n"


def test_event_shape() -> None:
    shown = events.shape(Event(START, "container", "exec_create: ls", "ab", {"image": "debian", "name": "web"}))
    assert shown["status"] == "exec_create: ls" and shown["from"] == "debian" and shown["scope"] == "local"
    assert shown["time"] == 1_700_000_000 and shown["timeNano"] == START
    assert shown["Actor"] == {"ID": "ab", "Attributes": {"image": "debian", "name": "web"}}


def test_stats_of_running_and_stopped() -> None:
    usage = Usage(10, 6, 4, 1000, 300, 0, 2, 0)
    running = instance(state=State(Status.RUNNING, pid=1, started_ns=START))
    shown = stats.shape(running, stats.Sample(usage, 99, START), stats.Sample(usage._replace(cpu_ns=5), 90, START - 1))
    assert shown["cpu_stats"]["cpu_usage"] == {"total_usage": 10, "usage_in_kernelmode": 4, "usage_in_usermode": 6}
    assert shown["cpu_stats"]["system_cpu_usage"] == 99 and shown["precpu_stats"]["cpu_usage"]["total_usage"] == 5
    assert (
        shown["memory_stats"]["limit"] == stats.host_memory_bytes()
        and shown["memory_stats"]["stats"]["inactive_file"] == 300
    )
    assert shown["cpu_stats"]["online_cpus"] >= 1 and shown["pids_stats"] == {"current": 2} and "networks" not in shown
    counters = {f"{way}_{noun}": 7 for way in ("rx", "tx") for noun in ("bytes", "packets", "errors", "dropped", "length")}
    busy = usage._replace(block_read_bytes=4096, block_write_bytes=512)
    shown = stats.shape(running, stats.Sample(busy, 99, START, {"eth0": counters, "eth1": {}}), None)
    assert [(row["op"], row["value"]) for row in shown["blkio_stats"]["io_service_bytes_recursive"]] == [
        ("read", 4096),
        ("write", 512),
    ]
    assert (
        list(shown["networks"]) == ["eth0"]
        and len(shown["networks"]["eth0"]) == 8
        and shown["networks"]["eth0"]["rx_bytes"] == 7
    )
    idle = stats.shape(instance(), stats.Sample(None, 1, START), None)
    assert idle["read"] == words.NEVER and idle["memory_stats"] == {} and idle["cpu_stats"]["cpu_usage"]["total_usage"] == 0


def test_exec_shape_and_console_size() -> None:
    config = {"Cmd": ["ls", "-l"], "Tty": True, "AttachStdout": True, "User": "me"}
    shown = streams.exec_shape(Exec(ExecId("e" * 64), InstanceId("a" * 64), config, False, 3, 0))
    assert shown["ExitCode"] == 3 and shown["ProcessConfig"]["entrypoint"] == "ls" and shown["ProcessConfig"]["user"] == "me"
    assert shown["ProcessConfig"]["arguments"] == ["-l"] and shown["OpenStdout"] and not shown["OpenStdin"]
    for bad in ([1], "x", [1, "2"], [-1, 5], [1, 70_000]):
        with pytest.raises(InvalidRequest):
            streams._console_size(bad)


def test_top_tables() -> None:
    now = time.time_ns()
    process = {"pid": 7, "ppid": 1, "uid": 0, "user": "root", "tty": "", "stime_ns": now, "cpu_ns": 3_661_000_000_000,
               "command": "/bin/sleep 9"}  # fmt: skip
    titles, rows = top.table([process], "-ef")
    assert titles == ["UID", "PID", "PPID", "C", "STIME", "TTY", "TIME", "CMD"]
    assert rows[0][:3] == ["root", "7", "1"] and rows[0][5:] == ["?", "01:01:01", "/bin/sleep 9"]
    assert top.table([process], "-o pid,comm") == (["PID", "COMMAND"], [["7", "sleep"]])
    for bad in ("-o", "-o nope", "--forest", "-ef --forest"):
        with pytest.raises(InvalidRequest, match="not known"):
            top.table([process], bad)


def test_every_route_is_reachable_with_and_without_a_version() -> None:
    assert isinstance(ROUTER, Router)
    for method, path in (
        ("HEAD", "/_ping"), ("GET", "/containers/json"), ("POST", "/containers/create"), ("POST", "/containers/x/wait"),
        ("DELETE", "/containers/x"), ("POST", "/exec/x/start"), ("GET", "/images/a/b:c/json"), ("DELETE", "/images/a/json"),
        ("POST", "/images/load"), ("GET", "/events"), ("GET", "/networks/x"), ("GET", "/plugins/x/json"),
        ("GET", "/ambi/doctor"), ("POST", "/ambi/instances/x/mounts"), ("DELETE", "/ambi/instances/x/mounts"),
    ):  # fmt: skip
        for prefix in ("", "/v1.24", "/v1.44"):
            assert ROUTER.match(method, prefix + path).handler
    with pytest.raises(NotFound, match="page not found"):
        ROUTER.match("POST", "/grpc")
    assert ROUTER.match("POST", "/ambi/instances/a%20b/mounts").name == "a b"
    for path in ("/ambi/instances/mounts", "/ambi/instances//mounts", "/ambi/x/mounts"):
        with pytest.raises(NotFound, match="page not found"):
            ROUTER.match("POST", path)


@pytest.mark.parametrize(
    "name,pattern,fits",
    [("team/app:1", "team/app", True), ("team/app:1", "team/app:1", True), ("team/app:1", "app", False),
     ("team/app:1", "*", False), ("team/app:1", "*/*", True), ("host:5000/app:1", "host:5000/app", True),
     ("team/app@sha256:ab", "team/*", True), ("team/app:1", "team/[^a]*", False), ("app:1", "*:2", False)],
)  # fmt: skip
def test_patterns_of_references(name: str, pattern: str, fits: bool) -> None:
    """As filepath.Match has it, by which Docker goes: a `*` is not more than one part of a path."""
    assert images.matches(name, [pattern]) is fits
