"""Do what the README says on a bare Debian: quickstart, quickstart again, uninstall; then nothing may be left.

    .venv/bin/python scripts/package/check_bare.py bookworm|trixie [--then COMMAND]

The machine is a root by mmdebstrap (minbase and ca-certificates) in namespaces of its own, with a network by slirp4netns and
this host's settings of apt and pip. --then runs a shell command in the checkout before uninstall: `scripts/test unit`.
What the scripts print is printed: read it as somebody who sees it for the first time.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from images import distributions  # noqa: E402

# Read from stdin, so that nothing of it is done before there is a network.
ENTER = """
root=$1
mount --bind "$root" "$root"; cd "$root"
mount -t proc proc proc; mount -t sysfs sysfs sys; mount --rbind /dev dev; mount --rbind /sys/fs/cgroup sys/fs/cgroup
mount -t tmpfs -o mode=755 tmpfs run; mount -t tmpfs -o mode=1777 tmpfs tmp
hostname bare; mkdir .old
pivot_root . .old; umount -l /.old; rmdir /.old; cd /root/ambi
exec env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TERM=dumb sh -c "$2"
"""
# What package managers keep of their doings, and what packages leave when they are purged.
FORGOTTEN = (
    "/var/cache/", "/var/lib/apt/", "/var/lib/dpkg/", "/var/lib/systemd/", "/var/log/", "/root/.cache", "/root/ambi/.git/",
    "/etc/gshadow-", "/etc/group-", "/etc/passwd-", "/etc/shadow-", "/etc/hosts", "/etc/systemd/system/",
)  # fmt: skip


def run(*argv: str | Path, **options: object) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    if done.returncode:
        sys.exit(
            f"error: {' '.join(map(str, argv))} ended with {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )
    return str(done.stdout)


def make_root(root: Path, suite: str) -> None:
    """The bare root, with a clone of this checkout at /root/ambi and this host's way to the network."""
    lines = distributions.sources(distributions.DEBIAN, suite).lines
    run("mmdebstrap", "--mode=root", "--variant=minbase", "--include=ca-certificates", suite, root, *lines)
    listed = run("apt-config", "dump").splitlines()
    settings = [line for line in listed if line.startswith("Acquire::") and not line.startswith("Acquire::IndexTargets")]
    (root / "etc/apt/apt.conf.d/99host").write_text("".join(f"{line}\n" for line in settings))
    for source in Path("/usr/local/share/ca-certificates").glob("*.crt"):
        shutil.copy(source, root / "usr/local/share/ca-certificates")
    run("chroot", root, "update-ca-certificates")
    if Path("/etc/pip.conf").exists():
        shutil.copy("/etc/pip.conf", root / "etc/pip.conf")
    (root / "etc/resolv.conf").write_text("nameserver 10.0.2.3\n")  # slirp's
    run("git", "clone", "-q", ROOT, root / "root/ambi")


def inside(root: Path, command: str) -> int:
    """Run a shell command in the root's checkout, in namespaces of its own; its exit status."""
    holder = ["unshare", "--mount", "--pid", "--net", "--uts", "--ipc", "--fork", "--kill-child", "--propagation=private"]
    with subprocess.Popen([*holder, "sh", "-es", root, command], stdin=subprocess.PIPE, text=True) as machine:
        assert machine.stdin
        children = Path(f"/proc/{machine.pid}/task/{machine.pid}/children")
        while not (found := children.read_text().split()):
            time.sleep(0.05)
        ready, told = os.pipe()
        network = subprocess.Popen(
            ["slirp4netns", "--configure", f"--ready-fd={told}", found[0], "tap0"],
            pass_fds=[told], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(told)
        try:
            if not os.read(ready, 1):
                sys.exit("error: slirp4netns makes no network\nhint: apt-get install slirp4netns")
            machine.stdin.write(ENTER)
            machine.stdin.close()
            return machine.wait()
        finally:
            os.close(ready)
            machine.kill()
            network.terminate()
            network.wait()


def listing(root: Path) -> set[str]:
    found = set()
    for top, folders, files in os.walk(root):
        place = os.path.normpath(os.path.join("/", os.path.relpath(top, root)))
        found |= {os.path.join(place, name) for name in (*folders, *files)}
    return {path for path in found if not path.startswith(FORGOTTEN)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", metavar="SUITE", help="bookworm or trixie")
    parser.add_argument("--then", metavar="COMMAND")
    options = parser.parse_args()
    if not shutil.which("slirp4netns"):
        sys.exit("error: slirp4netns is missing\nhint: apt-get install slirp4netns")
    with tempfile.TemporaryDirectory(prefix="ambi-bare-", dir="/tmp") as name:
        root = Path(name) / "root"
        make_root(root, options.suite)
        before = listing(root)
        steps = ("scripts/quickstart", "scripts/quickstart", options.then, "scripts/uninstall")
        shown = "; ".join(f"echo '$ {step}'; {step}" for step in steps if step)
        status = inside(root, f"set -e; {shown}")
        if status:
            sys.exit(f"error: on {options.suite} it ended with {status}")
        kept = run("chroot", root, "apt-mark", "showauto").split()  # uninstall has named them
        owned = set(run("chroot", root, "dpkg-query", "-L", *kept).splitlines()) if kept else set()
        left = sorted(listing(root) - before - owned)
    if left:
        print("left behind:", *left, sep="\n  ")
        return 1
    print(f"{options.suite}: nothing is left")
    return 0


if __name__ == "__main__":
    sys.exit(main())
