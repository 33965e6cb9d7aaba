"""Networks and what instances have on them: the only caller of ambi.network.

The order for an instance that starts: addresses are chosen and recorded under the lock, which is held for moments; then the
kernel, the names and the ports, without it. What a start has made goes with `release`, at the end of the run as after a
failure. Who has an address is what the endpoints say, nothing else.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ambi.core.deadline import Deadline
from ambi.core.errors import AmbiError, Conflict, Forbidden, InvalidRequest, NotFound
from ambi.core.model import Isolation
from ambi.core.roots import DEFAULT_RUN_ROOT
from ambi.engine import addressing, endpoints, filters, names, netnames, newnetwork, publishing
from ambi.engine.endpoints import SHARED, mode_of
from ambi.engine.leftlinks import LeftLinks
from ambi.engine.netstate import Endpoint, NetState, decode
from ambi.engine.records import Record
from ambi.engine.spare import Spare
from ambi.engine.types import Instance
from ambi.network.host import NetworkHost
from ambi.network.model import DEFAULT_NETWORK, Network, Nic, Pool, Port

if TYPE_CHECKING:
    from ambi.engine.core import Core

log = logging.getLogger(__name__)

_ENDING_S = 60.0  # how long the end of a run may take that holds what somebody wants
_LAST_END_S = 5.0  # the same, when the engine itself ends
_CALL_S = 30.0
_WHOLE = ""  # the row of an instance, not of one of its networks: published ports, and that the rows are all it is on


def builtin_id(name: str) -> str:
    """The id of a network that every engine has: the same on every host."""
    return hashlib.sha256(f"ambi network {name}".encode()).hexdigest()


_NONE = Network(builtin_id("none"), "none", "null")
_HOST = Network(builtin_id("host"), "host", "host")


def tag_of(run_root: os.PathLike[str]) -> str:
    """What tells the links of this run root from those of another."""
    path = os.fspath(run_root)
    return "" if path == os.fspath(DEFAULT_RUN_ROOT) else hashlib.sha256(os.fsencode(path)).hexdigest()[:6]


class Attachment:
    """What a start takes along: namespaces, whose descriptors `close` lets go of, and the files that name the network's.

    netns: None for the host's own, and for a driver that makes one with `lo` alone. others: by kind, of other instances.
    """

    __slots__ = ("files", "netns", "others")

    def __init__(self, netns: int | None, files: netnames.Names) -> None:
        self.netns = netns
        self.files = files
        self.others: dict[str, int] = {}

    @property
    def namespaces(self) -> dict[str, int]:
        """Their descriptors by kind."""
        return {**({} if self.netns is None else {"network": self.netns}), **self.others}

    def close(self) -> None:
        for fd in self.namespaces.values():
            os.close(fd)
        self.netns, self.others = None, {}


class Networks:
    """All networks of one engine. Safe to use from any thread."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self.registry = core.registry
        self.host = NetworkHost(tag_of(core.roots.run))
        self.names = netnames.NameService(core.roots, self.host.tag)
        self.lock = threading.RLock()  # over the networks and over who has which address; held for moments
        self._networks: dict[str, Network] = {n.id: n for n in (_NONE, _HOST)}
        self._leaving: dict[str, Network] = {}  # removed, but for their links
        self._making: set[str] = set()  # names of networks that a create is at
        self._threads: list[threading.Thread] = []
        self._spare = Spare(self.host.new_namespace)
        self._left = LeftLinks(self.host, core.scheduler.later)
        self.addresses = addressing.Addresses()
        for body in core.db.networks():
            network = _decode(body)
            self._networks[network.id] = network

    # Networks

    def all(self) -> list[Network]:
        """The built-in ones too, the default bridge from now on among them."""
        self.default()
        with self.lock:
            return list(self._networks.values())

    def find(self, name: str) -> Network:
        """By name, id or unique prefix of an id. Raises NotFound, InvalidRequest."""
        if name in (DEFAULT_NETWORK, "default"):
            return self.default()
        with self.lock:
            networks = list(self._networks.values())
        for network in networks:
            if name in (network.name, network.id):
                return network
        found = [network for network in networks if name and network.id.startswith(name)]
        if len(found) > 1:
            raise InvalidRequest(f"network {name} is ambiguous ({len(found)} matches found based on ID prefix)")
        if not found:
            if name and builtin_id(DEFAULT_NETWORK).startswith(name):
                return self.default()
            raise NotFound(f"network {name} not found", hint="`ambi network ls` lists them")
        return found[0]

    def default(self) -> Network:
        """The default bridge, made at first use."""
        id = builtin_id(DEFAULT_NETWORK)
        with self.lock:
            network = self._networks.get(id)
        if network is not None:
            return network
        routes = self.routes()
        with self.lock:
            if id not in self._networks:
                pools = (self.choose(routes, 4),)
                options = {
                    "com.docker.network.bridge.default_bridge": "true",
                    "com.docker.network.bridge.enable_icc": "true",
                    "com.docker.network.bridge.enable_ip_masquerade": "true",
                    "com.docker.network.bridge.host_binding_ipv4": "0.0.0.0",
                    "com.docker.network.driver.mtu": "1500",
                }
                self.store(Network(id, DEFAULT_NETWORK, "bridge", pools, options=options, created_ns=time.time_ns()))
            return self._networks[id]

    def choose(self, routes: Iterable[str], family: int) -> Pool:
        """A pool that nobody uses. With the lock held."""
        from ambi.network import ipam

        return ipam.choose([*routes, *self.subnets()], family)

    def subnets(self) -> list[str]:
        with self.lock:
            return [pool.subnet for network in self._networks.values() for pool in network.pools]

    @contextmanager
    def naming(self, name: str) -> Iterator[None]:
        """Keep `name` for a network that is being made. Raises Conflict with Docker's words."""
        with self.lock:
            if name in self._making or any(network.name == name for network in self._networks.values()):
                raise newnetwork.taken(name)
            self._making.add(name)
        try:
            yield
        finally:
            with self.lock:
                self._making.discard(name)

    def store(self, network: Network) -> None:
        with self.lock:
            self._core.db.insert_network(network.id, network.name, network._asdict(), network.created_ns)
            self._networks[network.id] = network

    def make(self, network: Network) -> None:
        """Store `network` and have it in the kernel; nothing is left when it fails.

        Where nothing is left that can fail, nobody waits for the kernel: another bridge's removal keeps it for 40 ms.
        """
        self.store(network)
        if self.host.certain(network):
            self._start(lambda: self._bring_up(network))
        else:
            try:
                self.host.ensure(network)
            except BaseException:
                self._drop(network)
                self.host.remove(network)
                raise
            if network.driver == "bridge":
                self.names.warm_up()
        self.publish(network, "create")

    def _bring_up(self, network: Network) -> None:
        """Make what `make` has promised. A start that is here first, or finds that it failed, makes it itself, and says why
        it cannot."""
        try:
            self.host.create(network)
            self._unless_removed(network)
        except AmbiError as error:
            log.error("network %s: %s", network.name, error)
        self.names.warm_up()

    def _unless_removed(self, network: Network) -> None:
        """Take away what has just been made for `network` if that has been removed meanwhile, or even before."""
        with self.lock:
            removed = network.id not in self._networks
        if removed:
            self.names.forget(network.id)
            self.host.remove(network)

    def _drop(self, network: Network) -> None:
        with self.lock:
            self._core.db.delete_network(network.id)
            self._networks.pop(network.id, None)
            self.addresses.forget(network.id)

    def remove(self, name: str) -> None:
        """Raises NotFound, Forbidden (it is built in, or has endpoints)."""
        network = self.find(name)
        if network.builtin:
            raise Forbidden(f"{network.name} is a pre-defined network and cannot be removed")
        self._wait_ending(network)
        with self.lock:
            users = [f'name:"{record.name}" id:"{endpoint.id[:12]}"' for record, endpoint in self.live(network.id)]
            if users:
                raise Forbidden(
                    f"error while removing network: network {network.name} id {network.id} has active endpoints"
                    f" ({', '.join(users)})",
                    hint=f"stop them, or: ambi network disconnect {network.name} NAME",
                )
            if network.id not in self._networks:
                raise NotFound(f"network {name} not found")
            self._drop(network)
            self._leaving[network.id] = network
        self._start(lambda: self._take_away(network))
        self.publish(network, "destroy")

    def _take_away(self, network: Network) -> None:
        """Its links and names. The kernel takes 30 ms for a bridge, for which nobody needs to wait: what is left when this
        engine dies here is swept by the next one, as of a network that no record has."""
        try:
            self.names.forget(network.id)
            self.host.remove(network)
        except AmbiError as error:
            log.error("network %s is removed, but its links are not: %s", network.name, error)
        finally:
            with self.lock:
                self._leaving.pop(network.id, None)

    def routes(self) -> list[str]:
        """Subnets that the host has routes to, but for those by networks that are on their way out."""
        with self.lock:
            leaving = {pool.subnet for network in self._leaving.values() for pool in network.pools}
        return [subnet for subnet in self.host.routes() if subnet not in leaving]

    def prune(self, wanted: filters.Filters) -> list[str]:
        """Remove what no running instance is on; returns the names."""
        filters.check(wanted, frozenset(("label", "label!", "until")))
        until = [filters.seconds(value) for value in wanted.get("until", ())]
        removed = []
        for network in self.all():
            if network.builtin or (until and network.created_ns >= min(until) * 1e9):
                continue
            if not filters.has_labels(network.labels, wanted.get("label", ())):
                continue
            if any(filters.has_labels(network.labels, [value]) for value in wanted.get("label!", ())):
                continue
            if self.users(network):
                continue
            try:
                self.remove(network.id)
            except AmbiError:  # somebody has started on it since
                continue
            removed.append(network.name)
        self._core.bus.publish("network", "prune", "", {"reclaimed": "0"})
        return removed

    def users(self, network: Network) -> list[Record]:
        """Instances that are on it, or will be when they run."""
        return [record for record in self._core.registry if self.state(record).find(network.name)]

    def live(self, network_id: str) -> Iterator[tuple[Record, Endpoint]]:
        """Those that have an address on it now."""
        for record in self._core.registry:
            for endpoint in self.state(record).endpoints:
                if endpoint.network == network_id and endpoint.nic is not None:
                    yield record, endpoint

    def publish(self, network: Network, action: str, **own: str) -> None:
        self._core.bus.publish("network", action, network.id, {**own, "name": network.name, "type": network.driver})

    # Instances

    def state(self, record: Record) -> NetState:
        """What `record` has, as its request asks for it when it never ran."""
        if record.net is None:
            record.net = NetState(endpoints.asked_for(record.row.spec))
        return record.net

    def restore(self) -> None:
        """Bring in what is stored, before shims are adopted."""
        rows: dict[str, list[tuple[int, Endpoint]]] = {}
        published: dict[str, tuple[Port, ...]] = {}
        for instance, name, body in self._core.db.endpoints():
            found = rows.setdefault(instance, [])
            if name == _WHOLE:
                published[instance] = tuple(Port(p[0], p[1], p[2], p[3], tuple(p[4])) for p in body["ports"])
            else:
                found.append((int(body["place"]), decode(name, body)))
        for record in self._core.registry:
            if record.id in rows:
                ordered = tuple(endpoint for _, endpoint in sorted(rows[record.id], key=lambda x: x[0]))
                record.net = NetState(ordered, published.get(record.id, ()))

    def adopted(self) -> None:
        """After the shims: let go of what belongs to ended runs, and see that the rest is there."""
        alive = []
        for record in self._core.registry:
            runs = record.run is not None or record.state.running
            if runs and any(e.nic for e in self.state(record).endpoints):
                alive.append(record)
            else:
                self._let_go(record)
        if not self._core.db.networks():
            return
        self._start(lambda: self._heal(alive))

    def _heal(self, alive: list[Record]) -> None:
        try:
            with self.lock:
                networks = list(self._networks.values())
            self.host.sweep(networks, [record.id for record in alive])
            self.names.keep([network.id for network in networks], [record.id for record in alive])
            used = {e.network for record in alive for e in self.state(record).endpoints if e.nic}
            for network in networks:
                if network.id in used:
                    self.host.ensure(network)
                    self.tell_names(network)
                    self._unless_removed(network)
            for record in alive:
                publishing.restore(self, record)
            self.host.sweep_ports(self._ports_in_use)
            self.host.warm_up()
        except AmbiError as error:
            log.error("networks of running instances: %s", error)

    def _ports_in_use(self) -> set[str]:
        """The host's ends of veths that instances have, or are about to have."""
        with self.lock:
            nics = [endpoint.nic for record in self.registry for endpoint in self.state(record).endpoints]
        return {nic.host_link for nic in nics if nic is not None}

    def prepare(self, record: Record) -> Attachment:
        """Have everything in place for a start of `record`, whose lock is held. Undone by `release`, also by a failure."""
        host = record.row.spec.host
        mode = mode_of(host)
        if mode.startswith(SHARED):
            return self._shared(mode.removeprefix(SHARED))
        if mode == "host":
            return Attachment(None, netnames.of(self, record))
        state, netns = self.state(record), None
        if mode == "none" and not state.endpoints:
            # a VM gets devices for what it may be connected to by being in a namespace
            netns = self._spare.take() if record.row.isolation is Isolation.VM else self._spare.take_now()
            return Attachment(netns, netnames.of(self, record))
        try:
            plugged = self._allocate(record, state)
            netns = self._spare.take()
            for endpoint, network in plugged:
                assert endpoint.nic is not None
                self.plug(netns, network, endpoint.nic)
            for network in {network.id: network for _, network in plugged}.values():
                self.tell_names(network)
            publishing.publish(self, record)
        except BaseException:
            if netns is not None:
                os.close(netns)
            self.release(record, told=False)
            raise
        for _, network in plugged:
            self.publish(network, "connect", container=record.id)
        return Attachment(netns, netnames.of(self, record))

    def plug(self, netns: int, network: Network, nic: Nic) -> None:
        """See `NetworkHost.plug`; nothing else answers for its addresses afterwards."""
        self._left.make_way(nic)
        self.host.plug(netns, network, nic)

    def _shared(self, name: str) -> Attachment:
        """The namespace of another instance, and its files."""
        other = self._core.registry.find(name)
        run = other.run
        if run is None or not other.state.running:
            raise Conflict(f"cannot join network of a non running container: {other.id}", hint=f"ambi start {other.name}")
        if other.row.isolation is Isolation.VM:
            raise InvalidRequest(
                f"--network container:{name} is not possible: '{other.name}' is a VM, and there only its guest answers",
                hint="put both on one network: ambi network create NAME",
            )
        if mode_of(other.row.spec.host) == "host":
            return Attachment(None, netnames.shared_with(self._core, other))
        netns = run.connection.descriptor("netns", by=Deadline.after(_CALL_S))
        return Attachment(netns, netnames.shared_with(self._core, other))

    def _allocate(self, record: Record, state: NetState) -> list[tuple[Endpoint, Network]]:
        """Choose and record the interfaces of `record`, in its order."""
        networks = [self._resolve(endpoint) for endpoint in state.endpoints]
        self._wait_addresses(record, state, networks)
        with self.lock:
            made: list[Endpoint] = []
            for place, (endpoint, network) in enumerate(zip(state.endpoints, networks, strict=True)):
                made.append(self.give(record, endpoint, network, made))
                self._core.db.put_endpoint(record.id, endpoint.name, made[-1].encode(place))
                record.net = NetState((*made, *state.endpoints[len(made) :]), state.ports)
        return list(zip(made, networks, strict=True))

    def give(self, record: Record, endpoint: Endpoint, network: Network, own: Sequence[Endpoint]) -> Endpoint:
        """`endpoint` of `record` with an interface on `network`; `own` are the others of `record`. With the lock held."""
        others = [e for r in self._core.registry if r is not record for e in self.state(r).endpoints]
        return self.addresses.give(endpoint, network, [*others, *own], own, names.new_id())

    def data_dir(self, record: Record) -> Path:
        return self._core.roots.instance_data(record.id)

    def members(self, network: Network) -> list[tuple[Instance, Endpoint]]:
        """Who has an address on it now."""
        found = [(record.snapshot(self._core.roots), endpoint) for record, endpoint in self.live(network.id)]
        return [(instance, endpoint) for instance, endpoint in found if instance.state.running]

    def _resolve(self, endpoint: Endpoint) -> Network:
        if endpoint.network and endpoint.network in self._networks:
            return self._networks[endpoint.network]
        network = self.find(endpoint.name)
        if network.driver in ("host", "null"):
            raise InvalidRequest(f"an instance on networks of its own cannot be on '{network.name}'")
        return network

    def _wait_addresses(self, record: Record, state: NetState, networks: list[Network]) -> None:
        """An address that is asked for may belong to a run that is ending: wait for that."""
        wanted = {a for e in state.endpoints for a in (e.fixed(4), e.fixed(6)) if a}
        if not wanted:
            return
        for network in networks:
            for other, endpoint in list(self.live(network.id)):
                held = {a.address for a in endpoint.nic.addresses} if endpoint.nic else set()
                if other is not record and held & wanted:
                    self.wait_ending(other)

    def wait_ending(self, record: Record) -> bool:
        """Wait for the end of a run whose init has ended; whether there was one."""
        run = record.run
        if run is None or run.exit is None:
            return False
        return run.gone.wait(_ENDING_S)

    def _wait_ending(self, network: Network) -> None:
        for record, _ in list(self.live(network.id)):
            self.wait_ending(record)

    def release(self, record: Record, *, told: bool = True) -> None:
        """Free what the run of `record` had. told: the networks are said to be left. Never raises."""
        state = self.state(record)
        held = [e for e in state.endpoints if e.nic is not None]
        if not held and not state.ports:
            return
        try:
            publishing.withdraw(self, record)
            networks = [self._networks[e.network] for e in held if e.network in self._networks]
            self._let_go(record)
            for network in networks:
                self.tell_names(network)
                if told:
                    self.publish(network, "disconnect", container=record.id)
        except AmbiError as error:
            log.error("%s: its networks: %s", record.id[:12], error)

    def _let_go(self, record: Record) -> None:
        """Forget addresses and ports."""
        state = self.state(record)
        if not state.ports and not any(e.nic for e in state.endpoints):
            return
        with self.lock:
            kept = tuple(e._replace(id="", nic=None) for e in state.endpoints)
            if state.ports:
                self.set_ports(record, ())
            record.net = NetState(kept)
            for place, endpoint in enumerate(kept):
                self._core.db.put_endpoint(record.id, endpoint.name, endpoint.encode(place))
            for endpoint in state.endpoints:
                if endpoint.nic is not None:
                    self._left.add(endpoint.nic)

    def set_endpoints(self, record: Record, changed: tuple[Endpoint, ...]) -> None:
        """Store other endpoints of `record`."""
        db = self._core.db
        with self.lock:
            before = self.state(record)
            for endpoint in before.endpoints:
                if all(endpoint.name != e.name for e in changed):
                    db.delete_endpoint(record.id, endpoint.name)
            for place, endpoint in enumerate(changed):
                db.put_endpoint(record.id, endpoint.name, endpoint.encode(place))
            record.net = NetState(changed, before.ports)
            db.put_endpoint(record.id, _WHOLE, {"ports": before.ports})

    def set_ports(self, record: Record, ports: tuple[Port, ...]) -> None:
        """Store what `record` has published."""
        with self.lock:
            record.net = self.state(record)._replace(ports=ports)
            self._core.db.put_endpoint(record.id, _WHOLE, {"ports": ports})

    def tell_names(self, network: Network) -> None:
        """Have netd answer for who is on `network` now."""
        self.names.tell(network, lambda: self.live(network.id))

    def counters(self, record: Record) -> dict[str, dict[str, int]]:
        """Of each interface by its name: rx_bytes, tx_packets, ... as the instance sees them."""
        nics = [endpoint.nic for endpoint in self.state(record).endpoints if endpoint.nic is not None]
        return {nic.name: self.host.counters(nic) for nic in nics}

    def warm_up(self) -> None:
        """Load and make what the first start would have to."""

        def warm() -> None:
            self.host.warm_up()
            self._spare.fill()

        self._start(warm)

    def _start(self, work: Callable[[], None]) -> None:
        """Run `work` in a thread that `close` waits for."""
        thread = threading.Thread(target=work, name="networks", daemon=True)
        self._threads = [t for t in self._threads if t.is_alive()] + [thread]
        thread.start()

    def close(self) -> None:
        """Let go of everything. When no instance is on a network, nothing of ours stays in the kernel."""
        for record in self._core.registry:
            run = record.run
            if run is not None and run.exit is not None:
                run.gone.wait(_LAST_END_S)
        for thread in self._threads:
            thread.join(_CALL_S)
        self._spare.close()
        idle = not any(e.nic for record in self._core.registry for e in self.state(record).endpoints)
        self.names.close(idle=idle)
        if idle and self._core.db.networks():
            try:
                self.host.close_down()
            except AmbiError as error:
                log.error("networks: %s", error)
        self.host.close()


def _decode(body: dict[str, Any]) -> Network:
    return Network(**{**body, "pools": tuple(Pool(*pool) for pool in body["pools"])})
