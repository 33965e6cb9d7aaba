"""What the kernel has of our networks: bridges, namespaces, veths, rules. One object for an engine, safe between threads."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from ambi.core.errors import Unsupported
from ambi.network.model import Network, Nic, Port


def link_of(network: Network, tag: str) -> str:
    """Name of the bridge of `network`, at most 15 characters: what the option `com.docker.network.bridge.name` says, else
    `ambi0` (`ambi0-TAG`) for the default network and `ambi-` with ten digits of the id for others."""
    chosen = network.options.get("com.docker.network.bridge.name")
    if chosen:
        return chosen
    if network.builtin:
        return f"ambi0-{tag}" if tag else "ambi0"
    return f"ambi-{network.id[:10]}"


class NetworkHost:
    """The host's side of every network of one run root, in the network namespace that the caller's process is in.

    tag: "" for the default run root, else 6 hexadecimal digits of it. All methods block, for milliseconds.
    """

    def __init__(self, tag: str = "") -> None:
        self.tag = tag

    def warm_up(self) -> None:
        """Load what the first call would have to load (0.2 s); never needed, raises nothing."""

    def ensure(self, network: Network) -> None:
        """Bridge, its addresses, sysctls and rules are there afterwards; heals what somebody took away. Nothing to do for
        `host` and `null`. Raises Unsupported, Conflict (the link's name is another's), Forbidden."""
        raise Unsupported("networks are not there yet")

    def remove(self, network: Network) -> None:
        """Take the links and rules of `network` away; what is not there is no error."""

    def new_namespace(self) -> int:
        """A descriptor (CLOEXEC) of a fresh network namespace in which `lo` is up. The caller closes it."""
        raise Unsupported("networks are not there yet")

    def plug(self, netns_fd: int, network: Network, nic: Nic) -> None:
        """Make `nic` in the namespace and join it to `network`, with addresses and routes; it is up and forwards at once.

        `nic.addresses[].gateway` is where the default route goes if `nic.default_route`. Undone when it fails.
        """
        raise Unsupported("networks are not there yet")

    def unplug(self, netns_fd: int, nic: Nic) -> None:
        """Take `nic` away; one that is not there is no error."""

    def publish(self, key: str, ports: Sequence[Port]) -> None:
        """Divert what arrives for `ports` (host_port chosen) to their targets, in addition to what `key` has published."""
        raise Unsupported("networks are not there yet")

    def unpublish(self, key: str) -> None:
        """Forget every port of `key`; one without is no error. Connections that go on are cut, as Docker does."""

    def counters(self, nic: Nic) -> dict[str, int]:
        """rx_bytes, rx_packets, rx_errors, rx_dropped, tx_... as the instance sees them; {} when it has no such NIC."""
        return {}

    def routes(self) -> list[str]:
        """Subnets that this host has routes to, IPv4 and IPv6, without default routes: for `ipam.choose`."""
        return []

    def sweep(self, networks: Iterable[Network], keys: Collection[str]) -> None:
        """Drop links, rules and published ports of ours that none of `networks` and no instance of `keys` needs.

        A veth whose inner end is in a living namespace stays: the instance that has it runs.
        """

    def close_down(self) -> None:
        """Take away everything of ours: bridges, table, rules in foreign firewalls. Sysctls stay."""
