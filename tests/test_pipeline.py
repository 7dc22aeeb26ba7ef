"""The pipeline: nothing is lost silently, a request never waits, and a broken store breaks nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import logging
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import get_current_span, set_span_in_context

import tracemw
from tests import budget
from tests.servers import wait_for
from tracemw import guard
from tracemw import pipeline as pipelines
from tracemw.asgi import TraceMiddleware
from tracemw.errors import StoreError
from tracemw.pipeline import writer
from tracemw.pipeline.encode import trace_row
from tracemw.pipeline.local import StoreSink
from tracemw.pipeline.roots import TOGETHER
from tracemw.pipeline.writer import Pipeline
from tracemw.record import TraceRecord, current_record
from tracemw.settings import Settings
from tracemw.store import Store, arrivals
from tracemw.store.rows import SpanRow, TraceRow

tracer = TracerProvider(shutdown_on_exit=False).get_tracer("test")


class ListSink:
    """Keeps the rows; refuses them while `refusing`."""

    def __init__(self) -> None:
        self.spans: list[SpanRow] = []
        self.traces: list[TraceRow] = []
        self.refusing = False
        self.calls = 0

    def write(self, traces: Sequence[TraceRow], spans: Sequence[SpanRow]) -> None:
        self.calls += 1
        if self.refusing:
            raise StoreError("the disk is full: make room", retry=True)
        self.spans += spans
        self.traces += traces


def put(pipeline: Pipeline, number: int) -> TraceRecord:
    """Queue a trace of some spans, the root last."""
    root = tracer.start_span("root")
    context = root.get_span_context()
    record = TraceRecord(context.trace_id, context.span_id)
    for _ in range(number - 1):
        child = tracer.start_span("child", context=set_span_in_context(root))
        child.end()
        pipeline.put(record, child)  # type: ignore[arg-type]
    record.name, record.start_ns, record.end_ns = "root", time.time_ns(), time.time_ns()
    root.end()
    record.on_change = lambda changed: pipeline.put(changed, None)
    pipeline.put(record, root)  # type: ignore[arg-type]
    return record


def test_all_that_is_queued_is_written() -> None:
    """`flush` returns True once everything queued before it is written, from any number of threads."""
    sink = ListSink()
    pipeline = Pipeline(sink, Settings())
    threads = [threading.Thread(target=lambda: [put(pipeline, 5) for _ in range(100)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert pipeline.flush(10)
    assert len(sink.spans) == 2000
    assert len({row.trace_id for row in sink.traces}) == 400
    assert pipeline.stats()["written_spans"] == 2000
    assert pipeline.close()


def test_what_comes_while_a_batch_is_written_waits_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spans that trickle in while the writer is at it are written together, not each in a write of its own."""
    monkeypatch.setattr(writer, "INTERVAL", 0.2)
    times: list[float] = []

    class Trickle(ListSink):
        def write(self, traces: Sequence[TraceRow], spans: Sequence[SpanRow]) -> None:
            times.append(time.monotonic())
            super().write(traces, spans)
            if len(times) < 5:
                put(pipeline, 1)
            if len(times) == 1:  # somebody wants all to be stored while the writer is at it
                threading.Thread(target=pipeline.flush).start()
                wait_for(lambda: len(pipeline._queue) == 2)

    pipeline = Pipeline(Trickle(), Settings())
    put(pipeline, 1)
    wait_for(lambda: len(times) == 5, 10)
    gaps = [later - earlier for earlier, later in itertools.pairwise(times[1:])]
    assert min(gaps[1:]) > 0.15  # the first ones may come at once
    assert pipeline.close()


def test_without_work_the_thread_sleeps() -> None:
    """The writer starts with the first span and does not wake while there is nothing to write."""
    sink = ListSink()
    pipeline = Pipeline(sink, Settings())
    assert pipeline._thread is None
    put(pipeline, 1)
    assert pipeline.flush(10)
    calls = sink.calls
    time.sleep(0.3)
    assert sink.calls == calls
    put(pipeline, 1)
    wait_for(lambda: len(sink.spans) == 2)
    pipeline.close()


