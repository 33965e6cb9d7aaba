"""Host directories in the guest, by virtiofs: a virtiofsd for each tree, as a child of the shim.

The root of a `Directory` plan is one tree. All bind mounts together are a second one: a tmpfs with an entry for each, made
in the private mount namespace of the virtiofsd, so that the host sees none of it. Read-only is enforced there as well, where
a guest cannot change it.

Two programs are called virtiofsd: the one in C of QEMU 7 (Debian 12, /usr/lib/qemu) and the one in Rust (Debian 13,
/usr/libexec); what we say to them is what both understand, but for `_options`.
"""

from __future__ import annotations

import errno
import gc
import json
import os
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, NoReturn

from ambi.core.errors import AmbiError, InvalidRequest, NotFound, Unsupported, from_os_error, from_wire
from ambi.linux import mount, paths, process
from hyper.vm import jail
from hyper.vm.cgroup import Cgroup

C_PROGRAM = "/usr/lib/qemu/virtiofsd"
INSTALL = "apt-get install virtiofsd (Debian 12: qemu-system-common)"
RUST_PROGRAMS = ("/usr/libexec/virtiofsd", "/usr/lib/virtiofsd")
ROOT_TAG = "root"
BINDS_TAG = "binds"
TMPFS_MAGIC = 0x01021994  # linux/magic.h
DONE = b"done"


class Bind(NamedTuple):
    """A bind mount; it appears as `name` in the tree. `recursive`: with the mounts below it.

    subpath: below `source`, which it never leaves, "" for all of it. copies: the guest fills it when it is empty, and so may
    write then, read-only or not.
    """

    name: str
    source: Path
    readonly: bool
    recursive: bool
    subpath: str = ""
    copies: bool = False

    def open(self) -> int:
        """An O_PATH descriptor of what is bound. Raises OSError."""
        top = os.open(self.source, os.O_PATH | os.O_CLOEXEC)
        if not self.subpath:
            return top
        try:
            return paths.open_in_root(top, self.subpath)
        finally:
            os.close(top)


class Server(NamedTuple):
    """A running virtiofsd; `sock` is connected to it and is for QEMU."""

    tag: str
    child: jail.Child
    sock: socket.socket

    def end(self) -> None:
        """Idempotent."""
        self.sock.close()
        self.child.kill()
        self.child.close()


def program() -> str | None:
    """The virtiofsd of this host."""
    return next((path for path in (*RUST_PROGRAMS, C_PROGRAM) if os.access(path, os.X_OK)), None)


def check_sources(binds: tuple[Bind, ...]) -> None:
    """Raise NotFound for a source that is not there."""
    for bind in binds:
        if not bind.source.exists():
            raise NotFound(f"bind source path does not exist: {bind.source}")
        try:
            os.close(bind.open())
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise InvalidRequest(
                    f"cannot bind '{bind.subpath}' of {bind.source}: its symbolic links lead nowhere"
                ) from error
            raise from_os_error(f"cannot bind '{bind.subpath or '/'}' of {bind.source}", error) from error


class Place(NamedTuple):
    """Where a virtiofsd runs, and where its words go. host_mounts: the mount namespace that paths of binds are looked up in;
    ours shows what was mounted when the zygote began, with what has come since only below shared mounts."""

    run_dir: Path
    cgroup: Cgroup
    output: int
    host_mounts: int | None = None


def serve_directory(path: Path, place: Place) -> Server:
    """Serve `path` as the root of a guest."""
    return _serve(ROOT_TAG, path, place._replace(host_mounts=None), ())


def serve_binds(binds: tuple[Bind, ...], place: Place) -> Server:
    """Serve a tree with an entry for each of `binds`."""
    with _among(place.host_mounts):
        check_sources(binds)
    tree = place.run_dir / BINDS_TAG
    tree.mkdir(exist_ok=True)
    return _serve(BINDS_TAG, tree, place, binds)


@contextmanager
def _among(mounts: int | None) -> Iterator[None]:
    """In the mount namespace `mounts` for the time being. For a process of one thread that has no need of its directory."""
    if mounts is None:
        yield
        return
    ours = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    try:
        process.setns(mounts, process.CLONE_NEWNS)
        try:
            yield
        finally:
            process.setns(ours, process.CLONE_NEWNS)
    finally:
        os.close(ours)


