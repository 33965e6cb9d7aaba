"""QEMU's command line as a function of values. Nothing here touches the system.

The machine is microvm: virtio-mmio devices found through ACPI, a UART for the kernel's last words, an RTC (without one Linux
polls an absent clock for two seconds), neither PIT nor PIC. Linux cannot calibrate its TSC on that, so we tell it the rate.
"""

from __future__ import annotations

from typing import NamedTuple

from hyper.guest.protocol import PORT_NAME

SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
TB_SIZE_MIB = 128  # TCG's cache of translated code; its default is an eighth of the host's memory
CPU_TCG = "qemu64,+ssse3,+sse4.1,+sse4.2,+popcnt,+cx16,+lahf-lm,+rdrand"  # x86-64-v2, which today's distributions require
WORDS = (  # measured, see hyper/README.md: they shorten the boot and change nothing for the workload
    "quiet", "reboot=t", "panic=-1", "console=ttyS0", "no_timer_check", "tsc=reliable", "8250.nr_uarts=1",
    "i8042.noaux", "i8042.nomux", "i8042.nopnp", "i8042.dumbkbd", "cryptomgr.notests", "random.trust_cpu=on",
    "rcupdate.rcu_expedited=1", "pci=off",
)  # fmt: skip
WORDS_TCG = ("mitigations=off", "init_on_alloc=0")  # on a true CPU the guest's kernel keeps its guards


NO_TRACING = "initcall_blacklist=tracer_init_tracefs"  # TCG alone: 0.1 s for some ten thousand files of tracefs


class Share(NamedTuple):
    """A file tree by virtiofs: the tag that the guest mounts, and a socket connected to its virtiofsd."""

    tag: str
    fd: int


class Volume(NamedTuple):
    """A further disk, which the guest finds by `serial`."""

    serial: str
    fd: int
    readonly: bool


class Nic(NamedTuple):
    """A network device: its MAC and its tap's descriptor; `vhost` is one of the kernel's back-end, or None."""

    mac: bytes
    fd: int
    vhost: int | None


class Machine(NamedTuple):
    """A VM to be started. Descriptors are inherited by QEMU under their numbers.

    kernel, initramfs: descriptors of files that anybody may read (QEMU opens them once more).
    layers: descriptor of a VMDK, layer_fds what it lists; None without layers. disk: of the writable image, or None;
    disk_flushes: whether a flush in the guest is one on the host, which nobody needs of a disk that is removed at the end.
    tracing: whether somebody in the guest could look into tracefs.
    agent, console, monitor: connected stream sockets; tsc_khz: the host's rate.
    """

    name: str
    kvm: bool
    vcpus: int
    memory_bytes: int
    tsc_khz: int
    kernel: int
    initramfs: int
    agent: int
    console: int
    monitor: int
    layers: int | None = None
    layer_fds: tuple[int, ...] = ()
    disk: int | None = None
    disk_flushes: bool = True
    shares: tuple[Share, ...] = ()
    nics: tuple[Nic, ...] = ()
    volumes: tuple[Volume, ...] = ()
    tracing: bool = True
    words: tuple[str, ...] = ()

    @property
    def fds(self) -> tuple[int, ...]:
        """Everything to be inherited."""
        some = (self.kernel, self.initramfs, self.agent, self.console, self.monitor, self.layers, self.disk)
        volumes = [volume.fd for volume in self.volumes]
        nics = [fd for nic in self.nics for fd in (nic.fd, nic.vhost) if fd is not None]
        return (
            *(fd for fd in some if fd is not None),
            *self.layer_fds,
            *(share.fd for share in self.shares),
            *nics,
            *volumes,
        )


def command_line(machine: Machine) -> str:
    """The kernel's words."""
    words = [*WORDS, f"tsc_early_khz={machine.tsc_khz}"]
    if not machine.kvm:
        words += WORDS_TCG if machine.tracing else (*WORDS_TCG, NO_TRACING)
    if machine.vcpus == 1:
        words.append("noreplace-smp")
    return " ".join((*words, *machine.words))


