"""Roots of requests on their way into the queue: under load, requests make them ready for the store themselves.

Turning a root into rows and words takes the writer two or three times as long as the thread that has served it:
neither code nor objects are in a cache of its processor, and meanwhile every request waits for the interpreter.
One by one it would take the requests as long. So whoever ends the last of several makes all of them ready, after
its own answer. Where fewer come between two looks of the writer, it takes them as they are.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan

    from tracemw.record import TraceRecord

TOGETHER: Final = 8


class Roots:
    """Roots that have ended and are not queued yet, in the order of their ends.

    Args:
        queue: Where they go; the writer takes from there.
        ready: Makes what is queued of one, for the writer to hand on.
    """

    def __init__(self, queue: deque[Any], ready: Callable[[TraceRecord, ReadableSpan | None], Any]) -> None:
        self._queue = queue
        self._ready = ready
        self._waiting: deque[tuple[TraceRecord, ReadableSpan | None]] = deque()
        self._seen: object = None
        # Held while roots are neither here nor in the queue. A signal handler or a finalizer may come back to us
        # in the middle of that, so it has to let its own thread in.
        self._moving = threading.RLock()

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, record: TraceRecord, span: ReadableSpan | None) -> None:
        """Add a root, or with None in its place a record whose facts have changed.

        Its caller may have to make several ready, about 30 µs each. It waits for nobody.
        """
        self._waiting.append((record, span))
        if len(self._waiting) >= TOGETHER and self._moving.acquire(blocking=False):
            try:
                self._move(TOGETHER, self._ready)
            finally:
                self._moving.release()

    def queue_all(self) -> None:
        """Queue all as they are; what is being made ready is queued when this returns."""
        with self._moving:
            self._move(len(self._waiting), _as_it_is)

    def queue_late(self) -> None:
        """Queue all as they are if nothing else is queued, or if the first one was here the last time, too."""
        try:
            first = self._waiting[0]
        except IndexError:
            self._seen = None
            return
        if first is self._seen or not self._queue:
            self.queue_all()
        else:
            self._seen = first

    def _move(self, number: int, made: Callable[[TraceRecord, ReadableSpan | None], Any]) -> None:
        for _ in range(number):
            try:
                record, span = self._waiting.popleft()
            except IndexError:  # the writer has taken it
                return
            self._queue.append(made(record, span))


def _as_it_is(record: TraceRecord, span: ReadableSpan | None) -> Any:
    return record, span, None