def test_a_steady_flow_wakes_the_writer_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as spans keep coming the writer looks for them by itself: no request has to wake it."""
    monkeypatch.setattr(writer, "INTERVAL", 0.2)
    sink = ListSink()
    pipeline = Pipeline(sink, Settings())
    woken = 0

    def rouse(rouse: Callable[[], None] = pipeline._rouse) -> None:
        nonlocal woken
        woken += 1
        rouse()

    monkeypatch.setattr(pipeline, "_rouse", rouse)
    began = time.monotonic()
    while time.monotonic() - began < 1.2:
        put(pipeline, 1)
        time.sleep(0.01)
    assert sink.calls >= 4
    assert woken == 1
    assert pipeline.close()


@pytest.fixture
def waiting(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pipeline]:
    """A pipeline in force, with a store, whose writer does not come by itself."""
    pipeline = Pipeline(StoreSink("memory:", None, Settings()), Settings())
    monkeypatch.setattr(pipeline, "_rouse", lambda: None)
    before = pipelines.use(pipeline)
    yield pipeline
    pipelines.use(before)


def serve(number: int, app: Any = budget.plain_asgi) -> None:
    """Have an application answer so many requests, one after the other."""
    traced = TraceMiddleware(app)

    async def ask() -> None:
        for _ in range(number):
            await traced(budget.scope(), budget.receive, budget.send)

    asyncio.run(ask())


def next_batch(pipeline: Pipeline) -> writer._Batch:
    """Return what the writer would hand on now."""
    pipeline._hurried = True  # nothing is left for later
    pipeline._encode(pipeline._take()[0])
    batch = pipeline._spool.pop()
    pipeline._account(batch, -1)
    return batch


def spool(pipeline: Pipeline, batch: writer._Batch) -> None:
    """Give a batch back, for the writer to hand on."""
    pipeline._spool.append(batch)
    pipeline._account(batch, 1)


def test_what_waits_for_the_writer_is_few_objects(waiting: Pipeline) -> None:
    """A request leaves few objects behind that Python's garbage collector counts until they are stored: each makes
    its rounds come earlier, and a round keeps a request waiting."""
    serve(296)
    waiting._queue.clear()
    gc.collect()
    gc.disable()
    try:
        before = gc.get_count()[0]
        serve(304)
        objects = (gc.get_count()[0] - before) / 304
    finally:
        gc.enable()
    assert len(waiting._queue) == 304
    assert objects < 10


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("number", [1, 7, 8, 20])
def test_plain_requests_are_made_ready_by_themselves(waiting: Pipeline, number: int, late: bool) -> None:
    """Where many have ended, the last of them makes all ready, after its answer; what the store is given is what
    the writer would make of them, and what was set on a trace after its end is in it or comes after it."""
    records = []

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        records.append(current_record())
        await budget.plain_asgi(scope, receive, send)
        if late:
            tracemw.update_current_trace(tags={"set": "late"}, session_id="another")

    serve(number, answer)
    assert waiting.stats()["queued"] == number * (1 + late)
    batch = next_batch(waiting)
    assert len(batch.arrived) == number - number % TOGETHER
    traces, spans = arrivals.rows_of(batch.arrived)
    facts = {row.trace_id: row for row in [*traces, *batch.traces]}  # those that come later count
    wanted = [trace_row(record) for record in records if record is not None]
    assert [facts[row.trace_id] for row in wanted] == wanted
    assert {frozenset(row.tags) for row in wanted} == {frozenset(["set"] if late else [])}
    assert sorted(span.trace_id for span in [*spans, *batch.spans]) == sorted(facts)
    spool(waiting, batch)
    assert waiting._write_spool()
    store = store_of(waiting)
    assert {found.row.trace_id: found.row for found in store.search().traces} == facts
    assert waiting.stats()["written_spans"] == number


def test_a_root_is_the_same_whoever_makes_it_ready(waiting: Pipeline) -> None:
    """The rows that a request makes and those that the writer makes of the same root are equal."""
    serve(1)
    root = waiting._queue[0]
    arrival = waiting._make_ready(root.record, root.span)
    batch = next_batch(waiting)
    assert arrival is not None
    assert arrivals.rows_of([arrival]) == (batch.traces, batch.spans)


@pytest.mark.parametrize("told", ["inputs", "an attribute", "an event"])
def test_a_request_of_which_much_may_be_told_is_left_to_the_writer(waiting: Pipeline, told: str) -> None:
    """What an application has put onto a trace may be long: no request's thread encodes that."""

    @tracemw.trace
    def handler(question: str) -> str:
        return question

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        if told == "inputs":
            handler("q" * 1000)
        elif told == "an attribute":
            get_current_span().set_attribute("question", "q" * 1000)
        else:
            get_current_span().add_event("asked", {"question": "q" * 1000})
        await budget.plain_asgi(scope, receive, send)

    serve(10, answer)
    batch = next_batch(waiting)
    assert (len(batch.traces), batch.arrived) == (10, [])
    assert [span.parent_id for span in batch.spans].count(None) == 10
    assert "q" * 1000 in "".join(span.attributes + span.events for span in batch.spans)


