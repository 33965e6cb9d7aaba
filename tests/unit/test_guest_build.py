"""The initramfs archive, the kernel's payload, the record: what `python -m hyper.guest` makes, without network and root."""

from __future__ import annotations

import gzip
import json
import lzma
import os
import shutil
import stat
import struct
import subprocess
from pathlib import Path

import pytest

from ambi.core.errors import Corrupt, NotFound, Unavailable, Unsupported
from hyper.guest import build, initramfs, kernel, store

ELF = b"\x7fELF" + bytes(range(256)) * 64


def _bzimage(payload: bytes) -> bytes:
    """The fields of the boot protocol that name the payload, in a setup of two sectors."""
    image = bytearray(1024 + 0x100 + len(payload))
    image[0x1F1] = 1
    image[0x202:0x206] = b"HdrS"
    struct.pack_into("<II", image, 0x248, 0x100, len(payload))
    image[1024 + 0x100 :] = payload
    return bytes(image)


def _needs(tool: str) -> str:
    found = shutil.which(tool)
    if not found:
        pytest.skip(f"{tool} is not installed")
    return found


def test_archive_is_what_cpio_reads(tmp_path: Path) -> None:
    entries = [
        initramfs.directory("dev"),
        initramfs.file("init", b"#!program", 0o755),
        initramfs.character_device("dev/console", 5, 1, 0o600),
        initramfs.file("empty", b"", 0o644),
        initramfs.file("name-of-odd-length", b"12345", 0o640),
    ]
    archive = initramfs.cpio(entries)
    assert len(archive) % 512 == 0
    listed = subprocess.run(
        [_needs("cpio"), "-tv", "--quiet"], input=archive, capture_output=True, check=True
    ).stdout.decode()
    rows = [line.split() for line in listed.splitlines()]
    assert [(row[0], row[-1]) for row in rows] == [
        ("drwxr-xr-x", "dev"),
        ("-rwxr-xr-x", "init"),
        ("crw-------", "dev/console"),
        ("-rw-r--r--", "empty"),
        ("-rw-r-----", "name-of-odd-length"),
    ]
    assert rows[2][4:6] == ["5,", "1"]
    subprocess.run(
        ["cpio", "-id", "--quiet", "init", "empty", "name-of-odd-length"], input=archive, cwd=tmp_path, check=True
    )
    assert (tmp_path / "init").read_bytes() == b"#!program"
    assert (tmp_path / "name-of-odd-length").read_bytes() == b"12345"


def test_agent_is_static_small_and_built_once(tmp_path: Path) -> None:
    _needs("gcc")
    agent = build.build_agent(tmp_path)
    assert agent.name == f"agent-{build.build_id()}"
    data = agent.read_bytes()
    assert data.startswith(b"\x7fELF") and len(data) < 1 << 20
    assert build.build_id().encode() in data
    headers = struct.unpack_from("<Q", data, 32)[0]
    size, count = struct.unpack_from("<HH", data, 54)
    kinds = [struct.unpack_from("<I", data, headers + size * number)[0] for number in range(count)]
    assert 3 not in kinds  # PT_INTERP
    before = agent.stat()
    assert build.build_agent(tmp_path) == agent
    assert agent.stat().st_mtime_ns == before.st_mtime_ns
    assert os.listdir(tmp_path) == [agent.name]
    assert subprocess.run([agent], check=False).returncode == 64  # it is an init, and says so


def test_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Unsupported, match="no C compiler") as error:
        build.build_agent(tmp_path / "out")
    assert error.value.hint == "apt-get install gcc libc6-dev"
    assert not (tmp_path / "out").exists()


def test_initramfs_of_a_kernel_directory(tmp_path: Path) -> None:
    _needs("gcc")
    directory = tmp_path / "6.1.0-1-cloud-amd64"
    (directory / "modules").mkdir(parents=True)
    (directory / "modules/order").write_text("erofs erofs.ko\n")
    (directory / "modules/erofs.ko").write_bytes(b"module")
    old = directory / "initramfs-000000000000.cpio"
    old.touch()
    made = initramfs.build_initramfs(directory)
    assert initramfs.build_initramfs(directory) == made
    assert not old.exists()
    assert stat.S_IMODE(made.stat().st_mode) == 0o644
    names = subprocess.run(
        [_needs("cpio"), "-t", "--quiet"], input=made.read_bytes(), capture_output=True, check=True
    ).stdout
    assert {b"init", b"dev/console", b"modules/order", b"modules/erofs.ko"} <= set(names.split())
    assert sorted(path.name for path in directory.iterdir()) == [made.name, "modules"]


def test_signatures_of_modules_are_left_out() -> None:
    signature = bytes(range(100))
    record = bytes(8) + struct.pack(">I", len(signature))
    magic = b"~Module signature appended~\n"
    assert initramfs.without_signature(b"code" + signature + record + magic) == b"code"
    for module in (b"code", magic, b"x" + bytes(12) + magic, b"code" + bytes(8) + b"\xff\xff\xff\xff" + magic):
        assert initramfs.without_signature(module) == module


