"""A made-up image of many layers that uses everything a layer can hold, as a docker-save archive. Deterministic."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import tarfile
from pathlib import Path

from tests.rootfs import PASSWD, busybox_path

EPOCH_NS = 1_600_000_000_123_456_789


def build(work: Path, probe: Path, count: int = 127, seed: int = 7) -> tuple[Path, list[Path]]:
    """(archive to load as `layercake:latest`, the layers' tars in order). Needs root: devices, owners, capabilities."""
    die, tars = random.Random(seed), []
    names: list[str] = []
    for number in range(count):
        tree = work / "tree"
        tree.mkdir()
        if number == 0:
            _base(tree, probe)
            names = _quirks(tree)
        else:
            _change(tree, die, number, names)
        _settle_times(tree, number)
        tars.append(_pack(tree, work / f"layer{number:03}.tar"))
        shutil.rmtree(tree)
    return _save(work, tars), tars


def _base(tree: Path, probe: Path) -> None:
    for name in ("bin", "etc", "proc", "sys", "dev", "tmp", "quirks", "cake", "deleted"):
        (tree / name).mkdir()
    shutil.copy(busybox_path(), tree / "bin/busybox")
    shutil.copy(probe, tree / "bin/treeprobe")
    for applet in ("sh", "sleep", "true"):
        (tree / "bin" / applet).symlink_to("busybox")
    for name, text in (("passwd", PASSWD), ("hosts", ""), ("hostname", ""), ("resolv.conf", "")):
        (tree / "etc" / name).write_text(text)


def _quirks(tree: Path) -> list[str]:
    """One of everything; returns the paths that later layers may change or remove."""
    here = os.fsencode(tree / "quirks")
    plain = tree / "quirks/plain"
    plain.write_bytes(os.urandom(1) * 3000)
    os.link(plain, tree / "quirks/second-name")
    os.symlink("plain", tree / "quirks/link")
    os.symlink("/" + "x" * 3000, tree / "quirks/long-link")
    os.link(tree / "quirks/link", tree / "quirks/link-to-link", follow_symlinks=False)
    os.mkfifo(tree / "quirks/fifo", 0o640)
    os.mknod(tree / "quirks/char", 0o620 | 0o020000, os.makedev(5, 300))
    os.mknod(tree / "quirks/block", 0o660 | 0o060000, os.makedev(300, 70000))
    (tree / "quirks/setuid").write_text("#!/bin/sh\n")
    os.chown(tree / "quirks/setuid", 70000, 4_000_000)
    os.chmod(tree / "quirks/setuid", 0o6755)
    for name in (b"latin1-\xe9\xff", b"new\nline", b"back\\slash", b"n" * 255, "ünïcode".encode()):
        Path(os.fsdecode(here + b"/" + name)).write_bytes(name)
    deep = tree / "quirks"
    for _ in range(30):
        deep = deep / ("d" * 60)
        deep.mkdir()
    (deep / "bottom").write_text("far down")
    with open(tree / "quirks/sparse", "wb") as file:
        file.truncate(8 << 20)
        file.seek(3 << 20)
        file.write(b"island" * 1000)
    (tree / "quirks/empty").touch()
    os.setxattr(plain, "user.note", b"v" * 2000)
    os.setxattr(tree / "quirks", "user.on-directory", b"yes")
    capability = bytes.fromhex("0100000200200000000000000000000000000000")  # cap_net_raw=ep, vfs_cap_data revision 2
    os.setxattr(tree / "quirks/setuid", "security.capability", capability)
    for number in range(40):
        folder = tree / f"deleted/d{number}"
        folder.mkdir()
        for name in ("a", "b"):
            (folder / name).write_text(f"{number} {name}")
    return [f"deleted/d{number}" for number in range(40)]


def _change(tree: Path, die: random.Random, number: int, removable: list[str]) -> None:
    """Add, replace, remove, make opaque: what build steps do."""
    cake = tree / "cake"
    cake.mkdir()
    (cake / f"layer{number}").write_bytes(bytes([number]) * die.choice([0, 1, 100, 2048, 2049, 4096, 70_000]))
    (cake / "top").write_text(f"layer {number}")
    os.chmod(cake, die.choice([0o755, 0o750, 0o1777]))
    if number % 3 == 0 and removable:
        victim = removable.pop(die.randrange(len(removable)))
        (tree / "deleted").mkdir(exist_ok=True)
        (tree / "deleted" / f".wh.{Path(victim).name}").touch()
    if number % 5 == 0:
        folder = cake / "box"
        folder.mkdir()
        (folder / f"only{number}").write_text("inside")
        if number % 10 == 0:
            (folder / ".wh..wh..opq").touch()
    if number % 7 == 0 and number > 7:
        (cake / f".wh.layer{number - 3}").touch()
    if number % 11 == 0:
        os.symlink(f"layer{number}", cake / f"link{number}")
        os.link(cake / f"layer{number}", cake / f"hard{number}")
        os.chown(cake / f"layer{number}", number, number * 1000)
    if number % 13 == 0:  # a directory where a file was, and the other way round
        shape = cake / "shape"
        if number % 2:
            shape.mkdir()
            (shape / "inside").write_text(str(number))
        else:
            shape.write_text("a file now")


def _settle_times(tree: Path, number: int) -> None:
    for top, folders, files in os.walk(os.fsencode(tree), topdown=False):
        for name in [*files, *folders]:
            path = os.path.join(top, name)
            stamp = EPOCH_NS + number * 1_000_000_007 + len(name)
            os.utime(path, ns=(stamp, stamp), follow_symlinks=False)


def _pack(tree: Path, target: Path) -> Path:
    argv = ["tar", "-C", str(tree), "--format=pax", "--sparse", "--xattrs", "--xattrs-include=*", "--numeric-owner"]
    subprocess.run([*argv, "--sort=name", "-cf", str(target), "."], check=True)
    return target


def _save(work: Path, tars: list[Path]) -> Path:
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Cmd": ["/bin/sh"], "Env": ["PATH=/bin"]},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(t.read_bytes()).hexdigest()}" for t in tars]},
    }
    text = json.dumps(config).encode()
    name = hashlib.sha256(text).hexdigest() + ".json"
    (work / name).write_bytes(text)
    manifest = [{"Config": name, "RepoTags": ["layercake:latest"], "Layers": [t.name for t in tars]}]
    (work / "manifest.json").write_text(json.dumps(manifest))
    archive = work / "layercake.tar"
    with tarfile.open(archive, "w") as tar:
        for member in [work / "manifest.json", work / name, *tars]:
            tar.add(member, member.name)
    return archive
