"""Groups of traces: right counts and rates, and honest answers to whether they differ."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.filter_data import MS, make_trace
from tracemw.errors import FilterError
from tracemw.store import Store, TraceRow, open_store
from tracemw.store.compare import FEW_HITS, Group
from tracemw.store.statistics import holm, proportions_differ, quantile, values_differ, wilson

_numbers = itertools.count(1)


def traces(count: int, errors: int = 0, ms: int = 10, **facts: Any) -> list[TraceRow]:
    """Some traces that share facts, the first ones failed; they took about as long as each other."""
    chance = random.Random(f"{count} {errors} {facts}")
    return [
        make_trace(next(_numbers), **{
            "state": "ERROR" if n < errors else "OK", "duration_ns": ms * MS + chance.randrange(MS)
        } | facts)
        for n in range(count)
    ]  # fmt: skip


def version(value: str, **metadata: str) -> dict[str, str]:
    """The metadata of an application's version."""
    return {"app_version": value, **metadata}


@pytest.fixture
def store() -> Iterator[Store]:
    """An empty store."""
    with open_store("memory:") as opened:
        yield opened


def by_value(groups: list[Group]) -> dict[str | None, Group]:
    """Groups by their value."""
    return {group.value: group for group in groups}


def test_counts_and_rates(store: Store) -> None:
    """Groups have their counts and error rates; the largest comes first, traces without a value are a group."""
    store.write(traces(50, 5, metadata=version("1")) + traces(30, 0, metadata=version("2")) + traces(7), [])
    one, two, none = store.compare("version")
    assert (one.value, one.count, one.rated, one.errors, one.error_rate) == ("1", 50, 50, 5, 0.1)
    assert (two.value, two.count, two.errors, two.error_rate, two.error_rate_low) == ("2", 30, 0, 0.0, 0.0)
    assert (none.value, none.count) == (None, 7)
    assert one.error_rate_low == pytest.approx(0.0435, abs=1e-4)  # published values of Wilson's interval
    assert one.error_rate_high == pytest.approx(0.2136, abs=1e-4)
    assert one.significant is None and not one.is_baseline


def test_unrated_traces(store: Store) -> None:
    """Traces in progress, left or cancelled count, but not for the error rate."""
    store.write(
        traces(8, 2, method="GET")
        + traces(3, state="STATE_UNSPECIFIED", method="GET")
        + traces(1, state="IN_PROGRESS", duration_ns=None, method="GET")
        + traces(2, state="IN_PROGRESS", duration_ns=None, method="PUT"),
        [],
    )
    groups = by_value(store.compare("method", baseline="GET"))
    assert (groups["GET"].count, groups["GET"].rated, groups["GET"].error_rate) == (12, 8, 0.25)
    put = groups["PUT"]
    assert (put.count, put.rated, put.error_rate, put.error_rate_low, put.p50_ms) == (2, 0, None, None, None)
    assert (put.p_value, put.significant, put.latency_p_value, put.latency_significant) == (None, None, None, None)


def test_quantiles(store: Store) -> None:
    """Quantiles are those of NumPy and pandas."""
    store.write([make_trace(n, duration_ns=n * MS, name="x") for n in range(1, 101)], [])
    (group,) = store.compare("name")
    assert (group.p50_ms, group.p95_ms, group.p99_ms) == pytest.approx((50.5, 95.05, 99.01))


@pytest.mark.parametrize(
    ("by", "values"),
    [
        ("version", {"1", "2"}),
        ("app_version", {"1", "2"}),
        ("metadata.app_version", {"1", "2"}),
        ("metadata.`flag.new`", {"on", "off"}),
        ("flag.new", {"on", "off"}),
        ("feature-x", {"a", None}),
        ('say "x"', {"b", None}),
        ("tags.team", {"red", "blue"}),
        ("route", {"/a", "/b"}),
        ("user", {"jane", "joe"}),
        ("user_id", {"jane", "joe"}),
        ("trace.name", {"GET /a", "GET /b"}),
        ("status_code", {"200", "500"}),
        ("status", {"OK", "ERROR"}),
    ],
)
def test_group_by(store: Store, by: str, values: set[str | None]) -> None:
    """Groups are made by columns, tags and any key of the metadata, with or without prefix."""
    first: dict[str, Any] = {
        "tags": {"team": "red"},
        "route": "/a",
        "user_id": "jane",
        "name": "GET /a",
        "status_code": 200,
    }
    second: dict[str, Any] = {
        "tags": {"team": "blue"},
        "route": "/b",
        "user_id": "joe",
        "name": "GET /b",
        "status_code": 500,
    }
    store.write(
        traces(2, 0, metadata=version("1", **{"flag.new": "on", "feature-x": "a"}), **first)
        + traces(2, 2, metadata=version("2", **{"flag.new": "off", 'say "x"': "b"}), **second),
        [],
    )
    assert {group.value for group in store.compare(by)} == values


