"""One suite for both forms of layers: what an archive means is what GNU tar extracts, entry by entry."""

from __future__ import annotations

import gzip
import os
import random
import stat
import struct
import subprocess
from pathlib import Path

import pytest

from ambi.linux import mount
from images.layers.supervisor import Worker
from images.snapshots import FORMS as LAYER_FORMS
from tests import layerkit
from tests.layerkit import directory, member, symlink, write_tar
from tests.tree import Tree, differences, extract, merge, scan

FORMS = ("erofs", "dir")


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def made(form: str, archive: Path, work: Path) -> Tree:
    """The tree of the layer that `archive` becomes."""
    target = work / f"{archive.name}.{form}"
    layerkit.convert(form, archive, target)
    with layerkit.tree_of(form, target) as root:
        return scan(root)


def same(found: Tree, wanted: Tree) -> None:
    assert differences(found, wanted) == []


def quirks(root: Path) -> None:
    """A tree with everything that gets lost."""
    random.seed(7)
    root.mkdir()
    (root / "empty").write_bytes(b"")
    for size in (1, 2047, 2048, 2049, 4095, 4096, 4097, 70_000, 3 << 20):
        (root / f"file{size}").write_bytes(random.randbytes(size))
    os.chmod(root / "file1", 0o6755)
    os.chown(root / "file4096", 3_000_000_000, 70_000)
    (root / ("n" * 255)).write_bytes(b"long name")
    (root / os.fsdecode(b"not-utf8-\xff\xfe\x80")).write_bytes(b"latin")
    (root / "new\nline \\ and blank").write_bytes(b"odd")
    deep = root
    for _ in range(30):
        deep = deep / ("d" * 90)
    deep.mkdir(parents=True)
    (deep / "leaf").write_bytes(b"deep")
    (root / "many").mkdir()
    for number in range(1200):
        (root / "many" / f"entry-{number:04}-{'x' * (number % 40)}").write_bytes(b"%d" % number)
    os.symlink("t" * 4000, root / "long-link")
    os.symlink("t" * 4060, root / "longest-link")
    os.symlink("/absolute/../../x", root / "absolute-link")
    os.link(root / "long-link", root / "link-to-link")
    os.link(root / "file4097", root / "many" / "hard")
    os.link(root / "file4097", root / "z-hard")
    os.mkfifo(root / "fifo")
    os.mknod(root / "char", stat.S_IFCHR | 0o640, os.makedev(5, 300))
    os.mknod(root / "block", stat.S_IFBLK | 0o600, os.makedev(300, 70_000))
    os.link(root / "char", root / "char-again")
    os.setxattr(root / "file2048", "user.short", b"value")
    os.setxattr(root / "file2048", "trusted.t", b"\x00\x01binary")
    os.setxattr(root / "file70000", "user.long", random.randbytes(3000))
    capability = struct.pack("<IIIII", 0x02000001, 1 << 13, 0, 0, 0)  # cap_net_raw=ep, linux/capability.h version 2
    os.setxattr(root / "file2049", "security.capability", capability)
    os.setxattr(root / "many", "user.dir", b"on a directory")
    with open(root / "sparse", "wb") as file:
        for offset in (0, 100_000, 5 << 20, (9 << 20) + 17):
            file.seek(offset)
            file.write(random.randbytes(5000))
        file.truncate(20 << 20)
    with open(root / "all-hole", "wb") as file:
        file.truncate(100 << 20)
    for name, time_ns in (
        ("file1", -1_500_000_001),
        ("file2047", 2_208_988_800_123_456_789),
        ("many", 1_234_567_890_987_654_321),
    ):
        os.utime(root / name, ns=(time_ns, time_ns), follow_symlinks=False)
    os.utime(root / "absolute-link", ns=(5, 5), follow_symlinks=False)