def test_a_span_before_the_root_and_the_root(waiting: Pipeline) -> None:
    """A trace has one row in a batch, though a span of it was queued before its root; the writer makes both."""
    number = 8

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        with tracemw.start_span("step"):
            pass
        await budget.plain_asgi(scope, receive, send)

    serve(number, answer)
    batch = next_batch(waiting)
    assert batch.arrived == []
    names = [batch.traces[0].name] * number + ["step"] * number
    assert sorted(span.name for span in batch.spans) == names
    assert [trace.state for trace in batch.traces] == ["OK"] * number
    spool(waiting, batch)
    assert waiting._write_spool()
    store = store_of(waiting)
    assert [len(found.spans) for found in store.search().traces] == [2] * number


def test_a_root_that_cannot_be_made_ready(waiting: Pipeline) -> None:
    """A text that has to be cleaned first is left to the store; the roots beside it are made ready."""
    serve(7)

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        tracemw.update_current_trace(tags={"broken": "a\0b"})
        await budget.plain_asgi(scope, receive, send)

    serve(1, answer)
    batch = next_batch(waiting)
    assert (len(batch.arrived), len(batch.spans)) == (7, 1)
    spool(waiting, batch)
    assert waiting._write_spool()
    store = store_of(waiting)
    found = store.search("tags.broken LIKE 'a%'").traces
    assert [one.row.tags for one in found] == [{"broken": "a\N{REPLACEMENT CHARACTER}b"}]
    assert store.stats()["traces"] == 8


@pytest.fixture
def stored() -> Iterator[Pipeline]:
    """A pipeline in force that writes to a file."""
    pipeline = Pipeline(StoreSink("sqlite:///stored.db", None, Settings()), Settings())
    before = pipelines.use(pipeline)
    yield pipeline
    pipelines.use(before)
    assert pipeline.close()


def store_of(pipeline: Pipeline) -> Store:
    """Return the store that a pipeline writes to."""
    sink: Any = pipeline.sink
    store: Store = sink.store
    return store


def test_a_lone_root_does_not_wait_for_others(stored: Pipeline) -> None:
    """Roots that nobody makes ready are written all the same, whatever else keeps the writer busy."""
    over = threading.Event()
    flow = threading.Thread(target=lambda: [put(stored, 1) for _ in iter(lambda: over.wait(0.001), True)])
    flow.start()
    try:
        wait_for(lambda: stored.stats()["written_spans"] > 20)
        serve(3)
        wait_for(lambda: len(store_of(stored).search("user = 'jane'").traces) == 3, 2)
        assert flow.is_alive()
    finally:
        over.set()
        flow.join()


