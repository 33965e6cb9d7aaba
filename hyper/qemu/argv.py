"""QEMU's command line as a function of values. Nothing here touches the system.

The machine is microvm: virtio-mmio devices found through ACPI, a UART for the kernel's last words, an RTC (without one Linux
polls an absent clock for two seconds), neither PIT nor PIC. Linux cannot calibrate its TSC on that, so we tell it the rate.
"""

from __future__ import annotations

from hyper.guest.protocol import PORT_NAME
from hyper.vm.hardware import Hardware
from hyper.vm.words import command_line

SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
MEMORY_PATH = "/ambi-memory"  # no file: who opens it gets the descriptor of Hardware.memory, see ambi/linux/handover.py
BLANK = "driver=null-co,node-name={0},read-only={1},size=1048576,read-zeroes=on"
EXTENTS = "extents"  # what reads the layers' files. Below another node: QEMU saves no machine that has it, see snapshots.py
TB_SIZE_MIB = 128  # TCG's cache of translated code; its default is an eighth of the host's memory
CPU_TCG = "qemu64,+ssse3,+sse4.1,+sse4.2,+popcnt,+cx16,+lahf-lm,+rdrand"  # x86-64-v2, which today's distributions require


def build(qemu: str, machine: Hardware, layers: int | None = None) -> list[str]:
    """The arguments, program first. layers: a descriptor of the VMDK that lists `machine.layers`, see vmdk.py.

    A blank machine and one that goes on as its copy have the same devices in the same order.
    """
    memory = _memory(machine)
    backing = ",memory-backend=ram" if memory else ""
    argv = [
        qemu, "-name", f"ambi-{machine.name[:12]}", "-nodefaults", "-no-user-config", "-no-reboot",
        "-display", "none", "-sandbox", SANDBOX,
        "-machine", f"microvm,pit=off,pic=off,rtc=on,acpi=on,usb=off,auto-kernel-cmdline=off{backing}",
        *_cpu(machine), "-smp", str(machine.vcpus), "-m", f"{machine.memory_bytes >> 20}M",
        "-global", "virtio-mmio.force-legacy=false",
        "-kernel", f"/proc/self/fd/{machine.kernel}", "-initrd", f"/proc/self/fd/{machine.initramfs}",
        "-append", command_line(machine),
        *_stream("console", machine.console), "-serial", "chardev:console",
        *_stream("monitor", machine.control), "-mon", "chardev=monitor,mode=control",
        *_stream("agent", machine.agent), "-device", "virtio-serial-device,max_ports=2",
        "-device", f"virtserialport,nr=1,chardev=agent,name={PORT_NAME}",
    ]  # fmt: skip
    argv += memory + _balloon(machine) + _vsock(machine)
    return argv + _disks(machine, layers) + _shares(machine) + _nics(machine) + _volumes(machine)


def _memory(machine: Hardware) -> list[str]:
    size = f"size={machine.memory_bytes >> 20}M"
    if machine.memory is not None:
        shared = "on" if machine.memory.shared else "off"
        return ["-object", f"memory-backend-file,id=ram,{size},mem-path={MEMORY_PATH},share={shared}"]
    return ["-object", f"memory-backend-memfd,id=ram,{size},share=on"] if machine.shares else []


def _balloon(machine: Hardware) -> list[str]:
    """What the guest does not use goes back to the host; of a copy of a template QEMU cannot give it: it would punch holes
    into the template's file, and may not."""
    return ["-device", "virtio-balloon-device,free-page-reporting=on"] if machine.memory is None else []


def _vsock(machine: Hardware) -> list[str]:
    if machine.vsock is None:
        return []
    return ["-device", f"vhost-vsock-device,guest-cid={machine.vsock.cid},vhostfd={machine.vsock.fd}"]


def _cpu(machine: Hardware) -> list[str]:
    if machine.kvm:
        return ["-accel", "kvm", "-cpu", "host"]
    return ["-accel", f"tcg,thread=multi,tb-size={TB_SIZE_MIB}", "-cpu", CPU_TCG]


def _stream(name: str, fd: int) -> list[str]:
    return ["-chardev", f"socket,id={name},fd={fd}"]


def _disks(machine: Hardware, layers: int | None) -> list[str]:
    if machine.blank:
        return _blank("layers", True) + _blank("disk", False)
    argv: list[str] = []
    for fd in machine.layers.fds if machine.layers else ():
        argv += ["-add-fd", f"fd={fd},set={fd}"]
    if layers is not None:
        argv += [
            "-add-fd", f"fd={layers},set={layers}",
            "-blockdev", f"driver=vmdk,node-name={EXTENTS},read-only=on,file.driver=file,file.read-only=on,"
            f"file.filename=/dev/fdset/{layers}",
            "-blockdev", f"driver=raw,node-name=layers,read-only=on,file={EXTENTS}",
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


def _blank(name: str, readonly: bool) -> list[str]:
    """A disk without content."""
    return [
        "-blockdev", BLANK.format(name, "on" if readonly else "off"),
        "-device", f"virtio-blk-device,drive={name},serial={name}",
    ]  # fmt: skip


def _shares(machine: Hardware) -> list[str]:
    argv: list[str] = []
    for share in machine.shares:
        argv += [*_stream(share.tag, share.fd), "-device", f"vhost-user-fs-device,chardev={share.tag},tag={share.tag}"]
    return argv


def _nics(machine: Hardware) -> list[str]:
    argv: list[str] = []
    for number, nic in enumerate(machine.nics):
        peer = ""
        if nic.fd >= 0 and not machine.blank:
            vhost = "off" if nic.vhost is None else f"on,vhostfd={nic.vhost}"
            argv += ["-netdev", f"tap,id=nic{number},fd={nic.fd},vhost={vhost}"]
            peer = f"netdev=nic{number},"
        argv += ["-device", f"virtio-net-device,{peer}mac={nic.mac.hex(':')}"]
    return argv


def _volumes(machine: Hardware) -> list[str]:
    argv: list[str] = []
    for volume in machine.volumes:
        if machine.blank:
            argv += _blank(volume.serial, False)
            continue
        readonly = "on" if volume.readonly else "off"
        argv += [
            "-add-fd", f"fd={volume.fd},set={volume.fd}",
            "-blockdev", f"driver=raw,node-name={volume.serial},read-only={readonly},discard=unmap,file.driver=file,"
            f"file.read-only={readonly},file.discard=unmap,file.locking=off,file.filename=/dev/fdset/{volume.fd}",
            "-device", f"virtio-blk-device,drive={volume.serial},serial={volume.serial}",
        ]  # fmt: skip
    return argv
