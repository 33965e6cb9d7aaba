"""The agent in a booted guest, through PROTOCOL.md alone."""

from __future__ import annotations

import hashlib
import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ambi.core.deadline import Deadline
from ambi.core.errors import CommandNotExecutable, CommandNotFound, Conflict, InvalidRequest, NotFound, Unsupported
from hyper.guest.protocol import HEADER, MAGIC, STREAM_STDOUT, FileTag, Items, ProcessTag, SetupTag, Type
from tests.harness import guest_dir
from tests.vm.guest_boot import (
    ALL_CAPABILITIES,
    DEFAULT_CAPABILITIES,
    MOUNTS,
    Guest,
    busybox_layer,
    erofs,
    mount,
    process,
    sh,
)

pytestmark = pytest.mark.needs("qemu")

FILES: Items = (
    (SetupTag.FILE, ((FileTag.PATH, "/etc/hosts"), (FileTag.MODE, 0o644), (FileTag.CONTENT, "127.0.0.1 localhost\n"))),
    (SetupTag.FILE, ((FileTag.PATH, "/deep/er/file"), (FileTag.MODE, 0o600), (FileTag.CONTENT, "x" * 70_000))),
)
PROTECTION: Items = (
    (SetupTag.MASKED, "/proc/kcore"),
    (SetupTag.MASKED, "/sys/firmware"),
    (SetupTag.MASKED, "/proc/not-there"),
    (SetupTag.READ_ONLY_PATH, "/proc/sys"),
)


def by() -> Deadline:
    return Deadline.after(60)


@pytest.fixture(scope="module")
def layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return busybox_layer(tmp_path_factory.mktemp("layer"))


