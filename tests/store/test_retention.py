"""What is removed when, and that the file gets smaller."""

from __future__ import annotations

import os
import threading
import time

import pytest

from tests.store.rows import MS, START, span, trace, trace_id, words_are
from tracemw.store import Store, open_store, retention, tokens

SECOND = 1_000_000_000
BIG = '{"a": "%s"}' % ("x" * 1500)


def fill(store: Store, count: int, *, first: int = 0, outbox: bool = False) -> None:
    """Write traces of about 5 kB, a second apart."""
    for begin in range(first, first + count, 200):
        numbers = range(begin, min(begin + 200, first + count))
        store.write(
            [trace(n, start_ns=START + n * SECOND) for n in numbers],
            [span(n, k, attributes=BIG) for n in numbers for k in range(3)],
            outbox=outbox,
        )


def left(store: Store) -> list[int]:
    """Return the numbers of the traces that are left, oldest first."""
    return [int(id, 16) for (id,) in store.read("SELECT trace_id FROM traces ORDER BY start_key")]


def whole(store: Store) -> bool:
    """True where no span, queue entry or word outlived its trace."""
    traces, spans = store.read("SELECT (SELECT count(*) FROM traces), (SELECT count(*) FROM spans)")[0]
    orphans = store.read("SELECT count(*) FROM outbox WHERE trace NOT IN (SELECT id FROM traces)")[0][0]
    return bool(words_are(store, traces) and spans == 3 * traces and not orphans)


def test_old_traces_go() -> None:
    """Traces that started longer ago than allowed are removed, and counted."""
    with open_store("sqlite:///store.db") as store:
        fill(store, 1300)
        age = (time.time_ns() - START) / SECOND - 899.5
        assert store.purge(max_age_s=age) == 900
        assert left(store) == list(range(900, 1300))
        assert whole(store)
        assert store.stats()["purged"] == 900
        assert store.purge(max_age_s=age) == 0


def test_the_oldest_go_until_the_size_is_right() -> None:
    """Above the size, the oldest go, not many more than needed; the file itself gets smaller."""
    with open_store("sqlite:///store.db") as store:
        fill(store, 2000)
        before = store.stats()["size_bytes"]
        removed = store.purge(max_size_bytes=before // 2)
        after = store.stats()["size_bytes"]
        assert 0.4 * before < after <= before // 2
        assert left(store) == list(range(removed, 2000))
        assert whole(store)
    assert os.path.getsize("store.db") < 0.7 * before


def test_within_the_limits_nothing_goes() -> None:
    """A purge without need removes nothing."""
    with open_store("sqlite:///store.db") as store:
        fill(store, 10)
        assert store.purge(max_age_s=10**10, max_size_bytes=10**9) == 0
        assert store.purge() == 0
        assert len(left(store)) == 10


def test_everything_goes_if_it_must() -> None:
    """A limit below an empty file's size ends too."""
    with open_store("sqlite:///store.db") as store:
        fill(store, 30)
        assert store.purge(max_size_bytes=1) == 30


def test_what_waits_for_delivery_goes_last() -> None:
    """Undelivered traces, older or not, are kept as long as removing others is enough."""
    with open_store("sqlite:///store.db") as store:
        fill(store, 400, outbox=True)
        fill(store, 1600, first=400)
        store.purge(max_size_bytes=store.stats()["size_bytes"] // 2)
        assert left(store)[:400] == list(range(400))
        assert store.stats()["purged_undelivered"] == 0
        purged = store.stats()["purged"]
        store.purge(max_size_bytes=store.stats()["size_bytes"] // 8)
        counts = store.stats()
        assert counts["purged"] == 1600 and purged < 1600
        assert 0 < counts["purged_undelivered"] == 400 - len(left(store)) == 400 - counts["waiting"]
        assert whole(store)


def test_age_takes_the_undelivered_too() -> None:
    """Beyond the allowed age nothing is kept, delivered or not; both are counted."""
    with open_store("sqlite:///store.db") as store:
        fill(store, 20, outbox=True)
        fill(store, 20, first=20)
        assert store.purge(max_age_s=1) == 40
        counts = store.stats()
        assert (counts["purged"], counts["purged_undelivered"], counts["waiting"]) == (20, 20, 0)


def test_one_huge_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trace of more spans than a chunk has is removed too, by itself."""
    monkeypatch.setattr(retention, "CHUNK_SPANS", 50)
    with open_store("sqlite:///store.db") as store:
        store.write([trace(1), trace(2)], [span(1, n) for n in range(300)] + [span(2, n) for n in range(30)])
        assert store.purge(max_age_s=1) == 2
        assert store.stats()["spans"] == 0


def test_writers_do_not_wait_long() -> None:
    """While thousands of traces are purged, another connection's writes stay short."""
    with open_store("sqlite:///store.db") as store, open_store("sqlite:///store.db") as other:
        fill(store, 4000)
        purge = threading.Thread(target=lambda: store.purge(max_age_s=1))
        purge.start()
        longest, number = 0.0, 10_000
        while purge.is_alive():
            began = time.perf_counter()
            other.write([trace(number, start_ns=time.time_ns())], [span(number, k) for k in range(3)])
            longest, number = max(longest, time.perf_counter() - began), number + 1
            time.sleep(0.002)
        purge.join()
        assert longest < 1.0
        assert len(left(store)) == number - 10_000
        assert whole(store)


def test_purged_traces_are_gone_for_search() -> None:
    """Neither the index by time nor the one by words finds what was removed."""
    with open_store("memory:") as store:
        store.write([trace(n, start_ns=START + n * MS) for n in range(100)], [])
        store.purge(max_age_s=(time.time_ns() - START - 50 * MS) / SECOND)
        found = {t.row.trace_id for t in store.search("user = 'jane'").traces}
        assert found == {t.row.trace_id for t in store.search().traces}
        assert trace_id(10) not in found and trace_id(99) in found


@pytest.mark.skipif(not tokens.supported(), reason="needs FTS5")
def test_the_token_index_does_not_grow() -> None:
    """Words of removed traces do not pile up in the index, however many traces come and go."""
    sizes = []
    with open_store("memory:") as store:
        for turn in range(8):
            fill(store, 500, first=turn * 500)
            store.purge(max_age_s=(time.time_ns() - START) / SECOND - turn * 500 + 0.2)
            sizes.append(store.read("SELECT sum(length(block)) FROM tokens_data")[0][0])
        assert len(left(store)) == 500
        assert whole(store)
    assert max(sizes[2:]) < 1.5 * sizes[1]


@pytest.mark.parametrize("url", ["memory:", "sqlite:///store.db"])
def test_an_empty_store_is_purged(url: str) -> None:
    """There is nothing to do, and it is not done for ever."""
    with open_store(url) as store:
        assert store.purge(1, 1) == 0
