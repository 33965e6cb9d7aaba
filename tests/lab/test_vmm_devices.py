"""The devices of our monitor in a booted guest: what they do, and that nothing of it comes to a vCPU's thread in user space.

`scripts/test` runs this folder inside of `scripts/kvm-lab`, where a KVM that cannot be used is a failure.
"""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from ambi.core.deadline import Deadline
from ambi.core.errors import InvalidRequest
from ambi.linux import tap
from ambi.network import namespaces
from hyper.guest.protocol import AddressTag, CpusTag, NetTag, SetupTag, Type
from hyper.vm import share
from hyper.vmm.config import Disk, Extent, Nic, Share
from tests.netkit import Place
from tests.vm.guest_boot import BOOT_S, busybox_layer, layers_disk, mount
from tests.vmmkit import Guest

READS = 10_000
READERS = 8
STREAM = 200 << 20
MOST_EXITS = 50
PATIENCE_S = 250  # a bound against hanging for ever, not a measure
NICS = (("10.77.1", b"\x02\xab\0\0\0\1"), ("10.77.2", b"\x02\xab\0\0\0\2"))  # the first with vhost, the second without
DISK_BYTES = 64 << 20
MEMORY_MIB = 256
BALLOON = 16 << 20
MORE = 512 << 20


class Rig:
    """A guest with two disks, two NICs, whose taps are in the namespace `place`, and the directory `shared` at /share."""

    port = 5000  # of the last stream

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        netns = namespaces.new()
        stack.callback(os.close, netns)
        self.place = Place(netns, stack)
        self.disk = directory / "disk.img"
        self.disk.write_bytes(secrets.token_bytes(1 << 20) * (DISK_BYTES >> 20))
        layers = layers_disk([busybox_layer(directory)], directory / "layers.img")
        fds = [os.open(layers, os.O_RDONLY), os.open(self.disk, os.O_RDWR), os.open("/dev/vhost-net", os.O_RDWR)]
        fds += [self._tap(number) for number in range(len(NICS))]
        sectors = layers.stat().st_size // 512
        fds += [self._share(directory, stack), os.memfd_create("ram")]
        os.truncate(fds[-1], MEMORY_MIB << 20)
        self.guest = Guest(
            directory, fds=tuple(fds), memory_mib=MEMORY_MIB, memory=fds[-1], hotplug_bytes=MORE << 1,
            shares=(Share("binds", fds[-2]),),
            disks=(Disk("layers", extents=(Extent(fds[0], sectors, 0),)), Disk("scratch", fds[1], readonly=False)),
            nics=tuple(Nic(mac, fds[3 + n], None if n else fds[2]) for n, (_, mac) in enumerate(NICS)),
        )  # fmt: skip
        stack.callback(self.guest.close)
        self.guest.setup((SetupTag.LAYERS, 1), mount("/share", "bind", "bind", source="0"))
        self.guest.run("mknod /dev/vdb b $(tr : ' ' < /sys/block/vdb/dev)")
        for number, (network, mac) in enumerate(NICS):
            address = (
                (AddressTag.FAMILY, 4),
                (AddressTag.ADDRESS, socket.inet_aton(f"{network}.2")),
                (AddressTag.PREFIX, 24),
            )
            items = ((NetTag.MAC, mac), (NetTag.NAME, f"eth{number}"), (NetTag.MTU, 1500), (NetTag.ADDRESS, address))
            self.guest.client.request(Type.NET, items, Deadline.after(BOOT_S))

    def _share(self, directory: Path, stack: ExitStack) -> int:
        """A connected socket of a virtiofsd, which ends with it."""
        self.shared = directory / "tree" / "0"
        self.shared.mkdir(parents=True)
        exe = share.program()
        assert exe is not None
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(directory / "fs"))
            listener.listen(1)
            client = socket.socket(socket.AF_UNIX)
            client.connect(str(directory / "fs"))
            options = share._options(exe, directory / "tree", shared=False)
            self.server = subprocess.Popen([exe, f"--fd={listener.fileno()}", *options], pass_fds=[listener.fileno()])
        stack.callback(self.server.wait, 20)
        return client.detach()

    def _tap(self, number: int) -> int:
        def make() -> int:
            fd = tap.reserve()
            tap.make(fd, f"tap{number}")
            for words in (f"address add {NICS[number][0]}.1/24 dev tap{number}", f"link set tap{number} up"):
                subprocess.run(["ip", *words.split()], check=True)
            return fd

        return self.place.do(make)

    def stream(self, number: int, size: int) -> int:
        """Have the guest send `size` bytes over its NIC `number`; how many came."""
        self.port = port = self.port + 1
        server = self.place.listen(port, f"{NICS[number][0]}.1")
        server.settimeout(BOOT_S)
        got = 0

        def drink() -> None:
            nonlocal got
            connection, _ = server.accept()
            with connection:
                connection.settimeout(BOOT_S)
                while piece := connection.recv(1 << 20):
                    got += len(piece)

        reader = threading.Thread(target=drink)
        reader.start()
        # The program has the socket itself: nc's own pieces of 1 KiB would be a test of nc.
        send = f"dd if=/dev/zero bs=64k count={size >> 16}"
        self.guest.run(f"nc {NICS[number][0]}.1 {port} -e {send}", PATIENCE_S)
        reader.join(BOOT_S)
        return got


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with ExitStack() as stack:
        yield Rig(tmp_path_factory.mktemp("devices"), stack)


