"""Small root file systems for tests, made of Debian's static busybox."""

from __future__ import annotations

import io
import shutil
import subprocess
import tarfile
from pathlib import Path

PASSWD = "root:x:0:0:root:/root:/bin/sh\ndaemon:x:1:1::/:/bin/false\nalice:x:1000:1000:Alice:/home/alice:/bin/sh\n"
GROUP = "root:x:0:\ndaemon:x:1:\nalice:x:1000:\nstaff:x:50:alice\nvideo:x:44:alice\n"
DIRECTORIES = ("bin", "etc", "root", "tmp", "home", "home/alice", "proc", "sys", "dev", "run", "var", "usr", "usr/bin")


def busybox_path() -> str:
    """Debian's static busybox; RuntimeError names the package when it is missing."""
    path = shutil.which("busybox", path="/bin:/usr/bin")
    if not path:
        raise RuntimeError("busybox is missing (Debian package busybox-static)")
    return path


def busybox_tar(target: Path) -> Path:
    """Write a tar of a root with busybox, its applets as links in /bin, passwd and group; returns `target`."""
    busybox = busybox_path()
    applets = subprocess.run([busybox, "--list"], capture_output=True, text=True, check=True).stdout.split()
    with tarfile.open(target, "w") as tar:
        for name in DIRECTORIES:
            entry = tarfile.TarInfo(name)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o1777 if name == "tmp" else 0o755
            if name == "home/alice":
                entry.uid = entry.gid = 1000
            tar.addfile(entry)
        entry = tarfile.TarInfo("bin/busybox")
        data = Path(busybox).read_bytes()
        entry.size, entry.mode = len(data), 0o755
        tar.addfile(entry, io.BytesIO(data))
        for applet in applets:
            if applet != "busybox":
                entry = tarfile.TarInfo(f"bin/{applet}")
                entry.type, entry.linkname = tarfile.SYMTYPE, "busybox"
                tar.addfile(entry)
        for name, text in (("etc/passwd", PASSWD), ("etc/group", GROUP)):
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(text), 0o644
            tar.addfile(entry, io.BytesIO(text.encode()))
    return target
