"""A Debian or Ubuntu release as an image, made on this host with mmdebstrap, streamed straight into an import.

apt checks the archive's signatures by the keyrings that `distributions` names. Times inside are cut to the date of the
release files, so that two runs on one state of the archive give one layer.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from collections.abc import Sequence
from typing import IO, TYPE_CHECKING

from ambi.core.errors import Unavailable, Unsupported
from ambi.core.events import Progress, ProgressSink
from images import distributions
from images.model import Image

if TYPE_CHECKING:
    from images.store import Store


def bootstrap(store: Store, suite: str, name: str, packages: Sequence[str], progress: ProgressSink) -> Image:
    """`suite`: see `distributions.parse`; `name`: of the image, `debian:SUITE` or `ubuntu:SUITE` when empty.

    Raises Unsupported without mmdebstrap or keyring, NotFound for an unknown suite, Unavailable when mmdebstrap fails.
    """
    distribution, release = distributions.parse(suite)
    for word in packages:
        distributions.check_word(word)
    if shutil.which("mmdebstrap") is None:
        raise Unsupported("mmdebstrap is missing", hint="apt-get install mmdebstrap")
    lines, epoch = distributions.sources(distribution, release)
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
    return _import(store, process, f"{distribution.name}:{release}", name, epoch, progress)


def _import(
    store: Store, process: subprocess.Popen[bytes], made: str, name: str, epoch: int, progress: ProgressSink
) -> Image:
    """made: what it is, and its name when it gets no other."""
    assert process.stdout is not None and process.stderr is not None
    said: list[str] = []
    listening = threading.Thread(target=_listen, args=(process.stderr, progress, said), name="mmdebstrap")
    listening.start()
    source = _Whole(process, made, listening, said)
    try:
        return store.import_tar(
            source,  # type: ignore[arg-type]
            name or made,
            changes=['CMD ["bash"]'],
            message=f"{made}, made with mmdebstrap",
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

    def __init__(self, process: subprocess.Popen[bytes], made: str, listening: threading.Thread, said: list[str]) -> None:
        self._process = process
        self._made = made
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
                f"cannot make {self._made}: mmdebstrap ended with status {status}: {why}",
                hint=f"try it by hand: mmdebstrap --variant=minbase {self._made.partition(':')[2]} /dev/null",
            )
        return data


def _listen(stream: IO[bytes], progress: ProgressSink, said: list[str]) -> None:
    for line in stream:
        text = line.decode(errors="replace").strip()
        if text.startswith(("I: ", "E: ", "W: ")):
            said.append(text)
            del said[:-50]
            progress(Progress("", text[3:], 0, 0))