def traces_and_roots(pipeline: Pipeline) -> tuple[int, ...]:
    """Return how many traces and roots are stored; where several loops run, there may be other spans."""
    query = "SELECT (SELECT count(*) FROM traces), count(*) FROM spans WHERE parent_id IS NULL"
    return tuple(store_of(pipeline).read(query)[0])


def interrupting(pipeline: Pipeline, during: Callable[[], object]) -> None:
    """Have something happen once, while a root is being made ready."""
    sink: Any = pipeline.sink
    things = [during]

    def interrupted(trace: TraceRow, span: SpanRow) -> Any:
        made = sink.ready(trace, span)
        if things:
            things.pop()()
        return made

    pipeline._ready = interrupted


def test_flush_does_not_wait_for_what_is_being_made_ready(stored: Pipeline) -> None:
    """All requests that have ended before `flush` was called are stored when it returns, though one of them is in
    the middle of making the others ready; so are those that end meanwhile, and each of them once."""
    begun, go_on = threading.Event(), threading.Event()

    def wait() -> None:
        begun.set()
        assert go_on.wait(10)

    interrupting(stored, wait)
    serving = threading.Thread(target=serve, args=(8,))
    serving.start()
    assert begun.wait(10)
    serve(20)
    assert stored.flush(10)
    assert store_of(stored).stats()["traces"] == 28
    go_on.set()
    serving.join()
    assert stored.flush(10)
    assert traces_and_roots(stored) == (28, 28)


def test_flush_in_a_signal_handler(stored: Pipeline) -> None:
    """Whoever flushes in the middle of making roots ready, in the same thread, is not kept waiting."""
    answers: list[bool] = []
    interrupting(stored, lambda: answers.append(stored.flush(10)))
    serve(8)
    assert answers == [True]
    assert store_of(stored).stats()["traces"] == 8


def test_a_fact_that_is_set_while_its_root_is_made_ready(stored: Pipeline) -> None:
    """What is set on a trace after its root has been read is stored, whoever is at it at that moment."""
    records: list[TraceRecord] = []

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        record = current_record()
        assert record is not None
        records.append(record)
        await budget.plain_asgi(scope, receive, send)

    interrupting(stored, lambda: records[0].update(tags={"set": "late"}))
    serve(8, answer)
    assert stored.flush(10)
    found = store_of(stored).search("tags.set = 'late'").traces
    assert [one.row.trace_id for one in found] == [f"{records[0].trace_id:032x}"]


def test_an_exit_while_roots_are_made_ready(stored: Pipeline) -> None:
    """A signal handler that raises, as that of a server that is told to end, loses nothing of what was queued."""

    def leave() -> None:
        raise SystemExit

    interrupting(stored, leave)
    with contextlib.suppress(SystemExit):
        serve(8)
    serve(8)
    assert stored.flush(10)
    assert traces_and_roots(stored) == (16, 16)


def test_what_was_made_ready_is_kept_while_the_store_refuses(stored: Pipeline) -> None:
    """It is counted like any other span that waits, is bounded like them, and is written in the end."""
    other = sqlite3.connect("stored.db", isolation_level=None)
    assert store_of(stored).stats()["traces"] == 0
    stored._idle = False  # the writer stays away
    serve(16)
    batch = next_batch(stored)
    assert (len(batch.arrived), batch.size) == (16, sum(len(arrival.text) for arrival in batch.arrived))
    other.execute("BEGIN IMMEDIATE")
    stored._closing = True  # it does not wait for the lock
    spool(stored, batch)
    assert not stored._write_spool()
    assert (stored._spooled_spans, stored._spooled_traces, stored._spooled_bytes) == (16, 16, batch.size)
    assert stored.stats()["spooled"] == 16
    serve(1)
    other.close()
    stored._closing, stored._hurried = False, False
    assert stored.flush(10)
    assert store_of(stored).stats()["traces"] == 17
    assert (stored._spooled_spans, stored._spooled_traces, stored._spooled_bytes) == (0, 0, 0)
    assert stored.stats()["written_spans"] == 17


