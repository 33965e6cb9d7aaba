"""A look into the root of a guest: one TREE message, a stream, an answer. See ambi/shim/PROTOCOL.md, "Trees"."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from ambi.core.errors import AmbiError, InvalidRequest, Unavailable
from ambi.core.loop import Loop
from ambi.core.plan import LaunchPlan
from hyper.guest.protocol import STREAM_STDOUT, Items, Message, TreeAnswer, TreeTag, Type, Value
from hyper.vm.guest_process import Inlet, Outlet
from hyper.vm.link import Link

TreeDone = Callable[[dict[str, Any] | AmbiError], None]
READS, WRITES, NEITHER = ("put",), ("get", "diff", "layer", "export"), ("stat",)
_FLAGS = (("follow", 1), ("no_overwrite_dir_non_dir", 2), ("copy_ids", 4))


class Look:
    """One request under way. Takes over `fd`; `done` is called once, from the loop."""

    def __init__(self, loop: Loop, link: Link, ident: int, verb: str, fd: int | None, done: TreeDone) -> None:
        self._loop, self._link, self._ident, self._verb = loop, link, ident, verb
        self._done: TreeDone | None = done
        self._inlet: Inlet | None = None
        self._outlet: Outlet | None = None
        if fd is not None:
            os.set_blocking(fd, False)
        if fd is not None and verb in READS:
            self._inlet = Inlet(loop, link, ident, fd)
        elif fd is not None:
            self._outlet = Outlet(loop, link, ident, STREAM_STDOUT, fd, terminal=False)
            self._outlet.on_broken = self._broken
        link.attach(ident, self)

    def begin(self, items: Items) -> None:
        self._link.request(Type.TREE, items, ident=self._ident, done=self._answered)
        if self._inlet is not None:
            self._inlet.begin()

    def _broken(self) -> None:
        """Nobody reads any more: what is still to come is of no use."""
        self._link.tell(Type.CLOSE_STDIN, self._ident)

    def receive(self, message: Message) -> None:
        if message.kind is Type.STDOUT and self._outlet is not None:
            self._outlet.push(message.body)
        elif message.kind is Type.STDOUT_END and self._outlet is not None:
            self._outlet.end()
        elif message.kind is Type.STDIN_CREDIT and self._inlet is not None:
            self._inlet.allow(message.fields.number(1))

    def resume(self) -> None:
        if self._inlet is not None:
            self._inlet.resume()

    def _answered(self, message: Message) -> None:
        if message.kind is Type.ERROR:
            self._finish(message.error())
        elif self._verb in ("stat", "get"):
            fields = message.fields
            self._finish({
                "size": fields.number(TreeAnswer.SIZE),
                "mode": fields.number(TreeAnswer.MODE),
                "mtime_ns": fields.number(TreeAnswer.MTIME_NS, signed=True),
                "link": fields.text(TreeAnswer.LINK),
            })  # fmt: skip
        else:
            self._finish({})

    def lost(self, reason: str) -> None:
        self._finish(Unavailable(f"the virtual machine is gone: {reason}"))

    def _finish(self, result: dict[str, Any] | AmbiError) -> None:
        done, self._done = self._done, None
        if done is None:
            return
        self._link.detach(self._ident)
        if self._inlet is not None:
            self._inlet.close()
        if self._outlet is not None:
            self._outlet.end()
        self._loop.later(0, lambda: done(result))

    def close(self) -> None:
        """Let go of the stream; what nobody has read is dropped."""
        if self._outlet is not None:
            self._outlet.close()

    @property
    def over(self) -> bool:
        return self._done is None and (self._outlet is None or self._outlet.closed)


def check(request: dict[str, Any], fd: int | None) -> str:
    """The verb. Raises InvalidRequest."""
    verb, path = request.get("verb"), request.get("path", "/")
    if verb not in (*READS, *WRITES, *NEITHER):
        raise InvalidRequest(f"'tree' knows no verb {verb!r}")
    if not isinstance(path, str) or not path.startswith("/") or "\0" in path:
        raise InvalidRequest(f"'tree' wants an absolute path, not {path!r:.200}")
    if (fd is None) != (verb in NEITHER):
        raise InvalidRequest(f"'tree' {verb} wants {'no' if verb in NEITHER else 'one'} stream")
    return str(verb)


def items(plan: LaunchPlan, request: dict[str, Any]) -> Items:
    """The fields of TREE."""
    flags = sum(bit for name, bit in _FLAGS if request.get(name))
    found: list[tuple[int, Value]] = [
        (TreeTag.VERB, request["verb"]),
        (TreeTag.PATH, request.get("path", "/")),
        (TreeTag.FLAGS, flags),
    ]
    if request["verb"] in ("diff", "layer"):
        mounted = [entry["destination"] for entry in plan.config.get("mounts") or ()] + [str(f.path) for f in plan.files]
        found += [(TreeTag.EXCLUDED, path) for path in (*mounted, "/dev")]
    if request.get("copy_ids"):
        user = plan.config["process"].get("user") or {}
        written = user.get("username")
        ids = (TreeTag.UID, user.get("uid") or 0), (TreeTag.GID, user.get("gid") or 0)
        found += [(TreeTag.USER, written)] if written else list(ids)
    return found
