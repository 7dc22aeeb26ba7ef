"""Batches: one bad trace costs only itself, and a back end that refuses everything is not hammered."""

from __future__ import annotations

import math
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.delivery.rows import trace_row
from tracemw.pipeline.batches import LONGEST_PAUSE, MAX_TRACES, PATIENCE, Batches, Encoded, pause
from tracemw.pipeline.transport import Refused, Unavailable
from tracemw.store import StoredTrace


class Judge:
    """A back end that refuses a body with a bad trace in it; traces are one byte each."""

    def __init__(self, bad: Iterable[int] = (), limit: int = 10**9) -> None:
        self.bad = set(bad)
        self.limit = limit
        self.bodies: list[bytes] = []
        self.taken: list[int] = []

    def post(self, body: bytes) -> None:
        self.bodies.append(body)
        if len(body) > self.limit:
            raise Refused("too much", final=True, too_large=True)
        if self.bad & set(body):
            raise Refused("bad", final=True)
        self.taken += list(body)


def items(count: int) -> list[Encoded]:
    """Traces 0 to count - 1, each encoded as its number."""
    return [Encoded(StoredTrace(trace_row(n), [], n, 1), bytes([n])) for n in range(count)]


def send(judge: Judge, count: int, suspects: Iterable[int] = ()) -> tuple[list[int], list[int]]:
    """Send traces; return the numbers of those taken and of those refused."""
    taken: list[int] = []
    refused: list[int] = []
    for batch, refusal in Batches(judge.post).send(items(count), set(suspects)):
        (taken if refusal is None else refused).extend(item.trace.id for item in batch)
    return taken, refused


@given(st.integers(1, 200), st.sets(st.integers(0, 199), max_size=6))
def test_each_bad_trace_is_refused_alone(count: int, bad: set[int]) -> None:
    """All others are taken, each once, and the requests it takes grow with the logarithm of the batch."""
    judge = Judge(bad)
    taken, refused = send(judge, count)
    bad = {number for number in bad if number < count}
    assert sorted(taken) == sorted(judge.taken) == sorted(set(range(count)) - bad)
    assert sorted(refused) == sorted(bad)
    assert len(judge.bodies) <= 1 + len(bad) * 2 * math.ceil(math.log2(count) if count > 1 else 1)


def test_a_back_end_that_refuses_everything_is_asked_a_few_times() -> None:
    """Then it is the one at fault: what has no result yet waits."""
    judge = Judge(range(200))
    with pytest.raises(Unavailable, match="everything is refused"):
        send(judge, 200)
    assert len(judge.bodies) == PATIENCE + 1


def test_suspects_go_alone() -> None:
    """A trace that was refused before cannot take others down with it."""
    judge = Judge({3})
    taken, refused = send(judge, 10, suspects={3, 4})
    assert (sorted(taken), refused) == ([0, 1, 2, 4, 5, 6, 7, 8, 9], [3])
    assert sorted(map(len, judge.bodies)) == [1, 1, 8]


def test_a_batch_has_a_limit_of_traces() -> None:
    """No request has more than so many traces."""
    one = Encoded(StoredTrace(trace_row(1), [], 1, 1), b"x")
    judge = Judge()
    for _ in Batches(judge.post).send([one] * (2 * MAX_TRACES + 1), ()):
        pass
    assert list(map(len, judge.bodies)) == [MAX_TRACES, MAX_TRACES, 1]


def test_a_back_end_that_takes_less_at_once_gets_less() -> None:
    """After "too large", what is sent stays below half of what was refused."""
    size = 70 << 10
    judge = Judge(limit=100 << 10)
    batches = Batches(judge.post)
    heavy = [Encoded(StoredTrace(trace_row(n), [], n, 1), bytes([n]) * size) for n in range(4)]
    for round in range(2):
        judge.bodies.clear()
        assert all(refusal is None for _, refusal in batches.send(heavy, ()))
        assert len(judge.bodies) == (7 if round == 0 else 4)


@given(st.integers(0, 1000))
def test_pauses_grow_to_a_limit(failures: int) -> None:
    """They double up to a minute, and at most half of one is taken off at random."""
    full = min(LONGEST_PAUSE, 0.5 * 2.0 ** min(failures, 20))
    assert full / 2 <= pause(failures) <= full
