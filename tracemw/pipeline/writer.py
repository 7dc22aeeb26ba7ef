"""The pipeline: a bounded queue on the request's side, one writer thread per process on the other.

A request appends to a deque and looks at a flag; it takes no lock and does no I/O. The thread starts with the
first span, sleeps without waking while there is nothing to do, and writes what came within `INTERVAL` in one
transaction. Nothing of it crosses a fork: the child starts with an empty queue and a thread of its own, and what
the queue held stays the parent's to write.
"""

from __future__ import annotations

import logging
import os
import queue as queue_module
import sys
import threading
import time
import weakref
from collections import Counter, deque
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

from tracemw.capture import DEFAULT_REDACT, Redactor
from tracemw.errors import StoreError
from tracemw.guard import due, report
from tracemw.pipeline.encode import foreign_trace_row, is_slight, span_row, trace_row
from tracemw.pipeline.roots import Item, Root, Roots, parted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from opentelemetry.sdk.trace import ReadableSpan

    from tracemw.record import TraceRecord
    from tracemw.settings import Settings
    from tracemw.store.arrivals import Arrival
    from tracemw.store.rows import SpanRow, TraceRow

logger = logging.getLogger("tracemw")

CAPACITY: Final = 100_000  # queued items; beyond them the newest are dropped and counted
# Seconds between two writes. Seldom writes are cheaper, but keep the requests that meet one waiting for longer: at
# 0.1 the 99th percentile of a busy server is a tenth higher. Twice this is also what SIGKILL can cost.
INTERVAL: Final = 0.025
FEW: Final = 64  # items in one transaction, which one statement takes; to encode them all takes some 3 ms
MANY: Final = 1000  # items in the queue from which on it is written in batches that are as large as they can be
LARGE_BATCH: Final = 5000  # items in one of those: who falls behind has to work at a larger scale
SLICE: Final = 64  # items encoded at least before other threads get their turn; the change costs them 0.1 ms
TURNS: Final = 16  # given to them at most while a batch is encoded: each may cost 5 ms beside a busy thread
RETRY_LIMIT: Final = 5.0  # seconds, the longest pause after a failed write
SPOOL_LIMIT: Final = 50_000  # spans kept in memory while they cannot be written; as many rows of traces
SPOOL_BYTES: Final = 64 << 20  # of the spans' text, likewise
WORKER_EXIT: Final = 5.0  # seconds that the end of a worker of `multiprocessing` may wait for the store
END_WAIT: Final = 1.0  # seconds that closing waits for the thread's end; a write under way ends it later
RECENT_LIMIT: Final = 10_000  # traces remembered, so that spans ending after their record was freed are known



class Sink(Protocol):
    """Where the writer thread puts rows."""

    def write(self, traces: Sequence[TraceRow], spans: Sequence[SpanRow]) -> None:
        """Store rows; StoreError where they could not be, with `retry` for whether to keep them.

        One that has a method `ready`, as `StoreSink` does, also takes what that makes of a plain root: `arrived`.
        """


class _Marker:
    """A place in the queue; `done` is set when all before it was written, or could not be."""

    __slots__ = ("done", "stored")

    def __init__(self) -> None:
        self.done = threading.Event()
        self.stored = False


class _Batch(NamedTuple):
    """Rows that are written together.

    Attributes:
        arrived: Traces of one span each that were made ready in the queue.
        size: About how much memory they take: the characters of their long texts.
    """

    traces: list[TraceRow]
    spans: list[SpanRow]
    arrived: list[Arrival]
    size: int

    @property
    def span_count(self) -> int:
        """How many spans it has."""
        return len(self.spans) + len(self.arrived)

    @property
    def trace_count(self) -> int:
        """How many rows of traces it has."""
        return len(self.traces) + len(self.arrived)


