"""Options that several commands share, with docker's names and meanings."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import click

from ambi.cli.complete import images

F = TypeVar("F", bound=Callable[..., Any])

FORMAT_HELP = "`table`, `json`, `table TEMPLATE` or a Go template such as '{{.ID}} {{.Names}}'."


class Option(click.Option):
    """An option whose variable is called as the option is: AMBI_PS_FORMAT for `ambi ps --format`."""

    def resolve_envvar_value(self, ctx: click.Context) -> str | None:
        long = next((name for name in self.opts if name.startswith("--")), None)
        if self.envvar is not None or long is None or not ctx.auto_envvar_prefix:
            return super().resolve_envvar_value(ctx)
        return os.environ.get(f"{ctx.auto_envvar_prefix}_{long[2:].upper().replace('-', '_')}") or None


def option(*names: str, **settings: Any) -> Callable[[F], F]:
    return click.option(*names, cls=Option, **settings)


def many(*names: str, **settings: Any) -> Callable[[F], F]:
    """An option that may be given several times."""
    return option(*names, multiple=True, **settings)


def switch(*names: str, **settings: Any) -> Callable[[F], F]:
    return option(*names, is_flag=True, **settings)


def format_option(text: str = FORMAT_HELP) -> Callable[[F], F]:
    return option("--format", "template", metavar="FORMAT", help=text)


def filter_option(text: str) -> Callable[[F], F]:
    return many("-f", "--filter", "filters", metavar="KEY=VALUE", help=text)


def prune_filter_option(text: str) -> Callable[[F], F]:
    """As docker's prune has it: `-f` is --force."""
    return many("--filter", "filters", metavar="KEY=VALUE", help=text)


def apply(options: list[Callable[[F], F]], command: F) -> F:
    """`command` with `options`, listed in this order in its help."""
    for option in reversed(options):
        command = option(command)
    return command