def build(qemu: str, machine: Machine) -> list[str]:
    """The arguments, program first."""
    backing = ",memory-backend=ram" if machine.shares else ""
    argv = [
        qemu, "-name", f"ambi-{machine.name[:12]}", "-nodefaults", "-no-user-config", "-no-reboot",
        "-display", "none", "-sandbox", SANDBOX,
        "-machine", f"microvm,pit=off,pic=off,rtc=on,acpi=on,usb=off,auto-kernel-cmdline=off{backing}",
        *_cpu(machine), "-smp", str(machine.vcpus), "-m", f"{machine.memory_bytes >> 20}M",
        "-global", "virtio-mmio.force-legacy=false",
        "-kernel", f"/proc/self/fd/{machine.kernel}", "-initrd", f"/proc/self/fd/{machine.initramfs}",
        "-append", command_line(machine),
        *_stream("console", machine.console), "-serial", "chardev:console",
        *_stream("monitor", machine.monitor), "-mon", "chardev=monitor,mode=control",
        *_stream("agent", machine.agent), "-device", "virtio-serial-device,max_ports=2",
        "-device", f"virtserialport,nr=1,chardev=agent,name={PORT_NAME}",
    ]  # fmt: skip
    if machine.shares:
        argv += ["-object", f"memory-backend-memfd,id=ram,size={machine.memory_bytes >> 20}M,share=on"]
    return argv + _disks(machine) + _shares(machine) + _nics(machine) + _volumes(machine)


def _cpu(machine: Machine) -> list[str]:
    if machine.kvm:
        return ["-accel", "kvm", "-cpu", "host"]
    return ["-accel", f"tcg,thread=multi,tb-size={TB_SIZE_MIB}", "-cpu", CPU_TCG]


def _stream(name: str, fd: int) -> list[str]:
    return ["-chardev", f"socket,id={name},fd={fd}"]


def _disks(machine: Machine) -> list[str]:
    argv: list[str] = []
    for fd in machine.layer_fds:
        argv += ["-add-fd", f"fd={fd},set={fd}"]
    if machine.layers is not None:
        argv += [
            "-add-fd", f"fd={machine.layers},set={machine.layers}",
            "-blockdev", f"driver=vmdk,node-name=layers,read-only=on,file.driver=file,file.read-only=on,"
            f"file.filename=/dev/fdset/{machine.layers}",
            "-device", "virtio-blk-device,drive=layers,serial=layers",
        ]  # fmt: skip
    if machine.disk is not None:
        argv += [
            "-add-fd", f"fd={machine.disk},set={machine.disk}",
            "-blockdev", "driver=raw,node-name=disk,discard=unmap,file.driver=file,file.discard=unmap,"
            f"file.cache.no-flush={'off' if machine.disk_flushes else 'on'},"
            f"file.filename=/dev/fdset/{machine.disk}",
            "-device", "virtio-blk-device,drive=disk,serial=disk",
        ]  # fmt: skip
    return argv


def _shares(machine: Machine) -> list[str]:
    argv: list[str] = []
    for share in machine.shares:
        argv += [*_stream(share.tag, share.fd), "-device", f"vhost-user-fs-device,chardev={share.tag},tag={share.tag}"]
    return argv


def _nics(machine: Machine) -> list[str]:
    argv: list[str] = []
    for number, nic in enumerate(machine.nics):
        vhost = "off" if nic.vhost is None else f"on,vhostfd={nic.vhost}"
        argv += [
            "-netdev", f"tap,id=nic{number},fd={nic.fd},vhost={vhost}",
            "-device", f"virtio-net-device,netdev=nic{number},mac={nic.mac.hex(':')}",
        ]  # fmt: skip
    return argv


def _volumes(machine: Machine) -> list[str]:
    argv: list[str] = []
    for volume in machine.volumes:
        readonly = "on" if volume.readonly else "off"
        argv += [
            "-add-fd", f"fd={volume.fd},set={volume.fd}",
            "-blockdev", f"driver=raw,node-name={volume.serial},read-only={readonly},discard=unmap,file.driver=file,"
            f"file.read-only={readonly},file.discard=unmap,file.locking=off,file.filename=/dev/fdset/{volume.fd}",
            "-device", f"virtio-blk-device,drive={volume.serial},serial={volume.serial}",
        ]  # fmt: skip
    return argv