def test_what_is_lost_of_what_was_made_ready_is_counted(
    stored: Pipeline, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Dropped for want of memory, for a defect, or at the end of the process: each span counts."""
    guard._last_logged.clear()
    monkeypatch.setattr(writer, "SPOOL_LIMIT", 10)
    stored._idle = False  # the writer stays away
    serve(24)
    batch = next_batch(stored)
    assert stored.stats()["queued"] == 0
    serve(9)
    with caplog.at_level(logging.ERROR, "tracemw"):
        stored.tell_unsaved()
    assert "9 spans are lost" in caplog.text
    spool(stored, batch)
    stored._bound_spool()
    assert stored.stats()["dropped"] == 24
    spool(stored, next_batch(stored))
    with monkeypatch.context() as patch:
        patch.setattr(StoreSink, "write", None)
        stored._write_spool()
    assert stored.stats()["dropped"] == 33


def test_requests_in_many_threads(stored: Pipeline) -> None:
    """Every request is stored once, from however many threads they come, and whoever makes them ready."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=serve, args=(101,)) for _ in range(8)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            assert stored.flush(10)
        for thread in threads:
            thread.join()
        assert stored.flush(10)
    finally:
        sys.setswitchinterval(interval)
    assert traces_and_roots(stored) == (808, 808)
    assert store_of(stored).read("SELECT count(*) FROM spans") == [(stored.stats()["written_spans"],)]


def test_spans_of_a_trace_that_goes_on_wait_for_its_root_once(waiting: Pipeline) -> None:
    """A look of the writer leaves what it finds of a request under way for the next look, so that most traces come
    to the store whole, which takes it a part of the work; one that goes on for longer does not wait again."""
    looks = []

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        for name in ("one", "two"):
            with tracemw.start_span(name):
                pass
            looks.append(len(waiting._take()[0]))
        await budget.plain_asgi(scope, receive, send)

    serve(1, answer)
    assert looks == [0, 1]  # what was left the first time goes, what has come since is left
    assert len(waiting._take()[0]) == 2
    assert not waiting._queue

    async def ask(scope: Any, receive: Any, send: Any) -> None:
        with tracemw.start_span("one"):
            pass
        waiting._hurried = True  # somebody waits for what there is
        looks.append(len(waiting._take()[0]))
        waiting._hurried = False
        await budget.plain_asgi(scope, receive, send)

    serve(1, ask)
    assert looks[-1] == 1


def test_facts_that_come_late_do_not_overtake_the_root(waiting: Pipeline) -> None:
    """What is set on a trace after its root has ended goes with the root, not a look of the writer before it."""

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        await budget.plain_asgi(scope, receive, send)
        tracemw.update_current_trace(tags={"set": "late"})

    serve(3, answer)
    assert waiting._take()[0] == []
    waiting._encode(waiting._take()[0])
    batch = waiting._spool.pop()
    assert (len(batch.traces), len(batch.spans)) == (3, 3)
    assert not waiting._queue


def test_a_request_under_way_is_stored(stored: Pipeline) -> None:
    """What has ended of a long request can be found while it goes on, without anybody asking for it."""

    def states() -> list[str]:
        return [found.row.state for found in store_of(stored).search().traces]

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        with tracemw.start_span("step"):
            pass
        wait_for(lambda: states() == ["IN_PROGRESS"])
        await budget.plain_asgi(scope, receive, send)

    serve(1, answer)
    assert stored.flush(10)
    (found,) = store_of(stored).search().traces
    assert (found.row.state, len(found.spans)) == ("OK", 2)


def test_a_record_that_cannot_be_encoded(caplog: pytest.LogCaptureFixture) -> None:
    """It costs itself, and is counted; the traces beside it are stored, and nobody waits longer for them."""
    guard._last_logged.clear()
    sink = ListSink()
    pipeline = Pipeline(sink, Settings())
    with caplog.at_level(logging.ERROR, "tracemw"):
        broken, fine = put(pipeline, 1), put(pipeline, 1)
        broken.metadata = None  # type: ignore[assignment]
        assert pipeline.flush(10)
    assert [row.trace_id for row in sink.traces] == [f"{fine.trace_id:032x}"]
    assert pipeline.stats()["dropped"] == 1
    pipeline.close()


def test_flush_tells_of_an_attempt_made_after_it_was_called() -> None:
    """A store that was mended while the last attempt failed takes what is there; `flush` says so."""
    sink, refuse = ListSink(), threading.Event()

    class Mended:
        def write(self, traces: Sequence[TraceRow], spans: Sequence[SpanRow]) -> None:
            if not refuse.is_set():
                assert refuse.wait(10)
                raise StoreError("no database: move it away", retry=False)
            time.sleep(0.1)  # whoever was told of the first attempt is awake by now
            sink.write(traces, spans)

    pipeline = Pipeline(Mended(), Settings())
    put(pipeline, 1)
    wait_for(lambda: not pipeline._queue)
    answers: list[bool] = []
    asking = threading.Thread(target=lambda: answers.append(pipeline.flush(10)))
    asking.start()
    wait_for(lambda: pipeline._queue)
    refuse.set()
    asking.join()
    assert answers == [True] and len(sink.spans) == 1
    pipeline.close()


def closing_takes() -> float:
    """Seconds that it takes to close a pipeline that has nothing left to write."""
    pipeline = Pipeline(ListSink(), Settings())
    put(pipeline, 1)
    assert pipeline.flush(10)
    wait_for(lambda: pipeline._idle)
    began = time.monotonic()
    assert pipeline.close()
    return time.monotonic() - began


def test_closing_does_not_wait_for_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process ends, and a test's capture is over, without the pause that gathers spans into a batch."""
    monkeypatch.setattr(writer, "INTERVAL", 0.1)
    assert min(closing_takes() for _ in range(10)) < writer.INTERVAL * 0.8


def test_a_refused_write_is_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    """Rows that the store refuses are kept, said so once, counted, and written when it takes them again."""
    guard._last_logged.clear()
    sink = ListSink()
    sink.refusing = True
    pipeline = Pipeline(sink, Settings())
    with caplog.at_level(logging.ERROR, "tracemw"):
        put(pipeline, 3)
        assert not pipeline.flush(0.4)
        put(pipeline, 3)
        assert not pipeline.flush(0.4)
    assert len([record for record in caplog.records if "the disk is full" in record.message]) == 1
    assert pipeline.stats()["retried_writes"] >= 2
    sink.refusing = False
    assert pipeline.flush(10)
    assert len(sink.spans) == 6
    assert pipeline.stats()["dropped"] == 0
    pipeline.close()


def test_what_waits_for_the_store_is_counted_in_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every span is written, dropped, queued or spooled, and the bound of the spool is one of spans, too."""
    for name, value in {"SPOOL_LIMIT": 100, "FEW": 10, "MANY": 10, "LARGE_BATCH": 10, "RETRY_LIMIT": 0.1}.items():
        monkeypatch.setattr(writer, name, value)
    sink = ListSink()
    sink.refusing = True
    pipeline = Pipeline(sink, Settings())
    before = 0
    for made, spooled in ((80, 80), (130, 100)):
        aside = Pipeline(sink, Settings())
        aside._idle = False  # its writer stays away
        for _ in range(made - before):
            put(aside, 1)
        pipeline._queue.extend(aside._queue)  # all at once: what is dropped is whole batches
        before = made
        assert not pipeline.flush(0.5)
        stats = pipeline.stats()
        assert (stats["spooled"], stats["dropped"], stats["queued"]) == (spooled, made - spooled, 0)
    sink.refusing = False
    assert pipeline.close(10)
    assert (len(sink.spans), pipeline.stats()["spooled"]) == (100, 0)


def test_late_facts_are_bounded_while_the_store_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of traces alone, whose spans are stored, use up no memory without end either."""
    for name, value in {"SPOOL_LIMIT": 100, "FEW": 10, "MANY": 10, "LARGE_BATCH": 10, "RETRY_LIMIT": 0.1}.items():
        monkeypatch.setattr(writer, name, value)
    sink = ListSink()
    pipeline = Pipeline(sink, Settings())
    records = [put(pipeline, 1) for _ in range(150)]
    assert pipeline.flush(10)
    sink.refusing, sink.traces = True, []
    for record in records:
        pipeline.put(record, None)
    assert not pipeline.flush(0.5)
    assert pipeline.stats()["spooled"] == 0
    sink.refusing = False
    assert pipeline.close(10)
    assert 0 < len(sink.traces) <= 100


def test_a_batch_that_can_never_be_stored_costs_only_itself() -> None:
    """What the store refuses for good does not stand in the way of what comes after it."""

    class PickySink(ListSink):
        def write(self, traces: Sequence[TraceRow], spans: Sequence[SpanRow]) -> None:
            if any(row.name == "poison" for row in spans):
                raise StoreError("this cannot be stored")
            super().write(traces, spans)

    sink = PickySink()
    pipeline = Pipeline(sink, Settings())
    poison = tracer.start_span("poison")
    poison.end()
    context = poison.get_span_context()
    pipeline.put(TraceRecord(context.trace_id, context.span_id), poison)  # type: ignore[arg-type]
    assert not pipeline.flush(0.3)
    put(pipeline, 3)
    assert not pipeline.flush(0.3)
    assert len(sink.spans) == 3
    pipeline.close(0.1)


def test_a_full_queue_is_counted_and_said(caplog: pytest.LogCaptureFixture) -> None:
    """Beyond its capacity the queue drops what comes, counts it and logs it; the caller does not wait."""
    guard._last_logged.clear()
    pipeline = Pipeline(ListSink(), Settings(), capacity=10)
    pipeline._idle = False  # nobody writes
    with caplog.at_level(logging.ERROR, "tracemw"):
        put(pipeline, 25)
    assert pipeline.stats()["dropped"] == 15
    assert "the queue is full" in caplog.text


def test_a_long_queue_is_worked_off_at_a_larger_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """The longer the queue, the fewer batches, and turns for other threads, for a span: a busy thread makes each
    of them cost 5 ms, and who gives as many as before never catches up."""
    turns = 0

    def sleep(seconds: float, sleep: Callable[[float], None] = time.sleep) -> None:
        nonlocal turns
        turns += threading.current_thread().name == "tracemw-writer"
        sleep(seconds)

    monkeypatch.setattr(time, "sleep", sleep)
    sink = ListSink()
    pipeline = Pipeline(sink, Settings())
    pipeline._idle = False  # the writer is held back until all is there
    for _ in range(40):
        put(pipeline, 300)
    assert pipeline.flush(30)
    assert len(sink.spans) == 12_000
    assert sink.calls <= 6
    assert turns <= 100
    pipeline.close()


def test_a_span_that_cannot_be_encoded_costs_only_itself(caplog: pytest.LogCaptureFixture) -> None:
    """A defect in one span is logged and counted; the others are written."""
    guard._last_logged.clear()
    sink = ListSink()
    pipeline = Pipeline(sink, Settings())
    record = put(pipeline, 2)
    pipeline.put(record, object())  # type: ignore[arg-type]
    put(pipeline, 2)
    assert pipeline.flush(10)
    assert len(sink.spans) == 4
    assert pipeline.stats()["dropped"] == 1
    pipeline.close()


def test_a_defect_in_the_writer_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who flushes is told at once that it failed, and what comes later is written."""
    guard._last_logged.clear()
    sink = ListSink()
    pipeline = Pipeline(sink, Settings())
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "_encode", None)
        pipeline._idle = False  # the writer is held back until all is there
        put(pipeline, 2)
        marker = writer._Marker()
        pipeline._queue.append(marker)
        pipeline._rouse()
        assert marker.done.wait(10)
        assert not marker.stored
    put(pipeline, 3)
    assert pipeline.flush(10)
    assert len(sink.spans) == 3
    pipeline.close()


def test_late_facts_are_written_again() -> None:
    """A fact set after the root's end reaches the store as another row of the same trace."""
    sink = ListSink()
    pipeline = Pipeline(sink, Settings())
    record = put(pipeline, 1)
    assert pipeline.flush(10)
    record.update(tags={"late": "yes"})
    assert pipeline.flush(10)
    assert [row.tags for row in sink.traces] == [{}, {"late": "yes"}]
    pipeline.close()


@pytest.mark.parametrize("broken", ["missing folder", "no database", "a folder"])
def test_a_store_that_cannot_be_opened(tmp_path: Path, broken: str, caplog: pytest.LogCaptureFixture) -> None:
    """One clear log line says what is wrong; the spans wait in memory and are stored once it is mended."""
    guard._last_logged.clear()
    path = tmp_path / "sub" / "t.db"
    if broken == "no database":
        path.parent.mkdir()
        path.write_bytes(b"this is no database" * 1000)
    elif broken == "a folder":
        path.mkdir(parents=True)
    pipeline = Pipeline(StoreSink(f"sqlite:///{path}", None, Settings()), Settings())
    with caplog.at_level(logging.ERROR, "tracemw"):
        put(pipeline, 3)
        assert not pipeline.flush(0.3)
    messages = [record.message for record in caplog.records]
    assert len(messages) == 1
    assert str(path) in messages[0] or str(path.parent) in messages[0]

    if broken == "no database":
        path.unlink()
    elif broken == "a folder":
        path.rmdir()
    else:
        path.parent.mkdir()
    assert pipeline.flush(15)
    sink = pipeline.sink
    assert isinstance(sink, StoreSink)
    assert [len(trace.spans) for trace in sink.store.search(include_spans=True).traces] == [3]
    pipeline.close()
    sink.close()


def test_discarding() -> None:
    """Without a sink spans are counted and dropped before anything is done with them."""
    pipeline = Pipeline(None, Settings())
    put(pipeline, 4)
    assert pipeline.flush(1)
    assert pipeline.stats()["discarded"] == 4


SIGNALS = """
import signal, sys
import tracemw
from tracemw import pipeline

tracemw.configure(destination=sys.argv[1])
with tracemw.start_span("first"):  # imports what it needs
    pass
tracemw.flush()
in_handler = 0

def handler(signum, frame):
    global in_handler
    in_handler += 1
    with tracemw.start_span("in the handler"):
        pass
    pipeline.current().flush(0.001)
    if armed:
        signal.setitimer(signal.ITIMER_REAL, 0.0005)

armed = True
signal.signal(signal.SIGALRM, handler)
signal.setitimer(signal.ITIMER_REAL, 0.0005)
for i in range(3000):
    with tracemw.start_span("outside"):
        pass
    if i % 50 == 0:
        pipeline.current().flush(0.001)
armed = False
signal.setitimer(signal.ITIMER_REAL, 0)
assert tracemw.flush(20)
assert in_handler > 20, in_handler
found = tracemw.search_traces(max_results=10000, include_spans=True)
print(sum(len(trace.data.spans) for trace in found) - in_handler)
"""


def test_signal_handlers_may_trace_and_flush(tmp_path: Path) -> None:
    """A handler that interrupts us anywhere may trace and flush: nothing hangs, nothing is lost."""
    command = [sys.executable, "-c", SIGNALS, f"sqlite:///{tmp_path}/t.db"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "3001"
