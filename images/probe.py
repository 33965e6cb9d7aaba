"""Which form of layers containers use on this host, found by doing it: EROFS from a file, EROFS from a loop device, `dir`.

The child mounts in a private mount namespace, in the store itself, because the answer depends on the file system there (a
file on tmpfs or overlayfs cannot be mounted). `python -I -m images.probe FILE DIRECTORY` is that child.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import uuid
from pathlib import Path
from typing import Literal

from ambi.core.errors import Internal
from ambi.linux import mount, process

_CACHE = "layer-form.json"


def layer_form(root: Path) -> tuple[Literal["erofs", "dir"], str]:
    """`("erofs" | "dir", why)` for the store at `root`; asked once a boot and device, and kept in `layer-form.json`."""
    boot = f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {root.stat().st_dev}"
    cache = root / _CACHE
    try:
        known = json.loads(cache.read_bytes())
        if known["boot"] == boot and known["form"] in ("erofs", "dir"):
            return known["form"], known["why"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    form, why = _ask(root)
    new = cache.with_name(f"{_CACHE}.{uuid.uuid4().hex}")
    new.write_text(json.dumps({"boot": boot, "form": form, "why": why}))
    os.replace(new, cache)
    return form, why


def _ask(root: Path) -> tuple[Literal["erofs", "dir"], str]:
    import subprocess

    from images.layers.erofs import ErofsWriter
    from images.layers.tree import Node

    place = root / "ingest" / f"probe-{uuid.uuid4().hex}"
    place.mkdir()
    try:
        image = place / "image"
        with open(image, "wb") as file:
            root_node = Node("d", 0o755, 0)
            root_node.entries[b"seen"] = Node("f", 0o644, 1)
            ErofsWriter(file.fileno()).finish(root_node, bytes(16))
        asked = subprocess.run(
            [sys.executable, "-I", "-m", "images.probe", image, place],
            capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, timeout=60,
        )  # fmt: skip
        if asked.returncode:
            raise Internal(f"cannot find out how layers are mounted here: {asked.stderr.strip()[-300:]}")
        form, _, why = asked.stdout.strip().partition(" ")
        return ("erofs", why) if form == "erofs" else ("dir", why)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def main(image: Path, place: Path) -> str:
    """In the child: the form and why, in one line."""
    try:
        process.unshare(process.CLONE_NEWNS)
        mount.mount(None, Path("/"), None, mount.MS_REC | mount.MS_PRIVATE)
    except OSError as error:
        return f"dir a mount namespace cannot be made here: {error.strerror}"
    lower = place / "lower"
    lower.mkdir()
    try:
        mount.mount(image, lower, "erofs", mount.MS_RDONLY)
        return _overlay(place, lower, "EROFS files are mounted directly")
    except OSError as error:
        why = error.strerror
    arguments = ["mount", "-t", "erofs", "-o", "ro,loop", str(image), str(lower)]
    try:
        failed = os.waitpid(os.posix_spawnp("mount", arguments, os.environ), 0)[1]
    except OSError as error:
        failed = error.errno or 1
    if failed:
        return f"dir EROFS files cannot be mounted in {place.parents[1]}, directly ({why}) or by a loop device"
    return _overlay(place, lower, f"EROFS files are mounted by loop devices (directly: {why})")


def _overlay(place: Path, lower: Path, how: str) -> str:
    for name in ("upper", "work", "merged"):
        (place / name).mkdir()
    options = f"lowerdir={lower},upperdir={place / 'upper'},workdir={place / 'work'}"
    try:
        mount.mount(Path("overlay"), place / "merged", "overlay", 0, options)
        (place / "merged" / "seen").unlink()
    except OSError as error:
        return f"dir overlay does not work over EROFS here: {error.strerror}"
    return f"erofs {how}"


if __name__ == "__main__":
    print(main(Path(sys.argv[1]), Path(sys.argv[2])))
