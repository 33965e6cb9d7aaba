"""The events of the engine: stored in a bounded ring, replayed, and followed live."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from ambi.core.errors import AmbiError, InvalidRequest
from ambi.engine.filters import Filters
from ambi.engine.state import StateDb
from ambi.engine.types import Event

log = logging.getLogger(__name__)

_KEYS = frozenset(("type", "event", "container", "image", "label", "volume", "network", "daemon", "scope"))
_TICK_S = 1.0
_BACKLOG = 10_000  # a client this far behind is cut off


class EventBus:
    """Publishes to every open stream. Safe to use from any thread."""

    def __init__(self, db: StateDb) -> None:
        self._db = db
        self._lock = threading.Lock()
        self._streams: set[EventStream] = set()

    def publish(self, kind: str, action: str, actor: str, attributes: dict[str, str]) -> None:
        with self._lock:
            event = Event(time.time_ns(), kind, action, actor, attributes)
            try:
                self._db.add_event(event)
            except AmbiError as error:  # who follows sees it all the same
                log.error("event %s of %s is not stored: %s", action, actor[:12], error)
            for stream in self._streams:
                stream.offer(event)

    def open(self, since_ns: int | None, until_ns: int | None, filters: Filters) -> EventStream:
        """A stream of what `filters` lets through. Raises InvalidRequest for an unknown filter."""
        matches = _matcher(filters)
        with self._lock:
            past = list(self._db.events(since_ns)) if since_ns is not None else []
            stream = EventStream(past, until_ns, matches, self._forget)
            if until_ns is None or until_ns > time.time_ns():
                self._streams.add(stream)
            else:
                stream.finish()
        return stream

    def _forget(self, stream: EventStream) -> None:
        with self._lock:
            self._streams.discard(stream)

    def close(self) -> None:
        """End every stream."""
        with self._lock:
            streams, self._streams = self._streams, set()
        for stream in streams:
            stream.finish()


class EventStream:
    """An iterator of events. None comes about once a second when nothing happens, so the caller can look at its client."""

    def __init__(
        self,
        past: list[Event],
        until_ns: int | None,
        matches: Callable[[Event], bool],
        forget: Callable[[EventStream], None],
    ) -> None:
        self._past = deque(past)
        self._live: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._until_ns = until_ns
        self._matches = matches
        self._forget = forget
        self._ended = False

    def offer(self, event: Event) -> None:
        if self._live.qsize() < _BACKLOG:
            self._live.put(event)
        else:
            self._ended = True

    def finish(self) -> None:
        """What is queued is still given out, then the iteration ends."""
        self._live.put(None)

    def close(self) -> None:
        """End the iteration, from any thread; idempotent."""
        self._forget(self)
        self._ended = True
        self._live.put(None)

    def __iter__(self) -> Iterator[Event | None]:
        return self

    def __next__(self) -> Event | None:
        while not self._ended:
            if self._past:
                event: Event | None = self._past.popleft()
            else:
                try:
                    event = self._live.get(timeout=self._patience())
                except queue.Empty:
                    if self._until_ns is not None and time.time_ns() > self._until_ns:
                        break
                    return None
            if event is None or (self._until_ns is not None and event.time_ns > self._until_ns):
                break
            if self._matches(event):
                return event
        self.close()
        raise StopIteration

    def _patience(self) -> float:
        if self._until_ns is None:
            return _TICK_S
        return min(_TICK_S, max(0.001, (self._until_ns - time.time_ns()) / 1e9 + 0.001))


def _matcher(filters: Filters) -> Callable[[Event], bool]:
    for key in filters:
        if key not in _KEYS:
            raise InvalidRequest(f"invalid filter '{key}'")
    tests: list[Callable[[Event], bool]] = []
    for key, values in filters.items():
        if values:
            tests.append(_test(key, values))
    return lambda event: all(test(event) for test in tests)


def _test(key: str, values: list[str]) -> Callable[[Event], bool]:
    if key == "type":
        return lambda e: e.type in values
    if key == "event":
        return lambda e: any(e.action == v or e.action.startswith(f"{v}:") for v in values)
    if key == "label":
        return lambda e: all(_has_label(e.attributes, v) for v in values)
    if key in ("daemon", "scope"):
        return lambda e: key == "scope" and "local" in values
    return lambda e: any(_names(e, key, v) for v in values)


def _has_label(attributes: dict[str, str], wanted: str) -> bool:
    name, equals, value = wanted.partition("=")
    return name in attributes and (not equals or attributes[name] == value)


def _names(event: Event, kind: str, value: str) -> bool:
    """Whether `value` is an id, a prefix of one, or the name of the object of `kind` that the event is about."""
    if event.type == kind:
        plain = value.removeprefix("/")
        by_id = event.actor_id.removeprefix("sha256:").startswith(plain.removeprefix("sha256:"))
        return by_id or event.attributes.get("name") in (plain, f"{plain}:latest")
    return kind == "image" and event.attributes.get("image") in (value, f"{value}:latest")


def attributes_of(labels: Any, **own: str) -> dict[str, str]:
    """An event's attributes: the object's labels, then its own words, which win."""
    return {**(labels or {}), **own}