@pytest.mark.parametrize("compress", [gzip.compress, lzma.compress])
def test_vmlinux_out_of_a_bzimage(compress: object) -> None:
    assert callable(compress)
    payload = compress(ELF) + struct.pack("<I", len(ELF))
    assert kernel.extract_vmlinux(_bzimage(payload)) == ELF


@pytest.mark.parametrize(("tool", "flags"), [("lz4", ["-l", "-c"]), ("zstd", ["-c"])])
def test_vmlinux_by_a_tool(tool: str, flags: list[str]) -> None:
    packed = subprocess.run([_needs(tool), *flags], input=ELF, capture_output=True, check=True).stdout
    assert kernel.extract_vmlinux(_bzimage(packed + struct.pack("<I", len(ELF)))) == ELF


@pytest.mark.parametrize(
    "image", [b"", b"x" * 5000, _bzimage(b"unknown payload"), _bzimage(gzip.compress(b"no elf") + bytes(4))]
)
def test_no_vmlinux_means_the_bzimage_boots(image: bytes) -> None:
    assert kernel.extract_vmlinux(image) is None


def test_modules_come_with_their_dependencies_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modules = tmp_path / "lib"
    (modules / "kernel").mkdir(parents=True)
    for name in ("ring", "bus", "disk"):
        (modules / f"kernel/{name}.ko").write_bytes(name.encode())
    (modules / "kernel/packed.ko.xz").write_bytes(lzma.compress(b"packed"))
    (modules / "modules.dep").write_text(
        "kernel/disk.ko: kernel/bus.ko kernel/ring.ko\nkernel/ring.ko:\n"
        "kernel/bus.ko: kernel/ring.ko\nkernel/packed.ko.xz:\n"
    )
    (modules / "modules.builtin").write_text("kernel/ext4.ko\n")
    monkeypatch.setattr(kernel, "GROUPS", {"virtio:2": ("disk",), "other": ("ext4", "packed")})
    kernel._choose_modules(modules, tmp_path / "out")
    assert (tmp_path / "out/order").read_text().splitlines() == [
        "virtio:2 ring.ko",
        "virtio:2 bus.ko",
        "virtio:2 disk.ko",
        "other packed.ko",
    ]
    assert (tmp_path / "out/packed.ko").read_bytes() == b"packed"
    monkeypatch.setattr(kernel, "GROUPS", {"x": ("absent",)})
    with pytest.raises(Unsupported, match="has no module absent"):
        kernel._choose_modules(modules, tmp_path / "out2")


def test_no_apt_and_an_unknown_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for tool in ("apt-get", "apt-cache", "dpkg-deb", "depmod"):
        script = tmp_path / tool
        script.write_text("#!/bin/sh\necho 'E: Temporary failure resolving' >&2\nexit 100\n")
        script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(NotFound, match="apt does not know the package linux-image-x") as unknown:
        kernel.fetch_kernel(tmp_path / "guest", package="linux-image-x")
    assert unknown.value.hint == "apt-get update"
    (tmp_path / "apt-cache").write_text("#!/bin/sh\necho \"$4\"\necho '  Depends: linux-image-6.1.0-1-cloud-amd64'\n")
    with pytest.raises(Unavailable, match=r"cannot download linux-image-.*: Temporary failure resolving"):
        kernel.fetch_kernel(tmp_path / "guest")
    assert list((tmp_path / "guest").iterdir()) == []
    (tmp_path / "apt-get").unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Unsupported, match="apt-get is not installed"):
        kernel.fetch_kernel(tmp_path / "guest")


@pytest.mark.parametrize("text", ["", "[]", "{}", json.dumps({"format": 99, "vmlinuz_sha256": "x"})])
def test_a_damaged_record(tmp_path: Path, text: str) -> None:
    (tmp_path / store.RECORD).write_text(text)
    with pytest.raises(Corrupt):
        store.read_record(tmp_path)


def test_a_module_is_carried_without_what_the_guest_does_not_read(tmp_path: Path) -> None:
    source, module = tmp_path / "m.c", tmp_path / "m.ko"
    source.write_text(
        "int kept(void) { return 42; }\n"
        '__attribute__((section(".BTF"))) char types[64] = "types";\n'
        '__attribute__((section(".orc_unwind_ip"))) int (*unwind)(void) = kept;\n'
    )
    subprocess.run(["gcc", "-c", "-o", module, source], check=True)
    before = module.read_bytes()
    slim = initramfs.slimmed(before)
    assert len(slim) == len(before)
    module.write_bytes(slim)
    shown = subprocess.run(["readelf", "-SW", module], check=True, capture_output=True, text=True).stdout
    assert "types" not in shown and ".BTF" not in shown
    assert " .text " in shown and " .orc_unwind_ip " not in shown and " .rela.orc_unwind_ip " in shown
    assert initramfs.slimmed(b"no module") == b"no module"
