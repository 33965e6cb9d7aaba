"""A blob as it comes from a registry: read to its end over as many connections as that takes."""

from __future__ import annotations

import time
from collections.abc import Callable

from urllib3.exceptions import HTTPError

from ambi.core.errors import Corrupt, Unavailable
from images.registry.client import Descriptor, Repository
from images.registry.transport import Response, harmless

PAUSE_S = 0.2  # before the second connection; doubles
_FRUITLESS = 5  # connections in a row that bring nothing


class BlobStream:
    """`read` gives the bytes from `offset` on, never more than the descriptor promises. told: called with bytes so far."""

    def __init__(self, repository: Repository, wanted: Descriptor, offset: int, told: Callable[[int], None]) -> None:
        self._repository, self._wanted, self._told = repository, wanted, told
        self._at = offset
        self._response: Response | None = None
        self._fruitless = 0

    def read(self, size: int, /) -> bytes:
        """b"" at the end. Raises Corrupt (too many bytes), Unavailable (cut off again and again)."""
        while self._at < self._wanted.size:
            try:
                data = self._connected().read(size)
            except (HTTPError, OSError) as error:
                self._cut(error)
                continue
            if not data:
                self._cut(None)
                continue
            self._fruitless = 0
            self._at += len(data)
            if self._at > self._wanted.size:
                raise Corrupt(self._about("is damaged: the registry sends more bytes than its manifest says"))
            self._told(self._at)
            return data
        self.close()
        return b""

    def _connected(self) -> Response:
        if self._response is None:
            self._response = self._repository.blob(self._wanted, self._at)
            if self._response.status == 200 and self._at:  # it knows no ranges
                self._skip(self._response, self._at)
        return self._response

    def _skip(self, response: Response, count: int) -> None:
        while count:
            data = response.read(min(count, 1 << 20))
            if not data:
                raise HTTPError("the connection ended")
            count -= len(data)

    def _cut(self, error: Exception | None) -> None:
        self.close()
        self._fruitless += 1
        if self._fruitless >= _FRUITLESS:
            cause = harmless(str(error)) if error else f"it ends after {self._at} of {self._wanted.size} bytes"
            raise Unavailable(
                self._about(f"cannot be got: {cause}"), hint="pull again: it goes on where it was cut"
            ) from error
        time.sleep(PAUSE_S * 2 ** (self._fruitless - 1))

    def _about(self, text: str) -> str:
        return f"layer {self._wanted.digest[7:19]} of {self._repository.name} {text}"

    def close(self) -> None:
        if self._response is not None:
            self._response.close()
            self._response = None
