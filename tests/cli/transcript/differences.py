"""Where we differ from Debian 12's dockerd (20.10) on purpose, and why."""

from __future__ import annotations

import re

from tests.cli.transcript.script import Difference

BOTH = ("container", "vm")
_USAGE = "\n\nRun 'docker run --help' for more information\n"
_RUNC = "the cause is the same; runc's and containerd's words around it are not ours"
_WORDS_25 = "the words of Docker 25, whose API version (1.44) we speak"


def _daemon(text: str, *, code: int = 1, before: str = "", after: str = "\n") -> str:
    """The pattern of an answer that is one error of the engine."""
    return re.escape(f"|{before}Error response from daemon: {text}{after}|{code}")


def _run(text: str, code: int) -> str:
    return _daemon(text, code=code, before="docker: ", after=_USAGE)


DIFFERENCES: tuple[Difference, ...] = (
    Difference("no-program", 0, BOTH, _run('exec: "nope": executable file not found in $PATH', 127), _RUNC),
    Difference("no-program-path", 0, BOTH, _run('exec: "/bin/nope": stat /bin/nope: no such file or directory', 127), _RUNC),
    Difference("not-executable", 0, BOTH, _run('exec: "/etc/passwd": permission denied', 126), _RUNC),
    Difference("a-directory", 0, BOTH, _run('exec: "/etc": is a directory', 126), "the true cause, as newer runc says it"),
    Difference("failed-start-is-kept", 0, BOTH, _run('exec: "nope": executable file not found in $PATH', 127), _RUNC),
    Difference("no-command", 0, BOTH, _run("no command specified", 125), _WORDS_25),
    Difference("bad-runtime", 0, BOTH, _daemon("unknown or invalid runtime name: nothing"), _WORDS_25),
    Difference("ps", 4, BOTH, _daemon("invalid filter 'nothing'"), _WORDS_25),
    Difference(
        "resolver",
        0,
        BOTH,
        re.escape("nameserver 10.1.1.1\nsearch a.example\noptions ndots:2\n||0"),
        "the order that Docker writes since 26; resolvers do not care",
    ),
    Difference(
        "exec-no-program",
        0,
        BOTH,
        re.escape('exec: "nope": executable file not found in $PATH\r\n||127'),
        "127 is what Docker answers since 28, and what `docker run` answers always",
    ),
    Difference(
        "exec-no-directory",
        0,
        ("container",),
        re.escape('cannot use working directory "/not/there": no such file or directory\r\n||126'),
        _RUNC,
    ),
    Difference(
        "exec-no-directory",
        0,
        ("vm",),
        re.escape('chdir to cwd ("/not/there") set in config.json failed: no such file or directory\r\n||126'),
        _RUNC,
    ),
    Difference("top", 0, ("container",), r"PID +COMMAND\n<masked>ambi-init\n<masked>sleep\n\|\|0", "the name of our init"),
    Difference("top", 0, ("vm",), r"PID +COMMAND\n<masked>init\n<masked>sleep\n\|\|0", "the name of our init"),
    Difference(
        "load-garbage",
        0,
        BOTH,
        _daemon("cannot load the archive: not a tar archive: it has 18 bytes"),
        "says which job failed and why",
    ),
    Difference(
        "import",
        1,
        BOTH,
        r"Untagged: imported:1\nDeleted: sha256:<id>\n\|\|0",
        "layers are freed by garbage collection and not named one by one",
    ),
)
