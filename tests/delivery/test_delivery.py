"""Store and forward: what was written reaches the back end, whatever happens in between, and is accounted for."""

from __future__ import annotations

import json
import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.delivery.backends import Collector, Reply, Request
from tests.delivery.rows import fill, span_row, trace_row
from tests.servers import wait_for
from tracemw.errors import SettingError, StoreError, TracemwError
from tracemw.pipeline import courier, delivery
from tracemw.pipeline.courier import Courier
from tracemw.pipeline.delivery import Deliverer, run_deliverer
from tracemw.pipeline.local import StoreSink
from tracemw.settings import Settings
from tracemw.store import Store, open_store

MakeDeliverer = Callable[[str], Deliverer]


@pytest.fixture
def deliverer(store: Store) -> Iterator[MakeDeliverer]:
    """Makes deliverers of the store; closes them."""
    made: list[Deliverer] = []

    def make(url: str) -> Deliverer:
        made.append(Deliverer(lambda: store, f"otlp+{url}"))
        return made[-1]

    yield make
    for each in made:
        each.close()


def refuse(*numbers: int, status: int = 400) -> Callable[[Request], Reply | None]:
    """A judge that refuses requests with any of these traces in them."""
    ids = [bytes.fromhex(trace_row(number).trace_id) for number in numbers]
    return lambda request: Reply(status, b"not this one") if any(id in request.body for id in ids) else None


def test_all_that_was_written_arrives_once(
    store: Store, collector: Collector, deliverer: MakeDeliverer
) -> None:
    """In few requests, and then nothing waits any more."""
    rows = fill(store, 300)
    made = deliverer(collector.url)
    assert made.wait_delivered(20)
    assert sorted(collector.traces) == sorted(row.trace_id for row in rows)
    assert len(collector.spans) == 600 and len(collector.requests) <= 4
    expected = {"delivered": 300, "retried": 0, "waiting": 0, "dead": 0, "problem": None, "oldest_waiting_s": None}
    assert made.stats().items() >= expected.items()


def test_nothing_waiting_is_delivered_already(
    store: Store, collector: Collector, deliverer: MakeDeliverer
) -> None:
    """Waiting for delivery of nothing takes no time."""
    began = time.monotonic()
    assert deliverer(collector.url).wait_delivered(10)
    assert time.monotonic() - began < 0.5


def test_what_waits_is_delivered_when_the_back_end_comes_back(
    store: Store, collector: Collector, deliverer: MakeDeliverer
) -> None:
    """Until then it stays in the store, and the numbers say how it is."""
    collector.off()
    fill(store, 50)
    made = deliverer(collector.url)
    assert not made.wait_delivered(0.3)
    stats = made.stats()
    assert (stats["waiting"], stats["delivered"], stats["dead"]) == (50, 0, 0)
    assert "nothing listens there" in stats["problem"] and stats["oldest_waiting_s"] >= 0
    assert stats["retried"] > 0
    collector.on()
    assert made.wait_delivered(20)
    assert sorted(collector.traces) == sorted(set(collector.traces)) and len(collector.traces) == 50
    assert made.stats()["problem"] is None


def test_a_back_end_in_trouble_is_not_hammered(
    store: Store, collector: Collector, deliverer: MakeDeliverer
) -> None:
    """It is asked after longer and longer pauses, with one trace."""
    collector.judge = lambda request: Reply(503)
    fill(store, 200)
    made = deliverer(collector.url)
    made.notify()
    time.sleep(3.0)
    assert 2 <= len(collector.seen) <= 5
    sizes = [len(request.body) for request in collector.seen]
    assert all(size < sizes[0] / 50 for size in sizes[1:])


@pytest.mark.parametrize("waited_for", [False, True])
def test_retry_after_is_honoured(
    store: Store, collector: Collector, deliverer: MakeDeliverer, waited_for: bool
) -> None:
    """A back end that asks for time gets it, also while somebody waits for delivery."""
    times: list[float] = []

    def judge(request: Request) -> Reply | None:
        times.append(time.monotonic())
        return Reply(429, headers={"Retry-After": "2"}) if len(times) == 1 else None

    collector.judge = judge
    fill(store, 3)
    made = deliverer(collector.url)
    made.notify()
    if waited_for:
        assert made.wait_delivered(10)
    else:
        wait_for(lambda: len(times) > 1)
    assert times[1] - times[0] >= 2.0


