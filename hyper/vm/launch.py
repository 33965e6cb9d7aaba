"""From a plan to a running VMM: everything it needs is opened here and handed over as descriptors."""

from __future__ import annotations

import os
from pathlib import Path

from ambi.core.deadline import Deadline
from ambi.core.errors import Forbidden, from_os_error
from ambi.core.loop import Loop
from ambi.core.plan import Directory, LaunchPlan, Layers
from ambi.core.undo import Undo
from hyper import boot_files, probe, translate
from hyper.vm import disk, jail, layers, nic, share, template, vsock
from hyper.vm.backend import Backend, Handles, Place
from hyper.vm.cgroup import Cgroup, Limits
from hyper.vm.console import Console
from hyper.vm.hardware import Hardware, Nic, Share, Volume
from hyper.vm.machine import Parts, VirtualMachine
from hyper.vm.monitor import TEMPLATE, Monitor, end
from hyper.vm.restoring import Restoring
from hyper.vm.saving import Line

TEMPLATES = "disks"  # below the guest directory
MAX_TASKS = 512  # threads of a VMM and virtiofsd


def launch(
    backend: Backend,
    host: probe.Host,
    plan: LaunchPlan,
    undo: Undo,
    by: Deadline,
    loop: Loop,
    host_mounts: int | None = None,
    restoring: Restoring | None = None,
) -> VirtualMachine:
    """Start the VMM of `plan`; its guest is still to boot, or is a copy of one that has. What was made is undone by `undo`,
    or by the machine's delete. restoring: the snapshot that it goes on from.

    Raises NotFound (a layer, a bind's source), Unsupported, StorageFull, Forbidden.
    """
    plan.run_dir.mkdir(parents=True, exist_ok=True)
    with Handles() as handles:
        cgroup = Cgroup(plan.config["linux"]["cgroupsPath"])
        undo.add("remove the cgroup of the VM", cgroup.remove)
        cgroup.create(_limits(plan, backend.overhead_bytes(host.kvm)))
        output, console_fd, console = _console(handles, undo, loop)
        servers = _serve(plan, share.Place(plan.run_dir, cgroup, output, host_mounts), undo)
        agent, agent_fd = handles.socket_pair()
        undo.add("close the agent's socket", agent.close)
        copies = restoring.disks if restoring else {}
        hardware = _hardware(plan, host, handles, servers, copies)._replace(console=console_fd, agent=agent_fd)
        if sockets := vsock.take(plan):
            handles.add(sockets.fd)
            hardware = hardware._replace(vsock=sockets)
        network = _network(plan, undo, restoring)
        if network:
            hardware = hardware._replace(nics=_nics(network, host, handles))
        place = Place(jail.user_id(plan.id), cgroup, output, handles)
        if restoring:
            monitor = restoring.start(template.completed(hardware, restoring.snapshot), place, by)
        else:
            monitor = template.start(backend, hardware, plan.guest_dir, place, by)
        undo.add("end the VMM", lambda: end(monitor))
        if network:
            network.close_taps()
        line = restoring.line() if restoring else _line(backend, host, monitor, hardware)
        parts = Parts(monitor, console, cgroup, servers, network, line, host_mounts)
        machine = VirtualMachine(plan, parts, agent, loop, restoring)
        machine.vsock_cid = hardware.vsock.cid if hardware.vsock else None
        undo.add("end the VM", machine.abandon)
        return machine


def _line(backend: Backend, host: probe.Host, monitor: Monitor, hardware: Hardware) -> Line:
    common = monitor.origin == TEMPLATE
    nics = max(len(hardware.nics), template.NICS if common else 0)
    return Line(backend.snapshots(), kvm=host.kvm, common=common, nics=nics)


def _limits(plan: LaunchPlan, overhead: int) -> Limits:
    return Limits(memory_bytes=translate.shape(plan).memory_bytes + overhead, pids=MAX_TASKS)


def _console(handles: Handles, undo: Undo, loop: Loop) -> tuple[int, int, Console]:
    """Where children write what they have to say, the VMM's end of the guest's console, and the reader of both."""
    reader, output = os.pipe2(os.O_CLOEXEC)
    handles.add(output)
    serial, serial_fd = handles.socket_pair()
    console = Console(loop, serial.detach(), reader)
    undo.add("close the console", console.close)
    return output, serial_fd, console


