"""A Debian release as an image, made on this host with mmdebstrap, streamed straight into an import.

Mirrors and keys are those of the host's own apt, so that a proxy, a local mirror or an archive key set up there serves here
too. Times inside are cut to the date of the release file, so that two runs on one state of the archive give one layer.
"""

from __future__ import annotations

import calendar
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

from ambi.core.errors import Internal, InvalidRequest, NotFound, Unavailable, Unsupported
from ambi.core.events import Progress, ProgressSink
from images.model import Image

if TYPE_CHECKING:
    from images.store import Store

_WORDS = frozenset("abcdefghijklmnopqrstuvwxyz0123456789-+.")
_FIELDS = "$(ORIGIN)|$(CODENAME)|$(REPO_URI)|$(RELEASE)|$(COMPONENT)|$(SIGNED_BY)|$(SUITE)"


def bootstrap(store: Store, suite: str, name: str, packages: Sequence[str], progress: ProgressSink) -> Image:
    """`suite`: `bookworm` or `debian:bookworm`; `name`: of the image, `debian:SUITE` when empty.

    Raises Unsupported without mmdebstrap, NotFound when apt here knows no such suite, Unavailable when mmdebstrap fails.
    """
    distribution, colon, release = suite.rpartition(":")
    if colon and distribution != "debian":
        raise Unsupported(f"cannot make {suite}: only Debian is made here", hint="for example debian:bookworm")
    for word in (release, *packages):
        if not word or not _WORDS.issuperset(word) or word[0] in "-+.":
            raise InvalidRequest(f"'{word}' is neither a suite nor a package")
    if shutil.which("mmdebstrap") is None:
        raise Unsupported("mmdebstrap is missing", hint="apt-get install mmdebstrap")
    lines, epoch = apt_sources(release)
    command = ["mmdebstrap", "--variant=minbase", "--format=tar", '--aptopt=Acquire::Languages "none"']
    if packages:
        command.append("--include=" + ",".join(packages))
    environment = {**os.environ, "LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"}
    if epoch:
        environment["SOURCE_DATE_EPOCH"] = str(epoch)
    process = subprocess.Popen(
        [*command, release, "-", *lines],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment,
    )  # fmt: skip
    return _import(store, process, release, name or f"debian:{release}", epoch, progress)


def _import(
    store: Store, process: subprocess.Popen[bytes], release: str, name: str, epoch: int, progress: ProgressSink
) -> Image:
    assert process.stdout is not None and process.stderr is not None
    said: list[str] = []
    listening = threading.Thread(target=_listen, args=(process.stderr, progress, said), name="mmdebstrap")
    listening.start()
    source = _Whole(process, release, listening, said)
    try:
        return store.import_tar(
            source,  # type: ignore[arg-type]
            name,
            changes=['CMD ["bash"]'],
            message=f"Debian {release}, made with mmdebstrap",
            progress=progress,
            created_ns=epoch * 1_000_000_000 if epoch else None,
        )
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait()
        listening.join()
        process.stdout.close()
        process.stderr.close()


class _Whole:
    """mmdebstrap's output, whose end counts only when it has succeeded: else `read` raises, and nothing is imported."""

    def __init__(self, process: subprocess.Popen[bytes], release: str, listening: threading.Thread, said: list[str]) -> None:
        self._process = process
        self._release = release
        self._listening = listening
        self._said = said

    def read(self, size: int = -1) -> bytes:
        assert self._process.stdout is not None
        data = self._process.stdout.read(size)
        if data:
            return data
        status = self._process.wait()
        if status:
            self._listening.join()
            why = next((x for x in reversed(self._said) if x.startswith("E:")), self._said[-1] if self._said else "")
            raise Unavailable(
                f"cannot make debian:{self._release}: mmdebstrap ended with status {status}: {why}",
                hint=f"try it by hand: mmdebstrap --variant=minbase {self._release} /dev/null",
            )
        return data


def _listen(stream: IO[bytes], progress: ProgressSink, said: list[str]) -> None:
    for line in stream:
        text = line.decode(errors="replace").strip()
        if text.startswith(("I: ", "E: ", "W: ")):
            said.append(text)
            del said[:-50]
            progress(Progress("", text[3:], 0, 0))


def apt_sources(release: str) -> tuple[list[str], int]:
    """sources.list lines for a Debian release from the host's apt, and the newest date of its release files (0: unknown)."""
    if shutil.which("apt-get") is None:
        raise Unsupported("apt is missing: Debian images are made on Debian hosts")
    asked = subprocess.run(
        ["apt-get", "indextargets", "--format", f"{_FIELDS}|$(METAKEY)|$(FILENAME)", "Identifier: Packages"],
        capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    if asked.returncode:
        raise Internal(f"apt-get indextargets failed: {asked.stderr.strip()}")
    lines, epoch = set[str](), 0
    for row in asked.stdout.splitlines():
        origin, code, uri, wanted, component, key, *_, file = row.split("|")
        if origin != "Debian" or component != "main" or not _belongs(code, wanted, release):
            continue
        signed = f"[signed-by={key}] " if key.startswith("/") else ""
        lines.add(f"deb {signed}{uri} {wanted} main")
        epoch = max(epoch, _release_date(file))
    if not lines:
        raise NotFound(
            f"apt on this host knows no Debian {release}", hint="add it to /etc/apt/sources.list and run apt-get update"
        )
    return sorted(lines), epoch


def _belongs(code: str, wanted: str, release: str) -> bool:
    """The release itself, its updates and its security archive; no backports."""
    suites = (release, f"{release}-updates", f"{release}-security", f"{release}/updates")
    return code in suites or wanted in suites


def _release_date(packages_file: str) -> int:
    """The `Date:` of the release file that belongs to an index in apt's lists."""
    base = Path(packages_file)
    stem = base.name.partition("_dists_")
    suite = stem[2].partition("_main_")[0]
    for name in ("InRelease", "Release"):
        try:
            text = (base.parent / f"{stem[0]}_dists_{suite}_{name}").read_text(errors="replace")
        except OSError:
            continue
        for line in text.splitlines():
            if line.startswith("Date: "):
                try:
                    return calendar.timegm(time.strptime(line[6:].strip(), "%a, %d %b %Y %H:%M:%S %Z"))
                except ValueError:
                    return 0
    return 0
