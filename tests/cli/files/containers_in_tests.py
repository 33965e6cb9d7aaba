"""What a test suite written with testcontainers does, in a process of its own: everything through the library.

DOCKER_HOST names the engine. Ends with 0 when all is as the library promises.
"""

import shutil
import socket
import tempfile
from pathlib import Path

from testcontainers.core.container import DockerContainer
from testcontainers.core.network import Network
from testcontainers.core.waiting_utils import wait_for_logs

SERVE = "mkdir -p /www && echo served > /www/index.html && echo ready to serve && exec httpd -f -p 80 -h /www"


def fetch(host: str, port: int) -> bytes:
    with socket.create_connection((host, port), 10) as client:
        client.sendall(b"GET / HTTP/1.0\r\n\r\n")
        return b"".join(iter(lambda: client.recv(4096), b""))


def server_and_client(shared: Path) -> None:
    with Network() as network:
        server = (
            DockerContainer("bb")
            .with_command(["sh", "-c", SERVE])
            .with_exposed_ports(80)
            .with_env("COLOUR", "green")
            .with_network(network)
            .with_network_aliases("web", "site")
            .with_volume_mapping(str(shared), "/shared", "rw")
            .with_kwargs(stop_signal="SIGKILL")
        )
        with server:
            wait_for_logs(server, "ready to serve", timeout=30)
            address = server.get_container_host_ip(), int(server.get_exposed_port(80))
            end = b""
            while not end.endswith(b"served\n"):  # the program listens a moment after its line
                try:
                    end = fetch(*address)
                except ConnectionError:
                    continue
            code, output = server.exec(["sh", "-c", "echo $COLOUR | tee /shared/colour"])
            assert (code, output) == (0, b"green\n"), (code, output)
            assert (shared / "colour").read_text() == "green\n"
            assert server.exec("false").exit_code == 1
            assert server.get_logs() == (b"ready to serve\n", b"")
            client = DockerContainer("bb").with_network(network).with_command("wget -q -O - http://site/")
            with client:
                assert client.get_wrapped_container().wait()["StatusCode"] == 0
                wait_for_logs(client, "served", timeout=30)
    assert server.get_docker_client().client.containers.list(all=True) == []


def main() -> None:
    shared = Path(tempfile.mkdtemp(prefix="ambi-", dir="/tmp"))
    try:
        server_and_client(shared)
    finally:
        shutil.rmtree(shared)


main()
