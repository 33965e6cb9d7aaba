"""`python -m hyper.guest [--guest-dir DIR] [--package NAME]`: all that a VM boots from. A second run changes nothing."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from ambi.core.errors import AmbiError, from_os_error
from hyper.guest.initramfs import build_initramfs
from hyper.guest.kernel import PACKAGE, fetch_kernel


def _default_guest_dir() -> Path:
    from ambi.core.roots import Roots

    return Roots().guest


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m hyper.guest", description=__doc__)
    parser.add_argument("--guest-dir", type=Path, help="where kernels and the initramfs are kept")
    parser.add_argument("--package", default=PACKAGE, help="the Debian package of the kernel (%(default)s)")
    options = parser.parse_args()
    guest_dir = (options.guest_dir or _default_guest_dir()).absolute()
    started = time.monotonic()

    def say(text: str) -> None:
        print(f"guest: {text}", flush=True)

    try:
        kernel = fetch_kernel(guest_dir, package=options.package, say=say)
        say(f"kernel {kernel.name} in {kernel}")
        initramfs = build_initramfs(kernel)
    except OSError as error:
        return _failed(from_os_error(f"cannot prepare the guest in {guest_dir}", error))
    except AmbiError as error:
        return _failed(error)
    say(f"initramfs {initramfs.name}, {initramfs.stat().st_size >> 10} KiB")
    say(f"ready in {time.monotonic() - started:.1f} s")
    return 0


def _failed(error: AmbiError) -> int:
    print(f"ambi: {error.message}", file=sys.stderr)
    if error.hint:
        print(f"hint: {error.hint}", file=sys.stderr)
    return error.exit_status


if __name__ == "__main__":
    sys.exit(main())
