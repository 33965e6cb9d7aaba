"""Rule sets by libnftables (package libnftables1): what `nft` runs, in this process.

A command may be many lines; all of it is one transaction, which the kernel takes whole or not at all. Adding an element to a
set takes 0.1 ms (nftables 1.0.6). See libnftables(3).
"""

from __future__ import annotations

import ctypes
import json
import socket
import threading
from typing import Any

from ambi.core.errors import Conflict, Forbidden, Internal, NotFound, Unsupported

_LIBRARY = "libnftables.so.1"
_NETLINK_NETFILTER = 12  # linux/netlink.h
_OUTPUT_JSON, _OUTPUT_TERSE = 1 << 4, 1 << 11  # NFT_CTX_OUTPUT_..., nftables/libnftables.h


def _load() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(_LIBRARY)
    except OSError as error:
        raise Unsupported(f"cannot use nftables: {error}", hint="apt-get install libnftables1") from error
    library.nft_ctx_new.argtypes = [ctypes.c_uint32]
    library.nft_ctx_new.restype = ctypes.c_void_p
    library.nft_ctx_free.argtypes = [ctypes.c_void_p]
    library.nft_ctx_free.restype = None
    library.nft_ctx_output_set_flags.argtypes = [ctypes.c_void_p, ctypes.c_uint]
    library.nft_ctx_output_set_flags.restype = None
    library.nft_run_cmd_from_buffer.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
    for kind in ("output", "error"):
        getattr(library, f"nft_ctx_buffer_{kind}").argtypes = [ctypes.c_void_p]
        getter = getattr(library, f"nft_ctx_get_{kind}_buffer")
        getter.argtypes = [ctypes.c_void_p]
        getter.restype = ctypes.c_char_p
    return library


def _check_kernel() -> None:
    """libnftables ends the process (exit status 3) when it cannot have this socket."""
    try:
        socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER).close()
    except OSError as error:
        raise Unsupported(
            f"cannot use nftables: this kernel has none ({error.strerror})", hint="modprobe nfnetlink nf_tables"
        ) from error


class Nftables:
    """A connection to the rule sets of the network namespace in which the calling thread is when this is made.

    Safe between threads. Commands are texts that the caller has made from checked values only.
    """

    def __init__(self) -> None:
        self._library = _load()
        _check_kernel()
        self._lock = threading.Lock()
        self._context = self._library.nft_ctx_new(0)
        if not self._context:
            raise Unsupported("cannot open a netlink socket for nftables", hint="see that the kernel has nf_tables")
        self._library.nft_ctx_buffer_output(self._context)
        self._library.nft_ctx_buffer_error(self._context)

    def run(self, command: str) -> None:
        """Do `command`. Raises what fits the kernel's answer: NotFound, Conflict, Forbidden, Unsupported, else Internal."""
        self._run(command, 0)

    def query(self, command: str) -> list[dict[str, Any]]:
        """The objects that `command` (`list table inet NAME`) prints, as libnftables-json(5) has them, without metainfo."""
        text = self._run(command, _OUTPUT_JSON)
        return [row for row in json.loads(text)["nftables"] if "metainfo" not in row] if text else []

    def show(self, command: str) -> bytes:
        """What `command` prints as text, without the elements of sets: to be compared."""
        return self._run(command, _OUTPUT_TERSE)

    def close(self) -> None:
        with self._lock:
            context, self._context = self._context, None
            if context:
                self._library.nft_ctx_free(context)

    def _run(self, command: str, flags: int) -> bytes:
        with self._lock:
            if not self._context:
                raise Internal("nftables was closed")
            self._library.nft_ctx_output_set_flags(self._context, flags)
            failed = self._library.nft_run_cmd_from_buffer(self._context, command.encode())
            output = self._library.nft_ctx_get_output_buffer(self._context)
            complaint = self._library.nft_ctx_get_error_buffer(self._context)
        if failed:
            raise _error(complaint.decode(errors="replace"))
        return bytes(output)


def _error(complaint: str) -> Exception:
    """The error of what nft says: its first line is `Error: CAUSE`, after `:LINE:COLUMNS:` with some versions."""
    lines = [line for line in complaint.splitlines() if "rror: " in line] or ["Error: no reason given"]
    message = "nftables: " + lines[0].partition("rror: ")[2].removeprefix("Could not process rule: ")
    if "Operation not permitted" in message:
        return Forbidden(message, hint="run the engine as root, with CAP_NET_ADMIN")
    if "No such file or directory" in message:
        return NotFound(message, hint="see `nft list ruleset`")
    if "File exists" in message:
        return Conflict(message, hint="see `nft list ruleset`")
    if any(text in message for text in ("not supported", "Protocol error", "Invalid argument", "cache initialization")):
        return Unsupported(
            message, hint="the kernel needs nf_tables with nat, fib and masquerade: `modprobe nf_tables nft_nat`"
        )
    return Internal(message)
