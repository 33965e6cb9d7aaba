"""Connecting an instance to one more network, and taking it off one; while it runs, at once."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

from ambi.core.deadline import Deadline
from ambi.core.errors import AmbiError, Conflict, Forbidden, InvalidRequest, NotFound
from ambi.core.model import Isolation
from ambi.engine import endpoints, netfiles, netnames, publishing, trees
from ambi.engine.endpoints import SHARED, mode_of
from ambi.engine.netstate import Endpoint
from ambi.engine.records import Record, Run
from ambi.network.model import Network

if TYPE_CHECKING:
    from ambi.engine.networks import Networks

log = logging.getLogger(__name__)

_CALL_S = 60.0


def connect(networks: Networks, name: str, instance: str, asked: dict[str, Any]) -> None:
    """Raises NotFound, Forbidden (it is on it already, an address is taken), InvalidRequest (Docker's texts)."""
    network = networks.find(name)
    record = networks.registry.find(instance)
    _check_kinds(network, record)
    endpoint = Endpoint(network.name, asked, network.id)
    endpoints.check_endpoint(endpoint)
    with record.lock:
        if record.removing:
            raise Conflict(
                f"container {record.id} is marked for removal and cannot be connected or disconnected to the network"
            )
        if networks.state(record).find(network.name) is not None:
            raise Forbidden(f"endpoint with name {record.name} already exists in network {network.name}")
        run = _running(networks, record)
        if run is None:
            networks.set_endpoints(record, (*networks.state(record).endpoints, endpoint))
        else:
            _plug(networks, record, run, network, endpoint)
    networks.publish(network, "connect", container=record.id)


def _check_kinds(network: Network, record: Record) -> None:
    mode = mode_of(record.row.spec.host)
    if network.name == "host" or mode == "host":
        raise InvalidRequest("container cannot be disconnected from host network or connected to host network")
    if mode.startswith(SHARED):
        raise InvalidRequest(
            "container sharing network namespace with another container or host cannot be connected to any other network"
        )
    if network.name == "none":
        raise InvalidRequest(
            "container cannot be connected to multiple networks with one of the networks in private (none) mode",
            hint="disconnect it from its networks: it is on none then",
        )


def _running(networks: Networks, record: Record) -> Run | None:
    """The run of `record`, None when it does not run; one that ends is waited for."""
    if record.state.running and record.run is not None and record.run.exit is None:
        return record.run
    networks.wait_ending(record)
    return None


def _plug(networks: Networks, record: Record, run: Run, network: Network, endpoint: Endpoint) -> None:
    """Nothing of it stays when it fails."""
    before = networks.state(record).endpoints
    netns = run.connection.descriptor("netns", by=Deadline.after(_CALL_S))
    try:
        with networks.lock:
            made = networks.give(record, endpoint, network, before)
            networks.set_endpoints(record, (*before, made))
        assert made.nic is not None
        try:
            networks.plug(netns, network, made.nic)
            if record.row.isolation is Isolation.VM:
                run.connection.call("plug_nic", name=made.nic.name, by=Deadline.after(_CALL_S))
            networks.tell_names(network)
            if not networks.state(record).ports:
                publishing.publish(networks, record)
        except BaseException:
            networks.set_endpoints(record, before)
            _quietly(networks, netns, made, network)
            raise
    finally:
        os.close(netns)
    update_files(networks, record, run)


def _quietly(networks: Networks, netns: int, endpoint: Endpoint, network: Network) -> None:
    try:
        if endpoint.nic is not None:
            networks.host.unplug(netns, endpoint.nic)
        networks.tell_names(network)
    except AmbiError as error:
        log.error("undoing a connection to %s: %s", endpoint.name, error)


def disconnect(networks: Networks, name: str, instance: str, *, force: bool) -> None:
    """Raises NotFound, Forbidden (it is not on it), InvalidRequest. force: an instance that is gone is no error."""
    network = networks.find(name)
    try:
        record = networks.registry.find(instance)
    except NotFound:
        if force:
            return
        raise
    if network.name == "host" or mode_of(record.row.spec.host) == "host":
        raise InvalidRequest("container cannot be disconnected from host network or connected to host network")
    with record.lock:
        endpoint = networks.state(record).find(network.name)
        if network.name == "none" and mode_of(record.row.spec.host) == "none" and not networks.state(record).endpoints:
            return  # so that it may be connected to others, which it may here anyway
        if endpoint is None:
            raise Forbidden(f"container {record.id} is not connected to network {network.name}")
        run = _running(networks, record)
        kept = tuple(e for e in networks.state(record).endpoints if e.name != network.name)
        if run is None:
            networks.set_endpoints(record, kept)
        else:
            _unplug(networks, record, run, network, endpoint.name)
    networks.publish(network, "disconnect", container=record.id)


def _unplug(networks: Networks, record: Record, run: Run, network: Network, name: str) -> None:
    state = networks.state(record)
    gone = next(e for e in state.endpoints if e.name == name)
    kept = tuple(e for e in state.endpoints if e.name != name)
    if gone.nic is None:
        networks.set_endpoints(record, kept)
        return
    ports = state.ports if gone.nic.default_route else ()
    netns = run.connection.descriptor("netns", by=Deadline.after(_CALL_S))
    try:
        if ports:
            publishing.withdraw(networks, record)
        if record.row.isolation is Isolation.VM:
            run.connection.call("unplug_nic", name=gone.nic.name, by=Deadline.after(_CALL_S))
        networks.host.unplug(netns, gone.nic)
        networks.set_endpoints(record, _move_default_route(networks, record, run, netns, gone, kept))
    finally:
        os.close(netns)
    networks.tell_names(network)
    if ports:
        publishing.publish(networks, record)
    update_files(networks, record, run)


def _move_default_route(
    networks: Networks, record: Record, run: Run, netns: int, gone: Endpoint, kept: tuple[Endpoint, ...]
) -> tuple[Endpoint, ...]:
    """`kept`, with the default routes by the next network that leads out when they went by `gone`."""
    if gone.nic is None or not gone.nic.default_route:
        return kept
    for place, endpoint in enumerate(kept):
        network = networks.find(endpoint.network)
        if endpoint.nic is None or network.internal:
            continue
        nic = endpoint.nic._replace(default_route=True)
        vm = record.row.isolation is Isolation.VM
        if vm:  # it learns routes when it gets the interface
            run.connection.call("unplug_nic", name=nic.name, by=Deadline.after(_CALL_S))
        networks.host.route_by(netns, network, nic)
        if vm:
            run.connection.call("plug_nic", name=nic.name, by=Deadline.after(_CALL_S))
        return (*kept[:place], endpoint._replace(nic=nic), *kept[place + 1 :])
    return kept


def update_files(networks: Networks, record: Record, run: Run) -> None:
    """The instance's /etc/hosts and /etc/resolv.conf, which are files of ours, say what is so now."""
    data = networks.data_dir(record)
    try:
        files = netfiles.changed(data, record.row.spec, netnames.of(networks, record), run.files)
        if not files:
            return
        if record.row.isolation is Isolation.VM:
            trees.write_files(run.connection, files)
        else:
            netfiles.write(data, files)
        run.files = {**(run.files or {}), **files}
    except (AmbiError, OSError) as error:
        log.warning("%s: its /etc/hosts: %s", record.id[:12], error)
