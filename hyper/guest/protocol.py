"""The guest protocol, version 1: frames and fields, see PROTOCOL.md.

Nothing here does I/O. `encode` makes the bytes of a message, a `Decoder` makes messages of bytes that a guest wrote, which
are treated as hostile: every length and count is bounded. `client.py` has a blocking client over a socket.

    items   what `encode` takes: (tag, value) pairs in order; value is an int (8 bytes), str (UTF-8, undecodable bytes as
            surrogates), bytes, or a list of items (nested fields)
    Fields  what a parsed body is: `number`, `text`, `data`, `texts`, `datas` by tag
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from enum import IntEnum
from typing import NamedTuple, Union

from ambi.core.errors import AmbiError, Corrupt, from_wire

VERSION = 1
PORT_NAME = "ambi.agent"
SYNC = b"\xf3\x9a\x1c\x77ambisync\x0d\x0a\x00\xe1"
MAGIC = 0x31424D41
HEADER = struct.Struct("<IIHHI")  # magic, length of the body, type, zero, id
FIELD = struct.Struct("<HHI")  # tag, zero, length
MAX_BODY = 65536
MAX_FIELD = 32768  # a longer value is split into fields with PART set
MAX_MESSAGE = 8 << 20  # of our own choosing: what a message assembled of several frames may have
MAX_PENDING = 16  # messages that are incomplete at the same time
MORE = 0xFFFF
PART = 0x8000
INITIAL_CREDIT = 256 << 10  # bytes, for each of stdin, stdout and stderr
CREDIT_STEP = 64 << 10
STREAM_STDOUT = 1
STREAM_STDERR = 2
INIT_ID = 1

# Written by a host whose predecessor may have left half a frame: it completes any frame, and what is too much is no magic.
FLUSH = bytes(HEADER.size + MAX_BODY)


class Type(IntEnum):
    HELLO = 0x01
    SETUP = 0x02
    RUN = 0x03
    EXEC = 0x04
    SIGNAL = 0x05
    RESIZE = 0x06
    STDIN = 0x07
    CLOSE_STDIN = 0x08
    CREDIT = 0x09
    STATS = 0x0A
    PROCESSES = 0x0B
    TIME = 0x0C
    ENTROPY = 0x0D
    POWER_OFF = 0x0E
    PING = 0x0F
    DISK_SYNC = 0x10
    NET = 0x11
    UNPLUG = 0x12
    LIMITS = 0x14
    FREEZE = 0x15
    THAW = 0x16
    RESUME = 0x17
    ATTACH = 0x18
    DETACH = 0x19
    CPUS = 0x1A
    GROW = 0x1B
    TREE = 0x13
    READY = 0x80
    HELLO_OK = 0x81
    OK = 0x82
    ERROR = 0x83
    STDOUT = 0x84
    STDERR = 0x85
    STDOUT_END = 0x86
    STDERR_END = 0x87
    STDIN_CREDIT = 0x88
    EXITED = 0x89
    SYNCED = 0x8A
    LOG = 0x8B


RAW = frozenset((Type.STDIN, Type.STDOUT, Type.STDERR))  # the body is bytes of a stream, no fields
FROM_GUEST = frozenset(kind for kind in Type if kind >= 0x80)


class HelloTag(IntEnum):
    LOWEST = 1
    HIGHEST = 2
    CLOCK_NS = 3
    ENTROPY = 4


class SetupTag(IntEnum):
    HOSTNAME = 1
    DOMAINNAME = 2
    LAYERS = 3
    DISK = 4
    ROOT_TAG = 5
    READ_ONLY = 6
    MOUNT = 7
    FILE = 8
    MASKED = 9
    READ_ONLY_PATH = 10
    SYSCTL = 11
    MEMORY = 12
    CPU_QUOTA = 13
    CPU_PERIOD = 14
    PIDS = 15
    CPU_SHARES = 16
    INIT = 17
    COPY = 18


class MountTag(IntEnum):
    DESTINATION = 1
    TYPE = 2
    SOURCE = 3
    OPTION = 4


class DetachTag(IntEnum):
    DESTINATION = 1
    FORCE = 2


class FileTag(IntEnum):
    PATH = 1
    MODE = 2
    CONTENT = 3


class SysctlTag(IntEnum):
    KEY = 1
    VALUE = 2


class NetTag(IntEnum):
    MAC = 1
    NAME = 2
    MTU = 3
    ADDRESS = 4
    ROUTE = 5
    NEW_MAC = 6


class AddressTag(IntEnum):
    FAMILY = 1
    ADDRESS = 2
    PREFIX = 3


class RouteTag(IntEnum):
    FAMILY = 1
    DESTINATION = 2
    PREFIX = 3
    GATEWAY = 4
    METRIC = 5


class ProcessTag(IntEnum):
    ARG = 1
    ENV = 2
    CWD = 3
    USER = 4
    UID = 5
    GID = 6
    GROUP = 7
    UMASK = 8
    TERMINAL = 9
    ROWS = 10
    COLUMNS = 11
    STDIN = 12
    BOUNDING = 13
    EFFECTIVE = 14
    PERMITTED = 15
    INHERITABLE = 16
    AMBIENT = 17
    NO_NEW_PRIVS = 18
    SECCOMP = 19
    RLIMIT = 20
    OOM_SCORE_ADJ = 21
    GROUP_NAME = 22


class TreeTag(IntEnum):
    VERB = 1
    PATH = 2
    FLAGS = 3
    EXCLUDED = 4
    USER = 5
    UID = 6
    GID = 7


class CpusTag(IntEnum):
    COUNT = 1


class GrowTag(IntEnum):
    SERIAL = 1
    BYTES = 2


class TreeAnswer(IntEnum):
    SIZE = 1
    MODE = 2
    MTIME_NS = 3
    LINK = 4


Value = Union[int, str, bytes, "Items"]
Items = Sequence[tuple[int, Value]]


def encode(kind: int, ident: int, items: Items = ()) -> bytes:
    """One message as the frames that carry it."""
    bodies = [bytearray()]
    for field in _encode_fields(items):
        if len(bodies[-1]) + len(field) + FIELD.size > MAX_BODY:
            bodies[-1] += FIELD.pack(MORE, 0, 0)
            bodies.append(bytearray())
        bodies[-1] += field
    return b"".join(encode_raw(kind, ident, bytes(body)) for body in bodies)


def encode_raw(kind: int, ident: int, body: bytes) -> bytes:
    """One frame with `body` as it is, for STDIN; at most MAX_BODY bytes."""
    if len(body) > MAX_BODY:
        raise ValueError(f"body of {len(body)} bytes")
    return HEADER.pack(MAGIC, len(body), kind, 0, ident) + body


def _encode_fields(items: Items) -> Iterator[bytes]:
    for tag, value in items:
        data = _encode_value(value)
        while len(data) > MAX_FIELD:
            yield FIELD.pack(tag | PART, 0, MAX_FIELD) + data[:MAX_FIELD]
            data = data[MAX_FIELD:]
        yield FIELD.pack(tag, 0, len(data)) + data


def _encode_value(value: Value) -> bytes:
    if isinstance(value, int):
        return (value & 0xFFFF_FFFF_FFFF_FFFF).to_bytes(8, "little")
    if isinstance(value, str):
        return value.encode("utf-8", "surrogateescape")
    if isinstance(value, bytes):
        return value
    return b"".join(_encode_fields(value))


class Fields:
    """The fields of a body, by tag, in order. Raises Corrupt when `body` is not a sequence of fields."""

    __slots__ = ("_values",)

    def __init__(self, body: bytes) -> None:
        self._values: dict[int, list[bytes]] = {}
        part: bytearray | None = None
        at = 0
        while at < len(body):
            if len(body) - at < FIELD.size:
                raise Corrupt("a message from the guest ends inside a field")
            tag, _, length = FIELD.unpack_from(body, at)
            at += FIELD.size
            if length > len(body) - at:
                raise Corrupt(f"a field from the guest has length {length}, {len(body) - at} bytes are left")
            part = (part or bytearray()) + body[at : at + length]
            at += length
            if tag == MORE or not tag & PART:
                self._values.setdefault(tag, []).append(bytes(part))
                part = None
        if part is not None:
            raise Corrupt("a message from the guest ends inside a field")

    def datas(self, tag: int) -> list[bytes]:
        return self._values.get(tag, [])

    def data(self, tag: int, default: bytes = b"") -> bytes:
        """The last value of `tag`."""
        return self._values[tag][-1] if tag in self._values else default

    def number(self, tag: int, default: int = 0, *, signed: bool = False) -> int:
        if tag not in self._values:
            return default
        data = self._values[tag][-1]
        if len(data) != 8:
            raise Corrupt(f"field {tag} from the guest is a number of {len(data)} bytes")
        return int.from_bytes(data, "little", signed=signed)

    def text(self, tag: int, default: str = "") -> str:
        return self._values[tag][-1].decode("utf-8", "surrogateescape") if tag in self._values else default

    def texts(self, tag: int) -> list[str]:
        return [data.decode("utf-8", "surrogateescape") for data in self.datas(tag)]


class Message(NamedTuple):
    """One message; `body` is the concatenation of its frames' fields without MORE, or raw bytes of a stream."""

    kind: Type
    ident: int
    body: bytes

    @property
    def fields(self) -> Fields:
        return Fields(self.body)

    def error(self) -> AmbiError:
        """The error that an ERROR message carries."""
        fields = self.fields
        kind, text, hint = _one_line(fields.text(1)), _one_line(fields.text(2)), _one_line(fields.text(3))
        return from_wire({"kind": kind, "message": text, "hint": hint or None})


