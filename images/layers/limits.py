"""What an untrusted archive may ask for. Beyond these an archive is refused, whatever it holds."""

from __future__ import annotations

MAX_ENTRIES = 1_000_000  # of one layer; each costs the worker about half a kilobyte
MAX_NAME = 255  # bytes of one component: NAME_MAX
MAX_PATH = 4095  # bytes of one path in the archive: PATH_MAX less its NUL
MAX_DEPTH = 1024  # directories above one entry; paths through symbolic links add up
MAX_LINKS = 40  # symbolic links followed to find one parent, as in the kernel
MAX_HEADER = 1 << 20  # bytes of one PAX or GNU extension header
MAX_XATTRS = 64 << 10  # bytes of all extended attributes of one entry: XATTR_LIST_MAX
MAX_EXTENTS = 100_000  # pieces of one sparse file
MAX_APPARENT = 1 << 40  # bytes of all files of one layer, holes counted

# An archive of zeros shrinks to a thousandth in gzip and further in zstd: the first gigabyte may.
FREE_EXPANSION = 1 << 30
MAX_RATIO = 200

MEMORY = 2 << 30  # address space of the worker
INLINE_BUDGET = 96 << 20  # bytes of small files that the worker may keep until the end
