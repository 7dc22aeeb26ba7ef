"""What waits for delivery, and who may deliver it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.store.rows import START, span, trace, trace_id
from tracemw.store import OutboxStats, Store, StoredTrace, open_store


@pytest.fixture
def store() -> Iterator[Store]:
    """A store with three traces to be delivered and one that is not."""
    with open_store("sqlite:///store.db") as store:
        store.write([trace(n) for n in (1, 2, 3)], [span(n, k) for n in (1, 2, 3) for k in (0, 1)], outbox=True)
        store.write([trace(4)], [])
        yield store


def names(traces: list[StoredTrace]) -> list[int]:
    """Return the numbers of traces."""
    return [int(t.row.trace_id, 16) for t in traces]


def marks(traces: list[StoredTrace]) -> list[tuple[int, int]]:
    """Return what `outbox_done` and `outbox_failed` take."""
    return [(t.id, t.revision) for t in traces]


def test_claim_and_done(store: Store) -> None:
    """What was written for delivery is claimed whole, in order, until it is done; claiming changes nothing."""
    first = store.outbox_claim(limit=2)
    assert names(first) == [1, 2] and [len(t.spans) for t in first] == [2, 2]
    assert first == store.outbox_claim(limit=2)
    assert store.outbox_done(marks(first)) == 2
    assert names(store.outbox_claim()) == [3]
    assert store.outbox_stats() == OutboxStats(waiting=1, dead=0, oldest_ns=trace(3).start_ns)


def test_batches_are_bounded_by_spans(store: Store) -> None:
    """A claim stops before it has too many spans, but always has one trace."""
    assert names(store.outbox_claim(max_spans=5)) == [1, 2]
    assert names(store.outbox_claim(max_spans=1)) == [1]


def test_what_changes_during_delivery_is_delivered_again(store: Store) -> None:
    """A late span, a patch or a rewritten trace makes the delivered revision an old one."""
    claimed = store.outbox_claim()
    store.write([], [span(1, 9)], outbox=True)
    store.patch(trace_id(2), tags={"a": "b"})
    assert store.outbox_done(marks(claimed)) == 1
    assert names(store.outbox_claim()) == [1, 2]


def test_what_changes_after_delivery_is_delivered_again(store: Store) -> None:
    """A delivered trace comes back when a change of it is to be delivered."""
    store.outbox_done(marks(store.outbox_claim()))
    store.patch(trace_id(1), tags={"a": "b"})
    assert store.outbox_claim() == []
    store.patch(trace_id(2), tags={"a": "b"}, outbox=True)
    store.write([], [span(3, 9)], outbox=True)
    assert names(store.outbox_claim()) == [2, 3]


def test_failed_traces_wait(store: Store) -> None:
    """A failed trace is due again at its time, also if it changes meanwhile."""
    now = time.time_ns()
    store.outbox_failed(marks(store.outbox_claim(limit=2)), "no route", now + 10**10)
    store.write([], [span(1, 9)], outbox=True)
    assert names(store.outbox_claim(now_ns=now)) == [3]
    assert names(store.outbox_claim(now_ns=now + 10**10)) == [1, 2, 3]
    assert store.outbox_stats().waiting == 3


def test_dead_letters(store: Store) -> None:
    """A trace that was given up is listed with the reason, is not claimed, and can be tried again."""
    claimed = store.outbox_claim()
    store.outbox_failed(marks(claimed[:2]), "no route", 0)
    store.outbox_failed(marks(claimed[:2]), "refused", 0, dead=True)
    assert names(store.outbox_claim()) == [3]
    letters = store.outbox_dead()
    assert [(d.trace_id, d.name, d.start_ns, d.attempts, d.reason) for d in letters] == [
        (trace_id(n), trace(n).name, trace(n).start_ns, 2, "refused") for n in (1, 2)
    ]
    assert store.outbox_stats() == OutboxStats(waiting=1, dead=2, oldest_ns=trace(3).start_ns)
    assert store.outbox_redeliver([trace_id(2), trace_id(3)]) == 1
    assert names(store.outbox_claim()) == [2, 3]
    assert store.outbox_redeliver() == 1
    assert store.outbox_dead() == []


def test_a_changed_trace_is_not_given_up(store: Store) -> None:
    """What was refused is the old revision; the new one may be accepted."""
    claimed = store.outbox_claim(limit=2)
    store.patch(trace_id(1), tags={"a": "b"})
    store.outbox_failed(marks(claimed), "refused", 0, dead=True)
    assert names(store.outbox_claim()) == [1, 3]
    store.patch(trace_id(2), tags={"a": "b"}, outbox=True)
    assert names(store.outbox_claim()) == [1, 2, 3]


def test_unfinished_traces_are_delivered_later() -> None:
    """A trace in progress waits for its end; one whose process was killed is delivered as it is in the end."""
    with open_store("memory:") as store:
        store.write([trace(1, state="IN_PROGRESS", duration_ns=None)], [], outbox=True)
        store.write([], [span(2, 1)], outbox=True)
        assert store.outbox_claim() == []
        assert names(store.outbox_claim(now_ns=time.time_ns() + 3600 * 10**9)) == [1, 2]
        store.write([trace(1)], [], outbox=True)
        assert names(store.outbox_claim()) == [1]


def test_deleted_traces_are_not_delivered(store: Store) -> None:
    """The outbox forgets with the store."""
    store.delete(trace_ids=[trace_id(2)])
    assert names(store.outbox_claim()) == [1, 3]


def test_a_lease_has_one_owner(store: Store) -> None:
    """A lease is refused to others until it is given back or runs out; its owner may renew it."""
    assert store.lease("delivery", "a", 60)
    assert not store.lease("delivery", "b", 60)
    assert store.lease("other", "b", 60)
    store.release("delivery", "b")
    assert store.lease("delivery", "a", 0.02)
    assert not store.lease("delivery", "b", 60)
    time.sleep(0.03)
    assert store.lease("delivery", "b", 60)
    assert not store.lease("delivery", "a", 60)
    store.release("delivery", "b")
    assert store.lease("delivery", "a", 60)


def test_many_ask_for_a_lease(store: Store) -> None:
    """Of many that ask at once, one gets it."""
    got: list[bool] = []

    def ask(number: int) -> None:
        got.append(store.lease("delivery", f"owner {number}", 60))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == [False] * 15 + [True]


def test_the_oldest_that_waits(store: Store) -> None:
    """The oldest is the one that started first, not the one that came first."""
    store.write([replace(trace(9), start_ns=START - 5)], [], outbox=True)
    assert store.outbox_stats().oldest_ns == START - 5
