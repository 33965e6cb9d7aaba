"""`ambi network ...`."""

from __future__ import annotations

from typing import Any

import click

from ambi.cli import complete, flags, networking, pruning
from ambi.cli.app import App, DockerCommand, each, pass_app
from ambi.cli.commands.inspect import show
from ambi.cli.filters import filter_query
from ambi.cli.names import looked_up, network_names, on
from ambi.cli.table import Columns
from ambi.cli.values import key_values
from ambi.client.client import path_of
from ambi.core.errors import InvalidRequest

LIST = Columns(
    {
        "ID": "NETWORK ID",
        "Name": "NAME",
        "Driver": "DRIVER",
        "Scope": "SCOPE",
        "IPv6": "IPV6",
        "Internal": "INTERNAL",
        "Labels": "LABELS",
        "CreatedAt": "CREATED AT",
    },
    ("ID", "Name", "Driver", "Scope"),
    methods={"Label": lambda key: key},
)


@click.group("network")
def network() -> None:
    """Manage networks."""


@network.command("create", cls=DockerCommand)
@flags.option("-d", "--driver", default="bridge", metavar="DRIVER", help="bridge, macvlan or ipvlan.  [default: bridge]")
@flags.many("--subnet", metavar="SUBNET", help="Addresses of the network, as 10.20.0.0/24.  [default: a free one]")
@flags.many("--gateway", metavar="ADDRESS", help="The host's address in a subnet.  [default: its first]")
@flags.many("--ip-range", metavar="RANGE", help="Give addresses from this part of a subnet only.")
@flags.many("--aux-address", metavar="NAME=ADDRESS", help="An address that is never given.")
@flags.switch("--internal", help="Without a way out.")
@flags.switch("--ipv6", help="IPv6 too.")
@flags.switch("--attachable", help="Docker's; every network can be attached to.")
@flags.many("-o", "--opt", metavar="KEY=VALUE", help="An option of the driver, as com.docker.network.driver.mtu=1400.")
@flags.many("-l", "--label", metavar="KEY[=VALUE]", help="Label the network.")
@flags.option("--ipam-driver", metavar="NAME", help="Docker's; there is one, `default`.")
@flags.many("--ipam-opt", metavar="KEY=VALUE", help="Docker's; kept for inspect.")
@click.argument("name", metavar="NETWORK")
@pass_app
def create(app: App, /, name: str, **given: Any) -> None:
    """Create a network, and print its ID."""
    body = {
        "Name": name,
        "CheckDuplicate": True,
        "Driver": given["driver"],
        "EnableIPv6": bool(given["ipv6"]),
        "Internal": bool(given["internal"]),
        "Attachable": bool(given["attachable"]),
        "IPAM": {
            "Driver": given["ipam_driver"] or "default",
            "Options": key_values("--ipam-opt", (), given["ipam_opt"]),
            "Config": _pools(given),
        },
        "Options": key_values("--opt", (), given["opt"]),
        "Labels": key_values("--label", (), given["label"]),
    }
    click.echo(app.client.post("/networks/create", None, body)["Id"])


def _pools(given: dict[str, Any]) -> list[dict[str, Any]]:
    """Docker's IPAM.Config: each address goes to the subnet that it is in."""
    import ipaddress

    pools: list[dict[str, Any]] = [{"Subnet": text} for text in given["subnet"]]
    try:
        nets = [ipaddress.ip_network(text, strict=False) for text in given["subnet"]]
    except ValueError as error:
        raise InvalidRequest(f"invalid value for --subnet: {error}", hint="as --subnet 10.20.0.0/24") from None

    def pool_of(flag: str, text: str) -> dict[str, Any]:
        try:
            inside = ipaddress.ip_interface(text).ip
        except ValueError as error:
            raise InvalidRequest(f"invalid value for {flag}: {error}", hint=f"as {flag} 10.20.0.1") from None
        for pool, net in zip(pools, nets, strict=True):
            if inside in net:
                return pool
        raise InvalidRequest(f"no matching subnet for {flag[2:]} {text}", hint="add --subnet")

    for flag, key in (("--ip-range", "IPRange"), ("--gateway", "Gateway")):
        for text in given[flag[2:].replace("-", "_")]:
            pool = pool_of(flag, text)
            if key in pool:
                raise InvalidRequest(f"cannot give {flag} twice for one subnet: {text}", hint=f"one {flag} a subnet")
            pool[key] = text
    for name, text in key_values("--aux-address", (), given["aux_address"]).items():
        pool_of("--aux-address", text).setdefault("AuxiliaryAddresses", {})[name] = text
    return pools