TAR_FORMATS = {
    "pax": ["--format=pax", "--xattrs", "--xattrs-include=*", "--sparse"],
    "sparse-0.0": ["--format=pax", "--xattrs", "--xattrs-include=*", "--sparse", "--sparse-version=0.0"],
    "sparse-0.1": ["--format=pax", "--xattrs", "--xattrs-include=*", "--sparse", "--sparse-version=0.1"],
    "gnu": ["--format=gnu", "--sparse"],
    "oldgnu": ["--format=oldgnu", "--sparse"],
    "gnu-plain": ["--format=gnu", "--exclude=./all-hole"],
    "v7": ["--format=v7", "--exclude=./d*", "--exclude=./n*", "--exclude=./*long*", "--exclude=./link-to-link",
           "--exclude=./block", "--exclude=./char*", "--exclude=./fifo", "--exclude=./file1", "--exclude=./file2047",
           "--exclude=./file4096", "--exclude=./all-hole"],
    "ustar": ["--format=ustar", "--exclude=./d*", "--exclude=./n*", "--exclude=./*long*", "--exclude=./link-to-link",
              "--exclude=./file1", "--exclude=./file2047", "--exclude=./file4096", "--exclude=./all-hole"],
}  # fmt: skip


@pytest.fixture(scope="module")
def quirk_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("quirks") / "root"
    quirks(root)
    return root


@pytest.mark.parametrize("format", TAR_FORMATS)
def test_everything_survives(form: str, format: str, quirk_tree: Path, short_tmp: Path) -> None:
    archive = short_tmp / "quirks.tar"
    command = ["tar", "--create", *TAR_FORMATS[format], "--file", str(archive), "--directory", str(quirk_tree), "."]
    subprocess.run(command, check=True, capture_output=True)
    extract(archive, short_tmp / "wanted")
    wanted = scan(short_tmp / "wanted")
    assert len(wanted) > 1200
    same(made(form, archive, short_tmp), wanted)


def test_holes_stay_holes(form: str, quirk_tree: Path, short_tmp: Path) -> None:
    archive = short_tmp / "holes.tar"
    subprocess.run(
        ["tar", "-c", "--sparse", "--format=pax", "-f", archive, "-C", quirk_tree, "all-hole", "sparse"], check=True
    )
    layer = short_tmp / "layer"
    layerkit.convert(form, archive, layer)
    used = sum(path.stat().st_blocks for path in (layer.rglob("*") if form == "dir" else [layer])) * 512
    assert used < 1 << 20  # of more than a hundred


@pytest.mark.parametrize("compression", ["gzip", "zstd", "xz", "bzip2"])
def test_compressed(form: str, compression: str, busybox_tar: Path, short_tmp: Path) -> None:
    archive = short_tmp / "archive"
    with open(archive, "wb") as out:
        program = {"bzip2": "bzip2", "gzip": "gzip", "xz": "xz", "zstd": "zstd"}[compression]
        if compression == "zstd":
            from backports.zstd import compress

            out.write(compress(busybox_tar.read_bytes()))
        else:
            subprocess.run([program, "-1", "-c", busybox_tar], stdout=out, check=True)
    plain, packed = short_tmp / "plain", short_tmp / "packed"
    one, two = layerkit.convert(form, busybox_tar, plain), layerkit.convert(form, archive, packed)
    assert (one.diff_id, two.compression) == (two.diff_id, compression)
    with layerkit.tree_of(form, plain) as first, layerkit.tree_of(form, packed) as second:
        same(scan(second), scan(first))


def test_many_gzip_members(form: str, short_tmp: Path) -> None:
    data = layerkit.tar_bytes(member("a", b"x" * 5000), member("b", b"y"))
    archive = short_tmp / "members.tar.gz"
    archive.write_bytes(b"".join(gzip.compress(data[at : at + 700]) for at in range(0, len(data), 700)) + bytes(4096))
    layer = short_tmp / "layer"
    layerkit.convert(form, archive, layer)
    with layerkit.tree_of(form, layer) as root:
        assert (root / "a").read_bytes() == b"x" * 5000


def test_layer_file_is_a_function_of_the_archive(busybox_tar: Path, short_tmp: Path) -> None:
    one, two = short_tmp / "one", short_tmp / "two"
    layerkit.convert("erofs", busybox_tar, one)
    layerkit.convert("erofs", busybox_tar, two)
    assert one.read_bytes() == two.read_bytes()
    assert one.stat().st_size % (2 << 20) == 0


