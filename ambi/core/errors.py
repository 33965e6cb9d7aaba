"""The errors that people see, one tree.

    AmbiError
    ├── InvalidRequest        a flag, body, file or value is wrong            exit 125, HTTP 400
    ├── Unsupported           this host, isolation or version cannot do it    exit 125, HTTP 400
    ├── NotFound              no such object                                  exit 125, HTTP 404
    │   └── CommandNotFound   the workload's program does not exist           exit 127, HTTP 400
    ├── CommandNotExecutable  the program is there but cannot be executed     exit 126, HTTP 400
    ├── Conflict              a name, state or resource is taken              exit 125, HTTP 409
    ├── NotModified           already in the state asked for                  exit 0,   HTTP 304
    ├── Forbidden             the caller or this process may not              exit 125, HTTP 403
    ├── Corrupt               bytes do not match their digest or format       exit 125, HTTP 400
    ├── StorageFull           no space or quota left                          exit 125, HTTP 507
    ├── Unavailable           a process or service of ours does not answer    exit 125, HTTP 503
    │   └── DeadlineExceeded  it did not answer in time
    └── Internal              ours; the message says what to report           exit 125, HTTP 500

A message says what failed, on which object, then the cause: `cannot start 'web': port 8080 is in use by nginx
(pid 812)`. The hint is a command or a file to change. Both are one line. Errors cross processes as the object that
`to_wire` returns and come back as the same class.

Standard library only, and no dataclasses: this is imported wherever a fresh interpreter starts.
"""

from __future__ import annotations

import errno as _errno


class AmbiError(Exception):
    """Something the user can read and act on. Every error that leaves a public function is one."""

    exit_status = 125
    http_status = 500
    usual_hint: str | None = None  # of a class whose fix is always the same

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint or self.usual_hint

    def __str__(self) -> str:
        return self.message

    def to_wire(self) -> dict[str, str | None]:
        """`{"kind": class name, "message": ..., "hint": ... or null}`; the inverse is `from_wire`."""
        return {"kind": type(self).__name__, "message": self.message, "hint": self.hint}


class InvalidRequest(AmbiError):
    http_status = 400


class Unsupported(AmbiError):
    http_status = 400


class NotFound(AmbiError):
    http_status = 404


class CommandNotFound(NotFound):
    """Docker's clients look for `executable file not found in $PATH` or `no such file or directory` in the text."""

    exit_status = 127
    http_status = 400
    usual_hint = "name the program's whole path, or look inside: ambi run --rm -it --entrypoint sh IMAGE"


class CommandNotExecutable(AmbiError):
    """Docker's clients look for `permission denied` or `is a directory` in the text."""

    exit_status = 126
    http_status = 400
    usual_hint = "name a program that the user may execute, or a script by its interpreter, as in `sh FILE`"


class Conflict(AmbiError):
    http_status = 409


class NotModified(AmbiError):
    exit_status = 0
    http_status = 304


class Forbidden(AmbiError):
    http_status = 403


class Corrupt(AmbiError):
    http_status = 400


class StorageFull(AmbiError):
    http_status = 507


class Unavailable(AmbiError):
    http_status = 503


class DeadlineExceeded(Unavailable):
    pass


class Internal(AmbiError):
    usual_hint = "this is a fault of ambi: report it with what engine.log in the data root says"


_KINDS: dict[str, type[AmbiError]] = {
    kind.__name__: kind
    for kind in (
        AmbiError, InvalidRequest, Unsupported, NotFound, CommandNotFound, CommandNotExecutable, Conflict, NotModified,
        Forbidden, Corrupt, StorageFull, Unavailable, DeadlineExceeded, Internal,
    )
}  # fmt: skip


def from_wire(body: dict[str, str | None]) -> AmbiError:
    """The error that `to_wire` described; an unknown kind becomes Internal and keeps its text."""
    kind = _KINDS.get(body.get("kind") or "", Internal)
    return kind(body.get("message") or "unknown error", hint=body.get("hint"))


def from_os_error(what: str, error: OSError) -> AmbiError:
    """`error`, met while doing `what` (`cannot create volume 'db'`), as the member of the tree that fits its errno."""
    cause = error.strerror or str(error)
    where = f": {error.filename}" if error.filename else ""
    message = f"{what}{where}: {cause}"
    if error.errno in (_errno.ENOSPC, _errno.EDQUOT):
        return StorageFull(message, hint="free space: `ambi image ls` shows what uses it, `ambi image rm` removes images")
    if error.errno in (_errno.EACCES, _errno.EPERM):
        return Forbidden(message, hint="run as root, or as a member of the group `ambi`")
    if error.errno == _errno.ENOENT:
        return NotFound(message, hint="see that the path exists, and is spelled as it is there: ls -ld PATH")
    if error.errno == _errno.EEXIST:
        return Conflict(message, hint="remove it, or choose another name")
    if error.errno in (_errno.EISDIR, _errno.ENOTDIR):
        return InvalidRequest(message, hint="`ls -ld PATH` shows what is a file there and what a directory")
    if error.errno in (_errno.ENOSYS, _errno.EOPNOTSUPP):
        return Unsupported(message, hint="`ambi doctor` shows what this host can do")
    return Internal(message)