@network.command("ls", cls=DockerCommand)
@flags.filter_option("By name, id, driver, label, scope, type or dangling.")
@flags.format_option()
@flags.switch("--no-trunc", help="Do not shorten anything.")
@flags.switch("-q", "--quiet", help="IDs only.")
@pass_app
def list_(app: App, filters: tuple[str, ...], template: str | None, no_trunc: bool, quiet: bool) -> None:
    """List networks."""
    found = sorted(app.client.get("/networks", filter_query(filters)), key=lambda n: str(n["Name"]))
    if quiet and not template:
        click.echo("".join(f"{n['Id'] if no_trunc else n['Id'][:12]}\n" for n in found), nl=False)
        return
    LIST.show([_row(n, whole=no_trunc) for n in found], template)


def _row(found: dict[str, Any], *, whole: bool) -> dict[str, object]:
    labels = found.get("Labels") or {}
    return {
        "ID": found["Id"] if whole else found["Id"][:12],
        "Name": found["Name"],
        "Driver": found["Driver"],
        "Scope": found["Scope"],
        "IPv6": str(found["EnableIPv6"]).lower(),
        "Internal": str(found["Internal"]).lower(),
        "Labels": ",".join(f"{key}={value}" for key, value in sorted(labels.items())),
        "Label": lambda key: labels.get(key, ""),
        "CreatedAt": found["Created"],
    }


@network.command("inspect", cls=DockerCommand)
@flags.option("-f", "--format", "template", metavar="FORMAT", help="`json` or a Go template such as '{{.Driver}}'.")
@flags.switch("-v", "--verbose", help="Docker's; there is no more to tell.")
@click.argument("names", nargs=-1, required=True, metavar="NETWORK...", shell_complete=complete.networks)
@pass_app
def inspect(app: App, names: tuple[str, ...], template: str | None, verbose: bool) -> None:
    """Show everything about networks."""
    find = on(app, network_names)(lambda name: app.client.get(path_of("networks", name)))
    show(names, template, find)


@network.command("rm", cls=DockerCommand)
@flags.switch("-f", "--force", help="One that does not exist is no error.")
@click.argument("names", nargs=-1, required=True, metavar="NETWORK...", shell_complete=complete.networks)
@pass_app
def remove(app: App, names: tuple[str, ...], force: bool) -> None:
    """Remove networks."""
    from ambi.core.errors import NotFound

    @on(app, network_names)
    def act(name: str) -> None:
        try:
            app.client.delete(path_of("networks", name))
        except NotFound:
            if not force:
                raise
        click.echo(name)

    each(names, act)


@network.command("prune", cls=DockerCommand)
@flags.switch("-f", "--force", help="Do not ask.")
@flags.prune_filter_option("By label or until.")
@pass_app
def prune(app: App, force: bool, filters: tuple[str, ...]) -> None:
    """Remove every network that no instance is on."""
    if not force:
        pruning.confirm("This will remove all custom networks not used by at least one container.")
    pruning.tell([pruning.networks(app.client, filters)], total=False)


@network.command("connect", cls=DockerCommand)
@flags.many("--alias", metavar="NAME", help="One more name of the instance on this network.")
@flags.option("--ip", metavar="ADDRESS", help="Its IPv4 address.")
@flags.option("--ip6", metavar="ADDRESS", help="Its IPv6 address.")
@flags.many("--link", metavar="NAME[:ALIAS]", help="A name for another instance.")
@flags.many("--driver-opt", metavar="KEY=VALUE", help="An option of the driver.")
@flags.option("--gw-priority", type=int, metavar="NUMBER", help="The highest has the default route.")
@click.argument("name", metavar="NETWORK", shell_complete=complete.networks)
@click.argument("instance", metavar="INSTANCE", shell_complete=complete.instances)
@pass_app
def connect(app: App, /, name: str, instance: str, **given: Any) -> None:
    """Connect an instance to one more network, at once when it runs."""
    ipam = {}
    for flag, key in (("ip", "IPv4Address"), ("ip6", "IPv6Address")):
        if given[flag]:
            ipam[key] = networking.checked_address(f"--{flag}", given[flag], six=flag == "ip6")
    settings = networking.endpoint(
        IPAMConfig=ipam or None,
        Aliases=list(given["alias"]) or None,
        Links=list(given["link"]) or None,
        DriverOpts=key_values("--driver-opt", (), given["driver_opt"]) or None,
        GwPriority=given["gw_priority"] or 0,
    )
    with looked_up(app, name, network_names):
        app.client.post(path_of("networks", name, "connect"), None, {"Container": instance, "EndpointConfig": settings})


@network.command("disconnect", cls=DockerCommand)
@flags.switch("-f", "--force", help="Also an instance that is gone.")
@click.argument("name", metavar="NETWORK", shell_complete=complete.networks)
@click.argument("instance", metavar="INSTANCE", shell_complete=complete.instances)
@pass_app
def disconnect(app: App, name: str, instance: str, force: bool) -> None:
    """Take an instance off a network, at once when it runs."""
    with looked_up(app, name, network_names):
        app.client.post(path_of("networks", name, "disconnect"), None, {"Container": instance, "Force": force})