_CREATE: list[Callable[[Any], Any]] = [
    option("--isolation", type=click.Choice(["container", "vm"]), help="What it runs in.  [default: container]"),
    option("--runtime", metavar="NAME", help="Docker's name for --isolation: `container` or `vm`."),
    option("--name", metavar="NAME", help="Name of the instance.  [default: a random one]"),
    option("--pull", metavar="WHEN", help="Get the image first: always, missing or never.  [default: missing]"),
    switch("-q", "--quiet", help="Do not tell of a pull."),
    switch("-i", "--interactive", help="Keep stdin open."),
    switch("-t", "--tty", help="Give the process a terminal."),
    many("-a", "--attach", metavar="STREAM", help="Attach to stdin, stdout or stderr only."),
    switch("--rm", "auto_remove", help="Remove the instance when it has ended."),
    option("--cidfile", metavar="FILE", help="Write the instance's ID to FILE, which must not exist."),
    option("--entrypoint", metavar="PROGRAM", help="Run PROGRAM instead of the image's entrypoint."),
    many("-e", "--env", metavar="NAME[=VALUE]", help="Set a variable, or pass on the one of this shell."),
    many("--env-file", metavar="FILE", help="Set the variables in FILE, a NAME=VALUE a line."),
    option("-w", "--workdir", metavar="DIR", help="Working directory inside."),
    option("-u", "--user", metavar="USER[:GROUP]", help="Names or numbers, looked up inside."),
    many("--group-add", metavar="GROUP", help="One more group of the process."),
    many("--annotation", metavar="NAME=VALUE", help="Into its config.json; ambi.vsock=auto: sockets from a VM to its host."),
    many("-l", "--label", metavar="KEY[=VALUE]", help="Label the instance."),
    many("--label-file", metavar="FILE", help="Labels in FILE, a KEY=VALUE a line."),
    option("-h", "--hostname", metavar="NAME", help="Host name.  [default: the short ID]"),
    option("--domainname", metavar="NAME", help="NIS domain name."),
    many("--add-host", metavar="NAME:IP", help="One more line of /etc/hosts."),
    many("--dns", metavar="IP", help="Name server in /etc/resolv.conf."),
    many("--dns-option", "--dns-opt", metavar="OPTION", help="Resolver option in /etc/resolv.conf."),
    many("--dns-search", metavar="DOMAIN", help="Search domain in /etc/resolv.conf."),
    many("--network", "--net", metavar="NETWORK", help="Networks, or none, host, container:NAME.  [default: bridge]"),
    many("--network-alias", "--net-alias", metavar="NAME", help="One more name on the first network."),
    option("--ip", metavar="ADDRESS", help="IPv4 address on the first network."),
    option("--ip6", metavar="ADDRESS", help="IPv6 address on the first network."),
    many("--link-local-ip", metavar="ADDRESS", help="One more address on the first network, for the link alone."),
    option("--mac-address", metavar="MAC", help="MAC address on the first network."),
    many("--link", metavar="NAME[:ALIAS]", help="A name for another instance."),
    many("-p", "--publish", metavar="[IP:][HOST:]PORT[/PROTO]", help="Publish a port or range on the host."),
    switch("-P", "--publish-all", help="Publish every exposed port at a free port of the host."),
    many("--expose", metavar="PORT[/PROTO]", help="Say that a port or range is served."),
    switch("--init", default=None, help="Run an init as PID 1 that forwards signals and reaps processes."),
    switch("--read-only", help="Mount the root file system read-only."),
    many("-v", "--volume", metavar="[SRC:]DST[:ro]", help="Mount a path of the host, a volume, or a new anonymous one."),
    many("--volumes-from", metavar="NAME[:ro]", help="Mount what is mounted in another instance."),
    option("--volume-driver", metavar="NAME", help="Driver of volumes that are made.  [default: local]"),
    many("--mount", metavar="type=TYPE,...", help="A bind, volume or tmpfs, as type=bind,src=/a,dst=/b,readonly."),
    many("--tmpfs", metavar="DST[:OPTIONS]", help="Mount a tmpfs."),
    many("--device", metavar="SRC[:DST][:rwm]", help="Pass on a device of the host."),
    many("--cap-add", metavar="CAP", help="Add a capability, or ALL."),
    many("--cap-drop", metavar="CAP", help="Drop a capability, or ALL."),
    switch("--privileged", help="All capabilities and devices, no seccomp, nothing masked."),
    many("--security-opt", metavar="OPTION", help="no-new-privileges, seccomp=FILE|unconfined, systempaths=unconfined."),
    option("-m", "--memory", metavar="SIZE", help="Memory limit; of a VM, the size of its memory."),
    option("--memory-swap", metavar="SIZE", help="Limit of memory and swap together, -1 for none."),
    option("--cpus", metavar="NUMBER", help="CPU time limit, as 1.5; of a VM, its vCPUs, rounded up."),
    option("-c", "--cpu-shares", type=int, metavar="WEIGHT", help="Share of CPU time when it is scarce."),
    option("--cpuset-cpus", metavar="LIST", help="CPUs to run on, as 0-1,3."),
    option("--blkio-weight", type=click.IntRange(10, 1000), metavar="WEIGHT", help="Share of block I/O when it is scarce."),
    many("--blkio-weight-device", metavar="DEV:WEIGHT", help="The same for one disk."),
    many("--device-read-bps", metavar="DEV:RATE", help="Most bytes a second read from a disk, as /dev/sda:1mb."),
    many("--device-write-bps", metavar="DEV:RATE", help="Most bytes a second written to a disk."),
    many("--device-read-iops", metavar="DEV:RATE", help="Most reads of a disk a second."),
    many("--device-write-iops", metavar="DEV:RATE", help="Most writes of a disk a second."),
    option("--cgroup-parent", metavar="PATH", help="Put its control group below this one."),
    option("--pids-limit", type=int, metavar="NUMBER", help="Most processes and threads, -1 for no limit."),
    many("--ulimit", metavar="NAME=SOFT[:HARD]", help="A resource limit, as nofile=1024:2048."),
    option("--shm-size", metavar="SIZE", help="Size of /dev/shm.  [default: 64m]"),
    many("--storage-opt", metavar="NAME=VALUE", help="size=BYTES: the most that the writable layer may hold."),
    many("--sysctl", metavar="NAME=VALUE", help="A namespaced kernel parameter."),
    option("--oom-score-adj", type=click.IntRange(-1000, 1000), metavar="SCORE", help="Higher is killed sooner."),
    option("--ipc", metavar="MODE", help="IPC namespace: private, shareable, none, host or container:NAME."),
    option("--pid", metavar="MODE", help="PID namespace: private, host or container:NAME."),
    option("--uts", metavar="MODE", help="UTS namespace: private or host."),
    option("--stop-signal", metavar="SIGNAL", help="What `stop` sends first.  [default: the image's, or SIGTERM]"),
    option("--stop-timeout", type=click.IntRange(-1), metavar="SECONDS", help="How long `stop` waits; -1: for ever."),
    option("--restart", metavar="POLICY", help="no, always, unless-stopped or on-failure[:N].  [default: no]"),
    option("--health-cmd", metavar="COMMAND", help="Check the health with a command of the shell."),
    option("--health-interval", metavar="TIME", help="Between two checks.  [default: 30s]"),
    option("--health-timeout", metavar="TIME", help="How long a check may take.  [default: 30s]"),
    option("--health-start-period", metavar="TIME", help="How long failures do not count.  [default: 0s]"),
    option("--health-start-interval", metavar="TIME", help="Between two checks in the start period.  [default: 5s]"),
    option("--health-retries", type=click.IntRange(0), metavar="N", help="Failures that make it unhealthy.  [default: 3]"),
    switch("--no-healthcheck", help="Leave out the image's health check."),
    option("--log-driver", metavar="NAME", help="json-file or none.  [default: json-file]"),
    many("--log-opt", metavar="KEY=VALUE", help="max-size or max-file of json-file."),
]  # fmt: skip

