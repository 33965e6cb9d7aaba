"""What an instance has on its networks: what was asked for, and the interfaces of its present run."""

from __future__ import annotations

from typing import Any, NamedTuple

from ambi.network.model import Address, Nic, Port

_ADDRESSES = ("addresses", "extra")  # of a Nic


class Endpoint(NamedTuple):
    """An instance on one network.

    name: of the network. asked: Docker's EndpointSettings as the client gave them. network: its id, "" while the network has
    not been looked up. id: 64 hexadecimal digits, "" while it does not run. nic: None while it does not run.
    """

    name: str
    asked: dict[str, Any]
    network: str = ""
    id: str = ""
    nic: Nic | None = None

    def encode(self, place: int) -> dict[str, Any]:
        """The body of a row; `place` is where it comes among those of its instance."""
        nic = None
        if self.nic is not None:
            nic = {**self.nic._asdict(), **{key: [list(x) for x in getattr(self.nic, key)] for key in _ADDRESSES}}
        return {"place": place, "asked": self.asked, "network": self.network, "id": self.id, "nic": nic}

    @property
    def aliases(self) -> list[str]:
        return list(self.asked.get("Aliases") or ())

    @property
    def links(self) -> list[str]:
        return list(self.asked.get("Links") or ())

    def fixed(self, family: int) -> str | None:
        """The address that was asked for, None for any."""
        key = "IPv4Address" if family == 4 else "IPv6Address"
        return (self.asked.get("IPAMConfig") or {}).get(key) or None

    @property
    def link_local(self) -> list[str]:
        return list(dict.fromkeys((self.asked.get("IPAMConfig") or {}).get("LinkLocalIPs") or ()))


def decode(name: str, body: dict[str, Any]) -> Endpoint:
    nic = body["nic"]
    if nic is not None:
        nic = Nic(**{**nic, **{key: tuple(Address(*x) for x in nic.get(key, ())) for key in _ADDRESSES}})
    return Endpoint(name, body["asked"], body["network"], body["id"], nic)


class NetState(NamedTuple):
    """Everything of one instance. ports: as they are published now. Replaced as a whole, so readers need no lock."""

    endpoints: tuple[Endpoint, ...] = ()
    ports: tuple[Port, ...] = ()

    def find(self, network: str) -> Endpoint | None:
        """By the network's name or id."""
        return next((e for e in self.endpoints if network in (e.name, e.network)), None)
