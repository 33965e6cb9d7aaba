"""The transcript: what is asked of every engine. Image `box` is static busybox with a few users (tests/rootfs.py)."""

# ruff: noqa: E501  (a command stays in one line, as it is typed)

from __future__ import annotations

from tests.cli.transcript.script import Await, Expect, Line, Resize, Run, Send, Step

TRAP = "trap 'exit 7' {signal}; echo ready; while :; do sleep 0.1; done"


def line(name: str, *steps: Step | str) -> Line:
    return Line(name, tuple(Run(step) if isinstance(step, str) else step for step in steps))


def trap(signal: str) -> str:
    return f'box sh -c "{TRAP.format(signal=signal)}"'


OUTPUT = (
    line("echo", "{run} --rm box echo hello world"),
    line("both-streams", "{run} --rm box sh -c 'echo out; echo err >&2; exit 3'"),
    line("no-newline", "{run} --rm box printf 'a\\nb'"),
    line("binary", "{run} --rm box printf '\\001\\377\\000x'"),
    line("long-line", "{run} box sh -c 'head -c 100000 /dev/zero | tr \"\\0\" x'", "logs {me}"),
    line("exit-255", "{run} --rm box sh -c 'exit 255'"),
    line("exit-300", "{run} --rm box sh -c 'exit 300'"),
    line("detached", "{run} -d box sh -c 'echo later; exit 9'", "wait {me}", "logs {me}"),
    line("removed", "{run} --rm box true", "inspect {me}"),
)

FAILURES = (
    line("no-program", "{run} --rm box nope"),
    line("no-program-path", "{run} --rm box /bin/nope"),
    line("not-executable", "{run} --rm box /etc/passwd"),
    line("a-directory", "{run} --rm box /etc"),
    line("no-image", "{run} --pull never nothing:here"),
    line("no-user", "{run} --rm -u nobody-here box true"),
    line("no-command", "{run} --rm box"),
    line("bad-name", "create --name -bad box true"),
    line("bad-runtime", "create --name {me} --runtime nothing box true"),
    line("bad-signal", "kill -s NOPE {box}"),
    line("little-memory", "create --name {me} -m 1m box true"),
    line("relative-workdir", "create --name {me} -w here box true"),
    line("failed-start-is-kept", "{run} box nope", "inspect -f '{{.State.Status}} {{.State.ExitCode}}' {me}"),
    line("unknown-everywhere", *(f"{verb} nothing-here" for verb in (
        "start", "stop", "kill", "wait", "rm", "logs", "restart", "attach", "top", "inspect", "rename x", "exec x",
    ) if " " not in verb), "rename nothing-here other", "exec nothing-here true"),
    line("name-in-use", "{create} box true", "{create} box true"),
    line("not-running", "{create} box true", "kill {me}", "exec {me} true", "top {me}", "stop {me}"),
)  # fmt: skip

SIGNALS = (
    # Whether the shell also says "Killed" depends on which of the two it sees first, so its words are dropped.
    line("killed-inside", "{run} --rm box sh -c 'exec 2> /dev/null; sleep 100 & kill -9 $!; wait $!'"),
    line("kill", "{run} -d box sleep 1000", "kill {me}", "wait {me}"),
    line("kill-by-number", "{run} -d " + trap("USR1"), Await("logs {me}", "ready"), "kill -s 10 {me}", "wait {me}"),
    line(
        "term-is-ignored-by-pid-1",
        "{run} -d box sh -c 'echo ready; exec sleep 1000'",
        Await("logs {me}", "ready"),
        "kill -s TERM {me}",
        "exec {me} true",
        "inspect -f '{{.State.Running}}' {me}",
        "stop -t 1 {me}",
        "wait {me}",
    ),
    line("stop", "{run} -d " + trap("TERM"), Await("logs {me}", "ready"), "stop {me}", "wait {me}"),
    line("stop-signal", "{run} --stop-signal INT -d " + trap("INT"), Await("logs {me}", "ready"), "stop {me}", "wait {me}"),
    line(
        "restart",
        "{run} -d " + trap("TERM"),
        Await("logs {me}", "ready"),
        "restart {me}",
        "inspect -f '{{.State.Running}} {{.RestartCount}}' {me}",
        Await("logs {me}", "ready\nready"),
    ),
    line("oom", "{run} -m 32m --memory-swap 32m box sh -c 'exec dd if=/dev/zero of=/dev/null bs=200M'",
         "inspect -f '{{.State.OOMKilled}} {{.State.ExitCode}}' {me}"),
)  # fmt: skip

INPUT = (
    line("half-close", Run("{run} -i --rm box cat", stdin=b"hello\nlast")),
    line("half-close-then-output", Run("{run} -i --rm box sh -c 'wc -c; echo after'", stdin=bytes(200_000))),
    line("input-unread", Run("{run} -i --rm box true", stdin=bytes(500_000))),
    line("no-input", Run("{run} --rm box cat", stdin=b"ignored")),
    line("start-with-input", "{create} -i box cat", Run("start -ai {me}", stdin=b"again\n")),
    line("start-attached", "{create} box sh -c 'echo one; exit 4'", "start -a {me}"),
    line(
        "attach-with-input",
        "{run} -di box sh -c 'read line; echo got $line; exit 6'",
        Run("attach {me}", stdin=b"x\n", mask=r"\A(?s:.*)\Z"),  # dockerd may drop what comes after the end of input
        "wait {me}",
    ),
    line("attach-stopped", "{create} box true", "attach {me}"),
)

TERMINALS = (
    line("terminal-without-input", "{run} --rm -t box sh -c 'echo hi; echo err >&2; test -t 1'"),
    line("terminal-log", "{run} -t box echo hi", "logs {me}"),
    line(
        "resize",
        Run(
            "{run} --rm -it box sh -c 'want() { while [ \"$(stty size 2>/dev/null)\" != \"$1\" ]; do sleep 0.1; done; echo is $1; }; "
            "want \"30 100\"; want \"41 123\"; exit 4'",
            terminal=(Expect("is 30 100"), Resize(41, 123), Expect("is 41 123")),
        ),
    ),
    line(
        "interrupt",
        Run(
            "{run} --rm -it box sh -c 'trap \"echo caught; exit 5\" INT; echo ready; while :; do sleep 0.1; done'",
            terminal=(Expect("ready"), Send(b"\x03")),
        ),
    ),
    line(
        "typed-input",
        Run("{run} --rm -it box sh -c 'echo ready; read a; echo got $a'", terminal=(Expect("ready"), Send(b"hello\r"))),
    ),
    line(
        "end-of-file-typed",
        Run("{run} --rm -it box sh -c 'echo ready; cat; echo end'", terminal=(Expect("ready"), Send(b"\x04"))),
    ),
    line(
        "detach",
        Run("{run} -it box sh -c 'echo ready; exec sleep 1000'", terminal=(Expect("ready"), Send(b"\x10\x11"))),
        "inspect -f '{{.State.Running}}' {me}",
    ),
    line(
        "detach-own-keys",
        Run(
            "{run} --detach-keys ctrl-a,x -it box sh -c 'echo ready; exec sleep 1000'",
            terminal=(Expect("ready"), Send(b"\x01x")),
        ),
        "inspect -f '{{.State.Running}}' {me}",
    ),
    line("exec-terminal", Run("exec -it {box} sh -c 'echo ready; read a; echo got $a; exit 3'",
                              terminal=(Expect("ready"), Send(b"hi\r")))),
)  # fmt: skip
