"""The transcript, second part: exec, what is inside, logs, lists and the image commands."""

# ruff: noqa: E501  (a command stays in one line, as it is typed)

from __future__ import annotations

from tests.cli.transcript.lines import line
from tests.cli.transcript.script import Await, Line, Run

EXEC = (
    line("exec", "exec {box} echo hi", "exec {box} sh -c 'echo out; echo err >&2; exit 5'"),
    line("exec-user", "exec -u alice {box} id", "exec -u 1000:50 {box} id", "exec -u 4242 {box} id -u"),
    line("exec-environment", "exec -e A=1 -w /tmp {box} sh -c 'echo $A $PWD $HOME'"),
    line("exec-no-program", "exec {box} nope"),
    line("exec-no-user", "exec -u nobody-here {box} true"),
    line("exec-no-directory", "exec -w /not/there {box} true"),
    line("exec-input", Run("exec -i {box} wc -c", stdin=bytes(100_000))),
    line("exec-killed", "exec {box} sh -c 'kill -9 $$'"),
    line("exec-detached", "exec -d {box} sh -c 'echo done > /tmp/mark'", Await("exec {box} cat /tmp/mark", "done")),
)

INSIDE = (
    line("environment", "{run} --rm -e A=1 -e B= --hostname h1 box sh -c 'env | sort'"),
    line("hostname", "{run} --rm --hostname h1 --domainname d.example box sh -c 'hostname; cat /etc/hostname'"),
    line("hosts", "{run} --rm --hostname h1 --add-host x:10.0.0.9 box sh -c 'grep -v ^ff /etc/hosts | grep -v ^fe'"),
    line("resolver", "{run} --rm --dns 10.1.1.1 --dns-search a.example --dns-option ndots:2 box grep -v ^# /etc/resolv.conf"),
    line("user", "{run} --rm -u alice box sh -c 'id; echo $HOME'", "{run} --rm -u 12:34 box id"),
    line("extra-groups", "{run} --rm -u alice --group-add 77 --group-add staff box id", "{run} --rm --group-add nope box id"),
    line("workdir", "{run} --rm -w /made/here box pwd"),
    line("entrypoint", "{run} --rm --entrypoint echo box a b", "{run} --rm hello more"),
    line("read-only", "{run} --rm --read-only box touch /x"),
    line("tmpfs", "{run} --rm --read-only --tmpfs /t:size=1m box sh -c 'dd if=/dev/zero of=/t/x bs=64k count=32 2>&1 | head -1'"),
    line("bind", "{run} --rm -v {dir}:/d box sh -c 'cat /d/greeting; echo made > /d/made'", "{run} --rm -v {dir}:/d box cat /d/made"),
    line("bind-read-only", "{run} --rm -v {dir}:/d:ro box touch /d/x"),
    line("bind-missing", "create --name {me} --mount type=bind,src=/not/there,dst=/d box true"),
    line("init", "{run} --rm --init box sh -c '[ $$ != 1 ] && echo not first; exit 6'"),
    line("capabilities", "{run} --rm box grep ^Cap[PEB] /proc/self/status"),
    line("capability-dropped", "{run} --rm --cap-drop CHOWN box chown 1 /tmp"),
    line("no-capabilities", "{run} --rm --cap-drop ALL --cap-add NET_RAW box grep ^Cap[PEB] /proc/self/status"),
    line("user-capabilities", "{run} --rm -u alice box grep ^Cap[PE] /proc/self/status"),
    line("no-new-privileges", "{run} --rm --security-opt no-new-privileges box grep NoNewPrivs /proc/self/status"),
    line("seccomp", "{run} --rm box grep ^Seccomp: /proc/self/status", "{run} --rm box unshare -U true"),
    line("pid-1", "{run} --rm box sh -c 'echo $$; ls -d /proc/[0-9]*'"),
    line("masked", "{run} --rm box sh -c 'ls -A /sys/firmware; echo x > /proc/sys/kernel/hostname'"),
    line("limits", "{run} --rm --ulimit nofile=100:200 --ulimit core=0 box sh -c 'ulimit -n; ulimit -Hn; ulimit -c'"),
    line("shared-memory", "{run} --rm --shm-size 8m box sh -c 'df -k /dev/shm | tail -1 | tr -s \" \" | cut -d\" \" -f2'"),
    line("sysctl", "{run} --rm --sysctl net.ipv4.ip_forward=1 box cat /proc/sys/net/ipv4/ip_forward"),
    line("devices", "{run} --rm box sh -c 'ls -l /dev/null /dev/zero /dev/full /dev/random | tr -s \" \" | cut -d\" \" -f1,5,6; ls -l /dev/fd /dev/stdin | sed s/.*/.dev/'"),
    line("interfaces", "{run} --rm box ls /sys/class/net"),
)  # fmt: skip