def test_filter(store: Store) -> None:
    """Only the traces of the filter are grouped, also where the token index does not lead to them."""
    store.write(
        traces(40, 4, metadata=version("1", flag="on")) + traces(60, metadata=version("1", flag="off")), []
    )
    (group,) = store.compare("version", "metadata.flag = 'on'")
    assert (group.count, group.errors) == (40, 4)
    store.write(traces(FEW_HITS, metadata=version("2", flag="on")), [])
    assert {g.value: g.count for g in store.compare("version", "metadata.flag = 'on'")} == {"1": 40, "2": FEW_HITS}
    assert store.compare("version", "metadata.flag = 'none'", baseline="1") == []


def test_baseline(store: Store) -> None:
    """Against the baseline, a rate that is clearly higher is significant and one that is hardly so is not."""
    store.write(
        traces(1000, 20, metadata=version("1.0.0"))
        + traces(2000, 44, metadata=version("1.1.0"))
        + traces(500, 60, metadata=version("2.0.0"), ms=30),
        [],
    )
    base, *others = store.compare("version", baseline="1.0.0")
    groups = by_value(others)
    assert base.value == "1.0.0" and base.is_baseline and base.p_value is None and base.significant is None
    assert groups["1.1.0"].error_rate_difference == pytest.approx(0.002)
    assert groups["1.1.0"].significant is False and groups["1.1.0"].latency_significant is False
    assert groups["2.0.0"].error_rate_difference == pytest.approx(0.1)
    assert groups["2.0.0"].significant is True and (groups["2.0.0"].p_value or 1) < 1e-6
    assert groups["2.0.0"].latency_significant is True
    assert groups["2.0.0"].p50_difference_ms == pytest.approx(20, abs=0.1)


def test_small_groups(store: Store) -> None:
    """Two errors of three against none of three are no difference yet; nine of ten against one of ten are."""
    store.write(traces(3, 2, method="A") + traces(3, 0, method="B"), [])
    assert by_value(store.compare("method", baseline="B"))["A"].significant is False
    store.write(traces(10, 9, method="C") + traces(10, 1, method="D"), [])
    found = by_value(store.compare("method", "method IN ('C', 'D')", baseline="D"))["C"]
    assert found.significant is True and found.p_value == pytest.approx(0.001093, abs=1e-6)  # Fisher's exact test


def test_longer_tail(store: Store) -> None:
    """A tail that is longer is found though the median is the same."""
    slow = traces(60, ms=500, method="B")
    store.write(traces(1000, method="A") + traces(940, method="B") + slow, [])
    group = by_value(store.compare("method", baseline="A"))["B"]
    assert group.latency_significant is True
    assert abs(group.p50_difference_ms or 0) < 0.1 and (group.p95_difference_ms or 0) > 100


def test_many_groups_find_nothing_in_noise(store: Store) -> None:
    """Fifty users with the same error rate and latency: none is significant."""
    chance = random.Random(7)
    rows = [
        make_trace(
            n,
            user_id=f"u{n % 50}",
            state="ERROR" if chance.random() < 0.1 else "OK",
            duration_ns=int(chance.lognormvariate(17, 1)),
        )
        for n in range(1, 5001)
    ]
    store.write(rows, [])
    groups = store.compare("user", baseline="u0")
    assert not any(group.significant or group.latency_significant for group in groups)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("version", None, "9"), "no trace has version = '9'; there is '1', '2'"),
        (("app_versoin",), "no trace has the metadata 'app_versoin'; did you mean 'app_version'?"),
        (("regoin",), "did you mean 'region'?"),
        (("flga",), "did you mean 'flag'?"),
        (("tags.x",), "no trace has the tag 'x'"),
        (("tags.\udcff",), "no stored text contains this character"),
        (("\udcff",), "no stored text contains this character"),
        (("a\x00b",), "no stored text contains this character"),
        (("trace.foo",), "unknown field 'foo'"),
        (("timestamp",), "traces cannot be grouped by this field"),
        (("span.name",), "traces cannot be grouped by this field"),
        (("request_preview",), "traces cannot be grouped by this field"),
        (("",), "say what to group by"),
        (("region", None, "x"), "no trace has a value"),
        (("version", "stauts = 'OK'"), "did you mean 'status'?"),
    ],
)
def test_errors(store: Store, arguments: Any, message: str) -> None:
    """What is wrong is told with what there is instead."""
    store.write(traces(3, metadata=version("1", flag="on")) + traces(2, metadata=version("2")), [])
    if arguments == ("region", None, "x"):
        store.write(traces(1, metadata={"region": "eu"}, method="POST"), [])
        arguments = ("region", "method IS NULL", "x")
    with pytest.raises(FilterError) as caught:
        store.compare(*arguments)
    assert message in str(caught.value)