def test_who_is_not_let_in_waits(store: Store, collector: Collector, deliverer: MakeDeliverer) -> None:
    """A wrong password is no fault of the traces: none is given up, and the reason is told."""
    collector.judge = lambda request: Reply(401, b"who are you?")
    fill(store, 20)
    made = deliverer(collector.url)
    assert not made.wait_delivered(0.5)
    assert made.stats()["problem"] == (
        "spans: HTTP 401 who are you?"
        " (set who we are in the URL's user and password, or OTEL_EXPORTER_OTLP_HEADERS)"
    )
    assert (made.stats()["waiting"], made.stats()["dead"]) == (20, 0)
    collector.judge = lambda request: None
    assert made.wait_delivered(10)


def test_ten_bad_traces_of_two_hundred_cost_themselves(
    store: Store, collector: Collector, deliverer: MakeDeliverer
) -> None:
    """190 are delivered, ten are dead letters with reasons, delivered when somebody has them tried again."""
    bad = range(5, 200, 20)
    collector.judge = refuse(*bad)
    rows = fill(store, 200)
    made = deliverer(collector.url)
    assert not made.wait_delivered(20)
    assert len(collector.traces) == len(set(collector.traces)) == 190
    letters = store.outbox_dead()
    assert [letter.trace_id for letter in letters] == [rows[number].trace_id for number in bad]
    assert {letter.reason for letter in letters} == {"spans: HTTP 400 not this one"}
    assert (made.stats()["dead"], made.stats()["waiting"]) == (10, 0)
    collector.judge = lambda request: None
    assert store.outbox_redeliver() == 10
    assert made.wait_delivered(20)
    assert sorted(collector.traces) == sorted(row.trace_id for row in rows)


