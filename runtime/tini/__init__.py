"""ambi-init, the reaping init of `--init`: source in tini.c, the program itself in program.py."""

from runtime.tini.program import PROGRAM

__all__ = ["PROGRAM"]
