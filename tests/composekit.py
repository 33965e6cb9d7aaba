"""Docker Compose, both generations, and the project of tests/cli/compose."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = ROOT / "tests" / "cli" / "compose" / "compose.yaml"
VERSION_2 = ROOT / "build" / "peers" / "docker-compose"  # by scripts/package/compose2.sh
IMAGE = "kit"
# The root that `store` and `web` share: what the volume of the first is filled with, and a page that asks the first.
MAKE_ROOT = r"""mkdir -p /srv /www/cgi-bin && echo from the image > /srv/index.html && cat > /www/cgi-bin/ask <<'END'
#!/bin/sh
printf 'Content-Type: text/plain\r\n\r\n%s, ' "$GREETING"
wget -q -O - http://store:8000/
END
chmod 755 /www/cgi-bin/ask"""


def version_1() -> list[str]:
    """Debian's docker-compose, 1.29."""
    path = shutil.which("docker-compose")
    assert path, "docker-compose is missing (Debian package docker-compose)"
    return [path]


def version_2() -> list[str]:
    return [str(VERSION_2)]


def make_image(engine: Path, base: str) -> None:
    """Make `kit` of a busybox image at the engine whose socket is `engine`."""
    environment = {**os.environ, "DOCKER_HOST": f"unix://{engine}"}
    for args in (["run", "--name", "making", base, "sh", "-c", MAKE_ROOT], ["commit", "making", IMAGE], ["rm", "making"]):
        subprocess.run(["docker", *args], env=environment, check=True, capture_output=True, stdin=subprocess.DEVNULL)


class Compose:
    """One project at one engine: the command, unmodified, told of nothing but the engine's socket."""

    def __init__(self, argv: list[str], engine: Path, project: str, *, port: int, files: tuple[Path, ...] = ()) -> None:
        """port: of the host, for `web`; 0 for any. files: more compose files, over the project's own."""
        paths = [word for path in (PROJECT, *files) for word in ("-f", str(path))]
        self._argv = [*argv, *paths, "-p", project]
        self.environment = {**os.environ, "DOCKER_HOST": f"unix://{engine}", "WEB_PORT": str(port), "NO_COLOR": "1"}

    def run(self, *args: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*self._argv, *args], check=False, env={**self.environment, **environment}, text=True, timeout=120,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def ok(self, *args: str, **environment: str) -> str:
        """What it printed. Raises AssertionError with all of it when it failed."""
        done = self.run(*args, **environment)
        assert done.returncode == 0, (args, done.stdout)
        return done.stdout