LOGS = (
    line("logs", "{run} box sh -c 'echo one; echo two >&2; printf three'", "logs {me}", "logs --tail 1 {me}", "logs -n 0 {me}",
         "logs -t {me}", "logs --since 2100-01-01T00:00:00 {me}", "logs --until 10m {me}"),
    line("logs-follow", "{run} -d box sh -c 'for i in 1 2 3; do echo $i; sleep 0.3; done'", "logs -f {me}"),
    line("logs-none", "{run} --log-driver none box echo hi", "logs {me}"),
)  # fmt: skip

LISTS = (
    line("ps", "{create} -l tier=x box sleep '1 2'", "ps -a --filter label=tier=x --format '{{.Image}} {{.Command}} {{.Status}} {{.Names}}'",
         "ps -q --filter name={me}", "ps -a --filter label=tier=y -q", "ps -a --filter nothing=x"),
    line("inspect", "{create} -e A=1 -l x=y -m 64m --cpus 1.5 -v {dir}:/d:ro --cap-add NET_ADMIN --tmpfs /t box sh -c 'a b'",
         "inspect -f '{{.Path}} {{json .Args}} {{json .Config.Env}} {{json .Config.Labels}} {{json .Config.Cmd}} {{.Config.Image}}' {me}",
         "inspect -f '{{.HostConfig.Memory}} {{.HostConfig.NanoCpus}} {{json .HostConfig.Binds}} {{json .HostConfig.CapAdd}}' {me}",
         "inspect -f '{{json .HostConfig.Tmpfs}} {{json .Mounts}} {{.HostConfig.NetworkMode}} {{json .HostConfig.LogConfig}}' {me}",
         "inspect -f '{{.State.Status}} {{.State.StartedAt}} {{.State.Pid}} {{.Name}} {{json .ExecIDs}} {{.RestartCount}}' {me}"),
    line("rename", "{create} box true", "rename {me} {me}", "rename {me} box", "rename {me} {me}-2", "inspect -f '{{.Name}}' {me}-2",
         "rm {me}-2"),
    line("rm-running", "{run} -d box sleep 1000", "rm {me}", "rm -f {me}", "rm {me}"),
    line("start-twice", "{run} -d box sleep 1000", "start {me}", "stop -t 0 {me}", "stop {me}"),
    line("wait-removed", "{run} -d --rm " + "box sh -c 'sleep 1; exit 3'", "wait {me}"),
    line("top", Run("top {box} -o pid,comm", mask=r"\d+ +")),
    line("events", "{run} box true",
         "events --since 0 --until=-1s --filter container={me} --format '{{.Type}} {{.Action}} {{.Actor.Attributes.name}}'"),
    line("stats", "stats --no-stream --format '{{.Name}}' {box}"),
)  # fmt: skip

IMAGES = (
    line("tag", "tag box other/name:1", "images --format '{{.Repository}}:{{.Tag}}' other/name", "rmi other/name:1",
         "inspect --type image -f '{{json .RepoTags}} {{.Os}} {{.Architecture}} {{json .Config.Cmd}}' box", "rmi nothing:here"),
    line("image-in-use", "rmi box"),
    line("load-garbage", Run("load", stdin=b"this is no archive")),
    line("import", Run("import -c 'CMD [\"echo\", \"imported\"]' - imported:1", stdin=bytes(10240)), "rmi imported:1"),
)  # fmt: skip

MORE: tuple[Line, ...] = (*EXEC, *INSIDE, *LOGS, *LISTS, *IMAGES)