def _serve(tag: str, path: Path, place: Place, binds: tuple[Bind, ...]) -> Server:
    exe = program()
    if exe is None:
        raise Unsupported("bind mounts into a virtual machine need virtiofsd", hint=INSTALL)
    listener, sock = _socket_to(place.run_dir, tag)
    try:
        argv = [exe, f"--fd={listener.fileno()}", *_options(exe, path, shared=bool(binds))]

        def prepare() -> None:
            place.cgroup.join()
            if place.host_mounts is not None:
                process.setns(place.host_mounts, process.CLONE_NEWNS)
            process.unshare(process.CLONE_NEWNS)
            mount.mount(None, "/", None, mount.MS_REC | mount.MS_SLAVE)
            if binds:
                _build_tree(path, binds)

        child = jail.spawn(argv, (listener.fileno(),), place.output, prepare)
    except BaseException:
        sock.close()
        raise
    finally:
        listener.close()
    return Server(tag, child, sock)


def _socket_to(run_dir: Path, tag: str) -> tuple[socket.socket, socket.socket]:
    """A listening socket that nobody else can connect to any more, and the one connection to it."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    directory = os.open(run_dir, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    name = f"/proc/self/fd/{directory}/virtiofs-{tag}"  # the path of run_dir may be longer than a socket's name can be
    try:
        listener.bind(name)
        try:
            listener.listen(1)
            sock.connect(name)
        finally:
            os.unlink(name)
    except BaseException as error:
        listener.close()
        sock.close()
        if isinstance(error, OSError):
            raise from_os_error("cannot make the socket of virtiofsd", error) from error
        raise
    finally:
        os.close(directory)
    return listener, sock


def _options(exe: str, path: Path, *, shared: bool) -> list[str]:
    """shared: others write there, too, and the guest is to see it at once: it asks again each time, where `auto` alone
    believes sizes and names for a second. The program in Rust has no such option, so there it is that second."""
    if exe == C_PROGRAM:
        # rlimit-nofile=0 leaves the limit alone: raising it needs CAP_SYS_RESOURCE, and failing to is fatal there.
        return [
            "-f",
            "-o",
            f"source={path}",
            "-o",
            "sandbox=namespace,xattr,announce_submounts,cache=auto" + (",timeout=0" if shared else ""),
            "--rlimit-nofile=0",
        ]
    return [f"--shared-dir={path}", "--sandbox=namespace", "--xattr", "--announce-submounts", "--cache=auto",
            "--rlimit-nofile=0", "--inode-file-handles=never"]  # fmt: skip


def _build_tree(tree: Path, binds: tuple[Bind, ...]) -> None:
    """In the child: a read-only tmpfs on `tree` with the binds mounted in it."""
    mount.mount("tmpfs", tree, "tmpfs", mount.MS_NOSUID | mount.MS_NODEV | mount.MS_NOEXEC, "mode=755,size=1m")
    top = os.open(tree, os.O_PATH | os.O_CLOEXEC)
    for bind in binds:
        fd = _cloned(bind)
        _make_entry(top, bind.name, fd)
        mount.move_mount(fd, top, bind.name)
        os.close(fd)
    os.close(top)
    mount.mount(None, tree, None, mount.MS_REMOUNT | mount.MS_BIND | mount.MS_RDONLY)


def _cloned(bind: Bind) -> int:
    """A detached mount of what is bound."""
    source = bind.open()
    try:
        fd = mount.open_tree(source, "", mount.OPEN_TREE_CLONE | (mount.AT_RECURSIVE if bind.recursive else 0))
    finally:
        os.close(source)
    empty = bind.copies and stat.S_ISDIR(os.fstat(fd).st_mode) and not os.listdir(f"/proc/self/fd/{fd}")
    if bind.readonly and not empty:
        _make_readonly(fd, recursive=bind.recursive)
    return fd


def _make_entry(tree: int, name: str, fd: int) -> None:
    """What `fd` can be mounted on."""
    if stat.S_ISDIR(os.fstat(fd).st_mode):
        os.mkdir(name, 0o755, dir_fd=tree)
    else:
        os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o644, dir_fd=tree))


def add(server: Server, bind: Bind, host_mounts: int | None) -> None:
    """Bind something more in the tree of a virtiofsd that runs, and that its guest has mounted.

    It looks paths up when it is asked, and so sees what is mounted in its namespace. Raises an AmbiError.
    """

    def work() -> None:
        if host_mounts is not None:
            process.setns(host_mounts, process.CLONE_NEWNS)
        check_sources((bind,))
        fd = _cloned(bind)
        mount.mount_setattr(fd, propagation=mount.MS_SLAVE, recursive=True)
        _enter(server)
        _make_entry(_writable_tree(), bind.name, fd)
        mount.move_mount(fd, mount.AT_FDCWD, f"/{bind.name}")

    _apart(work, f"cannot bind {bind.source}")


def remove(server: Server, name: str) -> None:
    """Undo `add`; what is open there stays with whoever has it. Idempotent. Raises an AmbiError."""

    def work() -> None:
        _enter(server)
        tree = _writable_tree()
        try:
            info = os.stat(name, dir_fd=tree, follow_symlinks=False)
        except FileNotFoundError:
            return
        try:
            mount.umount(f"/{name}", mount.MNT_DETACH | mount.UMOUNT_NOFOLLOW)
        except OSError as error:
            if error.errno != errno.EINVAL:  # nothing is mounted there
                raise
        if stat.S_ISDIR(info.st_mode):
            os.rmdir(name, dir_fd=tree)
        else:
            os.unlink(name, dir_fd=tree)

    _apart(work, "cannot take a bind away")


def _enter(server: Server) -> None:
    """Into the mount namespace of who serves: a child of the process that we started."""
    pid = server.child.pid
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except FileNotFoundError:  # a kernel without CONFIG_PROC_CHILDREN; mostly they are in one namespace
        children = []
    serves = os.pidfd_open(int(children[0]) if children else pid)
    process.setns(serves, process.CLONE_NEWNS)
    os.close(serves)


def _apart(work: Callable[[], None], what: str) -> None:
    """Run `work` in a child, which may enter other namespaces. Raises what it raises there; `what` names an OSError."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        _tell(work, what, writer)
    os.close(writer)
    with open(reader, "rb") as told:
        text = told.read()
    try:
        os.waitpid(pid, 0)
    except ChildProcessError:  # reaped by another part of this process
        pass
    if text != DONE:
        raise from_wire(json.loads(text or b'{"kind": "Internal", "message": "the process that changes mounts was killed"}'))


