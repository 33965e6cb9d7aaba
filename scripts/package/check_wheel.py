"""Build the wheel, install it into a fresh virtual environment outside the checkout, and use it there.

The installed command must run from a directory that has traps named like our packages (`images/`, `runtime/`), start an
engine with private roots, import an image, run a container from it and stop again.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(argv: list[str | Path], where: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(
        argv, cwd=where, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
    )
    if done.returncode:
        sys.exit(f"error: {' '.join(map(str, argv))} ended with {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout.strip()


def main() -> None:
    sys.path.insert(0, str(ROOT))
    from tests.rootfs import busybox_tar

    with tempfile.TemporaryDirectory(prefix="ambi-wheel-", dir="/tmp") as name:
        work = Path(name)
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "AMBI"))}
        run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", work, ROOT], work, environment)
        wheel = next(work.glob("ambi-*.whl"))
        run(["/usr/bin/python3", "-m", "venv", work / "venv"], work, environment)
        run([work / "venv/bin/pip", "install", "-q", "--disable-pip-version-check", wheel], work, environment)
        traps = work / "traps"
        for package in ("images", "runtime", "hyper", "ambi"):
            (traps / package).mkdir(parents=True)
            (traps / package / "__init__.py").write_text("raise SystemExit('imported from the current directory')\n")
        environment |= {"AMBI_DATA_ROOT": str(work / "data"), "AMBI_RUN_ROOT": str(work / "run")}
        environment["AMBI_SOCKET"] = str(work / "run/ambi.sock")
        ambi = work / "venv/bin/ambi"
        tar = busybox_tar(work / "busybox.tar")
        run([ambi, "image", "import", tar, "busybox"], traps, environment)
        try:
            said = run([ambi, "run", "--rm", "--network", "none", "busybox", "echo", "from the wheel"], traps, environment)
            if said != "from the wheel":
                sys.exit(f"error: the container said {said!r}")
        finally:
            run([ambi, "engine", "stop"], traps, environment)
    print("the wheel works")


if __name__ == "__main__":
    main()
