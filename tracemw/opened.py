"""The spans that a `Client` has begun and not ended: a table of this process, under their ids."""

from __future__ import annotations

import logging
import os
import threading
from typing import Final

from tracemw.livespan import LiveSpan

logger = logging.getLogger("tracemw")

LIMIT: Final = 10_000  # traces that may be open in one process


class OpenTrace:
    """The spans of one trace that was begun with a client: all of them, until the root and they have ended."""

    __slots__ = ("root", "spans")

    def __init__(self, root: LiveSpan) -> None:
        self.root = root
        self.spans: dict[str, LiveSpan] = {root.span_id: root}

    def has_ended(self) -> bool:
        return not any(span.otel_span.is_recording() for span in self.spans.values())


class Table:
    """The open traces of this process, oldest first."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all: after a fork they are the parent's."""
        self._traces: dict[str, OpenTrace] = {}
        self._lock = threading.Lock()

    def add(self, span: LiveSpan) -> None:
        """Keep a span; one below a span that no client has begun makes an entry of its own."""
        with self._lock:
            trace = self._traces.get(span.trace_id)
            if trace is None:
                self._traces[span.trace_id] = OpenTrace(span)
            else:
                trace.spans[span.span_id] = span
            surplus = len(self._traces) - LIMIT
            dropped = [self._traces.pop(key) for key in list(self._traces)[: max(0, surplus)]]
        for trace in dropped:
            logger.warning("more than %d traces are open; the oldest, %s, was ended", LIMIT, trace.root.trace_id)
            for open_span in reversed(trace.spans.values()):
                if open_span.otel_span.is_recording():
                    open_span.end()

    def trace(self, trace_id: str) -> OpenTrace | None:
        """Return an open trace."""
        return self._traces.get(trace_id)

    def span(self, trace_id: str, span_id: str) -> LiveSpan | None:
        """Return a span of an open trace."""
        trace = self._traces.get(trace_id)
        return None if trace is None else trace.spans.get(span_id)

    def ended(self, trace_id: str) -> None:
        """Forget a trace if nothing of it is open any more."""
        with self._lock:
            trace = self._traces.get(trace_id)
            if trace is not None and trace.has_ended():
                del self._traces[trace_id]

    def __len__(self) -> int:
        return len(self._traces)


TABLE: Final = Table()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=TABLE.reset)
