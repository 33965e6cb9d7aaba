"""Run one image as a container and as a VM: the same command, its output and exit code, and a small table of both.

Usage: compare.py AMBI IMAGE. Called by scripts/quickstart; ambi must be installed and IMAGE be there.
"""

from __future__ import annotations

import subprocess
import sys
import time
from typing import NamedTuple

SHOWN = '. /etc/os-release; echo "$PRETTY_NAME, pid $$, $(id -un)"; exit 7'
KINDS = ("container", "vm")
NEXT = (
    ("ambi run -it --rm {}", "a shell in a container"),
    ("ambi run -it --rm --isolation vm {}", "the same in a virtual machine"),
    ("ambi ps -a", "what runs"),
    ("ambi doctor", "what this host can do"),
    ("docker context create ambi --docker host=unix:///run/ambi/ambi.sock", "for the docker CLI, if you have it"),
    ("docker --context ambi run --rm --runtime vm {} uname -r", ""),
    ("scripts/uninstall", "take everything away again"),
)


class Figures(NamedTuple):
    """Seconds and bytes of one kind; medians of several runs where it is quick."""

    first_output_s: float
    exec_s: float
    memory_bytes: int


class Failed(Exception):
    pass


def run(argv: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(argv, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)


def checked(argv: list[str]) -> str:
    done = run(argv)
    if done.returncode:
        raise Failed(f"{' '.join(argv)} ended with {done.returncode}\n{done.stderr.strip()}")
    return done.stdout.strip()


def first_output(argv: list[str]) -> float:
    """Seconds from the start of the command line to its first byte of output."""
    begin = time.monotonic()
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL) as process:
        assert process.stdout and process.stderr
        seen = process.stdout.read(1)
        took = time.monotonic() - begin
        _, errors = process.communicate()
    if not seen:
        raise Failed(f"{' '.join(argv)} printed nothing\n{errors.decode().strip()}")
    return took


def timed(argv: list[str]) -> float:
    begin = time.monotonic()
    checked(argv)
    return time.monotonic() - begin


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def memory(ambi: str, instance: str) -> int:
    """What the host spends on a running, idle instance: proportional set size of its shim and everything below it."""
    processes = [int(checked([ambi, "inspect", "--format", "{{.Ambi.ShimPid}}", instance]))]
    for pid in processes:
        with open(f"/proc/{pid}/task/{pid}/children") as children:
            processes.extend(int(child) for child in children.read().split())
    total = 0
    for pid in processes:
        with open(f"/proc/{pid}/smaps_rollup") as rollup:
            total += sum(int(line.split()[1]) for line in rollup if line.startswith("Pss:")) * 1024
    return total


def measure(ambi: str, image: str, kind: str) -> Figures:
    start = [first_output([ambi, "run", "--rm", "--isolation", kind, image, "echo", "x"]) for _ in range(3)]
    name = checked([ambi, "run", "-d", "--isolation", kind, image, "sleep", "600"])
    try:
        execs = [timed([ambi, "exec", name, "true"]) for _ in range(5)]
        return Figures(median(start), median(execs), memory(ambi, name))
    finally:
        checked([ambi, "rm", "-f", name])


def main(ambi: str, image: str) -> int:
    outcomes = set()
    for kind in KINDS:
        argv = [ambi, "run", "--rm", "--isolation", kind, image, "sh", "-c", SHOWN]
        done = run(argv)
        print(f"$ ambi run --rm --isolation {kind} {image} sh -c '{SHOWN}'")
        print(done.stdout.rstrip() or done.stderr.rstrip())
        print(f"exit code {done.returncode}\n")
        outcomes.add((done.stdout, done.returncode))
        if done.returncode != 7:
            raise Failed(f"the {kind} ended with {done.returncode} instead of 7\n{done.stderr.strip()}")
    if len(outcomes) != 1:
        raise Failed("container and VM differ")
    figures = {kind: measure(ambi, image, kind) for kind in KINDS}
    print(f"{'':28}{'container':>12}{'vm':>12}")
    for title, cell in (
        ("start to first output", lambda f: f"{f.first_output_s:.2f} s"),
        ("exec", lambda f: f"{f.exec_s * 1000:.0f} ms"),
        ("memory on the host, idle", lambda f: f"{f.memory_bytes / 2**20:.1f} MiB"),
    ):
        print(f"{title:28}{cell(figures['container']):>12}{cell(figures['vm']):>12}")
    print('\nwhat to type next (put .venv/bin on your PATH first: export PATH="$PWD/.venv/bin:$PATH"):')
    for command, meaning in NEXT:
        print(f"  {command.format(image):<70}{meaning}".rstrip())
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(*sys.argv[1:]))
    except Failed as failure:
        print(f"error: {failure}\nhint: ambi doctor shows what this host can do", file=sys.stderr)
        sys.exit(1)