@pytest.mark.timeout(600)
def test_reads_and_a_stream_by_vhost_without_exits(rig: Rig, capsys: pytest.CaptureFixture[str]) -> None:
    """10,000 reads of a disk, eight at a time, and 200 MB over TCP."""
    before = rig.guest.figures()
    each = READS // READERS
    readers = (f"dd if=/dev/vdb of=/dev/null bs=4k count={each} skip={n * each} iflag=direct" for n in range(READERS))
    rig.guest.run(" & ".join(readers) + " & wait", PATIENCE_S)
    middle = rig.guest.figures()
    assert rig.stream(0, STREAM) == STREAM
    after = rig.guest.figures()
    assert middle["devices"]["blk5"]["requests"] - before["devices"]["blk5"]["requests"] >= READS
    assert after["devices"]["net6"]["requests"] == 0, "the kernel does not serve the NIC"
    _show(capsys, "reads", before, middle)
    _show(capsys, "stream by vhost", middle, after)
    assert _count(after) - _count(before) < MOST_EXITS


def test_a_stream_by_hand_without_exits(rig: Rig, capsys: pytest.CaptureFixture[str]) -> None:
    """A quarter of that without vhost: frames pass through our process, but no vCPU waits for it."""
    before = rig.guest.figures()
    assert rig.stream(1, STREAM >> 2) == STREAM >> 2
    after = rig.guest.figures()
    _show(capsys, "stream by hand", before, after)
    assert after["devices"]["net7"]["bytes"] - before["devices"]["net7"]["bytes"] >= STREAM >> 2
    assert _count(after) - _count(before) < MOST_EXITS


def test_a_shared_directory_without_exits(rig: Rig, capsys: pytest.CaptureFixture[str]) -> None:
    """Files both ways through virtiofsd, which has the queues."""
    content = secrets.token_bytes(3 << 20)
    (rig.shared / "theirs").write_bytes(content)
    before = rig.guest.figures()
    rig.guest.run("cat /share/theirs /share/theirs > /share/ours && mkdir /share/d && mv /share/ours /share/d", PATIENCE_S)
    after = rig.guest.figures()
    assert (rig.shared / "d" / "ours").read_bytes() == content * 2
    _show(capsys, "shared directory", before, after)
    assert after["devices"]["fs8"]["stopped"] == 0 and _count(after) - _count(before) < MOST_EXITS


