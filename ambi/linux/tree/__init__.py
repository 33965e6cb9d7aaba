"""ambi-tree, which looks into a root file system: sources in C, shared with the guest's agent; the program in program.py."""

from __future__ import annotations
