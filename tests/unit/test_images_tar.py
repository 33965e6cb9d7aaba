"""The tar reader and the tree, without a worker: what is refused, and what is contained."""

from __future__ import annotations

import random
import struct
import tarfile
from collections.abc import Iterator

import pytest

from ambi.core.errors import AmbiError, Corrupt
from images.layers import decoder, limits
from images.layers.convert import convert
from images.layers.tar import TarReader
from images.layers.tree import Body, LayerTree, Node
from tests.layerkit import directory, hard_link, member, symlink, tar_bytes


class Memory:
    """A sink that keeps bodies: the third implementation of `convert.Sink`."""

    def __init__(self) -> None:
        self.root: Node | None = None
        self._body = bytearray()

    def begin(self, size: int, *, sparse: bool) -> None:
        self._body = bytearray()

    def write(self, piece: memoryview) -> None:
        self._body += piece

    def skip(self, size: int) -> None:
        self._body += bytes(size)

    def end(self) -> Body:
        return bytes(self._body)

    def flush(self) -> None:
        pass

    def finish(self, root: Node, uuid: bytes) -> int:
        self.root = root
        return 0


def chunks(data: bytes, size: int = 700) -> Iterator[bytes]:
    for at in range(0, len(data), size):
        yield data[at : at + size]


def tree_of(data: bytes, size: int = 700) -> Node:
    sink = Memory()
    convert(chunks(data, size), sink, 1 << 40)
    assert sink.root is not None
    return sink.root


def paths(node: Node, prefix: bytes = b"") -> Iterator[tuple[bytes, Node]]:
    for name, child in node.entries.items():
        yield prefix + name, child
        if child.kind == "d":
            yield from paths(child, prefix + name + b"/")


