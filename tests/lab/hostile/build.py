#!/usr/bin/env python3
"""Build hostile.c for the guest's kernel, unless that is done: `python -m tests.lab.hostile.build GUEST_DIR TARGET`.

The headers are Debian's packages for that kernel, fetched and unpacked in /tmp, not installed. Needs apt, gcc and make.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from hyper import boot_files

SOURCE = Path(__file__).with_name("hostile.c")
FAMILY = "-cloud-amd64"


def build(guest_dir: Path, target: Path) -> None:
    """Raises CalledProcessError, whose output says why."""
    release = boot_files.find(guest_dir).release
    stamp = target.with_suffix(".of")
    mark = f"{release} {SOURCE.stat().st_mtime_ns}"
    if target.exists() and stamp.exists() and stamp.read_text() == mark:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="hostile-", dir="/tmp") as name:
        work = Path(name)
        work.chmod(0o755)
        headers = _headers(work, release)
        shutil.copy(SOURCE, work / "hostile.c")
        (work / "Kbuild").write_text("obj-m := hostile.o\n")
        _run(work, "make", "-s", "-C", str(headers), f"M={work}", "KBUILD_MODPOST_WARN=1", "modules")
        shutil.copy(work / "hostile.ko", target)
    stamp.write_text(mark)


def _headers(work: Path, release: str) -> Path:
    """The tree of headers of `release`, whose makefiles name each other by absolute paths."""
    packages = [f"linux-headers-{release}", f"linux-headers-{release.removesuffix(FAMILY)}-common"]
    packages.append(f"linux-kbuild-{'.'.join(release.split('.')[:2])}")
    _run(work, "apt-get", "-q", "download", *packages)
    for archive in work.glob("*.deb"):
        _run(work, "dpkg-deb", "-x", str(archive), str(work))
    headers = work / "usr" / "src" / f"linux-headers-{release}"
    for makefile in headers.rglob("Makefile"):
        makefile.write_text(makefile.read_text().replace("/usr/src/", f"{work}/usr/src/"))
    return headers


def _run(work: Path, *argv: str) -> None:
    done = subprocess.run(argv, cwd=work, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(argv[:3])}: {(done.stdout + done.stderr)[-2000:]}\nhint: apt-get install gcc make")


if __name__ == "__main__":
    build(Path(sys.argv[1]), Path(sys.argv[2]))