def test_last_of_equal_names_wins(form: str, short_tmp: Path) -> None:
    archive = write_tar(
        short_tmp / "twice.tar",
        directory("d", mode=0o700), member("d/kept", b"1"), directory("d", mode=0o711),
        member("f", b"old"), member("f", b"new"),
        member("was-file", b"x"), directory("was-file"), member("was-file/in", b"2"),
        directory("was-dir"), member("was-dir/gone", b"3"), member("was-dir", b"now a file"),
        symlink("was-link", "d"), directory("was-link"), member("was-link/own", b"4"),
    )  # fmt: skip
    tree = made(form, archive, short_tmp)
    assert sorted(tree) == [
        b"",
        b"d",
        b"d/kept",
        b"f",
        b"was-dir",
        b"was-file",
        b"was-file/in",
        b"was-link",
        b"was-link/own",
    ]
    assert (tree[b"d"].mode, tree[b"f"].size, tree[b"was-dir"].kind) == (0o711, 3, "-")


def test_parents_are_made_and_links_of_the_layer_followed(form: str, short_tmp: Path) -> None:
    archive = write_tar(
        short_tmp / "parents.tar",
        member("missing/parent/file", b"1"), directory("usr/lib"), symlink("lib", "usr/lib"), member("lib/x", b"2"),
        symlink("up", "../../../usr"), member("up/y", b"3"), symlink("abs", "/usr/lib"), member("abs/z", b"4"),
    )  # fmt: skip
    tree = made(form, archive, short_tmp)
    assert {b"missing/parent/file", b"usr/lib/x", b"usr/y", b"usr/lib/z"} <= tree.keys()
    assert (tree[b"missing"].mode, tree[b"missing"].uid, tree[b"lib"].kind) == (0o755, 0, "l")


def test_whiteouts(form: str, short_tmp: Path) -> None:
    archive = write_tar(
        short_tmp / "whiteouts.tar",
        directory("d"), member("d/.wh.gone"), member("d/.wh.both"), member("d/both", b"own"),
        member(".wh.replaced"), directory("replaced"), member("replaced/x", b"1"),
        directory("opaque"), member("opaque/y", b"2"), member("opaque/.wh..wh..opq"),
        directory(".wh..wh.plnk"), member(".wh..wh.plnk/1.2", b"aufs"), member(".wh..wh.aufs"),
    )  # fmt: skip
    layer = short_tmp / "layer"
    layerkit.convert(form, archive, layer)
    with layerkit.tree_of(form, layer) as root:
        tree = scan(root)
        assert sorted(tree) == [b"", b"d", b"d/both", b"d/gone", b"opaque", b"opaque/y", b"replaced", b"replaced/x"]
        assert (tree[b"d/gone"].kind, tree[b"d/gone"].device) == ("c", (0, 0))
        opaque = {name for name in ("d", "opaque", "replaced") if os.listxattr(root / name) == ["trusted.overlay.opaque"]}
        assert opaque == {"opaque", "replaced"}


def _mounted(form: str, worker: Worker, archive: Path, layer: Path) -> Path:
    """A mount of the layer that `archive` becomes at `layer`."""
    place = layer.with_name(f"o{layer.name[1:]}")
    place.mkdir()
    with open(archive, "rb") as source:
        LAYER_FORMS[form].make(worker, source.fileno(), layer, layerkit.LIMIT)
    if form == "erofs":
        layerkit.mount_erofs(layer, place)
    else:
        mount.mount(layer, place, None, mount.MS_BIND)
    return place


def test_127_layers_merge_as_docker_means_them(form: str, short_tmp: Path) -> None:
    archives = layerkit.many_layers(short_tmp, 127)
    wanted = merge(archives, short_tmp)
    mounted: list[Path] = []
    merged = short_tmp / "m"
    merged.mkdir()
    try:
        with Worker() as worker:
            for number, archive in enumerate(archives):
                mounted.append(_mounted(form, worker, archive, short_tmp / f"l{number}"))
        lowers = ":".join(place.name for place in reversed(mounted))
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", f"lowerdir={lowers}", merged], check=True, cwd=short_tmp)
        mounted.append(merged)
        found = scan(merged)
    finally:
        for place in reversed(mounted):
            mount.umount(place)
    # The names of an inode that upper layers hide still count for its own layer.
    assert differences(found, wanted, ignore=frozenset(("links",))) == []
    assert len(found) > 100
