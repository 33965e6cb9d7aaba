"""The host's codec of the guest protocol, alone and against the agent's own parsers under sanitizers."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest

from ambi.core.errors import CommandNotFound, Corrupt
from hyper.guest import build
from hyper.guest.protocol import (
    FIELD,
    FLUSH,
    HEADER,
    MAGIC,
    MAX_BODY,
    MORE,
    PART,
    SYNC,
    Decoder,
    Fields,
    Type,
    encode,
    encode_raw,
)

SYNCED = encode(Type.SYNCED, 0)


def synced() -> Decoder:
    decoder = Decoder()
    assert [message.kind for message in decoder.feed(SYNCED)] == [Type.SYNCED]
    return decoder


def test_header_layout() -> None:
    assert encode(Type.PING, 7) == b"AMB1" + bytes([0, 0, 0, 0, 0x0F, 0, 0, 0, 7, 0, 0, 0])


def test_fields_of_every_kind_come_back() -> None:
    items = ((1, "text"), (1, "more"), (2, 5), (3, b"\0\xff"), (4, -3), (5, ((1, 9), (2, "nested"))), (6, "\udcff"))
    (message,) = synced().feed(encode(Type.OK, 3, items))
    fields = message.fields
    assert (message.kind, message.ident) == (Type.OK, 3)
    assert fields.texts(1) == ["text", "more"]
    assert (fields.number(2), fields.data(3), fields.number(4, signed=True)) == (5, b"\0\xff", -3)
    assert Fields(fields.data(5)).text(2) == "nested"
    assert fields.data(6) == b"\xff" and fields.text(6) == "\udcff"
    assert (fields.number(9, 4), fields.text(9, "d"), fields.datas(9)) == (4, "d", [])


@pytest.mark.parametrize("size", [0, 1, 32767, 32768, 32769, 65536, 200_000, 1_000_000])
def test_values_of_any_size(size: int) -> None:
    value = random.Random(size).randbytes(size)
    data = encode(Type.OK, 1, ((1, value), (2, 7), (1, b"end")))
    at = 0
    while at < len(data):
        magic, length, kind, zero, ident = HEADER.unpack_from(data, at)
        assert (magic, kind, zero, ident) == (MAGIC, Type.OK, 0, 1) and length <= MAX_BODY
        at += HEADER.size + length
    (message,) = synced().feed(data)
    assert message.fields.datas(1) == [value, b"end"]
    assert message.fields.number(2) == 7


def test_pieces_of_one_byte_and_interleaved_messages() -> None:
    long = encode(Type.OK, 1, ((1, bytes(100_000)),))
    first = long[: HEADER.size + int.from_bytes(long[4:8], "little")]
    stream = first + encode_raw(Type.STDOUT, 1, b"between") + long[len(first) :]
    decoder = synced()
    messages = [message for at in range(len(stream)) for message in decoder.feed(stream[at : at + 1])]
    assert [message.kind for message in messages] == [Type.STDOUT, Type.OK]
    assert messages[0].body == b"between" and messages[1].fields.data(1) == bytes(100_000)


def test_stream_bytes_that_look_like_more_are_bytes() -> None:
    body = FIELD.pack(MORE, 0, 0)
    (message,) = synced().feed(encode_raw(Type.STDOUT, 1, body))
    assert message.body == body
    (message,) = synced().feed(encode(Type.OK, 1, ((1, body),)))
    assert message.fields.data(1) == body


def test_everything_before_synced_is_dropped() -> None:
    decoder = Decoder()
    assert decoder.feed(encode(Type.READY, 0, ((1, "6.1"),)) + b"half a frame" + SYNCED[:5]) == []
    assert not decoder.synced
    assert [message.kind for message in decoder.feed(SYNCED[5:] + encode(Type.OK, 4))] == [Type.SYNCED, Type.OK]
    decoder.resync()
    assert decoder.feed(encode(Type.OK, 5)) == []


@pytest.mark.parametrize(
    "data",
    [
        b"\0" * 16,
        HEADER.pack(MAGIC, MAX_BODY + 1, Type.OK, 0, 0),
        HEADER.pack(MAGIC, 0, 0x42, 0, 0),
        HEADER.pack(MAGIC, 0, Type.RUN, 0, 0),
        HEADER.pack(MAGIC, 0, Type.OK, 1, 0),
    ],
)
def test_what_is_no_frame_of_a_guest(data: bytes) -> None:
    with pytest.raises(Corrupt, match="a frame that is none"):
        synced().feed(data)


def test_a_message_without_end_is_bounded() -> None:
    decoder = synced()
    frame = encode_raw(Type.OK, 1, FIELD.pack(1, 0, 32768) + bytes(32768) + FIELD.pack(MORE, 0, 0))
    with pytest.raises(Corrupt, match="does not end"):
        for _ in range(1000):
            decoder.feed(frame)


def test_many_unfinished_messages_are_bounded() -> None:
    decoder = synced()
    with pytest.raises(Corrupt, match="does not end"):
        for ident in range(100):
            decoder.feed(encode_raw(Type.OK, ident, FIELD.pack(MORE, 0, 0)))


@pytest.mark.parametrize(
    "body",
    [b"\1", FIELD.pack(1, 0, 1), FIELD.pack(1, 0, 0xFFFFFFFF) + b"x", FIELD.pack(1 | PART, 0, 1) + b"x"],
)
def test_damaged_fields(body: bytes) -> None:
    with pytest.raises(Corrupt):
        Fields(body)


def test_errors_cross_as_their_class_on_one_line() -> None:
    (message,) = synced().feed(encode(Type.ERROR, 1, ((1, "CommandNotFound"), (2, "a\nb\x1b[2J"), (3, ""))))
    error = message.error()
    assert type(error) is CommandNotFound
    assert (error.message, error.hint) == ("a?b?[2J", CommandNotFound.usual_hint)


@pytest.fixture(scope="module")
def parsers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The agent's frame and field parsers in a program that reads files, with sanitizers."""
    compiler = shutil.which("gcc")
    if not compiler:
        pytest.skip("gcc is not installed")
    program = tmp_path_factory.mktemp("fuzz") / "fuzz"
    sources = [build.SOURCES / name for name in ("frame.c", "fields.c", "util.c")]
    flags = ["-std=gnu11", "-D_GNU_SOURCE", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    here = Path(__file__).parent / "guest_fuzz.c"
    subprocess.run([compiler, *flags, f"-I{build.SOURCES}", "-o", program, here, *sources], check=True)
    return program


def _run(program: Path, files: list[Path]) -> list[int]:
    # Unwinding the stack of every allocation takes seven times what all the rest does; the error's own stack is still told.
    quick = {**os.environ, "ASAN_OPTIONS": "malloc_context_size=0"}
    run = subprocess.run([program, *files], capture_output=True, text=True, check=False, env=quick)
    assert run.returncode == 0, run.stderr[-3000:]
    return [int(word) for word in run.stdout.split()]


def _host_says(source: random.Random) -> bytes:
    """What a host might send, valid; the first byte chooses how the harness cuts it."""
    parts = [bytes([source.randrange(256)])]
    for _ in range(source.randrange(1, 8)):
        nested = ((source.randrange(1, 5), source.randbytes(source.randrange(50))),)
        items = tuple(
            (
                source.randrange(1, 30),
                source.choice((source.randrange(1 << 60), source.randbytes(source.randrange(200)), nested)),
            )
            for _ in range(source.randrange(6))
        )
        parts.append(
            encode(source.randrange(1, 0x19), source.randrange(99), (*items, (3, bytes(source.choice((0, 40_000))))))
        )
        parts.append(source.choice((b"", SYNC, FLUSH + SYNC, source.randbytes(30) + SYNC)))
    return b"".join(parts)


def test_the_agents_parsers_see_what_was_sent(parsers: Path, tmp_path: Path) -> None:
    source = random.Random(1)
    file = tmp_path / "valid"
    frames = [encode(source.randrange(1, 0x19), number, ((1, number), (2, bytes(number)))) for number in range(200)]
    file.write_bytes(b"\5" + b"".join(frames) + b"rubbish" + SYNC + encode(Type.PING, 1))
    assert _run(parsers, [file])[:2] == [201, 1]


def test_mutated_frames_do_no_harm(parsers: Path, tmp_path: Path) -> None:
    source = random.Random(20261124)
    files = []
    for number in range(1500):
        data = bytearray(_host_says(source))
        for _ in range(source.randrange(0, 12)):
            at = source.randrange(len(data))
            match source.randrange(4):
                case 0:
                    data[at] ^= 1 << source.randrange(8)
                case 1:
                    data[at : at + 4] = source.choice((b"\xff\xff\xff\xff", b"\0\0\0\0", b"\0\0\1\0", source.randbytes(4)))
                case 2:
                    del data[at : at + source.randrange(1, 40)]
                case _:
                    data[at:at] = data[max(0, at - 64) : at]
            data = data or bytearray(1)
        files.append(tmp_path / f"{number}")
        files[-1].write_bytes(data)
    frames, syncs, values = _run(parsers, files)
    assert frames > 500 and syncs > 500 and values > 500
