"""`scripts/fuzz`."""

from __future__ import annotations

import argparse
import random
import sys
import traceback

from tests.fuzz.devices import DEVICES
from tests.fuzz.mutate import mutated
from tests.fuzz.targets import TARGETS, failures

ALL = TARGETS | DEVICES


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/fuzz")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(ALL))
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, help="this input alone, and show it")
    options = parser.parse_args()
    if unknown := set(options.targets) - set(ALL):
        parser.error(f"unknown target: {', '.join(unknown)}")
    status = 0
    for name in options.targets or ALL:
        start = random.randrange(1 << 60) if options.seed is None else options.seed
        count = options.count if options.seed is None else 1
        if options.seed is not None:
            sys.stdout.write(f"{mutated(ALL[name].good, start)!r}\n")
        print(f"{name}: {count} inputs from seed {start}", flush=True)
        for seed, error in failures(ALL[name], iter(range(start, start + count))):
            status = 1
            print(f"{name}: seed {seed}:")
            traceback.print_exception(error)
    return status


if __name__ == "__main__":
    sys.exit(main())