def _tell(work: Callable[[], None], what: str, writer: int) -> NoReturn:
    try:
        gc.freeze()
        process.die_with_parent()
        work()
        os.write(writer, DONE)
    except AmbiError as error:
        os.write(writer, json.dumps(error.to_wire()).encode())
    except OSError as error:
        os.write(writer, json.dumps(from_os_error(what, error).to_wire()).encode())
    finally:
        os._exit(0)


def _writable_tree() -> int:
    """In a virtiofsd's namespace, whose root is the tree of binds: the tmpfs itself, without what is mounted in it. No path
    leads to this mount, so the guest's is read-only at every moment."""
    fd = mount.open_tree(mount.AT_FDCWD, "/", mount.OPEN_TREE_CLONE)
    if paths.filesystem_type(fd) != TMPFS_MAGIC:
        raise OSError(errno.EXDEV, "the root of virtiofsd is not the tree of binds")
    mount.mount_setattr(fd, clear=mount.MOUNT_ATTR_RDONLY)
    return fd


def _make_readonly(fd: int, *, recursive: bool) -> None:
    try:
        mount.mount_setattr(fd, set=mount.MOUNT_ATTR_RDONLY, recursive=recursive)
    except OSError as error:
        if error.errno != errno.ENOSYS:
            raise
        mount.mount(None, f"/proc/self/fd/{fd}", None, mount.MS_REMOUNT | mount.MS_BIND | mount.MS_RDONLY)
