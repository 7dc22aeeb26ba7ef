"""The statistics of `compare`: rates with their uncertainty, quantiles, and tests whether two groups differ."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Sequence
from itertools import repeat

_Z95 = 1.959963984540054
_FEW = 10  # below so many expected cases the normal approximation of a proportion is poor
_SMALL = 8  # below so many values the normal approximation of a rank sum is poor
_EXACT_PAIRS = 400


def wilson(part: int, total: int) -> tuple[float, float]:
    """Return the 95 % interval of a proportion after Wilson: sound for few cases and for rates near 0 and 1."""
    rate, z2 = part / total, _Z95 * _Z95
    centre = rate + z2 / (2 * total)
    spread = _Z95 * math.sqrt(rate * (1 - rate) / total + z2 / (4 * total * total))
    scale = 1 + z2 / total
    low = 0.0 if part == 0 else (centre - spread) / scale
    return low, 1.0 if part == total else (centre + spread) / scale


def proportions_differ(part1: int, total1: int, part2: int, total2: int) -> float:
    """Return the two-sided p-value that two proportions are the same: Fisher's exact test where cases are few."""
    part, total = part1 + part2, total1 + total2
    if part in (0, total):
        return 1.0
    if min(total1, total2) * min(part, total - part) / total < _FEW:
        return _fisher(part1, total1, part2, total2)
    pooled = part / total
    error = math.sqrt(pooled * (1 - pooled) * (1 / total1 + 1 / total2))
    return _two_sided((part1 / total1 - part2 / total2) / error)


def _fisher(part1: int, total1: int, part2: int, total2: int) -> float:
    part, total = part1 + part2, total1 + total2
    whole = _log_choose(total, part)

    def log_chance(of_first: int) -> float:
        return _log_choose(total1, of_first) + _log_choose(total2, part - of_first) - whole

    observed = log_chance(part1) + 1e-7  # equally likely tables count, whatever the last digit
    tables = range(max(0, part - total2), min(part, total1) + 1)
    return min(1.0, math.fsum(math.exp(chance) for chance in map(log_chance, tables) if chance <= observed))


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def quantile(ordered: Sequence[int], share: float) -> float:
    """Return a quantile of values in order, interpolated between neighbours (as NumPy and pandas do)."""
    last = len(ordered) - 1
    position = last * share
    below = int(position)
    low = ordered[below]
    return low if below == last else low + (ordered[below + 1] - low) * (position - below)


def values_differ(first: Sequence[int], second: Sequence[int]) -> float:
    """Return the two-sided p-value that two samples, each in order, come from the same distribution.

    Two tests, since slowness has two shapes: Mann and Whitney's for values that are higher as a whole, and one for
    a longer tail, whether the highest twentieth of all belongs to one sample more than its size explains. The
    smaller p-value is doubled, as two tests have two chances.
    """
    limit = quantile(sorted([*first, *second]), 0.95)
    tail = proportions_differ(
        len(first) - bisect_right(first, limit), len(first), len(second) - bisect_right(second, limit), len(second)
    )
    return min(1.0, 2 * min(_mann_whitney(first, second), tail))


def _mann_whitney(first: Sequence[int], second: Sequence[int]) -> float:
    n1, n2 = len(first), len(second)
    total, pairs = n1 + n2, n1 * n2
    doubled = sum(map(bisect_left, repeat(first), second)) + sum(map(bisect_right, repeat(first), second))
    distinct = len({*first, *second}) == total
    if distinct and min(n1, n2) < _SMALL and pairs <= _EXACT_PAIRS:
        return _exact_rank_sum(n1, n2, doubled // 2)
    ties = 0 if distinct else sum(n**3 - n for n in Counter([*first, *second]).values())
    variance = pairs / 12 * (total + 1 - ties / (total * (total - 1)))
    if variance <= 0:
        return 1.0
    distance = max(0.0, abs(doubled / 2 - pairs / 2) - 0.5)
    return _two_sided(distance / math.sqrt(variance))


def _exact_rank_sum(n1: int, n2: int, statistic: int) -> float:
    """Count the orders of the two samples whose statistic is as far from the middle as this one."""
    ways = [1] + [0] * (n1 * n2)
    for step in range(1, n1 + 1):  # the Gaussian binomial coefficient, factor by factor
        for power in range(n1 * n2, n2 + step - 1, -1):
            ways[power] -= ways[power - n2 - step]
        for power in range(step, n1 * n2 + 1):
            ways[power] += ways[power - step]
    lower = min(statistic, n1 * n2 - statistic)
    return min(1.0, 2 * sum(ways[: lower + 1]) / sum(ways))


def _two_sided(z: float) -> float:
    return math.erfc(abs(z) / math.sqrt(2))


def holm(p_values: Sequence[float | None], level: float = 0.05) -> list[bool | None]:
    """Tell which of several tests are significant together, after Holm: many groups find no more by chance.

    Args:
        p_values: None where there was no test; the answer is None, too.
    """
    ranked = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    found: list[bool | None] = [None if p is None else False for p in p_values]
    for rank, (p, index) in enumerate(ranked):
        if p > level / (len(ranked) - rank):
            break
        found[index] = True
    return found