class Pipeline:
    """What happens to a finished span: queued, encoded, handed to the sink.

    Args:
        sink: Takes the rows; None drops the spans before they are encoded (they are counted).
        settings: Those in force, for the decisions the processor makes.
        capacity: Items the queue holds at most.
    """

    def __init__(self, sink: Sink | None, settings: Settings, *, capacity: int = CAPACITY) -> None:
        self.sink = sink
        self.keep_errors = settings.keep_errors
        self.keep_slower_than = settings.keep_slower_than
        self.operation_spans = settings.operation_spans
        self.store_all = settings.store_all
        self._redactor = Redactor(DEFAULT_REDACT if settings.redact is None else settings.redact)
        self._capacity = capacity
        self._ready: Any = getattr(sink, "ready", None)
        self._recent: dict[str, None] = {}
        if sink is not None and hasattr(sink, "patient"):
            sink.patient = lambda: not self._closing
        self._reset()
        _pipelines.add(self)

    def _reset(self) -> None:
        """Start anew, without what belongs to another process (after a fork) or nobody."""
        self._counts: Counter[str] = Counter()
        self._queue: deque[Any] = deque()
        self._roots = Roots(self._make_ready)
        self._left = 0  # items at the head of the queue that the writer has left there once
        self._spool: deque[_Batch] = deque()
        self._spooled_spans = 0
        self._spooled_traces = 0
        self._spooled_bytes = 0
        # What wakes the writer. Not an event: a signal handler, or a finalizer that the garbage collector runs,
        # may call us while its own thread is in the middle of waking the writer; `SimpleQueue.put` allows that.
        self._calls: SimpleQueue[None] = SimpleQueue()
        self._idle = True
        self._hurried = False  # somebody waits for what is queued
        self._refusal = ""  # the store's last one
        self._hopeless = False  # the store refuses for a reason that does not pass by itself
        self._closing = False
        self._threadless = False  # the interpreter is about to end and starts no threads, since Python 3.12
        self._thread: threading.Thread | None = None
        self._start_lock = threading.Lock()

    # The request's side.

    def put(self, record: TraceRecord | None, span: ReadableSpan | None) -> None:
        """Queue a finished span, or with None in its place a record whose facts changed."""
        if self._has_room():
            if record is not None:
                record.queued = True
            self._queue.append((record, span))
            if self._idle:
                self._rouse()

    def put_root(self, record: TraceRecord, span: ReadableSpan) -> None:
        """Queue the root of a trace, ended; a request has been answered by then."""
        if self._has_room():
            if self._ready is not None and is_slight(record, span):
                root = Root(record, span)
                self._queue.append(root)
                self._roots.add(root)
            else:
                self._queue.append((record, span))
            if self._idle:
                self._rouse()

    def _has_room(self) -> bool:
        if self.sink is None:
            self._counts["discarded"] += 1
            return False
        if len(self._queue) >= self._capacity:
            self._drop(1, "the queue is full")
            return False
        return True

    def _make_ready(self, record: TraceRecord, span: ReadableSpan) -> Arrival | None:
        try:
            row = span_row(record, span, self._redactor_of(record))
            arrival: Arrival = self._ready(trace_row(record), row)
            return arrival
        except Exception:  # the writer meets it again: it cleans what can be cleaned, and counts the rest
            return None

    def _redactor_of(self, record: TraceRecord) -> Redactor:
        return self._redactor if record.runtime is None else record.runtime.redactor

    def count(self, what: str, number: int = 1) -> None:
        """Count something that `stats()` tells of."""
        self._counts[what] += number

    def _drop(self, number: int, why: str) -> None:
        self._counts["dropped"] += number
        if due("dropped"):
            logger.error("%s: %d spans dropped so far in this process", why, self._counts["dropped"])

    def _rouse(self) -> None:
        self._idle = False
        if self._thread is None:
            self._start()
        self._calls.put(None)

    def _start(self) -> None:
        if not self._start_lock.acquire(blocking=False):
            return  # somebody is at it, perhaps this very thread
        try:
            if self._thread is None:
                _flush_at_worker_exit(self)
                self._calls = queue_module.SimpleQueue()  # looked up now: gevent may have put its own there since
                self._closing = False
                self._thread = threading.Thread(target=self._run, name="tracemw-writer", daemon=True)
                self._thread.start()
        except RuntimeError:
            self._thread, self._threadless = None, True
        finally:
            self._start_lock.release()

    # Everybody else's side.

    def flush(self, timeout: float = 30.0) -> bool:
        """Wait until all that was queued before the call is stored; False when it could not be in time."""
        if self.sink is None or (not self._queue and not self._spool and self._idle):
            return True
        deadline = time.monotonic() + timeout
        while True:
            marker = _Marker()
            self._queue.append(marker)
            self._hurried = True
            self._rouse()
            while self._threadless and self._queue and not marker.done.is_set():
                self._write_batch()
            if not marker.done.wait(max(0.0, deadline - time.monotonic())):
                return False
            if marker.stored or self._hopeless:
                return marker.stored
            time.sleep(min(0.05, max(0.0, deadline - time.monotonic())))
            if time.monotonic() >= deadline:
                return False

    def flush_at_exit(self, timeout: float) -> bool:
        """Flush before the process ends: log what cannot be stored, leave one file if that is easy."""
        stored = self.flush(timeout)
        if not stored:
            self.tell_unsaved()
        elif self.sink is not None and hasattr(self.sink, "rest"):
            self.sink.rest()
        return stored

    def tell_unsaved(self) -> None:
        """Log how many spans are lost with this pipeline, if any."""
        unsaved = self._spooled_spans + sum(not isinstance(item, _Marker) for item in list(self._queue))
        if unsaved:
            why = f": {self._refusal}" if self._refusal else " in time"
            logger.error("%d spans are lost, they could not be stored%s", unsaved, why)

    def close(self, timeout: float = 30.0) -> bool:
        """Flush, then end the writer thread. A span that comes later starts another one."""
        stored = self.flush(timeout)
        thread = self._thread
        if thread is not None and thread.is_alive():
            self._closing = self._hurried = True
            self._calls.put(None)
            thread.join(END_WAIT)
        return stored

    def stats(self) -> dict[str, int]:
        """Return what this process counted: written, dropped, waiting …"""
        counts = {"written_spans": 0, "written_traces": 0, "dropped": 0, "sampled_out": 0, "retried_writes": 0}
        return {**counts, **self._counts, "queued": len(self._queue), "spooled": self._spooled_spans}

    # The writer thread.

    def _run(self) -> None:
        try:
            self._work()
        finally:  # whatever ended it: the next span starts another one
            self._thread = None
            self._closing = self._hurried = False
            self._idle = True
        if self._queue:  # it came too late for this one
            self._rouse()

    def _work(self) -> None:
        failed_writes = 0
        while True:
            if not self._hurried:
                self._pause(min(INTERVAL * 2**failed_writes, RETRY_LIMIT))
            # Nobody has to wake us as long as spans keep coming: for the request that does it that is a call of
            # the system, for those beside it one more change of the thread that has the interpreter.
            if not self._queue and not self._spool:
                self._idle = True
                if self._closing:
                    return
                if not self._queue:  # asked again, now that whoever comes sees the flag
                    self._calls.get()
                self._idle = False
                continue
            try:
                failed_writes = 0 if self._write_batch() else min(failed_writes + 1, 10)
            except Exception as exc:  # a defect of ours costs a batch, never the thread
                report("Pipeline._write_batch", exc)
            if self._closing and failed_writes:
                return

    def _pause(self, seconds: float) -> None:
        """Let more spans come, unless somebody waits for those that are there."""
        try:
            self._calls.get(timeout=seconds)
        except Empty:
            pass

    def _write_batch(self) -> bool:
        """Encode and write what is queued, in batches; False when the sink refused.

        The few that came while it was written wait for the next time, unless somebody waits for them: one by one
        they would cost several times as much, and keep the requests from the interpreter all the time.
        """
        stored = True
        while True:
            items, markers = self._take()
            try:
                if items:
                    self._encode(items)
                if stored or markers:  # once refused, the rest only leaves the queue, unless somebody asks
                    stored = self._write_spool()
                if not stored:
                    self._bound_spool()
                for marker in markers:
                    marker.stored = stored
            finally:  # after a defect of ours, too: whoever waits asks again
                for marker in markers:
                    marker.done.set()
            if not self._queue or (len(self._queue) < 2 * FEW and not self._hurried):
                return stored

    def _take(self) -> tuple[list[Item], list[_Marker]]:
        """Take up to a batch off the queue; a marker ends it, so that what it stands for is written first."""
        queue = self._queue
        items: list[Item] = []
        many = len(queue) >= MANY
        limit = min(len(queue), LARGE_BATCH) if many else FEW
        left_before, self._left = self._left, 0
        while queue and len(items) < limit:
            item = queue.popleft()
            if isinstance(item, _Marker):
                self._hurried = False  # before it is written: who comes meanwhile says so again
                return items, [item]
            items.append(item)
        if not many and not self._hurried:
            items, left = parted(items, left_before)
            queue.extendleft(reversed(left))
            self._left = len(left)
        return items, []

    def _encode(self, items: list[Item]) -> None:
        spans: list[SpanRow] = []
        traces: list[TraceRow] = []
        arrived: list[Arrival] = []
        records: dict[int, TraceRecord] = {}  # by identity: parts of a foreign trace have records of their own
        turn = size = max(SLICE, len(items) // TURNS)
        for number, item in enumerate(items):
            if number == turn:
                turn += size
                if len(self._queue) < LARGE_BATCH:
                    time.sleep(0)  # lets a waiting request have the interpreter
            try:
                record, span, arrival = item.take() if isinstance(item, Root) else (*item, None)
                if arrival is not None:
                    arrived.append(arrival)
                    self._remember(arrival.trace_id)
                elif record is not None:
                    records[id(record)] = record
                    if span is not None:
                        spans.append(span_row(record, span, self._redactor_of(record)))
                elif span is not None:
                    self._encode_foreign(span, spans, traces)
            except Exception as exc:
                report("Pipeline._encode", exc)
                self._counts["dropped"] += 1
        self._roots.forget_taken()
        for record in records.values():
            try:
                traces.append(trace_row(record))
                self._remember(traces[-1].trace_id)
            except Exception as exc:
                report("Pipeline._encode", exc)
                self._counts["dropped"] += 1
        if traces or spans or arrived:
            size = sum(len(span.attributes) + len(span.events) for span in spans)
            batch = _Batch(traces, spans, arrived, size + sum(len(arrival.text) for arrival in arrived))
            self._spool.append(batch)
            self._account(batch, 1)

    def _encode_foreign(self, span: ReadableSpan, spans: list[SpanRow], traces: list[TraceRow]) -> None:
        """Keep a span without a record if its trace is one of ours, or if all traces are wanted."""
        row = span_row(None, span, self._redactor)
        if row.trace_id in self._recent:
            spans.append(row)
        elif self.store_all:
            spans.append(row)
            if span.parent is None or span.parent.is_remote:
                traces.append(foreign_trace_row(span))

    def _remember(self, trace_id: str) -> None:
        recent = self._recent
        recent[trace_id] = None
        if len(recent) > RECENT_LIMIT:
            del recent[next(iter(recent))]

    def _write_spool(self) -> bool:
        """Write what is encoded, oldest first; what is refused stays, within bounds.

        A batch that is refused for what it holds does not stand in the way of the others.
        """
        retry = False
        refused: deque[_Batch] = deque()
        while self._spool:
            batch = self._spool.popleft()
            try:
                self._hand_over(batch)
            except StoreError as exc:
                refused.append(batch)
                self._refused(exc)
                retry = exc.retry
                if retry:
                    break
                continue
            except Exception as exc:  # a defect: it costs this batch, and is counted
                report("Pipeline._write_spool", exc)
                self._account(batch, -1)
                self._drop(batch.span_count, "traces could not be stored")
                continue
            self._account(batch, -1)
            self._refusal = ""
            self._counts["written_spans"] += batch.span_count
            self._counts["written_traces"] += batch.trace_count
        self._spool.extendleft(reversed(refused))
        self._bound_spool()
        self._hopeless = bool(refused) and not retry
        return not refused

    def _hand_over(self, batch: _Batch) -> None:
        sink: Any = self.sink
        if batch.arrived:
            sink.write(batch.traces, batch.spans, batch.arrived)
        else:
            sink.write(batch.traces, batch.spans)

    def _refused(self, exc: StoreError) -> None:
        self._refusal = str(exc)
        self._counts["retried_writes"] += 1
        if due("refused"):
            logger.error("traces cannot be stored: %s. They are kept in memory and tried again.", exc)

    def _account(self, batch: _Batch, sign: int) -> None:
        """Note that rows came to what is kept in memory (1), or left it (-1)."""
        self._spooled_spans += sign * batch.span_count
        self._spooled_traces += sign * batch.trace_count
        self._spooled_bytes += sign * batch.size

    def _bound_spool(self) -> None:
        # Traces have a bound of their own: one whose facts change after its spans are stored comes without any.
        while self._spool and (
            max(self._spooled_spans, self._spooled_traces) > SPOOL_LIMIT or self._spooled_bytes > SPOOL_BYTES
        ):
            batch = self._spool.popleft()
            self._account(batch, -1)
            self._drop(batch.span_count, "traces cannot be stored and memory for them is used up")


_pipelines: weakref.WeakSet[Pipeline] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for pipeline in list(_pipelines):
        pipeline._reset()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


def _flush_at_worker_exit(pipeline: Pipeline) -> None:
    """Have `multiprocessing` flush before its workers end: they leave by `os._exit`, past `atexit`."""
    util = sys.modules.get("multiprocessing.util")
    process = sys.modules.get("multiprocessing.process")
    if util is not None and process is not None and process.parent_process() is not None:
        util.Finalize(None, pipeline.flush_at_exit, args=(WORKER_EXIT,), exitpriority=100)
