"""What every driver promises: the same plan, the same outcome, whatever isolates it."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest

from ambi.core.deadline import Deadline
from ambi.core.errors import AmbiError, CommandNotExecutable, CommandNotFound, Conflict, InvalidRequest, NotFound
from ambi.core.loop import Loop
from ambi.core.model import Status
from ambi.linux import capabilities
from tests.driverkit import CAPABILITIES, Rig, Running, Watched

SIGTERM, SIGKILL, SIGUSR1 = 15, 9, 10


# Ends


@pytest.mark.parametrize("code", [0, 1, 42, 255])
def test_exit_code(rig: Rig, code: int) -> None:
    done = rig.run(["sh", "-c", f"exit {code}"])
    assert (done.code, done.exit.oom_killed, done.exit.finished_ns > 0) == (code, False, True)


def test_sigkill_is_137(rig: Rig) -> None:
    with rig.started(["sleep", "1000"]) as running:
        running.created.init.signal(SIGTERM)  # pid 1 of its namespace has no handler, so this is ignored
        running.created.init.signal(SIGKILL)
        assert running.init.finish().code == 128 + SIGKILL
        assert running.created.state() is Status.EXITED


def test_handled_signal(rig: Rig) -> None:
    with rig.started(["sh", "-c", "trap 'exit 7' TERM; echo ready; while :; do sleep 0.05; done"]) as running:
        running.init.until(lambda: b"ready" in running.init.out)
        running.created.init.signal(SIGTERM)
        assert running.init.finish().code == 7


def test_signal_after_the_end_is_no_error(rig: Rig) -> None:
    with rig.started(["true"]) as running:
        running.init.finish()
        running.created.init.signal(SIGKILL)


@pytest.mark.parametrize(
    "program,error,text",
    [
        ("nope", CommandNotFound, 'exec: "nope": executable file not found in $PATH'),
        ("/nope", CommandNotFound, 'exec: "/nope": stat /nope: no such file or directory'),
        ("/etc/passwd", CommandNotExecutable, 'exec: "/etc/passwd": permission denied'),
        ("/etc", CommandNotExecutable, 'exec: "/etc": is a directory'),
    ],
)
def test_program_that_cannot_run(rig: Rig, idle: Running, program: str, error: type[AmbiError], text: str) -> None:
    with pytest.raises(error) as raised, rig.started([program]):
        pass
    assert text in raised.value.message
    with pytest.raises(error) as raised:
        idle.start_exec([program])
    assert text in raised.value.message


# Streams


def test_output_is_apart_and_whole(rig: Rig) -> None:
    script = "head -c 1000000 /dev/zero | tr '\\0' o; head -c 300000 /dev/zero | tr '\\0' e >&2"
    done = rig.run(["sh", "-c", script])
    assert (done.out, done.err) == (b"o" * 1_000_000, b"e" * 300_000)


def test_stdin_and_its_end(rig: Rig) -> None:
    data = os.urandom(300_000)
    assert rig.run(["cat"], input=data).out == data


def test_without_stdin_is_null(rig: Rig) -> None:
    assert rig.run(["sh", "-c", "cat; echo end"]).out == b"end\n"


def test_terminal(rig: Rig) -> None:
    size = {"height": 11, "width": 22}
    with rig.started(["sh", "-c", "tty; stty size; read x; stty size; echo got $x"], terminal=True, consoleSize=size) as run:
        run.init.until(lambda: b"11 22" in run.init.out)
        run.created.init.resize(33, 44)
        run.init.write(b"hello\n")
        done = run.init.finish()
    assert done.code == 0
    lines = done.out.replace(b"\r\n", b"\n").split(b"\n")
    assert lines[0].startswith(b"/dev/")
    assert b"33 44" in lines and b"got hello" in lines


def test_resize_without_terminal(idle: Running) -> None:
    with pytest.raises(InvalidRequest):
        idle.created.init.resize(1, 1)


def test_interrupt_by_terminal(idle: Running) -> None:
    watched = idle.start_exec(["sh", "-c", "echo up; sleep 1000"], terminal=True)
    watched.until(lambda: b"up" in watched.out)
    watched.write(b"\x03")
    assert watched.finish().code == 130


# The process


def test_environment_and_directory(rig: Rig) -> None:
    done = rig.run(["sh", "-c", "echo $MARK $HOME; pwd; hostname"], cwd="/made/for/you", hostname="name")
    assert done.out == b"here /root\n/made/for/you\nname\n"


@pytest.mark.parametrize(
    "user,expected",
    [
        ("alice", "1000 1000 1000 44 50 /home/alice"),
        ("1000", "1000 1000 1000 44 50 /home/alice"),
        ("alice:daemon", "1000 1 1 /home/alice"),
        ("4711", "4711 0 0 /"),
        ("4711:4712", "4711 4712 4712 /"),
        ("", "0 0 0 /root"),
    ],
)
def test_user(idle: Running, user: str, expected: str) -> None:
    done = idle.exec(["sh", "-c", "echo $(id -u) $(id -g) $(id -G) $HOME"], user=user, env=["PATH=/bin"])
    assert done.out.decode().strip() == expected


@pytest.mark.parametrize("user", ["nobody-here", "alice:nothing", "root:no", "99999999999"])
def test_unknown_user(rig: Rig, idle: Running, user: str) -> None:
    with pytest.raises(InvalidRequest), rig.started(["true"], user=user):
        pass
    with pytest.raises(InvalidRequest):
        idle.start_exec(["true"], user=user)


def test_additional_groups(rig: Rig, idle: Running) -> None:
    user = {"uid": 7, "gid": 8, "additionalGids": [99], "additionalGroups": ["video", "staff"]}
    assert idle.exec(["id", "-G"], user=user).out == b"8 44 50 99\n"
    missing = {"username": "alice", "additionalGroups": ["nope"]}
    with pytest.raises(InvalidRequest, match="Unable to find group nope"), rig.started(["true"], user=missing):
        pass
    with pytest.raises(InvalidRequest, match="Unable to find group nope"):
        idle.start_exec(["true"], user=missing)


def _status(idle: Running, **changes: Any) -> dict[str, str]:
    text = idle.exec(["cat", "/proc/self/status"], **changes).out.decode()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}


def test_capabilities(idle: Running) -> None:
    mask = f"{capabilities.mask_of(CAPABILITIES):016x}"
    found = _status(idle)
    assert [found[f"Cap{kind}"] for kind in ("Prm", "Eff", "Bnd", "Inh", "Amb")] == [mask, mask, mask, "0" * 16, "0" * 16]


def test_capabilities_of_a_plain_user(idle: Running) -> None:
    found = _status(idle, user="alice")
    assert (found["CapPrm"], found["CapEff"]) == ("0" * 16, "0" * 16)


def test_ambient_capabilities(idle: Running) -> None:
    one = ["CAP_NET_BIND_SERVICE"]
    sets = dict.fromkeys(("bounding", "effective", "permitted", "inheritable", "ambient"), one)
    found = _status(idle, user="alice", capabilities=sets)
    assert {found[f"Cap{kind}"] for kind in ("Prm", "Eff", "Bnd", "Inh", "Amb")} == {f"{capabilities.mask_of(one):016x}"}


def test_no_new_privileges_and_filter(idle: Running) -> None:
    assert [_status(idle)[key] for key in ("NoNewPrivs", "Seccomp")] == ["0", "2"]
    assert [_status(idle, noNewPrivileges=True)[key] for key in ("NoNewPrivs", "Seccomp")] == ["1", "2"]


def test_filter_denies(idle: Running) -> None:
    done = idle.exec(["unshare", "-m", "true"])
    assert done.code == 1 and b"not permitted" in done.err


def test_signals_start_default(idle: Running) -> None:
    found = _status(idle)
    assert {found[key] for key in ("SigBlk", "SigIgn", "SigCgt")} == {"0" * 16}


def test_only_stdio_is_open(idle: Running) -> None:
    done = idle.exec(["sh", "-c", "exec ls /proc/self/fd"])
    assert done.out.split() == [b"0", b"1", b"2", b"3"]  # 3 is ls reading the directory


def test_limits(idle: Running) -> None:
    limit = {"type": "RLIMIT_NOFILE", "soft": 77, "hard": 99}
    assert idle.exec(["sh", "-c", "ulimit -Sn; ulimit -Hn"], rlimits=[limit]).out == b"77\n99\n"


def test_umask(idle: Running) -> None:
    assert idle.exec(["sh", "-c", "umask"]).out == b"0022\n"


def test_stdio_can_be_opened_again(idle: Running) -> None:
    done = idle.exec(["sh", "-c", "echo o > /dev/stdout; echo e > /dev/stderr"], user="alice")
    assert (done.code, done.out, done.err) == (0, b"o\n", b"e\n")


# The surroundings


def test_first_process(rig: Rig) -> None:
    done = rig.run(["sh", "-c", "echo $$; ls -d /proc/[0-9]* | wc -l"])
    assert done.out.split()[0] == b"1"


def test_init_reaps(rig: Rig) -> None:
    script = "(sleep 0.05 &) ; sleep 0.3; ls -d /proc/[0-9]* | wc -l; echo $$; cat /proc/1/comm; exit 5"
    done = rig.run(["sh", "-c", script], annotations={"ambi.init": "1"})
    count, pid, name = done.out.split()
    assert done.code == 5
    assert pid != b"1" and b"init" in name
    assert int(count) <= 4  # init, sh, ls, wc: nothing waits to be reaped


def test_init_forwards_signals(rig: Rig) -> None:
    script = "trap 'exit 9' TERM; echo ready; while :; do sleep 0.05; done"
    with rig.started(["sh", "-c", script], annotations={"ambi.init": "1"}) as running:
        running.init.until(lambda: b"ready" in running.init.out)
        running.created.init.signal(SIGTERM)
        assert running.init.finish().code == 9


def test_kernel_file_systems(idle: Running) -> None:
    places = "/proc /dev /dev/pts /sys /dev/mqueue /dev/shm"
    script = f"for m in {places}; do grep \" $m \" /proc/mounts | tail -1 | cut -d' ' -f3; done"
    assert idle.exec(["sh", "-c", script]).out.split() == [b"proc", b"tmpfs", b"devpts", b"sysfs", b"mqueue", b"tmpfs"]


def test_devices(idle: Running) -> None:
    done = idle.exec(
        ["sh", "-c", "cd /dev; stat -c '%n %t:%T %a' null zero full random urandom tty; readlink fd; readlink ptmx"]
    )
    assert done.out.decode().splitlines() == [
        "null 1:3 666", "zero 1:5 666", "full 1:7 666", "random 1:8 666", "urandom 1:9 666", "tty 5:0 666",
        "/proc/self/fd", "pts/ptmx",
    ]  # fmt: skip


def test_masked_and_readonly(idle: Running) -> None:
    done = idle.exec(["sh", "-c", "cat /proc/keys; ls /sys/firmware; echo 1 > /proc/sys/kernel/panic"])
    assert done.out == b""
    assert b"/proc/sys/kernel/panic: Read-only file system" in done.err


def test_loopback_is_up(idle: Running) -> None:
    assert b"127.0.0.1" in idle.exec(["ip", "addr", "show", "lo"]).out


def test_host_name(idle: Running) -> None:
    assert idle.exec(["hostname"]).out == b"idle\n"


def test_files(rig: Rig) -> None:
    files = {"/etc/hosts": "1.2.3.4 there\n", "/deep/down/file": "content\n"}
    done = rig.run(["sh", "-c", "cat /etc/hosts /deep/down/file; echo more >> /etc/hosts; tail -1 /etc/hosts"], files=files)
    assert done.out == b"1.2.3.4 there\ncontent\nmore\n"


def test_readonly_root(rig: Rig) -> None:
    tmpfs = {"destination": "/scratch", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "noexec", "size=1m"]}
    script = "echo a > /scratch/a && cat /scratch/a; echo b > /b; cp /bin/busybox /scratch/id; /scratch/id"
    done = rig.run(["sh", "-c", script], root={"readonly": True}, mounts=(tmpfs,))
    assert done.out == b"a\n"
    assert (b"/b: Read-only file system" in done.err and b"No space left" in done.err) or b"ermission denied" in done.err


def test_mounts_come_and_go(rig: Rig, short_tmp: Path) -> None:
    """A VM of QEMU has to begin with one."""
    first, second = short_tmp / "first", short_tmp / "second"
    for place in (first, second):
        place.mkdir()
        (place / "file").write_text(f"{place.name}\n")
    by = Deadline.after(120)

    def bind(source: Path, destination: str, *options: str) -> dict[str, Any]:
        return {"destination": destination, "type": "bind", "source": str(source), "options": ["rbind", *options]}

    with rig.started(["sleep", "1000"], mounts=(bind(first, "/first"),)) as running:
        created: Any = running.created
        created.attach(bind(second, "/srv/second"), by)
        created.attach(bind(second, "/srv/ro", "ro"), by)
        created.attach(bind(second / "file", "/one/file"), by)
        script = "cat /srv/second/file /one/file && echo back > /srv/second/back && ! touch /srv/ro/no"
        done = running.exec(["sh", "-c", script])
        assert (done.code, done.out) == (0, b"second\nsecond\n"), done
        assert (second / "back").read_text() == "back\n"
        with pytest.raises(Conflict, match="attached at /srv/ro already"):
            created.attach(bind(second, "/srv/ro"), by)
        with pytest.raises(NotFound, match="nowhere"):
            created.attach(bind(short_tmp / "nowhere", "/srv/nowhere"), by)
        holder = running.start_exec(["sh", "-c", "cd /srv/second && echo in && read x && cat file"], stdin=True)
        holder.until(lambda: holder.out)
        with pytest.raises(Conflict, match="/srv/second is in use"):
            created.detach("/srv/second", by, force=False)
        created.detach("/srv/second", by, force=True)
        for destination in ("/srv/ro", "/one/file"):
            created.detach(destination, by, force=False)
        done = running.exec(["sh", "-c", "ls /srv/second /srv/ro && cat /one/file /first/file"])
        assert (done.code, done.out) == (0, b"/srv/ro:\n\n/srv/second:\nfirst\n"), done
        holder.write(b"\n")
        holder.close_stdin()
        assert holder.finish().out == b"in\nsecond\n"
        with pytest.raises(NotFound, match="nothing is attached at /srv/ro"):
            created.detach("/srv/ro", by, force=False)
        created.attach(bind(first, "/srv/ro"), by)
        assert running.exec(["cat", "/srv/ro/file"]).out == b"first\n"


def test_bind_mounts(rig: Rig, short_tmp: Path) -> None:
    (short_tmp / "file").write_text("from the host\n")
    binds = (
        {"destination": "/rw", "type": "bind", "source": str(short_tmp), "options": ["rbind", "rprivate"]},
        {"destination": "/ro", "type": "bind", "source": str(short_tmp), "options": ["rbind", "ro", "rprivate"]},
        {"destination": "/one/file", "type": "bind", "source": str(short_tmp / "file"), "options": ["rbind", "rprivate"]},
    )
    done = rig.run(["sh", "-c", "cat /one/file; echo back > /rw/back; echo no > /ro/no"], mounts=binds)
    assert done.out == b"from the host\n"
    assert b"Read-only file system" in done.err
    assert (short_tmp / "back").read_text() == "back\n"
    assert not (short_tmp / "no").exists()


def test_sysctl(rig: Rig) -> None:
    done = rig.run(["cat", "/proc/sys/net/ipv4/ip_unprivileged_port_start"],
                   linux={"sysctl": {"net.ipv4.ip_unprivileged_port_start": "80"}})  # fmt: skip
    assert done.out == b"80\n"


def test_upper_stays(rig: Rig) -> None:
    first = rig.plan(["sh", "-c", "echo kept > /kept; rm /etc/group; mkdir /bin/x 2>/dev/null; chmod 700 /home; exit 0"])
    with rig.started_plan(first) as running:
        assert running.init.finish().code == 0
    upper = first.rootfs.upper  # type: ignore[union-attr]
    with rig.started_plan(rig.plan(["sh", "-c", "cat /kept; ls /etc; stat -c %a /home"], upper=upper)) as running:
        done = running.init.finish()
    kept, *etc, mode = done.out.decode().split()
    assert (kept, mode) == ("kept", "700")
    assert "passwd" in etc and "group" not in etc


# Exec


def test_exec(idle: Running) -> None:
    done = idle.exec(["sh", "-c", "cat; echo err >&2; exit 3"], stdin=b"in")
    assert (done.code, done.out, done.err) == (3, b"in", b"err\n")


def test_exec_shares_everything(idle: Running) -> None:
    idle.exec(["sh", "-c", "echo shared > /shared"])
    assert idle.exec(["cat", "/shared"]).out == b"shared\n"
    links = [f"readlink /proc/$p/ns/{kind}" for kind in ("mnt", "pid", "net", "uts", "ipc", "cgroup")]
    script = "for p in 1 self; do " + "; ".join(links) + "; done"
    lines = idle.exec(
        ["sh", "-c", script], capabilities={k: ["CAP_SYS_PTRACE"] for k in ("bounding", "effective", "permitted")}
    )
    found = lines.out.split()
    assert found[:6] == found[6:]


def test_exec_terminal(idle: Running) -> None:
    watched = idle.start_exec(["sh", "-c", "tty; stty size; exit 6"], terminal=True, consoleSize={"height": 5, "width": 6})
    done = watched.finish()
    assert done.code == 6
    assert b"5 6" in done.out


def test_exec_in_a_directory_that_is_not_there(idle: Running) -> None:
    with pytest.raises(InvalidRequest, match="/not/there"):
        idle.start_exec(["true"], cwd="/not/there")


def test_exec_killed(idle: Running) -> None:
    watched = idle.start_exec(["sleep", "1000"])
    watched.process.signal(SIGKILL)
    assert watched.finish().code == 137


def test_exec_ends_with_init(rig: Rig) -> None:
    with rig.started(["sleep", "1000"]) as running:
        watched = running.start_exec(["sleep", "1000"])
        running.created.init.signal(SIGKILL)
        assert running.init.finish().code == 137
        assert watched.finish().code == 137
        with pytest.raises(Conflict):
            running.start_exec(["true"])


def test_execs_leave_no_descriptors(idle: Running) -> None:
    """A driver may keep something ready for the next exec, made a moment after one; then it is the same after each."""
    idle.exec(["true"])
    idle.loop.run(lambda: False, Deadline.after(0.5))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        idle.exec(["true"], stdin=b"")
    idle.loop.run(lambda: False, Deadline.after(0.5))
    assert len(os.listdir("/proc/self/fd")) == before


def test_full_stdout_blocks_nothing_else(rig: Rig) -> None:
    loop = Loop()
    created = rig.create(rig.plan(["sh", "-c", "yes"]), loop)
    exits: list[object] = []
    created.init.on_exit = exits.append
    created.start(Deadline.after(60))
    other = Watched(created.exec({**_true(), "args": ["echo", "alive"]}, False, Deadline.after(60)), loop)
    assert other.finish().out == b"alive\n"
    created.init.signal(SIGKILL)
    assert loop.run(lambda: bool(exits), Deadline.after(60))
    for fd in {created.init.streams.stdout, created.init.streams.stderr}:
        assert fd is not None
        os.close(fd)
    created.delete(Deadline.after(30))


def _true() -> dict[str, object]:
    from tests.driverkit import oci_process

    return oci_process(["true"])


# Limits


def test_memory_limit(rig: Rig) -> None:
    limits = {"memory": {"limit": 24 << 20, "swap": 24 << 20}}
    done = rig.run(["sh", "-c", "x=aaaaaaaa; while :; do x=$x$x; done"], resources=limits)
    assert (done.code, done.exit.oom_killed) == (137, True)


def test_pids_limit(rig: Rig) -> None:
    with rig.started(["sleep", "1000"], resources={"pids": {"limit": 6}}) as running:
        done = running.exec(["sh", "-c", "for i in 1 2 3 4 5 6 7 8; do sleep 3 & done; wait"])
    assert done.code != 0 and b"fork" in done.err


def test_limits_change_while_it_runs(rig: Rig) -> None:
    """Down, up, and away."""
    with rig.started(["sleep", "1000"]) as running:
        update: Any = running.created.update  # type: ignore[attr-defined]
        use = ["sh", "-c", "dd if=/dev/zero of=/dev/null bs=60M count=1 2>/dev/null"]
        for limit, code in ((30 << 20, 137), (120 << 20, 0)):
            assert not update({"memory": {"limit": limit, "swap": limit}}, Deadline.after(30))
            assert running.exec(use).code == code
            assert running.created.usage().memory_limit_bytes == limit
        update({"pids": {"limit": 4}}, Deadline.after(30))
        many = ["sh", "-c", "for i in 1 2 3 4 5 6; do sleep 1 & done; wait"]
        assert b"fork" in running.exec(many).err
        update({"pids": {"limit": -1}}, Deadline.after(30))
        assert running.exec(many).code == 0


def test_usage_and_processes(idle: Running) -> None:
    idle.exec(["sh", "-c", "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done"])
    usage = idle.created.usage()
    assert usage.cpu_ns > 0 and usage.memory_bytes > 0 and usage.pids >= 1 and usage.oom_kills == 0
    listed = idle.created.processes()
    sleeper = next(entry for entry in listed if "sleep 100000" in entry["command"])
    assert sleeper["uid"] == 0 and sleeper["stime_ns"] > 0


# The way in and out


def test_nothing_runs_before_start(rig: Rig, short_tmp: Path) -> None:
    bind = {"destination": "/out", "type": "bind", "source": str(short_tmp), "options": ["rbind", "rprivate"]}
    loop = Loop()
    created = rig.create(rig.plan(["touch", "/out/ran"], mounts=(bind,)), loop)
    assert created.state() is Status.CREATED
    watched = Watched(created.init, loop)
    assert not (short_tmp / "ran").exists()
    created.start(Deadline.after(60))
    assert watched.finish().code == 0
    assert stat.S_ISREG((short_tmp / "ran").stat().st_mode)
    created.delete(Deadline.after(30))


def test_delete_instead_of_start(rig: Rig) -> None:
    loop = Loop()
    created = rig.create(rig.plan(["true"]), loop)
    Watched(created.init, loop).release()
    created.delete(Deadline.after(30))


def test_delete_kills(rig: Rig) -> None:
    plan = rig.plan(["sleep", "1000"])
    loop = Loop()
    created = rig.create(plan, loop)
    created.start(Deadline.after(60))
    Watched(created.init, loop).release()
    created.delete(Deadline.after(30))
    rig.driver.sweep(plan)


def test_second_start_is_refused(rig: Rig) -> None:
    with rig.started(["sleep", "1000"]) as running, pytest.raises(Conflict):
        running.created.start(Deadline.after(30))


def test_failed_create_leaves_nothing(rig: Rig) -> None:
    plan = rig.plan(["nope"], files={"/etc/hosts": "x\n"})
    with pytest.raises(CommandNotFound), rig.started_plan(plan):
        pass
    assert not (plan.data_dir / "files").exists()
    rig.driver.sweep(plan)


def test_sweep_after_a_dead_shim(rig: Rig) -> None:
    plan = rig.plan(["sh", "-c", "echo up; sleep 1000"])
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            loop = Loop()
            created = rig.create(plan, loop)
            watched = Watched(created.init, loop)
            created.start(Deadline.after(60))
            watched.until(lambda: b"up" in watched.out)
            os.write(write, b"up")
        finally:
            os._exit(9)
    os.close(write)
    assert os.read(read, 2) == b"up"
    os.close(read)
    os.waitpid(pid, 0)
    rig.driver.sweep(plan)
    rig.driver.sweep(plan)
    assert not list(Path("/sys/fs/cgroup").glob(f"*/{plan.config['linux']['cgroupsPath']}"))


@pytest.mark.parametrize(
    "change,words",
    [
        ({"args": []}, "args"),
        ({"mounts": ({"destination": "/x", "type": "nfs", "source": "a:/b"},)}, "nfs"),
        ({"linux": {"namespaces": [{"type": "mount"}, {"type": "mystery"}]}}, "mystery"),
        ({"linux": {"resources": {"rdma": {"x": 1}}}}, "rdma"),
    ],
    ids=["args", "mount", "namespace", "resource"],
)
def test_check_names_what_cannot_be(rig: Rig, change: dict[str, object], words: str) -> None:
    plan = rig.plan(**{"args": ["true"], **change})  # type: ignore[arg-type]
    problems = rig.driver.check(plan)
    assert problems and any(words in problem.message for problem in problems)
    with pytest.raises(AmbiError), rig.started_plan(plan):
        pass


def test_check_of_a_good_plan(rig: Rig) -> None:
    assert rig.driver.check(rig.plan(["true"])) == []
    assert rig.driver.probe().problem is None
