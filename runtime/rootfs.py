"""The root file system: layers mounted once for all in the shim, an overlay over them in the container's own namespace."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

from ambi.core.errors import Unsupported, from_os_error
from ambi.core.plan import LaunchPlan, Layer, Layers
from ambi.linux import loop, mount, paths

LOCK = ".lock"  # in the layers directory; held while a layer is mounted


def prepare(plan: LaunchPlan) -> tuple[str, list[str], str]:
    """Make sure that the root of `plan` can be assembled: what the child needs for it.

    Returns ("overlay", [layer directories, the lowest first], upper) or ("directory", [], path). Runs in the shim's mount
    namespace, where EROFS layers stay mounted for whoever comes next; the upper gets its `fs` and `work`.
    """
    if not isinstance(plan.rootfs, Layers):
        return "directory", [], str(plan.rootfs.path)
    lowers = [str(layer.path) if layer.form == "dir" else _mounted(layer, plan.layers_dir) for layer in plan.rootfs.lowers]
    upper = str(plan.rootfs.upper)
    if not os.path.isdir(f"{upper}/fs"):
        _make_upper(upper, lowers)
    return "overlay", lowers, upper


def _make_upper(upper: str, lowers: list[str]) -> None:
    """`work`, then `fs` with the mode and owner of the image's own root, which overlay takes from the upper."""
    os.makedirs(f"{upper}/work", 0o700, exist_ok=True)
    unready = f"{upper}/fs.new"
    os.makedirs(unready, exist_ok=True)
    if lowers:
        status = os.stat(lowers[-1])
        os.chown(unready, status.st_uid, status.st_gid)
        os.chmod(unready, status.st_mode & 0o7777)
    os.rename(unready, f"{upper}/fs")


def _mounted(layer: Layer, layers_dir: Path) -> str:
    """Where `layer` is mounted in this namespace; mounts it first when nobody has."""
    place = f"{layers_dir}/{layer.name}"
    if _is_mount(place):
        return place
    os.makedirs(place, 0o700, exist_ok=True)
    lock = os.open(f"{layers_dir}/{LOCK}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _is_mount(place):
            made = mount_erofs(layer.path)
            try:
                mount.move_mount(made, mount.AT_FDCWD, place)
            finally:
                os.close(made)
    except OSError as error:
        raise from_os_error(f"cannot mount layer {layer.name} from {layer.path}", error) from error
    finally:
        os.close(lock)
    return place


def _is_mount(place: str) -> bool:
    try:
        return os.stat(place).st_dev != os.stat(os.path.dirname(place)).st_dev
    except FileNotFoundError:
        return False


def mount_erofs(image: Path) -> int:
    """A detached read-only mount of an EROFS file: of the file itself (Linux 6.12), else by a loop device."""
    attributes = mount.MOUNT_ATTR_RDONLY | mount.MOUNT_ATTR_NODEV
    file = os.open(image, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            return mount.new_mount("erofs", f"/proc/self/fd/{file}", (), attributes, readonly=True)
        except OSError as error:
            if error.errno == errno.ENODEV:
                raise Unsupported("this kernel has no EROFS", hint="use layers of the form `dir`") from None
            if error.errno not in (errno.ENOTBLK, errno.EINVAL, errno.EOPNOTSUPP):
                raise
        device, handle = loop.attach(file)
        try:
            return mount.new_mount("erofs", device, (), attributes, readonly=True)
        finally:
            os.close(handle)
    finally:
        os.close(file)


def assemble(kind: str, lowers: list[str], source: str, scratch: str, *, disposable: bool) -> int:
    """Mount the root at `scratch`, in the calling process's own namespace, and return an O_PATH descriptor of it.

    disposable: nobody needs the upper after a crash, so overlay need not sync it.
    """
    if kind == "directory":
        made = mount.open_tree(mount.AT_FDCWD, source, mount.OPEN_TREE_CLONE | mount.AT_RECURSIVE)
        mount.move_mount(made, mount.AT_FDCWD, scratch)
        os.close(made)
    elif not lowers:
        mount.mount(f"{source}/fs", scratch, None, mount.MS_BIND)
    else:
        _mount_overlay(lowers, source, scratch, disposable)
    return os.open(scratch, paths.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)


def _mount_overlay(lowers: list[str], upper: str, scratch: str, disposable: bool) -> None:
    """Directories go by descriptor: 127 of their paths would not fit the page that mount(2) takes, nor may they hold `:`."""
    _forget_volatile(f"{upper}/work/work/incompat/volatile")
    opened = [os.open(path, paths.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC) for path in (*reversed(lowers), f"{upper}/fs")]
    opened.append(os.open(f"{upper}/work", paths.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
    *below, fs, work = [f"/proc/self/fd/{fd}" for fd in opened]
    options = ["lowerdir=" + ":".join(below), f"upperdir={fs}", f"workdir={work}", "redirect_dir=nofollow", "metacopy=off"]
    options += ["index=off", "xino=off"] + (["volatile"] if disposable else [])
    try:
        mount.mount("overlay", scratch, "overlay", 0, ",".join(options))
    finally:
        for fd in opened:
            os.close(fd)


def assemble_lowers(lowers: list[str], scratch: str) -> None:
    """Mount at least two layers as they are below an upper, read-only, at `scratch`."""
    opened = [os.open(path, paths.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC) for path in reversed(lowers)]
    try:
        options = "lowerdir=" + ":".join(f"/proc/self/fd/{fd}" for fd in opened)
        mount.mount("overlay", scratch, "overlay", mount.MS_RDONLY, f"{options},redirect_dir=nofollow,metacopy=off,xino=off")
    finally:
        for fd in opened:
            os.close(fd)


def _forget_volatile(mark: str) -> None:
    """Remove what a mount with `volatile` leaves behind, and what keeps overlay from mounting the upper again."""
    try:
        os.unlink(f"{mark}/dirty")
        os.rmdir(mark)
    except FileNotFoundError:
        pass


def pivot(root: int, propagation: str) -> None:
    """Make `root` the root of this namespace and detach all that the host had in it."""
    os.fchdir(root)
    mount.pivot_root(".", ".")
    mount.umount(".", mount.MNT_DETACH)
    os.chdir("/")
    if propagation:
        flags = {"private": mount.MS_PRIVATE, "shared": mount.MS_SHARED, "slave": mount.MS_SLAVE}
        recursive = mount.MS_REC if propagation.startswith("r") else 0
        mount.mount(None, "/", None, flags.get(propagation.removeprefix("r"), mount.MS_UNBINDABLE) | recursive)
