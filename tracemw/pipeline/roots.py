"""Roots of requests in the queue: under load, requests make them ready for the store themselves.

Turning a root into rows and words takes the writer two or three times as long as the thread that has served it:
neither code nor objects are in a cache of its processor, and meanwhile every request waits for the interpreter.
One by one it would take the requests as long. So whoever ends the last of several makes all of them ready, after
its own answer, where they stand in the queue. What nobody has made ready when its turn comes, the writer does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, TypeAlias

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan

    from tracemw.record import TraceRecord
    from tracemw.store.arrivals import Arrival

TOGETHER: Final = 8


class Root:
    """A root in the queue, with its record until it is ready or taken by the writer.

    Attributes:
        arrival: What the store takes; set before the record is given up, so whoever has found no record finds it.
    """

    __slots__ = ("arrival", "record", "span")

    def __init__(self, record: TraceRecord, span: ReadableSpan) -> None:
        self.record: TraceRecord | None = record
        self.span: ReadableSpan | None = span
        self.arrival: Arrival | None = None

    def take(self) -> tuple[TraceRecord | None, ReadableSpan | None, Arrival | None]:
        """Return what there is of it, and have nobody make it ready any more."""
        record, span = self.record, self.span
        self.record = self.span = None
        return record, span, self.arrival


Item: TypeAlias = "tuple[TraceRecord | None, ReadableSpan | None] | Root"
"""What is queued: a record and its span, either of which may be None, or the root of a plain request."""


def parted(items: list[Item], seen: int) -> tuple[list[Item], list[Item]]:
    """Return what to write now of a batch, and what to leave in the queue until the next time.

    Most traces end within one or two intervals. A whole one is new to the store, which writes new ones with one
    statement; the rest of one that it has costs the batch, and the requests beside it, several. And a root that is
    not ready will be by then, if there are many.

    Args:
        seen: How many items at the head have been left before: nothing waits twice.
    """
    now, later = items[:seen], list[Item]()
    begun = set()
    for item in items[seen:]:
        record = item.record if isinstance(item, Root) else item[0]
        waits = record is not None and (isinstance(item, Root) or not record.ended or id(record) in begun)
        if waits:
            begun.add(id(record))
        (later if waits else now).append(item)
    return now, later


class Roots:
    """The roots that are not ready, in the order of the queue.

    They are in the queue as well, so that nothing is lost or late with what is forgotten here.

    Args:
        make: Makes a root ready for the store; None if that cannot be done.
    """

    def __init__(self, make: Callable[[TraceRecord, ReadableSpan], Arrival | None]) -> None:
        self._make = make
        self._raw: deque[Root] = deque()

    def add(self, root: Root) -> None:
        """Note a root that has been queued. Its caller may have to make several ready, about 30 µs each."""
        self._raw.append(root)
        if len(self._raw) >= TOGETHER:
            self._make_several()

    def _make_several(self) -> None:
        for _ in range(TOGETHER):
            try:
                root = self._raw.popleft()
            except IndexError:  # another thread is at it, too
                return
            record, span = root.record, root.span
            if record is not None and span is not None:
                root.arrival = self._make(record, span)
                if root.arrival is not None:
                    root.record = root.span = None

    def forget_taken(self) -> None:
        """Forget those at the head that the writer has taken."""
        try:
            while self._raw[0].record is None:
                self._raw.popleft()
        except IndexError:
            pass