@pytest.mark.parametrize("by", ["app_version", "version", "metadata.app_version", "region"])
def test_a_key_that_is_right_but_nowhere(store: Store, by: str) -> None:
    """Where traces have no version, the version is no typo: nothing is suggested in its place."""
    store.write(traces(3), [])
    with pytest.raises(FilterError) as caught:
        store.compare(by)
    assert str(caught.value) == f"no trace has the metadata '{by}'"


def test_empty_store(store: Store) -> None:
    """Of no traces there are no groups, whatever is asked."""
    assert store.compare("version", baseline="1") == []
    assert store.compare("no-such-key") == []


# The statistics.


@given(st.integers(0, 200), st.integers(1, 200))
def test_wilson_holds_the_rate(part: int, total: int) -> None:
    """The interval lies within 0 and 1 and holds the rate; more cases make it narrower."""
    part = min(part, total)
    low, high = wilson(part, total)
    assert 0 <= low <= part / total <= high <= 1
    low10, high10 = wilson(part * 10, total * 10)
    assert high10 - low10 < high - low


@given(st.integers(0, 12), st.integers(1, 12), st.integers(0, 12), st.integers(1, 12))
def test_fisher_counts_tables(part1: int, total1: int, part2: int, total2: int) -> None:
    """For few cases the p-value is the share of all arrangements that are no more likely than the one seen."""
    part1, part2 = min(part1, total1), min(part2, total2)
    part, ways = part1 + part2, math.comb(total1 + total2, part1 + part2)
    tables = [math.comb(total1, k) * math.comb(total2, part - k) for k in range(part + 1)]
    seen = math.comb(total1, part1) * math.comb(total2, part2)
    exact = sum(n for n in tables if n <= seen) / ways
    expected = min(total1, total2) * min(part, total1 + total2 - part) / (total1 + total2)
    if expected < 10:
        assert proportions_differ(part1, total1, part2, total2) == pytest.approx(exact, abs=1e-9)


def test_two_proportions() -> None:
    """For many cases it is the test for two proportions: published example, 10 of 100 against 30 of 100."""
    assert proportions_differ(10, 100, 30, 100) == pytest.approx(0.000407, abs=1e-6)
    assert proportions_differ(0, 100, 0, 100) == 1.0
    assert proportions_differ(100, 100, 100, 100) == 1.0


@given(st.lists(st.integers(0, 100), min_size=1, max_size=6, unique=True), st.integers(1, 5))
def test_rank_sum_counts_orders(values: list[int], split: int) -> None:
    """For few values the p-value is the share of all ways to split them that are as far from the middle."""
    split = min(split, len(values) - 1)
    if split < 1:
        return
    first, second = sorted(values[:split]), sorted(values[split:])

    def distance(chosen: Sequence[int]) -> float:
        rest = [value for value in values if value not in chosen]
        return abs(sum(a < b for a in chosen for b in rest) - len(chosen) * len(rest) / 2)

    splits = [distance(chosen) for chosen in itertools.combinations(values, split)]
    exact = sum(d >= distance(first) for d in splits) / len(splits)
    assert values_differ(first, second) <= min(1.0, 2 * exact) + 1e-9
    if values_differ(first, second) < 1:
        tail = values_differ(first, second) / 2
        assert tail == pytest.approx(exact) or tail < exact


@given(st.lists(st.integers(0, 5), min_size=1, max_size=40), st.lists(st.integers(0, 5), min_size=1, max_size=40))
def test_samples_with_ties(first: list[int], second: list[int]) -> None:
    """A p-value is one, in either direction, and equal samples do not differ."""
    p = values_differ(sorted(first), sorted(second))
    assert 0 <= p <= 1
    assert p == pytest.approx(values_differ(sorted(second), sorted(first)))
    assert values_differ(sorted(first), sorted(first)) == pytest.approx(1.0)


def test_false_alarms_are_rare() -> None:
    """Of samples from one distribution, about one in twenty at most is called different."""
    chance = random.Random(3)
    for size1, size2 in ((5, 5), (8, 40), (100, 300)):
        alarms = 0
        for _ in range(400):
            first, second = (sorted(int(chance.lognormvariate(10, 1)) for _ in range(n)) for n in (size1, size2))
            alarms += values_differ(first, second) < 0.05
        assert alarms <= 400 * 0.075


def test_holm() -> None:
    """Holm's method: the smallest p-value against level/n, the next one against level/(n-1) ..."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == [True, False, False, True]
    assert holm([0.04]) == [True]
    assert holm([None, 0.001, None]) == [None, True, None]
    assert holm([]) == []


def test_quantile_of_one() -> None:
    """One value is each of its quantiles."""
    assert [quantile([7], share) for share in (0.0, 0.5, 0.99, 1.0)] == [7, 7, 7, 7]
