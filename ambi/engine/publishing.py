"""Publishing an instance's ports: nft diverts what comes to them; netd holds them, and serves what nft does not (::1)."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from ambi.core.errors import AmbiError, Conflict
from ambi.engine import ports
from ambi.engine.netstate import Endpoint, NetState
from ambi.engine.records import Record
from ambi.network.model import Port

if TYPE_CHECKING:
    from ambi.engine.networks import Networks

log = logging.getLogger(__name__)


class PortTaken(AmbiError):
    """Docker answers with 500, and its clients read the text."""


def publishing_endpoint(networks: Networks, state: NetState) -> Endpoint | None:
    """Where ports lead: the interface with the default route, on a bridge that leads out."""
    for endpoint in state.endpoints:
        if endpoint.nic is not None and endpoint.nic.default_route:
            network = networks.find(endpoint.network)
            if network.driver == "bridge" and not network.internal:
                return endpoint
    return None


def publish(networks: Networks, record: Record) -> None:
    """Publish what `record` asks for, and keep it in its state. Raises PortTaken; nothing is published then."""
    wanted = ports.wanted(record.row.spec)
    state = networks.state(record)
    endpoint = publishing_endpoint(networks, state) if wanted else None
    if endpoint is None or endpoint.nic is None:
        return
    targets = tuple(address.address for address in endpoint.nic.addresses)
    default_ip = networks.find(endpoint.network).options.get("com.docker.network.bridge.host_binding_ipv4", "")
    default_ip = "" if default_ip == "0.0.0.0" else default_ip
    try:
        chosen: list[Port] = []
        for want in wanted:
            chosen.append(_bind(networks, record, endpoint, want, want.host_ip or default_ip, targets))
        networks.host.publish(record.id, chosen)
    except BaseException:
        _unpublish(networks, record)
        raise
    networks.set_ports(record, tuple(chosen))


def _bind(
    networks: Networks, record: Record, endpoint: Endpoint, want: ports.Wanted, host_ip: str, targets: tuple[str, ...]
) -> Port:
    """The port of `want` that is free. One that a run holds which is ending is waited for."""
    netd = networks.names.netd()
    problem: Conflict | None = None
    for number in want.host_ports:
        port = Port(want.protocol, host_ip, number, want.port, targets)
        for _ in range(2):
            try:
                return netd.publish(record.id, [port])[0]
            except Conflict as error:
                problem = error
                if not _wait_for_holder(networks, record, port):
                    break
    where = f"{host_ip or '0.0.0.0'}:{want.host_ports[0]}"
    if len(want.host_ports) > 1:
        where += f"-{want.host_ports[-1]}"
    raise PortTaken(
        f"driver failed programming external connectivity on endpoint {record.name} ({endpoint.id}): "
        f"Bind for {where} failed: port is already allocated{_holder(networks, record, want, problem)}",
        hint=f"publish another port, for example -p {_other(want)}:{want.port}",
    ) from problem


def _other(want: ports.Wanted) -> int:
    after = want.host_ports[-1] + 1
    return after if after < 65536 else want.host_ports[0] - 1


def _holder(networks: Networks, record: Record, want: ports.Wanted, problem: Conflict | None) -> str:
    """Who has it: an instance of ours, or the process that netd has found."""
    for other in networks.registry:
        for port in networks.state(other).ports:
            if other is not record and port.protocol == want.protocol and port.host_port in want.host_ports:
                return f" (by container {other.name})"
    return f" ({problem.message})" if problem is not None else ""


def _wait_for_holder(networks: Networks, record: Record, port: Port) -> bool:
    """Whether an instance whose run was ending had the port, and is gone now."""
    for other in networks.registry:
        if other is record:
            continue
        if any(p.protocol == port.protocol and p.host_port == port.host_port for p in networks.state(other).ports):
            return networks.wait_ending(other)
    return False


def withdraw(networks: Networks, record: Record) -> None:
    """Publish nothing of `record` any more."""
    if networks.state(record).ports:
        _unpublish(networks, record)
        networks.set_ports(record, ())


def _unpublish(networks: Networks, record: Record) -> None:
    for undo in (networks.host.unpublish, networks.names.netd().unpublish):
        try:
            undo(record.id)
        except AmbiError as error:
            log.error("%s: its published ports: %s", record.id[:12], error)


def restore(networks: Networks, record: Record) -> None:
    """After an engine has started again: the ports that `record` has published before it, as they were. Idempotent, and
    nothing stays published when it has ended meanwhile."""
    published = networks.state(record).ports
    if published:
        networks.names.netd().publish(record.id, list(published))
        networks.host.publish(record.id, published)
        if not networks.state(record).ports:
            with record.lock:  # which a start holds
                if not networks.state(record).ports:
                    _unpublish(networks, record)