def _serve(plan: LaunchPlan, place: share.Place, undo: Undo) -> list[share.Server]:
    """Start a virtiofsd for each tree that the plan needs."""
    servers = []
    if isinstance(plan.rootfs, Directory):
        servers.append(share.serve_directory(plan.rootfs.path, place))
        undo.add("end virtiofsd", servers[-1].end)
    binds = translate.binds(plan)
    if binds:
        servers.append(share.serve_binds(binds, place))
        undo.add("end virtiofsd", servers[-1].end)
    return servers


def _network(plan: LaunchPlan, undo: Undo, restoring: Restoring | None) -> nic.Network | None:
    path = nic.path_of(plan.config)
    saved = nic.Devices(restoring.snapshot.nics, restoring.snapshot.devices) if restoring else None
    return nic.Network(path, undo, saved) if path else None


def _nics(network: nic.Network, host: probe.Host, handles: Handles) -> tuple[Nic, ...]:
    """The VMM's devices; by the kernel's back-end where it is, which needs KVM."""
    found = []
    for device in network.devices:
        vhost = nic.open_vhost() if host.kvm else None
        found.append(Nic(device.mac, device.fd, handles.add(vhost) if vhost is not None else None))
    return tuple(found)


def _hardware(
    plan: LaunchPlan, host: probe.Host, handles: Handles, servers: list[share.Server], copies: dict[str, int]
) -> Hardware:
    """The machine without its sockets and NICs. copies: descriptors of disks in the place of those that are there."""
    shape = translate.shape(plan)
    files = boot_files.find(plan.guest_dir, shape.kernel)
    machine = Hardware(
        name=plan.id,
        kvm=host.kvm,
        vcpus=shape.vcpus,
        memory_bytes=shape.memory_bytes,
        hotplug_bytes=max(0, _host_memory() - shape.memory_bytes),
        tsc_khz=host.tsc_khz,
        tracing=translate.may_mount(plan),
        kernel=handles.add(_open_public(files.kernel)),
        initramfs=handles.add(_open_public(files.initramfs)),
        agent=-1,
        console=-1,
        control=-1,
        shares=tuple(Share(server.tag, server.sock.fileno()) for server in servers),
    )
    volumes = tuple(
        Volume(
            volume.name,
            copies[volume.name] if volume.name in copies else handles.add(disk.open_volume(volume)),
            volume.readonly,
        )
        for volume in translate.volumes(plan)
    )
    machine = machine._replace(volumes=volumes)
    if isinstance(plan.rootfs, Layers):
        return _with_disks(machine, plan, plan.rootfs, handles, copies)
    return machine


def _host_memory() -> int:
    """What this host has, in whole GiB: the most that makes sense for one guest."""
    return max(1 << 30, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") & -(1 << 30))


def _open_public(path: Path) -> int:
    """Open a file that a VMM may open again by itself (QEMU does), as a user with no rights."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise from_os_error("cannot open the guest's kernel", error) from error
    if not os.fstat(fd).st_mode & 0o004:
        os.close(fd)
        raise Forbidden(f"the VMM, which runs without rights, may not read {path}", hint=f"chmod a+r {path}")
    return fd


def _with_disks(machine: Hardware, plan: LaunchPlan, rootfs: Layers, handles: Handles, copies: dict[str, int]) -> Hardware:
    fd = copies["disk"] if "disk" in copies else handles.add(_open_disk(plan, rootfs.upper / disk.FILE))
    machine = machine._replace(disk=fd, disk_flushes=not translate.disposable(plan))
    if not rootfs.lowers:
        return machine
    opened = layers.open_layers(rootfs.lowers)
    for fd in opened.fds:
        handles.add(fd)
    return machine._replace(layers=opened)


def _open_disk(plan: LaunchPlan, path: Path) -> int:
    disk.ensure(path, translate.shape(plan).disk_bytes, plan.guest_dir / TEMPLATES)
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise from_os_error("cannot open the disk of the virtual machine", error) from error
