"""What the docker CLI prints of an engine's answers, ours prints, byte for byte; what differs is listed with its reason."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli import golden
from tests.cli.recorder import Recorder, recording
from tests.cli.test_golden import ANSWERS, IMAGES, INSTANCES, NOW, STATE, WEB
from tests.cli.test_run_body import EXACT_SINCE, docker_version

EVENT = {
    "Type": "container", "Action": "die", "Actor": {"ID": WEB, "Attributes": {"exitCode": "3", "name": "<web>"}},
    "scope": "local", "time": NOW, "timeNano": NOW * 10**9 + 123,
}  # fmt: skip
# One label and one repository each: docker prints several in the order of a map, a different one each time.
MORE = {
    ("GET", "/containers/json"): (200, [{**INSTANCES[0], "Labels": {"app": "shop"}}, INSTANCES[1]]),
    ("GET", "/images/json"): (200, [{**IMAGES[0], "RepoTags": ["debian:bookworm", "debian:12"]}, IMAGES[1]]),
    ("GET", "/events"): (200, EVENT),
    ("GET", "/images/debian/json"): (200, {"Id": "sha256:" + "d0" * 32, "RepoTags": ["debian:bookworm"], "Size": 5}),
    ("POST", "/containers/web/wait"): (200, {"StatusCode": 7}),
    ("POST", "/containers/web/kill"): (204, None),
    ("DELETE", "/images/debian"): (200, [{"Untagged": "debian:bookworm"}, {"Deleted": "sha256:" + "d0" * 32}]),
    ("POST", "/images/prune"): (200, {"ImagesDeleted": [{"Deleted": "sha256:" + "ba" * 32}], "SpaceReclaimed": 1234567}),
}
LINES = [
    "ps -q",
    "ps -a -q --no-trunc",
    "ps --format {{.ID}}|{{.Image}}|{{.Command}}|{{.RunningFor}}|{{.Status}}|{{.Names}}|{{.Labels}}|{{.Mounts}}",
    "ps --no-trunc --format table\\t{{.Names}}\\t{{.Command}}\\t{{.CreatedAt}}\\t{{.State}}",
    'ps --format {{.Label\t"app"}}/{{.Label\t"none"}}',
    "images",
    "images -q",
    "images --no-trunc --digests",
    "images --format {{.Repository}}:{{.Tag}}={{.ID}},{{.Size}},{{.CreatedSince}},{{.CreatedAt}},{{.Digest}}",
    "history debian",
    "history --no-trunc --human=false debian",
    "history -q debian",
    "history --format {{.CreatedBy}}|{{.Size}}|{{.Comment}} debian",
    "top web",
    "inspect web",
    "inspect -f {{.State.Status}}|{{.Name}}|{{json\t.Config.Env}}|{{len\t.Mounts}} web",
    'inspect -f {{range\t.Mounts}}{{.Source}};{{end}}{{index\t.Config.Labels\t"app"}} web',
    'inspect -f {{join\t.Config.Env\t","}}|{{upper\t.Name}}|{{if\t.State.Running}}on{{else}}off{{end}} web',
    "events --since 1h --until 1s",
    "events --since 1h --until 1s --format {{.Type}}:{{.Action}}:{{.Actor.Attributes.exitCode}}",
    "events --since 1h --until 1s --format json",
    "stop web",
    "kill -s TERM web",
    "wait web",
    "rmi debian",
    "image prune --force",
    "rename web web2",
    "tag debian other:1",
]
NEWER = ("events --since 1h --until 1s --format json",)  # an old docker CLI takes `json` for a template
DIFFERENCES = {
    "inspect web": "docker decodes into its own types first, and prints fields that were not in the answer",
}


def lines() -> list[str]:
    """Those that the docker CLI of this machine knows."""
    old = shutil.which("docker") is not None and docker_version() < EXACT_SINCE
    return [line for line in LINES if line not in DIFFERENCES and not (old and line in NEWER)]


@pytest.fixture(scope="module")
def recorder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorder]:
    with recording(tmp_path_factory.mktemp("same") / "s", {**ANSWERS, **MORE}) as it:
        yield it


def _docker(recorder: Recorder, words: list[str], home: Path) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "TZ": "UTC", "DOCKER_HOST": f"unix://{recorder.path}"}
    return subprocess.run(["docker", *words], env=environment, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.needs("docker")
@pytest.mark.parametrize("line", lines())
def test_same_output(line: str, recorder: Recorder, tmp_path: Path) -> None:
    words = [word.replace("\t", " ") for word in line.split(" ")]
    before = len(recorder.requests)
    docker = _docker(recorder, words, tmp_path)
    theirs = [r for r in recorder.requests[before:] if r.path != "/_ping"]
    ours = golden.run(*words, socket=recorder.path)
    assert (ours.stdout, ours.returncode) == (docker.stdout, docker.returncode), docker.stderr + ours.stderr
    last = recorder.requests[-1]
    assert (last.method, last.path) == (theirs[-1].method, theirs[-1].path)


def test_inspect_prints_the_answer_as_it_came(recorder: Recorder) -> None:
    import json

    assert json.loads(golden.run("inspect", "web", socket=recorder.path).stdout) == [STATE]