@pytest.fixture(scope="module")
def shared(layer: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    """A guest whose init only waits; tests run what they need as execs."""
    guest = Guest(tmp_path_factory.mktemp("guest"), guest_dir(), layers=[layer], disk=True)
    try:
        guest.setup((SetupTag.DISK, 1), (SetupTag.PIDS, 200), *FILES, *PROTECTION)
        guest.client.start(Type.RUN, 1, sh("trap 'exit 0' TERM; while :; do sleep 1000 & wait; done"), by())
        yield guest
    finally:
        guest.close()


@pytest.fixture
def fresh(layer: Path, tmp_path: Path) -> Iterator[Guest]:
    guest = Guest(tmp_path, guest_dir(), layers=[layer], disk=True)
    yield guest
    guest.close()


_ids = iter(range(100, 100_000))


def run(guest: Guest, items: Items, stdin: bytes | None = None) -> tuple[int | None, str, str]:
    """Exit code, stdout and stderr of an exec."""
    ident = next(_ids)
    if stdin is not None:
        items = (*items, (ProcessTag.STDIN, 1))
    guest.client.start(Type.EXEC, ident, items, by())
    if stdin is not None:
        guest.client.write_stdin(stdin, by(), ident)
        guest.client.close_stdin(by(), ident)
    output = guest.client.wait(by(), ident)
    return output.exit, output.stdout.decode(), output.stderr.decode()


def test_hello_sets_clock_and_names_the_build(shared: Guest) -> None:
    assert shared.hello.number(1) == 1
    _, out, _ = run(shared, sh("date +%s; cat /proc/sys/kernel/random/entropy_avail"))
    clock, entropy = out.split()
    assert abs(int(clock) - time.time()) < 30
    assert int(entropy) == 256


def test_a_host_of_another_version_is_refused(shared: Guest) -> None:
    with pytest.raises(Unsupported, match="speaks version 1"):
        shared.client.request(Type.HELLO, ((1, 2), (2, 3)), by())


def test_streams_and_exit_code(shared: Guest) -> None:
    assert run(shared, sh("echo out; echo err >&2; exit 7")) == (7, "out\n", "err\n")
    assert run(shared, sh("kill -9 $$"))[0] == 137


def test_ends_come_before_the_exit(shared: Guest) -> None:
    ident = next(_ids)
    shared.client.start(Type.EXEC, ident, sh("echo x"), by())
    events = shared.client.wait(by(), ident).events
    assert events[-1] is Type.EXITED
    assert {Type.STDOUT_END, Type.STDERR_END} <= set(events[:-1])


def test_exit_does_not_wait_for_descendants_with_the_pipe(shared: Guest) -> None:
    ident = next(_ids)
    shared.client.start(Type.EXEC, ident, sh("sleep 600 & echo started"), by())
    output = shared.client.wait(by(), ident)
    assert (output.exit, bytes(output.stdout)) == (0, b"started\n")
    assert Type.STDOUT_END not in output.events
    run(shared, sh("pkill sleep"))


def test_exec_is_in_the_namespaces_of_init(shared: Guest) -> None:
    _, out, _ = run(
        shared, sh("hostname; for n in pid mnt uts ipc cgroup; do readlink /proc/1/ns/$n /proc/self/ns/$n; done")
    )
    name, *links = out.split()
    assert name == "guest"
    assert links[0::2] == links[1::2]


def test_stdin_reaches_the_program_whole_and_ends(shared: Guest) -> None:
    data = os.urandom(2 << 20)
    code, out, _ = run(shared, sh("sha256sum"), data)
    assert (code, out.split()[0]) == (0, hashlib.sha256(data).hexdigest())


def test_stdin_of_a_program_that_does_not_read_is_dropped(shared: Guest) -> None:
    assert run(shared, sh("exec <&-; echo done; sleep 1"), bytes(1 << 20)) == (0, "done\n", "")


def test_without_stdin_it_is_null(shared: Guest) -> None:
    assert run(shared, sh("cat; readlink /proc/self/fd/0")) == (0, "/dev/null\n", "")


def test_a_full_stdout_blocks_neither_exec_nor_signals(shared: Guest) -> None:
    client = shared.client
    ident = next(_ids)
    client.returns_credit = False
    try:
        client.start(Type.EXEC, ident, sh("head -c 1000000 /dev/zero; echo END"), by())
        while len(client.outputs[ident].stdout) < 256 << 10:
            client.request(Type.PING, (), by())
        assert run(shared, sh("echo alive"))[1] == "alive\n"
        assert len(client.outputs[ident].stdout) == 256 << 10
        client.give_credit(STREAM_STDOUT, 2_000_000, by(), ident)
        output = client.wait(by(), ident)
    finally:
        client.returns_credit = True
    assert (output.exit, len(output.stdout)) == (0, 1_000_004)
    assert output.stdout.endswith(b"\0END\n")


def test_signals(shared: Guest) -> None:
    ident = next(_ids)
    shared.client.start(
        Type.EXEC, ident, sh("trap 'echo caught; exit 5' USR1; echo ready; while :; do sleep 0.2; done"), by()
    )
    shared.client.wait_output(b"ready", by(), ident)
    shared.client.request(Type.SIGNAL, ((1, 10),), by(), ident=ident)
    output = shared.client.wait(by(), ident)
    assert (output.exit, bytes(output.stdout)) == (5, b"ready\ncaught\n")
    with pytest.raises(NotFound):
        shared.client.request(Type.SIGNAL, ((1, 10),), by(), ident=ident)
    with pytest.raises(InvalidRequest, match="900 is no signal"):
        shared.client.request(Type.SIGNAL, ((1, 900),), by(), ident=1)


def test_terminal(shared: Guest) -> None:
    ident = next(_ids)
    extra = ((ProcessTag.TERMINAL, 1), (ProcessTag.ROWS, 33), (ProcessTag.COLUMNS, 101), (ProcessTag.STDIN, 1))
    script = (
        "stty size; tty; echo err >&2; read line; echo got $line; "
        "trap 'stty size; exit 3' WINCH; echo again; while :; do sleep 0.2; done"
    )
    shared.client.start(Type.EXEC, ident, sh(script, extra=extra), by())
    shared.client.wait_output(b"err\r\n", by(), ident)
    shared.client.write_stdin(b"word\n", by(), ident)
    shared.client.wait_output(b"again", by(), ident)
    shared.client.request(Type.RESIZE, ((1, 44), (2, 55)), by(), ident=ident)
    output = shared.client.wait(by(), ident)
    assert output.exit == 3
    lines = bytes(output.stdout).split(b"\r\n")
    assert lines[:2] == [b"33 101", b"/dev/pts/0"]
    assert {b"err", b"word", b"got word", b"44 55"} <= set(lines)
    assert not output.stderr and Type.STDERR_END not in output.events


def test_interrupt_from_a_terminal(shared: Guest) -> None:
    ident = next(_ids)
    extra = ((ProcessTag.TERMINAL, 1), (ProcessTag.STDIN, 1))
    shared.client.start(Type.EXEC, ident, sh("echo ready; exec sleep 600", extra=extra), by())
    shared.client.wait_output(b"ready", by(), ident)
    shared.client.write_stdin(b"\x03", by(), ident)
    assert shared.client.wait(by(), ident).exit == 130


def test_resize_without_terminal_is_refused(shared: Guest) -> None:
    with pytest.raises(InvalidRequest, match="no terminal"):
        shared.client.request(Type.RESIZE, ((1, 44), (2, 55)), by(), ident=1)


@pytest.mark.parametrize(
    ("user", "expected"),
    [
        ("alice", "uid=1000(alice) gid=1000(alice) groups=44(video),50(staff),1000(alice) /home/alice"),
        ("1000", "uid=1000(alice) gid=1000(alice) groups=44(video),50(staff),1000(alice) /home/alice"),
        ("alice:staff", "uid=1000(alice) gid=50(staff) groups=50(staff) /home/alice"),
        ("alice:7", "uid=1000(alice) gid=7 groups=7 /home/alice"),
        ("4242", "uid=4242 gid=0(root) groups=0(root) /"),
        (":video", "uid=0(root) gid=44(video) groups=44(video) /root"),
    ],
)
def test_users(shared: Guest, user: str, expected: str) -> None:
    _, out, _ = run(shared, sh("echo $(id) $HOME", extra=((ProcessTag.USER, user),)))
    assert out.strip() == expected


def test_numeric_user_with_groups(shared: Guest) -> None:
    extra = ((ProcessTag.UID, 7), (ProcessTag.GID, 8), (ProcessTag.GROUP, 9), (ProcessTag.GROUP, 10))
    _, out, _ = run(shared, sh("id -u; id -g; id -G; umask", extra=(*extra, (ProcessTag.UMASK, 0o027))))
    assert out.split("\n")[:4] == ["7", "8", "8 9 10", "0027"]


@pytest.mark.parametrize(
    ("user", "message"),
    [
        ("nobody-here", "unable to find user nobody-here: no matching entries in passwd file"),
        ("alice:nogroup-here", "unable to find group nogroup-here: no matching entries in group file"),
        ("2147483648", "uids and gids must be in range 0-2147483647"),
    ],
)
def test_unknown_users(shared: Guest, user: str, message: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        run(shared, sh("id", extra=((ProcessTag.USER, user),)))
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("args", "kind", "message"),
    [
        (("nope",), CommandNotFound, 'exec: "nope": executable file not found in $PATH'),
        (("/nope",), CommandNotFound, 'exec: "/nope": stat /nope: no such file or directory'),
        (("/etc/passwd",), CommandNotExecutable, 'exec: "/etc/passwd": permission denied'),
        (("/etc",), CommandNotExecutable, 'exec: "/etc": is a directory'),
        (("",), CommandNotFound, 'exec: "": executable file not found in $PATH'),
    ],
)
def test_programs_that_cannot_run(shared: Guest, args: tuple[str, ...], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind) as error:
        run(shared, process(*args))
    assert str(error.value) == message


def test_a_script_without_interpreter_and_one_of_no_format(shared: Guest) -> None:
    run(shared, sh("printf '#!/not/there\\n' > /tmp/a; printf 'rubbish' > /tmp/b; chmod 755 /tmp/a /tmp/b"))
    with pytest.raises(CommandNotFound, match="exec /tmp/a: no such file or directory"):
        run(shared, process("/tmp/a"))
    with pytest.raises(CommandNotExecutable, match="exec /tmp/b: exec format error"):
        run(shared, process("/tmp/b"))


def test_cwd(shared: Guest) -> None:
    assert run(shared, sh("pwd", extra=((ProcessTag.CWD, "/home/alice"),)))[1] == "/home/alice\n"
    with pytest.raises(InvalidRequest, match="no such file or directory"):
        run(shared, sh("pwd", extra=((ProcessTag.CWD, "/not/there"),)))


def test_capabilities_and_no_new_privs(shared: Guest) -> None:
    script = "grep -E '^(Cap|NoNew|Seccomp:)' /proc/self/status | tr -d '\\t' | tr '\\n' ' '"
    _, out, _ = run(shared, sh(script, extra=((ProcessTag.NO_NEW_PRIVS, 1),)))
    want = f"{DEFAULT_CAPABILITIES:016x}"
    assert out == f"CapInh:{0:016x} CapPrm:{want} CapEff:{want} CapBnd:{want} CapAmb:{0:016x} NoNewPrivs:1 Seccomp:0 "
    _, out, _ = run(shared, sh(script, extra=((ProcessTag.USER, "alice"),)))
    assert f"CapPrm:{0:016x} CapEff:{0:016x} CapBnd:{want}" in out
    bind = 1 << 10
    ambient = ((ProcessTag.INHERITABLE, bind), (ProcessTag.AMBIENT, bind), (ProcessTag.USER, "alice"))
    _, out, _ = run(shared, sh(script, extra=ambient))
    assert f"CapPrm:{bind:016x} CapEff:{bind:016x}" in out
    assert f"CapAmb:{bind:016x}" in out


def test_rlimits_and_oom_score(shared: Guest) -> None:
    extra = ((ProcessTag.RLIMIT, ((1, 7), (2, 123), (3, 456))), (ProcessTag.OOM_SCORE_ADJ, 500))
    _, out, _ = run(shared, sh("ulimit -n; ulimit -Hn; cat /proc/self/oom_score_adj", extra=extra))
    assert out.split() == ["123", "456", "500"]
    assert run(shared, sh("cat /proc/self/oom_score_adj"))[1] == "0\n"


def _filter(number: int, errno: int) -> bytes:
    """A seccomp program: `errno` for system call `number`, everything else allowed."""
    return b"".join(
        struct.pack("<HBBI", *instruction)
        for instruction in ((0x20, 0, 0, 0), (0x15, 0, 1, number), (0x06, 0, 0, 0x50000 | errno), (0x06, 0, 0, 0x7FFF0000))
    )


@pytest.mark.parametrize("no_new_privs", [0, 1])
def test_seccomp(shared: Guest, no_new_privs: int) -> None:
    sethostname = 170
    extra = ((ProcessTag.SECCOMP, _filter(sethostname, 13)), (ProcessTag.NO_NEW_PRIVS, no_new_privs))
    code, out, err = run(shared, sh("hostname other; grep Seccomp: /proc/self/status; hostname", ALL_CAPABILITIES, extra))
    assert (code, out) == (0, "Seccomp:\t2\nguest\n")
    assert "Permission denied" in err


def test_files_are_bound_and_writable(shared: Guest) -> None:
    _, out, _ = run(
        shared,
        sh("cat /etc/hosts;wc -c < /deep/er/file; stat -c %a /deep/er/file; echo more >> /etc/hosts && tail -n1 /etc/hosts"),
    )
    assert out == "127.0.0.1 localhost\n70000\n600\nmore\n"


def test_masks_and_read_only_paths(shared: Guest) -> None:
    _, out, err = run(
        shared,
        sh(
            "wc -c < /proc/kcore; ls -A /sys/firmware | wc -l; echo 1 > /proc/sys/kernel/panic; touch /sys/x",
            ALL_CAPABILITIES,
        ),
    )
    assert out.split() == ["0", "0"]
    assert err.count("Read-only file system") == 2


def test_stats_and_processes(shared: Guest) -> None:
    stats = shared.client.request(Type.STATS, (), by())
    assert stats.number(1) > 0 and stats.number(4) > 0 and stats.number(6) >= 2 and stats.number(7) == 0
    lines = shared.client.request(Type.PROCESSES, (), by()).texts(1)
    rows = [line.split(" ", 6) for line in lines]
    assert any(row[6].startswith("/bin/sh -c trap") and row[2] == "0" and row[5] == "?" for row in rows)
    assert any(row[6] == "sleep 1000" for row in rows)
    assert all(abs(int(row[3]) / 1e9 - time.time()) < 600 for row in rows)


def test_out_of_step_and_back(shared: Guest) -> None:
    client = shared.client
    for rubbish in (
        b"\0" * 40,
        HEADER.pack(MAGIC, 70_000, 1, 0, 0),
        HEADER.pack(MAGIC, 100, 1, 0, 0) + b"half",
        os.urandom(5000),
    ):
        client.send_bytes(rubbish, by())
        client.connect(by(), follows_another=True)
        client.request(Type.PING, (), by())


def test_damaged_messages_are_errors_and_nothing_else(shared: Guest) -> None:
    for kind in (Type.RUN, Type.EXEC, Type.SETUP, Type.HELLO):
        shared.client.send_bytes(HEADER.pack(MAGIC, 7, kind, 0, 99) + b"\1\0\0\0\xff\0\0", by())
        with pytest.raises((InvalidRequest, Conflict)):
            shared.client.request(Type.EXEC, ((99, 1),), by(), ident=99)
    for number in range(0x1C, 0x1E):
        with pytest.raises(Unsupported):
            shared.client.request(number, (), by())  # type: ignore[arg-type]
    shared.client.request(Type.PING, (), by())


def test_arguments_larger_than_a_frame(shared: Guest) -> None:
    words = [f"{number:06}" + "y" * 100 for number in range(1500)]
    code, out, _ = run(
        shared,
        process(
            "/bin/sh",
            "-c",
            "printf '%s\\n' $# ${#1500}; echo $1",
            "sh",
            *words,
            extra=((ProcessTag.ENV, "BIG=" + "z" * 100_000),),
        ),
    )
    assert code == 0
    assert out.split() == ["1500", "106", words[0]]


def test_an_id_in_use(shared: Guest) -> None:
    with pytest.raises(Conflict, match="process 1 is there already"):
        shared.client.request(Type.EXEC, sh("true"), by(), ident=1)
    with pytest.raises(Conflict):
        shared.client.request(Type.RUN, sh("true"), by(), ident=77)
    with pytest.raises(Conflict, match="set up already"):
        shared.client.request(Type.SETUP, (), by())


def test_init_is_pid_1_and_its_end_ends_the_rest(fresh: Guest) -> None:
    fresh.setup((SetupTag.DISK, 1))
    fresh.client.start(
        Type.RUN, 1, sh("echo $$; read x; exit 9", extra=((ProcessTag.STDIN, 1), (ProcessTag.CWD, "/made/here"))), by()
    )
    fresh.client.start(Type.EXEC, 2, sh("sleep 600"), by())
    fresh.client.close_stdin(by())
    assert fresh.client.wait(by()).exit == 9
    assert fresh.client.outputs[1].stdout == b"1\n"
    assert fresh.client.wait(by(), 2).exit == 137
    with pytest.raises(Conflict, match="not running"):
        fresh.client.request(Type.EXEC, sh("true"), by(), ident=3)
    fresh.client.power_off(by())
    assert fresh.vmm.wait(60) == 0


def test_the_disk_keeps_what_was_written(layer: Path, tmp_path: Path) -> None:
    for script, expected in (("echo kept > /file; rm /etc/group", b""), ("cat /file; ls /etc/group", b"kept\n")):
        guest = Guest(tmp_path, guest_dir(), layers=[layer], disk=True)
        try:
            guest.setup((SetupTag.DISK, 1))
            guest.client.start(Type.RUN, 1, sh(script), by())
            assert guest.client.wait(by()).stdout == expected
            guest.client.request(Type.DISK_SYNC, (), by())
            guest.client.power_off(by())
        finally:
            guest.close()


def test_init_reaps_and_forwards(fresh: Guest) -> None:
    fresh.setup((SetupTag.INIT, 1))
    fresh.client.start(
        Type.RUN,
        1,
        sh(
            "trap 'echo bye; exit 4' TERM; cat /proc/1/comm; echo $$; (sleep 0.1 &); echo ready; while :; do sleep 0.2; done"
        ),
        by(),
    )
    fresh.client.wait_output(b"ready", by())
    assert run(fresh, sh("sleep 1; ps -o stat,comm | grep -c ^Z"))[1] == "0\n"
    fresh.client.request(Type.SIGNAL, ((1, 15),), by(), ident=1)
    output = fresh.client.wait(by())
    assert output.exit == 4
    assert output.stdout == b"docker-init\n2\nready\nbye\n"


def test_out_of_memory_is_counted(fresh: Guest) -> None:
    fresh.setup((SetupTag.MEMORY, 24 << 20))
    fresh.client.start(Type.RUN, 1, sh("tail /dev/zero; echo $?"), by())
    output = fresh.client.wait(by())
    assert (bytes(output.stdout), output.oom_kills) == (b"137\n", 1)
    assert fresh.client.request(Type.STATS, (), by()).number(7) == output.oom_kills


def test_read_only_root_and_terminal_of_init(fresh: Guest) -> None:
    extra = ((ProcessTag.TERMINAL, 1), (ProcessTag.CWD, "/new/place"))
    fresh.setup((SetupTag.READ_ONLY, 1), mount("/tmp", "tmpfs", "noexec"))
    fresh.client.start(
        Type.RUN,
        1,
        sh("pwd; touch /x; touch /tmp/x && ls /tmp; ls -l /dev/console; echo there > /dev/console", extra=extra),
        by(),
    )
    output = fresh.client.wait(by())
    text = output.stdout.decode()
    assert text.startswith("/new/place\r\ntouch: /x: Read-only file system\r\nx\r\n")
    assert text.endswith("there\r\n")


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ((mount("/x", "nofs"),), "no file system 'nofs'"),
        ((mount("/x", "tmpfs", "bogus=1"),), "does not take the option 'bogus=1'"),
        (((SetupTag.SYSCTL, ((1, "kernel.nothing"), (2, "1"))),), "cannot set sysctl kernel.nothing"),
        (((SetupTag.SYSCTL, ((1, "../../sysrq-trigger"), (2, "c"))),), "cannot set sysctl"),
        (((SetupTag.LAYERS, 9),), "cannot mount layer 2"),
        (((SetupTag.DISK, 1),), "no disk with serial number 'disk'"),
    ],
)
def test_setups_that_fail_say_what(layer: Path, tmp_path: Path, items: Items, message: str) -> None:
    guest = Guest(tmp_path, guest_dir(), layers=[layer])
    try:
        with pytest.raises((InvalidRequest, Unsupported, NotFound), match=message):
            guest.setup(*items)
        guest.client.request(Type.PING, (), by())
    finally:
        guest.close()