_RUN: list[Callable[[Any], Any]] = [
    switch("-d", "--detach", help="Run in the background, and print the ID."),
    option("--detach-keys", metavar="KEYS", help="Keys that detach from a terminal.  [default: ctrl-p,ctrl-q]"),
    switch("--sig-proxy", default=True, help="Pass signals on; --sig-proxy=false does not.  [default: true]"),
]


_LIMITS: list[Callable[[Any], Any]] = [
    option("-m", "--memory", metavar="SIZE", help="Memory limit."),
    option("--memory-reservation", metavar="SIZE", help="What it keeps when memory is scarce."),
    option("--memory-swap", metavar="SIZE", help="Limit of memory and swap together, -1 for none."),
    option("--cpus", metavar="NUMBER", help="CPU time limit, as 1.5."),
    option("--cpu-period", type=int, metavar="MICROSECONDS", help="Period of --cpu-quota."),
    option("--cpu-quota", type=int, metavar="MICROSECONDS", help="CPU time in a period, -1 for no limit."),
    option("-c", "--cpu-shares", type=int, metavar="WEIGHT", help="Share of CPU time when it is scarce."),
    option("--cpuset-cpus", metavar="LIST", help="CPUs to run on, as 0-1,3."),
    option("--cpuset-mems", metavar="LIST", help="Memory nodes to use, as 0-1."),
    option("--blkio-weight", type=click.IntRange(10, 1000), metavar="WEIGHT", help="Share of block I/O when it is scarce."),
    option("--pids-limit", type=int, metavar="NUMBER", help="Most processes and threads, -1 for no limit."),
    option("--restart", metavar="POLICY", help="no, always, unless-stopped or on-failure[:N]."),
    many("--storage-opt", metavar="NAME=VALUE", help="size=BYTES: a larger disk of a VM."),
]


def limit_options(command: F) -> F:
    """Of `update`: what can be changed of an instance that is there."""
    return apply(_LIMITS, command)


def image_and_command(command: F) -> F:
    command = click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="[COMMAND] [ARG...]")(command)
    return click.argument("image", metavar="IMAGE", shell_complete=images)(command)


def create_options(command: F) -> F:
    return apply(_CREATE, image_and_command(command))


def run_options(command: F) -> F:
    return apply(_RUN + _CREATE, image_and_command(command))