def test_a_trace_that_may_yet_be_taken_is_tried_again(
    store: Store, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trouble inside the back end (500) is no verdict: some tries, alone, before it is given up."""
    monkeypatch.setattr(courier, "pause", lambda *args: 0.0)
    collector.judge = refuse(3, status=500)
    fill(store, 8)
    made = Courier(lambda: store, f"otlp+{collector.url}")
    wait_for(lambda: made.step(lambda: False) and store.outbox_stats().waiting == 0)
    assert [(letter.attempts, letter.reason) for letter in store.outbox_dead()] == [
        (courier.MAX_ATTEMPTS, "spans: HTTP 500 not this one")
    ]
    assert len(collector.traces) == 7
    assert made.counts == {"delivered": 7, "retried": courier.MAX_ATTEMPTS - 1, "dead": 1}
    made.close()


def test_a_back_end_that_fails_for_all_gives_up_none(
    store: Store, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A collector whose database is down answers 500 for hours: the traces wait as in any outage."""
    monkeypatch.setattr(courier, "pause", lambda *args: 0.0)
    collector.judge = lambda request: Reply(500)
    fill(store, 40)
    made = Courier(lambda: store, f"otlp+{collector.url}")
    for _ in range(100):
        made.step(lambda: False)
    assert (store.outbox_stats().waiting, store.outbox_stats().dead) == (40, 0)
    collector.judge = lambda request: None
    wait_for(lambda: made.step(lambda: False) and store.outbox_stats().waiting == 0)
    assert len(set(collector.traces)) == 40
    made.close()


def test_bad_traces_at_the_head_do_not_hold_up_the_rest(
    store: Store, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even as many in a row as make a back end look broken."""
    monkeypatch.setattr(courier, "pause", lambda failures, *args: 0.01 * failures)
    collector.judge = refuse(*range(30))
    fill(store, 60)
    made = Courier(lambda: store, f"otlp+{collector.url}")
    wait_for(lambda: made.step(lambda: False) and store.outbox_stats().waiting == 0, interval=0.01)
    assert len(set(collector.traces)) == 30 and store.outbox_stats().dead == 30
    made.close()


def test_a_trace_that_changes_while_it_is_sent_is_sent_again(
    store: Store, collector: Collector, deliverer: MakeDeliverer
) -> None:
    """What is acknowledged is what was sent, not what was stored meanwhile."""
    rows = fill(store, 1)
    patched = threading.Event()

    def judge(request: Request) -> Reply | None:
        if not patched.is_set():
            patched.set()
            store.patch(rows[0].trace_id, tags={"late": "yes"}, outbox=True)
        return None

    collector.judge = judge
    assert deliverer(collector.url).wait_delivered(10)
    roots = [span for span in collector.spans if not span.parent_span_id]
    keys = [{item.key for item in root.attributes} for root in roots]
    assert ["mlflow.traceTag.late" in each for each in keys] == [False, True]


def test_a_late_span_is_sent_without_the_others_again(
    store: Store, collector: Collector, deliverer: MakeDeliverer
) -> None:
    """Collectors keep what they get: a span that was sent is not sent twice, as long as that is remembered."""
    row = fill(store, 1)[0]
    made = deliverer(collector.url)
    assert made.wait_delivered(10)
    store.write([], [span_row(row, 9, name="late")], outbox=True)
    assert made.wait_delivered(10)
    assert [span.name for span in collector.spans] == [row.name, "step 2", "late"]
    store.write([row], [], outbox=True)
    assert made.wait_delivered(10) and len(collector.spans) == 3


def test_a_trace_that_cannot_be_encoded_costs_itself(
    store: Store, collector: Collector, deliverer: MakeDeliverer
) -> None:
    """It is a dead letter like one that the back end refuses."""
    fill(store, 3)
    bad = trace_row(9)
    store.write([bad], [span_row(bad, 1, span_id="not hex")], outbox=True)
    assert not deliverer(collector.url).wait_delivered(10)
    assert len(collector.traces) == 3
    assert "cannot be encoded" in (store.outbox_dead()[0].reason or "")


def test_one_of_two_delivers(store: Store, collector: Collector, deliverer: MakeDeliverer) -> None:
    """The other one waits for its turn, its callers for what the first one delivers."""
    first, second = deliverer(collector.url), deliverer(collector.url)
    fill(store, 5)
    assert first.wait_delivered(10) and second.wait_delivered(10)
    assert [first.stats()["active"], second.stats()["active"]] == [True, False]
    fill(store, 5, start=5)
    assert second.wait_delivered(10)
    assert (first.stats()["delivered"], second.stats()["delivered"]) == (10, 0)
    first.close()
    fill(store, 5, start=10)
    assert second.wait_delivered(10) and second.stats()["active"]
    assert len(set(collector.traces)) == len(collector.traces) == 15


def test_unfinished_traces_are_not_waited_for(
    store: Store, collector: Collector, deliverer: MakeDeliverer
) -> None:
    """A stream that goes on is delivered when it has ended; flush is about what ended before the call."""
    open_one = trace_row(1, state="IN_PROGRESS", duration_ns=None)
    store.write([open_one], [span_row(open_one, 2)], outbox=True)
    made = deliverer(collector.url)
    assert made.wait_delivered(5) and collector.spans == []
    ended = trace_row(1)
    store.write([ended], [span_row(ended, 1)], outbox=True)
    assert made.wait_delivered(5) and len(collector.spans) == 2


def test_a_damaged_store_is_told_of_and_not_raised(
    store: Store, collector: Collector, deliverer: MakeDeliverer, caplog: pytest.LogCaptureFixture
) -> None:
    """The thread goes on, the caller gets False."""
    fill(store, 1)
    made = deliverer(collector.url)
    with sqlite3.connect(store.path or "") as connection:
        connection.execute("DROP TABLE outbox")
    connection.close()
    assert not made.wait_delivered(0.2)
    assert "outbox" in caplog.text or "outbox" in str(made.stats())


# The process of its own.


def test_a_store_left_behind_is_emptied(store: Store, collector: Collector) -> None:
    """`once` returns when nothing is left, with what it did."""
    fill(store, 400)
    done = run_deliverer(store.url, f"otlp+{collector.url}", once=True)
    assert done == delivery.Delivered(delivered=400, waiting=0, dead=0, problem=None)
    assert len(set(collector.traces)) == 400


def test_once_ends_at_its_deadline(store: Store, collector: Collector) -> None:
    """With nobody there it says what is wrong, and what still waits."""
    collector.off()
    fill(store, 7)
    began = time.monotonic()
    done = run_deliverer(store.url, f"otlp+{collector.url}", once=True, timeout=0.5)
    assert time.monotonic() - began < 3
    assert (done.delivered, done.waiting, done.dead) == (0, 7, 0)
    assert "nothing listens there" in (done.problem or "")


def test_a_sidecar_delivers_until_it_is_stopped(tmp_path: Path, collector: Collector) -> None:
    """It waits for the store to be there, and for its turn."""
    url = f"sqlite:///{tmp_path}/later.db"
    stop = threading.Event()
    results: list[Any] = []
    thread = threading.Thread(
        target=lambda: results.append(run_deliverer(url, f"otlp+{collector.url}", stop=stop))
    )
    thread.start()
    with open_store(url) as store:
        fill(store, 10)
        wait_for(lambda: len(collector.traces) == 10)
        fill(store, 10, start=10)
        wait_for(lambda: len(collector.traces) == 20)
    stop.set()
    thread.join(5)
    assert results[0].delivered == 20


def test_what_cannot_work_is_said_at_once(store: Store, tmp_path: Path, collector: Collector) -> None:
    """A wrong destination, a store that is not there."""
    with pytest.raises(SettingError):
        run_deliverer(store.url, "otlp+http://host?experiment=x", once=True)
    with pytest.raises(StoreError):
        run_deliverer(f"sqlite:///{tmp_path}/nothing.db", f"otlp+{collector.url}", once=True)


def test_a_missing_package_is_named(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names the extra to install."""
    monkeypatch.setitem(__import__("sys").modules, "opentelemetry.proto.collector.trace.v1", None)
    with pytest.raises(TracemwError, match=r"pip install 'tracemw\[otlp\]'"):
        run_deliverer(store.url, "otlp+http://127.0.0.1:1", once=True)
    made = Deliverer(lambda: store, "mlflow+http://127.0.0.1:1")
    fill(store, 1)
    assert not made.wait_delivered(0.3)
    assert "tracemw[otlp]" in made.stats()["problem"]
    made.close()


def test_a_destination_can_be_checked(collector: Collector) -> None:
    """No trace is sent; the answer says what is there, or what is wrong."""
    assert delivery.check(f"otlp+{collector.url}") == (True, f"an OTLP receiver at {collector.url}")
    assert collector.spans == []
    collector.judge = lambda request: Reply(403)
    ok, text = delivery.check(f"otlp+{collector.url}")
    assert not ok and text.startswith("spans: HTTP 403 (set who we are in ")
    collector.off()
    assert not delivery.check(f"otlp+{collector.url}")[0]


def test_falling_behind_is_told_with_what_to_do(store: Store) -> None:
    """Traces that are new do not count, nor those that are not finished or were refused before."""
    now = time.time_ns()
    store.write([trace_row(1, start_ns=now)], [], outbox=True)
    assert delivery.behind(store, "mlflow+http://host") is None
    store.write([trace_row(2, start_ns=now - 90 * 10**9)], [], outbox=True)
    text = delivery.behind(store, "mlflow+http://me:secret@host") or ""
    assert "2 traces wait, the oldest for 90 s" in text and "fidelity=fast" in text and "secret" not in text
    assert "fidelity=fast" not in (delivery.behind(store, "otlp+http://host") or "")
    store.write([trace_row(3, start_ns=now - 900 * 10**9, duration_ns=899 * 10**9)], [], outbox=True)
    text = delivery.behind(store, "otlp+http://host") or ""  # a long request waits since its end
    assert "3 traces wait, the oldest for 90 s" in text
    old = store.get(trace_row(2).trace_id)
    assert old is not None
    store.outbox_failed([(old.id, old.revision)], "no", now)
    assert delivery.behind(store, "mlflow+http://host") is None


# The sink that the writer has.


def test_the_sink_delivers_what_it_stores(tmp_path: Path, collector: Collector) -> None:
    """It starts delivery with the first write, and its numbers have delivery's, without passwords."""
    url = f"otlp+{collector.url}".replace("//", "//me:secret@")
    sink = StoreSink(f"sqlite:///{tmp_path}/x.db", url, Settings())
    row = trace_row(1)
    sink.write([row], [span_row(row, 1)])
    assert sink.wait_delivered(10)
    assert collector.traces == [row.trace_id]
    assert collector.seen[0].headers["Authorization"].startswith("Basic ")
    assert sink.stats()["delivery"]["delivered"] == 1
    assert "secret" not in json.dumps(sink.stats())
    sink.close()
    sink.write([trace_row(2)], [span_row(trace_row(2), 1)])
    assert sink.wait_delivered(10) and len(collector.traces) == 2
    sink.close()


def test_a_sink_without_a_remote_destination_delivers_nothing(tmp_path: Path) -> None:
    """Nothing is queued, and waiting for delivery is no wait."""
    sink = StoreSink(f"sqlite:///{tmp_path}/x.db", None, Settings())
    sink.write([trace_row(1)], [])
    assert sink.wait_delivered(0.0)
    assert sink.store.outbox_stats().waiting == 0 and "delivery" not in sink.stats()
    sink.close()


def test_where_no_file_can_be_written_memory_takes_its_place(
    collector: Collector, caplog: pytest.LogCaptureFixture
) -> None:
    """A container with a read-only disk delivers all the same, and says once what is different."""
    with caplog.at_level(logging.ERROR, "tracemw"):
        sink = StoreSink("sqlite:////proc/no/such/place.db", f"otlp+{collector.url}", Settings())
        sink.write([trace_row(1)], [span_row(trace_row(1), 1)])
        sink.write([trace_row(2)], [span_row(trace_row(2), 1)])
    assert sink.wait_delivered(10) and len(collector.traces) == 2
    assert caplog.text.count("kept in memory") == 1
    sink.close()