def test_many_layers_and_a_hostile_one(layer: Path, tmp_path: Path) -> None:
    """127 layers, the last of which has links where the runtime mounts and writes."""
    hostile = tmp_path / "hostile"
    (hostile / "etc").mkdir(parents=True)
    (hostile / "etc/hosts").symlink_to("../../../../../../init")
    (hostile / "sys").symlink_to("/tmp/elsewhere")
    (hostile / "number").write_text("last")
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "number").write_text("first")
    middle = erofs(plain, tmp_path / "plain.erofs")
    images = [layer, *[middle] * 125, erofs(hostile, tmp_path / "hostile.erofs")]
    guest = Guest(tmp_path, guest_dir(), layers=images, disk=True)
    try:
        guest.setup((SetupTag.DISK, 1), FILES[0], layers=127, mounts=MOUNTS[:3])
        guest.client.start(Type.RUN, 1, sh("cat /number; echo; cat /etc/hosts; cat /init"), by())
        assert guest.client.wait(by()).stdout == b"last\n127.0.0.1 localhost\n127.0.0.1 localhost\n"
    finally:
        guest.close()


def test_sysfs_over_a_link_is_refused(layer: Path, tmp_path: Path) -> None:
    hostile = tmp_path / "hostile"
    hostile.mkdir()
    (hostile / "sys").symlink_to("/tmp")
    guest = Guest(tmp_path, guest_dir(), layers=[layer, erofs(hostile, tmp_path / "hostile.erofs")])
    try:
        with pytest.raises(InvalidRequest, match="/sys is a symbolic link"):
            guest.setup(layers=2)
    finally:
        guest.close()