def test_a_disk_that_shrinks(rig: Rig) -> None:
    """What is gone is an I/O error in the guest, and the machine goes on."""
    os.truncate(rig.disk, DISK_BYTES // 2)
    last = DISK_BYTES // 4096 - 1
    read = f"dd if=/dev/vdb of=/dev/null bs=4k count=1 iflag=direct skip={last}"
    assert rig.guest.run(f"{read} 2>/dev/null || echo refused") == "refused\n"
    rig.guest.run("dd if=/dev/vdb of=/dev/null bs=4k count=1 iflag=direct")
    os.truncate(rig.disk, DISK_BYTES)
    rig.guest.run(read)


def test_memory_goes_back_to_the_host(rig: Rig) -> None:
    """What the guest no longer uses: as it reports it, and as the balloon asks for it. And the guest gets it back."""
    guest = rig.guest
    use = "dd if=/dev/zero of=/dev/shm/f bs=1M count=40 && rm /dev/shm/f"
    guest.run(use)
    before = _resident(guest.pid)
    wait_until(lambda: _resident(guest.pid) < before - (24 << 20))
    assert guest.figures()["devices"]["balloon2"]["reported"] > 24 << 20
    free = _free(guest)
    guest.balloon(BALLOON)
    wait_until(lambda: guest.figures()["balloon"] == BALLOON)
    assert _free(guest) < free - BALLOON // 2
    guest.balloon(0)
    wait_until(lambda: guest.figures()["balloon"] == 0)
    guest.run(use)


@pytest.mark.timeout(600)
def test_memory_that_comes_and_goes(rig: Rig, capsys: pytest.CaptureFixture[str]) -> None:
    """The guest uses it, and so do the back-ends of the kernel and of virtiofsd; and it goes back to the host."""
    guest = rig.guest
    total, before = _total(guest), guest.figures()
    guest.memory(MORE)
    wait_until(lambda: guest.figures()["plugged"] == MORE)
    assert _total(guest) - total > MORE - (16 << 20)
    _show(capsys, f"{MORE >> 20} MiB more", before, guest.figures())
    guest.run(
        "mkdir -p /tmp/m && mount -t tmpfs -o size=400m m /tmp/m && dd if=/dev/zero of=/tmp/m/f bs=1M count=360", PATIENCE_S
    )
    assert rig.stream(0, STREAM >> 4) == STREAM >> 4
    guest.run("dd if=/tmp/m/f of=/share/big bs=1M count=8 && cmp -n 8388608 /tmp/m/f /share/big", PATIENCE_S)
    guest.run("umount /tmp/m && rm /share/big && echo 3 > /proc/sys/vm/drop_caches")
    guest.memory(0)
    wait_until(lambda: guest.figures()["plugged"] == 0)
    assert _total(guest) - total < 8 << 20
    guest.run("true")
    assert guest.figures()["devices"]["mem3"]["stopped"] == 0


def test_a_disk_that_grows(rig: Rig) -> None:
    os.truncate(rig.disk, DISK_BYTES * 2)
    rig.guest.resize("scratch")
    sectors = "cat /sys/block/vdb/size"
    wait_until(lambda: int(rig.guest.run(sectors)) * 512 == DISK_BYTES * 2)
    rig.guest.run(f"dd if=/dev/vdb of=/dev/null bs=4k count=1 iflag=direct skip={DISK_BYTES * 2 // 4096 - 1}")


def _total(guest: Guest) -> int:
    return int(guest.run("grep MemTotal /proc/meminfo").split()[1]) << 10


def _free(guest: Guest) -> int:
    return int(guest.run("grep MemFree /proc/meminfo").split()[1]) << 10


def test_a_server_of_files_that_dies_ends_the_machine(rig: Rig) -> None:
    """The last test: a workload whose files never answer is not left to hang."""
    rig.server.kill()
    ending = rig.guest.ending()
    assert ending["cause"] == "device" and ending["detail"].startswith("fs8: the host: ")


@pytest.mark.parametrize("vcpus", [1, 2])
def test_a_guest_whose_agent_is_not_asked_powers_off_by_sysrq(vcpus: int, tmp_path: Path) -> None:
    guest = Guest(tmp_path, vcpus=vcpus, memory_mib=128)
    try:
        for key in "suo":
            guest.sysrq(key)
        assert guest.ending()["cause"] == "guest-shutdown"
    finally:
        guest.close()


def test_cpus_go_off_line_and_come_back(tmp_path: Path) -> None:
    layers = layers_disk([busybox_layer(tmp_path)], tmp_path / "layers.img")
    fd = os.open(layers, os.O_RDONLY)
    disk = Disk("layers", extents=(Extent(fd, layers.stat().st_size // 512, 0),))
    guest = Guest(tmp_path, vcpus=4, fds=(fd,), disks=(disk,))
    try:
        guest.setup((SetupTag.LAYERS, 1))
        for count in (4, 1, 3, 4):
            guest.client.request(Type.CPUS, ((CpusTag.COUNT, count),), Deadline.after(BOOT_S))
            assert guest.run("nproc") == f"{count}\n"
        for count in (0, 5):
            with pytest.raises(InvalidRequest, match=f"4 CPUs: {count} cannot"):
                guest.client.request(Type.CPUS, ((CpusTag.COUNT, count),), Deadline.after(BOOT_S))
        assert guest.run("nproc") == "4\n"
    finally:
        guest.close()


def wait_until(true: Callable[[], bool]) -> None:
    by = Deadline.after(BOOT_S)
    while not true():
        by.check("the guest's memory")
        time.sleep(0.2)


def _resident(pid: int) -> int:
    """Memory of the machine, which is in a memfd: bytes that the process has mapped."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("RssShmem:")[2].split()[0]) << 10


def _count(figures: dict[str, Any]) -> int:
    return int(sum(figures["exits"].values()))


def _show(capsys: pytest.CaptureFixture[str], what: str, earlier: dict[str, Any], later: dict[str, Any]) -> None:
    """Exits by cause, in the log of the run."""
    found = {cause: count - earlier["exits"].get(cause, 0) for cause, count in later["exits"].items()}
    in_kernel = later["kernel"]["exits"] - earlier["kernel"]["exits"]
    took, exits = later["at"] - earlier["at"], _count(later) - _count(earlier)
    with capsys.disabled():
        print(f"\n{what}: {took:.1f} s, {exits} exits to user space of {in_kernel}:")
        print({cause: count for cause, count in found.items() if count})
