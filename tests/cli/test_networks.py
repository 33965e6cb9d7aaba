"""`ambi network`, `ambi port` and the flags of networks against a real engine: what is printed, and that it is so."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import EngineUnderTest


class Cli(EngineUnderTest):
    def ok(self, *args: str) -> str:
        done = self.ambi(*args)
        assert done.returncode == 0, (args, done.stderr.decode())
        return done.stdout.decode()


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory, busybox_tar: Path) -> Iterator[Cli]:
    it = Cli(tmp_path_factory.mktemp("nets"))
    it.start(vm=False)
    it.ok("import", str(busybox_tar), "bb")
    yield it
    it.destroy()


def test_a_network_from_create_to_prune(engine: Cli) -> None:
    flags = (
        "--subnet",
        "10.60.0.0/24",
        "--gateway",
        "10.60.0.254",
        "--ip-range",
        "10.60.0.64/26",
        "--aux-address",
        "r=10.60.0.64",
    )
    id = engine.ok("network", "create", *flags, "--label", "a=b", "-o", "com.docker.network.driver.mtu=1400", "web").strip()
    (shown,) = json.loads(engine.ok("network", "inspect", "web"))
    assert shown["Id"] == id and shown["Labels"] == {"a": "b"}
    assert shown["IPAM"]["Config"] == [
        {
            "Subnet": "10.60.0.0/24",
            "IPRange": "10.60.0.64/26",
            "Gateway": "10.60.0.254",
            "AuxiliaryAddresses": {"r": "10.60.0.64"},
        }
    ]
    assert engine.ok("inspect", "--format", "{{.Name}}", "web") == "web\n"
    rows = [line.split() for line in engine.ok("network", "ls").splitlines()]
    assert rows[0] == ["NETWORK", "ID", "NAME", "DRIVER", "SCOPE"] and [id[:12], "web", "bridge", "local"] in rows
    assert [row[1] for row in rows[1:]] == ["bridge", "host", "none", "web"]
    assert engine.ok("network", "ls", "-q", "--no-trunc", "-f", "label=a") == f"{id}\n"
    said = engine.ok("run", "--rm", "--network", "web", "bb", "sh", "-c", "ip addr show eth0; ip route")
    assert "10.60.0.65/24" in said and "mtu 1400" in said and "via 10.60.0.254" in said
    assert engine.ok("network", "prune", "-f", "--filter", "label!=a") == ""
    assert engine.ok("network", "prune", "-f") == "Deleted Networks:\nweb\n\n"
    assert engine.ambi("network", "inspect", "web").returncode == 125


def test_several_networks_ports_and_a_connection(engine: Cli) -> None:
    for name in ("front", "back", "third"):
        engine.ok("network", "create", name)
    flags = (
        "--network",
        "name=front,alias=db,mac-address=02:42:00:00:00:09",
        "--network",
        "back",
        "-p",
        "127.0.0.1:7070:70",
    )
    engine.ok("run", "-d", "--name", "one", *flags, "-p", "7071-7073:71/udp", "bb", "sleep", "1000")
    assert engine.ok("port", "one") == "70/tcp -> 127.0.0.1:7070\n71/udp -> 0.0.0.0:7071\n71/udp -> [::]:7071\n"
    assert engine.ok("port", "one", "70") == "127.0.0.1:7070\n"
    assert engine.ambi("port", "one", "80").stderr.startswith(b"error: no public port '80/tcp' published for one")
    shown = "0.0.0.0:7071->71/udp, 127.0.0.1:7070->70/tcp, [::]:7071->71/udp\n"
    assert engine.ok("ps", "--format", "{{.Ports}}") == shown
    assert engine.ok("exec", "one", "cat", "/sys/class/net/eth0/address") == "02:42:00:00:00:09\n"
    engine.ok("network", "connect", "--alias", "x", "third", "one")
    assert engine.ok("ps", "--format", "{{.Networks}}") == "back,front,third\n"
    assert engine.ok("exec", "one", "ls", "/sys/class/net").split() == ["eth0", "eth1", "eth2", "lo"]
    engine.ok("network", "disconnect", "back", "one")
    assert engine.ok("ps", "-q", "-f", "network=back") == "" and engine.ok("ps", "-q", "-f", "publish=7071/udp") != ""
    engine.ok("rm", "-f", "one")
    assert engine.ok("network", "rm", "front", "back", "third") == "front\nback\nthird\n"
