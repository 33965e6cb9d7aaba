"""Help, tables and errors, as people see them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ambi.cli.main import COMMANDS
from tests.cli import golden
from tests.cli.recorder import Recorder, recording

NOW = int(time.time())
WEB, DB = "3f2a" * 16, "b71c" * 16
DEBIAN, BARE = "sha256:" + "d0" * 32, "sha256:" + "ba" * 32

INSTANCES: list[dict[str, Any]] = [
    {
        "Id": WEB,
        "Names": ["/web"],
        "Image": "debian:bookworm",
        "ImageID": DEBIAN,
        "Command": "sh -c 'echo \"hello\" && sleep 1000'",
        "Created": NOW - 7300,
        "Ports": [],
        "Labels": {"tier": "front", "app": "shop"},
        "State": "running",
        "Status": "Up 2 hours",
        "Isolation": "container",
        "HostConfig": {"NetworkMode": "none"},
        "NetworkSettings": {"Networks": {"none": {}}},
        "Mounts": [],
    },
    {
        "Id": DB,
        "Names": ["/a-rather-long-name"],
        "Image": BARE,
        "ImageID": BARE,
        "Command": "/init",
        "Created": NOW - 86400 * 3,
        "Ports": [],
        "Labels": {},
        "State": "exited",
        "Status": "Exited (137) 5 minutes ago",
        "Isolation": "vm",
        "HostConfig": {"NetworkMode": "none"},
        "NetworkSettings": {"Networks": {"none": {}}},
        "Mounts": [{"Type": "bind", "Source": "/srv", "Destination": "/data"}],
    },
]
IMAGES: list[dict[str, Any]] = [
    {
        "Id": DEBIAN,
        "RepoTags": ["debian:bookworm", "registry:5000/base/debian:12"],
        "Created": NOW - 86400 * 40,
        "RepoDigests": ["debian@sha256:" + "ee" * 32],
        "Size": 124_512_345,
        "Labels": None,
    },
    {"Id": BARE, "RepoTags": [], "RepoDigests": [], "Created": NOW - 86400 * 5, "Size": 999, "Labels": None},
]
HISTORY = [
    {
        "Id": DEBIAN,
        "Created": NOW - 3600,
        "CreatedBy": '/bin/sh -c #(nop)  CMD ["bash"]',
        "Size": 0,
        "Comment": "",
        "Tags": ["debian"],
    },
    {
        "Id": "<missing>",
        "Created": NOW - 7300,
        "CreatedBy": "/bin/sh -c apt-get update && apt-get install -y\tcurl",
        "Size": 5_300_000,
        "Comment": "imported",
        "Tags": None,
    },
]
DOCTOR = [
    {
        "name": "KVM",
        "status": "warning",
        "detail": "/dev/kvm does not run a guest; VMs are emulated",
        "hint": "enable nested virtualisation",
    },
    {"name": "cgroups", "status": "ok", "detail": "version 2", "hint": ""},
    {
        "name": "QEMU",
        "status": "problem",
        "detail": "qemu-system-x86_64 is missing",
        "hint": "apt-get install qemu-system-x86",
    },
]
STATE = {
    "Id": WEB,
    "Name": "/web",
    "Created": "2026-11-24T10:00:00Z",
    "State": {"Status": "running", "Running": True, "ExitCode": 0},
    "Config": {"Tty": False, "Env": ["A=1", "B=<2>"], "Labels": {"app": "shop", "tier": "front"}, "OpenStdin": False},
    "Mounts": [{"Source": "/srv", "Destination": "/data"}, {"Source": "/etc", "Destination": "/e"}],
    "ExecIDs": None,
}
ANSWERS = {
    ("GET", "/containers/json"): (200, INSTANCES),
    ("GET", "/images/json"): (200, IMAGES),
    ("GET", "/images/debian/history"): (200, HISTORY),
    ("GET", "/ambi/doctor"): (200, DOCTOR),
    ("GET", "/containers/web/json"): (200, STATE),
    ("GET", "/containers/wev/json"): (404, {"message": "No such container: wev"}),
    ("GET", "/images/wev/json"): (404, {"message": "No such image: wev"}),
    ("GET", "/containers/zzzzzz/json"): (404, {"message": "No such container: zzzzzz"}),
    ("GET", "/images/zzzzzz/json"): (404, {"message": "No such image: zzzzzz"}),
    **{
        ("GET", f"/{noun}/{name}"): (404, {"message": f"{noun}: no {name}"})
        for noun in ("networks", "volumes")
        for name in ("wev", "zzzzzz")
    },
    ("GET", "/networks"): (200, []),
    ("GET", "/volumes"): (200, {"Volumes": None, "Warnings": None}),
    ("POST", "/containers/wev/stop"): (404, {"message": "No such container: wev"}),
    ("POST", "/containers/web/stop"): (204, None),
    ("POST", "/containers/stopped/stop"): (304, None),
    ("DELETE", "/containers/web"): (409, {"message": "cannot remove 'web': it is running"}),
    ("DELETE", "/containers/gone"): (404, {"message": "No such container: gone"}),
    ("POST", "/containers/create"): (404, {"message": "No such image: debain:bookworm"}),
    ("POST", "/images/create"): (404, {"message": "pull access denied for debain"}),
    ("GET", "/containers/web/top"): (
        200,
        {"Titles": ["UID", "PID", "CMD"], "Processes": [["root", "1", "sh"], ["daemon", "23", "sleep 1"]]},
    ),
}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorder]:
    with recording(tmp_path_factory.mktemp("golden") / "s", ANSWERS) as recorder:
        yield recorder


def test_help() -> None:
    golden.check("help", golden.transcript("--help"))


@pytest.mark.parametrize(
    "name", [*COMMANDS, "image bootstrap", "image import", "image load", "engine status", "engine stop"]
)
def test_help_of(name: str) -> None:
    golden.check(f"help-{name.replace(' ', '-')}", golden.transcript(*name.split(), "--help"))


TABLES = {
    "ps": [["ps"], ["ps", "-a", "--no-trunc"], ["ps", "-q"], ["ps", "--filter", "status=running", "--last", "2"]],
    "ps-format": [
        ["ps", "--format", "{{.ID}} {{.Names}}: {{.Isolation}}"],
        ["ps", "--format", "table {{.Names}}\\t{{.Status}}"],
        ["ps", "--format", 'table {{.ID}}\\t{{.Label "app"}}'],
        ["ps", "--format", "json"],
        ["ps", "--format", '{{.Names | upper | printf "%-20s|"}}{{.Label "app"}}'],
        ["ps", "--format", '{{if eq .State "running"}}+{{else}}-{{end}} {{json .Labels}} {{.Labels}}'],
        ["ps", "--format", '{{.Names "x"}}'],
    ],
    "images": [
        ["images"],
        ["images", "--digests"],
        ["images", "-q", "--no-trunc"],
        ["image", "ls", "debian"],
        ["images", "--format", "json"],
    ],
    "history": [["history", "debian"], ["history", "--human=false", "--no-trunc", "debian"], ["history", "-q", "debian"]],
    "doctor": [["doctor"], ["doctor", "--format", "json"]],
    "top": [["top", "web"]],
    "inspect": [
        ["inspect", "web"],
        ["inspect", "-f", "{{.State.Status}} {{.id}} {{len .Mounts}} {{(index .Mounts 1).Source}} {{.ExecIDs}}", "web"],
        ["inspect", "-f", "{{range .Mounts}}{{.Source}}:{{.Destination}} {{else}}none{{end}}", "web"],
        ["inspect", "-f", '{{range $i, $e := .Config.Env}}{{$i}}={{$e}}{{println}}{{end}}{{join .Config.Env ","}}', "web"],
        ["inspect", "-f", "{{json .Config}} {{.Config.Labels}} {{with .State}}{{.ExitCode}}{{end}}", "web"],
        ["inspect", "--format", "json", "web"],
    ],
}
TIMES = {r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ(?!\")": "TIME", r"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d \+0000 UTC": "TIME"}


@pytest.mark.parametrize("name", TABLES)
def test_table(name: str, engine: Recorder) -> None:
    golden.check(name, "\n".join(golden.transcript(*args, socket=engine.path) for args in TABLES[name]), hide=TIMES)


USAGE_ERRORS = [
    ["rnu"],
    ["xyzzy"],
    ["image", "lss"],
    ["ps", "--formt", "x"],
    ["run"],
    ["run", "--memory", "lots", "debian"],
    ["run", "--cpus", "many", "debian"],
    ["run", "--isolation", "jail", "debian"],
    ["run", "--isolation", "vm", "--runtime", "container", "debian"],
    ["run", "-d", "-a", "stdout", "debian"],
    ["run", "-it", "debian"],
    ["run", "--rm=perhaps", "debian"],
    ["run", "-e", "=x", "debian"],
    ["run", "--env-file", "/proc/none/env", "debian"],
    ["run", "--mount", "type=image,dst=/x", "debian"],
    ["run", "--mount", "type=bind,dst=/x", "debian"],
    ["run", "--ulimit", "nofile", "debian"],
    ["run", "--ulimit", "nofile=9:8", "debian"],
    ["run", "--device", "fuse", "debian"],
    ["run", "--sysctl", "kernel.panic=1", "debian"],
    ["run", "--dns", "nowhere", "debian"],
    ["run", "--add-host", "x", "debian"],
    ["run", "--security-opt", "seccomp=/proc/none/p", "debian"],
    ["run", "--log-driver", "none", "--log-opt", "max-size=1", "debian"],
    ["run", "--detach-keys", "ctrl-pp", "debian"],
    ["run", "--publish", "80:80", "debian"],
    ["run", "--cidfile", "/etc/hostname", "debian"],
    ["exec", "web"],
    ["logs", "--tail", "few", "web"],
    ["logs", "--since", "yesterday", "web"],
    ["ps", "--filter", "running"],
    ["ps", "--format", "{{.Nmaes}}"],
    ["ps", "--format", "{{.Names"],
    ["ps", "--format", "{{uper .Names}}"],
    ["ps", "--format", "{{range .Names}}"],
    ["start", "-a", "x", "y"],
    ["load", "-i", "/proc/none/x.tar"],
    ["image", "bootstrap", "fedora:40"],
    ["engine", "status"],
    ["engine", "stop"],
    ["version"],
]


def test_usage_errors(short_tmp: Path) -> None:
    """Each is one line that names the object, one with a fix, and 125; none of them needs an engine but for --format."""
    with recording(short_tmp / "s", ANSWERS) as recorder:
        texts = []
        for args in USAGE_ERRORS:
            alone = args[0] in ("engine", "version")
            texts.append(golden.transcript(*args, **({} if alone else {"socket": recorder.path})))
    golden.check("errors", "\n".join(texts), hide={r"Python: +[\d.]+": "Python: X"})


ENGINE_ERRORS = [
    ["run", "debain:bookworm"],
    ["stop", "wev", "web", "stopped"],
    ["inspect", "wev", "web", "zzzzzz", "--format", "{{.Name}}"],
    ["inspect", "--type", "image", "wev"],
    ["inspect", "--format", "{{.Sate}}", "web"],
    ["rm", "web"],
    ["rm", "gone"],
    ["rm", "-f", "gone"],
]


def test_engine_errors(engine: Recorder) -> None:
    golden.check("engine-errors", "\n".join(golden.transcript(*args, socket=engine.path) for args in ENGINE_ERRORS))


def test_colour_is_for_terminals() -> None:
    assert "\033" not in golden.run("rnu").stderr


def test_variables_stand_for_options(engine: Recorder) -> None:
    done = golden.run("ps", socket=engine.path, AMBI_PS_FORMAT="{{.Names}}")
    assert done.stdout == "web\na-rather-long-name\n"
    golden.run("ps", socket=engine.path, AMBI_PS_ALL="1")
    assert engine.asked("GET", "/containers/json")[-1].target.endswith("?all=1")
