"""Templates as files and values: what is kept, what is refused, what a copy's machine has; a child's open answered."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ambi.core.deadline import Deadline
from ambi.core.errors import Corrupt, Unavailable
from ambi.linux import libc, process
from ambi.linux.handover import Handover
from hyper.qemu import argv
from hyper.qemu.template import QemuTemplates
from hyper.vm import template, template_store
from hyper.vm.hardware import Hardware, Memory, Nic, Share, Volume
from hyper.vm.layers import LayerDisk
from hyper.vm.template_store import Store
from hyper.vmm.config import slots_of
from hyper.vmm.layout import SLOTS
from hyper.vmm.start import configure
from hyper.vmm.template import VmmTemplates

KEY = "0123456789abcdef" * 2
MACHINE = Hardware(
    name="0123456789abcdef", kvm=False, vcpus=1, memory_bytes=256 << 20, tsc_khz=2_600_000,
    kernel=10, initramfs=11, agent=12, console=13, control=14, layers=LayerDisk((), (21, 22)), disk=23,
    nics=(Nic(b"\2ambi\0", 24, None),),
)  # fmt: skip


def published(store: Store, key: str = KEY, state: bytes = b"state") -> None:
    draft = store.draft(key, 1 << 20)
    assert draft is not None
    os.pwrite(draft.memory, b"guest", 4096)
    draft.publish(state)
    draft.close()


def descriptors() -> list[str]:
    return os.listdir("/proc/self/fd")


# The store


def test_template_is_found_again(tmp_path: Path) -> None:
    store, before = Store(tmp_path / "t"), descriptors()
    assert store.open(KEY) is None
    published(store)
    found = store.open(KEY)
    assert found is not None and found.state == b"state"
    assert os.pread(found.memory, 5, 4096) == b"guest"
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.pwrite(found.memory, b"x", 0)
    os.close(found.memory)
    assert descriptors() == before
    assert not (tmp_path / "t" / "new").exists()
    assert (tmp_path / "t").stat().st_mode & 0o077 == 0 and (tmp_path / "t" / KEY).stat().st_mode & 0o077 == 0


def truncated(home: Path) -> None:
    os.truncate(home / "memory", 4096)


def changed(home: Path) -> None:
    with open(home / "memory", "r+b") as file:
        file.write(b"x")


def other_state(home: Path) -> None:
    (home / "state").write_bytes(b"State")


def no_json(home: Path) -> None:
    (home / "manifest.json").write_bytes(b"{")


def foreign(home: Path) -> None:
    (home / "manifest.json").write_bytes((home / "manifest.json").read_bytes().replace(b'"format": 1', b'"format": 2'))


def no_memory(home: Path) -> None:
    (home / "memory").unlink()


@pytest.mark.parametrize("damage", [truncated, changed, other_state, no_json, foreign, no_memory])
def test_damaged_template_is_refused_and_dropped(damage: Callable[[Path], None], tmp_path: Path) -> None:
    store = Store(tmp_path)
    published(store)
    before = descriptors()
    damage(tmp_path / KEY)
    with pytest.raises(Corrupt):
        store.open(KEY)
    assert descriptors() == before
    store.drop(KEY)
    assert store.open(KEY) is None and not (tmp_path / KEY).exists()
    published(store)
    assert store.open(KEY) is not None


def test_key_of_another_directory_is_refused(tmp_path: Path) -> None:
    published(Store(tmp_path))
    os.rename(tmp_path / KEY, tmp_path / ("f" * 32))
    with pytest.raises(Corrupt):
        Store(tmp_path).open("f" * 32)


def test_one_is_made_at_a_time_and_half_of_one_is_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path)
    draft = store.draft(KEY, 1 << 20)
    assert draft is not None
    assert store.draft("other", 1 << 20) is None
    draft.close()
    assert store.open(KEY) is None and not (tmp_path / "new").exists()
    (tmp_path / "new").mkdir()  # as a maker that was killed leaves it
    (tmp_path / "new" / "memory").write_bytes(b"half")
    published(store)
    assert store.open(KEY) is not None


def test_those_that_were_not_used_for_longest_go(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for number in range(template_store.KEEP):
        published(store, f"k{number}")
        os.utime(tmp_path / f"k{number}" / "manifest.json", (number, number))
    assert store.open("k0") is not None  # counts as used
    published(store, "new one")
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["k0", "k2", "k3", "k4", "k5", "new one"]


def test_failure_is_remembered_for_an_hour_and_until_success(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert not store.failed(KEY)
    store.fail(KEY, "why")
    assert store.failed(KEY) and (tmp_path / f"{KEY}.failed").read_text() == "why\n"
    os.utime(tmp_path / f"{KEY}.failed", (1, 1))
    assert not store.failed(KEY)
    published(store)
    assert not (tmp_path / f"{KEY}.failed").exists()


# The machine


def devices(machine: Hardware) -> list[str]:
    words = argv.build("qemu", machine, 20)
    return [word.partition(",")[0] for flag, word in itertools.pairwise(words) if flag == "-device"]


def test_copy_has_the_devices_of_the_blank_machine() -> None:
    machine = template._common(MACHINE)._replace(volumes=(Volume("volume3", 25, True),))
    blank = machine._replace(blank=True, memory=Memory(9, shared=True))
    copy = machine._replace(memory=Memory(9, shared=False))
    assert devices(blank) == devices(copy)
    assert devices(copy).count("virtio-net-device") == template.NICS
    line = " ".join(argv.build("qemu", blank))
    assert "share=on" in line and "/dev/fdset" not in line and "netdev" not in line
    assert blank.fds == (10, 11, 12, 13, 14)
    assert "share=off" in " ".join(argv.build("qemu", copy, 20))


@pytest.mark.needs("qemu")
def test_words_are_those_of_the_shape_alone() -> None:
    words = QemuTemplates().words(template._common(MACHINE))
    same = MACHINE._replace(name="other", kernel=1, agent=2, disk=3, layers=LayerDisk((), (4,)), tracing=False, nics=())
    assert QemuTemplates().words(template._common(same)) == words
    for change in ({"vcpus": 2}, {"memory_bytes": 512 << 20}, {"tsc_khz": 1}, {"volumes": (Volume("v", 9, False),)}):
        assert QemuTemplates().words(template._common(MACHINE._replace(**change))) != words


@pytest.mark.parametrize("change", [{"shares": (Share("binds", 30),)}, {"layers": None}, {"disk": None}])
def test_what_boots(change: dict[str, Any]) -> None:
    assert template._fits(MACHINE, QemuTemplates())
    assert not template._fits(MACHINE._replace(**change), QemuTemplates())
    assert template._fits(MACHINE._replace(**change), VmmTemplates())


def test_trees_come_into_spare_slots() -> None:
    plain = template._common(MACHINE)
    machine = plain._replace(shares=(Share("root", 30), Share("binds", 31)))
    assert VmmTemplates().words(machine) == VmmTemplates().words(plain)
    copy, blank = configure(machine, 1), configure(machine._replace(blank=True), 1)
    assert [share.socket for share in copy.shares] == [30, 31] and blank.shares == ()
    assert slots_of(copy) == slots_of(blank) == slots_of(configure(plain, 1))
    full = plain._replace(
        volumes=tuple(Volume(f"v{number}", 40 + number, False) for number in range(SLOTS - slots_of(blank) + 4))
    )
    assert configure(full, 1).spares == 0 and slots_of(configure(full, 1)) == SLOTS


def test_templates_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(template.CHOICE, "off")
    assert not template._fits(MACHINE, QemuTemplates()) and not template._fits(MACHINE, VmmTemplates())


# A child's open


def child(body: Callable[[], int]) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(body())
        finally:
            os._exit(99)
    return pid


def plain_open(path: Path) -> int:
    """open(path, O_RDWR), to which os.open would add O_CLOEXEC."""
    openat, at_fdcwd = 257, -100
    return libc.syscall(openat, at_fdcwd, bytes(path) + b"\0", os.O_RDWR)


def test_open_of_a_child_gets_our_descriptor(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "other").write_bytes(b"other")
    handover = Handover("/nowhere")

    def body() -> int:
        process.no_new_privileges()
        handover.announce()
        assert os.pread(plain_open(tmp_path / "other"), 9, 0) == b"other"
        fd = plain_open(Path("/nowhere"))
        assert os.pread(fd, 9, 0) == b"content"
        try:
            os.pwrite(fd, b"x", 0)
        except OSError as error:
            return 7 if error.errno == errno.EBADF else 8
        return 9

    pid = child(body)
    ended, fd = os.pidfd_open(pid), os.open(tmp_path / "file", os.O_RDONLY)
    try:
        handover.give(fd, ended, Deadline.after(30))
    finally:
        handover.close()
        os.close(fd)
        os.close(ended)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


def test_child_that_ends_is_no_wait() -> None:
    handover = Handover("/nowhere")
    pid = child(lambda: 0)
    ended = os.pidfd_open(pid)
    with pytest.raises(Unavailable):
        handover.give(0, ended, Deadline.after(30))
    handover.close()
    os.close(ended)
    os.waitpid(pid, 0)