def _one_line(text: str) -> str:
    """`text` of a guest, fit for a terminal and a log."""
    return "".join(c if c.isprintable() else "?" for c in text[:1000])


class Decoder:
    """Messages of what a guest wrote, in whatever pieces it arrives.

    It starts out of sync and drops everything up to the guest's SYNCED frame, which `feed` returns first. In sync, a wrong
    magic, length or type raises Corrupt: the guest is broken or hostile, and the connection is of no more use unless the
    host calls `resync` and sends FLUSH + SYNC.
    """

    __slots__ = ("_buffer", "_pending", "_synced")

    _SYNCED_FRAME = HEADER.pack(MAGIC, 0, Type.SYNCED, 0, 0)

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._pending: dict[tuple[int, int], bytearray] = {}
        self._synced = False

    @property
    def synced(self) -> bool:
        return self._synced

    def resync(self) -> None:
        self._synced = False
        self._pending.clear()

    def feed(self, data: bytes) -> list[Message]:
        self._buffer += data
        messages: list[Message] = []
        if not self._synced and not self._find_synced():
            return messages
        at = 0
        try:
            while len(self._buffer) - at >= HEADER.size:
                magic, length, kind, zero, ident = HEADER.unpack_from(self._buffer, at)
                if magic != MAGIC or length > MAX_BODY or zero or kind not in FROM_GUEST:
                    raise Corrupt(f"the guest sent a frame that is none: magic {magic:#x}, type {kind:#x}, length {length}")
                if len(self._buffer) - at - HEADER.size < length:
                    break
                body = bytes(memoryview(self._buffer)[at + HEADER.size : at + HEADER.size + length])
                at += HEADER.size + length
                message = self._assemble(Type(kind), ident, body)
                if message:
                    messages.append(message)
        finally:
            del self._buffer[:at]
        return messages

    def _find_synced(self) -> bool:
        at = self._buffer.find(self._SYNCED_FRAME)
        if at < 0:
            del self._buffer[: -(HEADER.size - 1)]
            return False
        del self._buffer[:at]
        self._synced = True
        return True

    def _assemble(self, kind: Type, ident: int, body: bytes) -> Message | None:
        if kind in RAW:
            return Message(kind, ident, body)
        key = (kind, ident)
        more = body.endswith(FIELD.pack(MORE, 0, 0)) and _ends_with_more(body)
        if not more and key not in self._pending:
            return Message(kind, ident, body)
        whole = self._pending.setdefault(key, bytearray())
        whole += body[: -FIELD.size] if more else body
        if len(whole) > MAX_MESSAGE or len(self._pending) > MAX_PENDING:
            raise Corrupt(f"the guest sent a message of type {kind:#x} that does not end")
        if more:
            return None
        del self._pending[key]
        return Message(kind, ident, bytes(whole))


def _ends_with_more(body: bytes) -> bool:
    """Whether the last field, and not only the last eight bytes of a value, is MORE."""
    at = 0
    while len(body) - at >= FIELD.size:
        tag, _, length = FIELD.unpack_from(body, at)
        if tag == MORE and at + FIELD.size == len(body):
            return True
        at += FIELD.size + length
    return False