REFUSED = {
    "parent": ([member("../canary", b"x")], "points out"),
    "parent inside": ([member("a/../../canary", b"x")], "points out"),
    "hard link out": ([hard_link("a", "../../etc/passwd")], "points out"),
    "hard link to nothing": ([hard_link("a", "etc/passwd")], "not an earlier entry"),
    "hard link to a directory": ([directory("d"), hard_link("a", "d")], "is a directory"),
    "hard link to itself": ([hard_link("a", "a")], "not an earlier entry"),
    "below a file": ([member("f", b"x"), member("f/g", b"y")], "no directory"),
    "link loop": ([symlink("a", "b"), symlink("b", "a"), member("a/x", b"y")], "symbolic links"),
    "root as a file": ([member("./", b"x")], "replaces the root"),
    "long name": ([member("n" * 256, b"")], "more than 255"),
    "long path": ([member("d/" * 2100 + "x", b"")], "more than 4095"),
    "empty link": ([symlink("l", "")], "target of 0 bytes"),
    "whiteout of nothing": ([member(".wh.", b"")], "impossible name"),
    "whiteout of the parent": ([member("d/.wh...", b"")], "impossible name"),
    "below a whiteout": ([member(".wh.a/b", b"")], "below the whiteout"),
    "nul in a path": ([member("x", b"", pax={"path": "a\0b"})], "NUL"),
    "owner": ([member("x", b"", pax={"uid": "4294967295"})], "owner"),
    "time": ([member("x", b"", pax={"mtime": "9" * 18})], "time"),
    "time that is none": ([member("x", b"", pax={"mtime": "now"})], "decimal"),
    "size in pax": ([member("x", b"", pax={"size": "-1"})], "decimal"),
    "huge size": ([member("x", b"", pax={"size": str(1 << 50)})], "impossible size"),
    "device": ([member("x", type=b"3", devmajor=4096, devminor=0)], "device number"),
    "xattrs": ([member("x", b"", pax={"SCHILY.xattr.user.a": "v" * 70_000})], "extended attributes"),
    "sparse overlap": ([member("x", b"abcd", pax={"GNU.sparse.map": "0,2,1,2", "GNU.sparse.size": "9"})], "overlap"),
    "sparse beyond": ([member("x", b"abcd", pax={"GNU.sparse.map": "0,2,8,2", "GNU.sparse.size": "9"})], "beyond its size"),
    "sparse lie": ([member("x", b"abcd", pax={"GNU.sparse.map": "0,2", "GNU.sparse.size": "9"})], "says otherwise"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_hostile_archives_are_refused(case: str) -> None:
    members, why = REFUSED[case]
    with pytest.raises(Corrupt, match=why):
        tree_of(tar_bytes(*members))


def test_absolute_names_are_below_the_root() -> None:
    found = dict(paths(tree_of(tar_bytes(member("/etc/x", b"1"), member("//./y", b"2")))))
    assert sorted(found) == [b"etc", b"etc/x", b"y"]


def test_writing_through_a_link_stays_in_the_layer() -> None:
    root = tree_of(tar_bytes(symlink("out", "../../../../tmp"), member("out/canary", b"x"), symlink("etc", "/")))
    found = dict(paths(root))
    assert sorted(found) == [b"etc", b"out", b"tmp", b"tmp/canary"]
    assert found[b"out"].link == b"../../../../tmp"  # kept: it means nothing before a container follows it


def test_a_link_replaced_by_a_directory_is_not_followed_later() -> None:
    data = tar_bytes(directory("a"), symlink("l", "a"), member("l/one", b""), directory("l"), member("l/two", b""))
    assert sorted(name for name, _ in paths(tree_of(data))) == [b"a", b"a/one", b"l", b"l/two"]


def test_an_images_own_overlay_attributes_are_dropped() -> None:
    pax = {
        "SCHILY.xattr.trusted.overlay.redirect": "/etc",
        "SCHILY.xattr.user.overlay.opaque": "y",
        "SCHILY.xattr.user.k": "v",
    }
    root = tree_of(tar_bytes(directory("d", pax=pax)))
    assert root.entries[b"d"].xattrs == {b"user.k": b"v"}


def test_libarchives_attributes() -> None:
    root = tree_of(tar_bytes(member("f", b"", pax={"LIBARCHIVE.xattr.user.a%20b": "AAH/"})))
    assert root.entries[b"f"].xattrs == {b"user.a b": b"\x00\x01\xff"}


@pytest.mark.parametrize("size", [1, 511, 512, 513, 10_000])
def test_chunks_of_any_size_mean_the_same(size: int) -> None:
    data = tar_bytes(
        directory("d"), member("d/" + "n" * 150, b"q" * 1500, pax={"SCHILY.xattr.user.k": "v" * 600}), member("e", b"z")
    )
    found = {name: (node.kind, node.body, node.xattrs) for name, node in paths(tree_of(data, size))}
    assert found[b"d/" + b"n" * 150] == ("f", b"q" * 1500, {b"user.k": b"v" * 600})
    assert found[b"e"][1] == b"z"


@pytest.mark.parametrize("length", [512 + 100, 1024 + 100, 1536 + 100, 2048 + 700])
def test_truncation(length: int) -> None:
    data = tar_bytes(member("a", b"x" * 600), member("b", b"y" * 600))
    assert sorted(tree_of(data).entries) == [b"a", b"b"]
    with pytest.raises(Corrupt, match="cut short"):
        tree_of(data[:length])


def test_too_short_for_a_tar() -> None:
    with pytest.raises(Corrupt, match="not a tar archive: it has 7 bytes"):
        tree_of(b"garbage")


def test_a_missing_end_is_legal() -> None:
    data = tar_bytes(member("a", b"x" * 512))[:1024]
    assert sorted(tree_of(data).entries) == [b"a"]


def test_what_follows_the_end_counts_for_the_digest() -> None:
    import hashlib

    data = tar_bytes(member("a", b"x")) + b"trailing" * 100
    result = convert(chunks(data), Memory(), 1 << 30)
    assert result.diff_id == "sha256:" + hashlib.sha256(data).hexdigest()
    assert result.tar_bytes == len(data)


def test_check_sums() -> None:
    data = bytearray(tar_bytes(member("a", b"x")))
    data[0] ^= 1
    with pytest.raises(Corrupt, match="not a tar archive"):
        tree_of(bytes(data))
    data = bytearray(tar_bytes(member("a", b"x"), member("b", b"x")))
    data[1024] ^= 1
    with pytest.raises(Corrupt, match="damaged: wrong check sum"):
        tree_of(bytes(data))


def test_noise_is_no_tar() -> None:
    with pytest.raises(Corrupt, match=r"^not a tar archive$"):
        tree_of(bytes(range(1, 251)) * 5)


def test_signed_check_sums_are_accepted() -> None:
    """As old Sun tars wrote them."""
    data = bytearray(tar_bytes(member("\udcff", b"x"), format=tarfile.GNU_FORMAT))
    block = data[:512]
    total = sum(struct.unpack("512b", block)) - sum(struct.unpack("8b", block[148:156])) + 256
    data[148:156] = b"%06o\0 " % total
    assert sorted(tree_of(bytes(data)).entries) == [b"\xff"]


def test_unknown_types_and_unfinished_extensions() -> None:
    with pytest.raises(Corrupt, match="unknown type"):
        tree_of(tar_bytes(member("a", type=b"Z")))
    alone = tar_bytes(member("a", b"", pax={"comment": "x"}))[:1024]
    with pytest.raises(Corrupt, match="without the entry"):
        tree_of(alone)


def test_extension_headers_have_a_limit() -> None:
    with pytest.raises(Corrupt, match="larger than"):
        tree_of(tar_bytes(member("a", b"", pax={"comment": "c" * (limits.MAX_HEADER + 1)})))


def test_numbers_in_base_256() -> None:
    data = tar_bytes(member("a", b"x", mtime=-5, uid=3_000_000), format=tarfile.GNU_FORMAT)
    (entry,) = TarReader(chunks(data))
    assert (entry.mtime_ns, entry.uid) == (-5_000_000_000, 3_000_000)


def test_pax_times_are_exact() -> None:
    for text, wanted in (
        ("1.5", 1_500_000_000),
        ("-1.5", -1_500_000_000),
        ("7.1234567899", 7_123_456_789),
        ("-0.25", -250_000_000),
    ):
        (entry,) = TarReader(chunks(tar_bytes(member("a", b"", pax={"mtime": text}))))
        assert entry.mtime_ns == wanted


def test_one_folder_by_many_spellings() -> None:
    """A folder that was written so before is found as it was the first time, also after something else took its place."""
    spelled = ("d/f", "d//f", "./d/f", "d/./f", "/d/f")
    members = [member(name + str(number), b"%d" % number) for number in (1, 2) for name in spelled]
    root = tree_of(tar_bytes(*members))
    assert sorted(root.entries[b"d"].entries) == [b"f1", b"f2"] and list(root.entries) == [b"d"]
    moved = tree_of(tar_bytes(*members, member("d", b"now a file"), symlink("d", "e"), *members))
    assert sorted(moved.entries[b"e"].entries) == [b"f1", b"f2"] and moved.entries[b"d"].kind == "l"
    for last in ("./..", "d/../f", "d/.wh..", "x" * 256, "d/" + "n" * 256, "./" * 2000 + "d/" + "n" * 200):
        with pytest.raises(Corrupt):
            tree_of(tar_bytes(member("./" * 2000 + "d/a", b""), *members, member(last, b"")))


def test_depth_through_links_has_a_limit() -> None:
    tree = LayerTree()
    deep = "x/" * 1000
    data = tar_bytes(directory(deep), symlink("l", deep), directory("l/" + "y/" * 100))
    with pytest.raises(Corrupt, match="deep"):
        for entry in TarReader(chunks(data)):
            tree.add(entry)


def test_a_number_of_entries_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("images.layers.tree.MAX_ENTRIES", 10)
    with pytest.raises(Corrupt, match="more than 10 entries"):
        tree_of(tar_bytes(*(member(f"f{number}", b"") for number in range(20))))
    with pytest.raises(Corrupt, match="more than 10 entries"):
        tree_of(tar_bytes(*(member(f".wh.{number}", b"") for number in range(20))))


def test_free_space_has_a_limit() -> None:
    with pytest.raises(AmbiError, match="free"):
        convert(chunks(tar_bytes(member("a", b"x" * 5000))), Memory(), 4000)


def test_damage_never_escapes_the_error_tree() -> None:
    """A thousand archives with a few bytes changed each: read, or refused as Corrupt; never another exception."""
    good = tar_bytes(
        directory("d"), member("d/f", b"x" * 900, pax={"SCHILY.xattr.user.a": "b", "mtime": "12.5"}), symlink("l", "d"),
        hard_link("h", "d/f"), member("s", b"abcd", pax={"GNU.sparse.map": "0,2,5,2", "GNU.sparse.size": "9"}),
    )  # fmt: skip
    random.seed(3)
    refused = 0
    for _ in range(1000):
        data = bytearray(good)
        for _ in range(random.randint(1, 4)):
            data[random.randrange(len(data) - 9000)] = random.choice((0, 32, 48, 55, 61, 255, random.randrange(256)))
        for at in range(0, len(good) - 9000, 512):  # keep the sums right, or nothing behind them is reached
            if good[at + 257 : at + 262] == b"ustar":
                block = data[at : at + 512]
                data[at + 148 : at + 156] = b"%06o\0 " % (sum(block) - sum(block[148:156]) + 256)
        try:
            tree_of(bytes(data))
        except AmbiError:
            refused += 1
    assert 0 < refused < 1000


def test_expansion_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    import gzip

    monkeypatch.setattr(decoder, "FREE_EXPANSION", 1 << 20)
    bomb = gzip.compress(bytes(32 << 20))
    with pytest.raises(Corrupt, match="expands"):
        for plain in decoder.Decoder(chunks(bomb)):
            assert len(plain) <= decoder.CHUNK


@pytest.mark.parametrize("program", ["gzip", "zstd", "xz", "bzip2"])
def test_compressed_streams_that_are_damaged(program: str) -> None:
    import bz2
    import gzip
    import lzma

    from backports.zstd import compress

    pack = {"gzip": gzip.compress, "zstd": compress, "xz": lzma.compress, "bzip2": bz2.compress}[program]
    random.seed(1)
    plain = random.randbytes(100_000)
    good = pack(plain)
    assert b"".join(decoder.Decoder(chunks(good))) == plain
    assert b"".join(decoder.Decoder(chunks(good + good))) == plain * 2
    for cut in (1, 5, len(good) // 2):
        with pytest.raises(Corrupt, match="cut short"):
            b"".join(decoder.Decoder(chunks(good[:-cut])))
    with pytest.raises(Corrupt, match="followed by"):
        b"".join(decoder.Decoder(chunks(good + b"garbage")))
    if program != "zstd":  # a frame without check sum cannot tell
        bad = bytearray(good)
        bad[len(bad) // 2] ^= 0x55
        with pytest.raises(Corrupt):
            b"".join(decoder.Decoder(chunks(bytes(bad))))


def test_zlib_stands_in_for_isal(monkeypatch: pytest.MonkeyPatch) -> None:
    import gzip

    monkeypatch.setitem(decoder._MAKERS, "gzip", decoder._Zlib)
    data = random.randbytes(3 << 20)
    packed = gzip.compress(data, 1)
    assert b"".join(decoder.Decoder(chunks(packed + packed, 100_000))) == data * 2
    zeros = gzip.compress(bytes(5 << 20))
    assert [len(x) <= decoder.CHUNK for x in decoder.Decoder(chunks(zeros))].count(False) == 0
    with pytest.raises(Corrupt, match="cut short"):
        b"".join(decoder.Decoder(chunks(packed[:-3])))
