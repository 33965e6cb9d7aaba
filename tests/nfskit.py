"""The kernel's own NFS server (nfsd.ko), for one directory, version 4 alone, without rpcbind, mountd and their daemons.

What mountd answers when the kernel asks, it is told beforehand: who the client is, what it gets, and where that is. The
formats are in support/export/cache.c of nfs-utils.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

# linux/nfsd/export.h: NFSEXP_INSECURE_PORT, NFSEXP_NOSUBTREECHECK, NFSEXP_FSID
_FLAGS = 0x2 | 0x400 | 0x2000
_VALID_S = 100_000
_NOBODY = 65534


class NfsServer:
    """Serves `export` as `:/` on port 2049 of every address, in the network namespace that `entering` leads into."""

    def __init__(self, entering: list[str], base: Path) -> None:
        self.export, self._control, self._entering = base / "export", base / "nfsd", entering

    def __enter__(self) -> NfsServer:
        self.export.mkdir()
        self._control.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", self.export], check=True)
        subprocess.run([*self._entering, sys.executable, __file__, self._control, self.export], check=True)
        return self

    def stop(self) -> None:
        """It serves nobody any more, for its threads end with this mount; what is exported stays."""
        if os.path.ismount(self._control):
            subprocess.run(["umount", self._control], check=True)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()
        subprocess.run(["umount", "--lazy", self.export], check=True)  # the kernel lets go of its files later


def _start(control: str, export: str) -> None:
    """In the namespace."""
    end = int(time.time()) + _VALID_S
    subprocess.run(["mount", "-t", "nfsd", "nfsd", control], check=True)
    _tell("auth.unix.ip", f"nfsd 127.0.0.1 {end} all")
    _tell("nfsd.export", f"all {export} {end} {_FLAGS} {_NOBODY} {_NOBODY} 0")
    _tell("nfsd.fh", f"all 1 \\x00000000 {end} {export}")
    for name, value in (("versions", "-3 +4"), ("nfsv4leasetime", "10"), ("nfsv4gracetime", "10"), ("threads", "2")):
        Path(control, name).write_text(f"{value}\n")
    with contextlib.suppress(OSError):  # a kernel that has nobody to ask for clients of before waits these 10 s
        Path(control, "v4_end_grace").write_text("Y\n")


def _tell(cache: str, line: str) -> None:
    fd = os.open(f"/proc/net/rpc/{cache}/channel", os.O_WRONLY)
    try:
        os.write(fd, f"{line}\n".encode())
    finally:
        os.close(fd)


if __name__ == "__main__":
    _start(sys.argv[1], sys.argv[2])
