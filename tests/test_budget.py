"""A change that adds work to the way of every request shows up here, not in somebody's production."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys

import pytest

from tests import budget
from tests.servers import ROOT
from tracemw.identity import check_id

AFTERWARDS = (
    "Is it worth that? Then `python -m tests.budget --record`, and commit tests/budget.json with the change; "
    "`python -m tests.budget --places` shows every function."
)


@functools.cache
def counts() -> budget.Counts:
    """What a process of its own has counted: without coverage's tracer, and with no settings but its own."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("COV", "TRACEMW", "OTEL"))}
    done = subprocess.run(
        [sys.executable, "-m", "tests.budget", "--json"],
        cwd=ROOT, env=kept, capture_output=True, text=True, check=True,
    )  # fmt: skip
    found: budget.Counts = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("name", budget.SCENARIOS)
def test_no_more_work_than_the_budget_allows(name: str) -> None:
    """A scenario makes no more calls and runs no more lines of ours than its budget says; nor far fewer."""
    found, stored = counts()[name], budget.budget()
    assert name in stored, f"no budget for {name!r} yet: python -m tests.budget --record"
    allowed = stored[name]
    modules = sorted(found["modules"].keys() | allowed["modules"].keys())
    changed = {
        module: f"{allowed['modules'].get(module, 0)} -> {found['modules'].get(module, 0)} calls"
        for module in modules
        if allowed["modules"].get(module, 0) != found["modules"].get(module, 0)
    }
    for what, limits in budget.limits(name, allowed).items():
        told = f"{name}: {found[what]} {what} of ours, budget {allowed[what]}. By module: {changed}. "
        assert found[what] < limits.stop, told + AFTERWARDS
        assert found[what] >= limits.start, f"{told}Well done; keep it: python -m tests.budget --record"


def test_what_is_counted() -> None:
    """Calls of our functions, and those that these make of others; nothing of the application's own."""
    assert budget.calls_of(lambda: sorted(len(name) for name in ("a", "b"))).total() == 0
    calls = budget.calls_of(lambda: check_id("user_id", "jane"))
    assert calls["identity.check_id"] == calls["identity._checked_person"] == 1
    assert calls["identity.check_id calls others"] >= 1
    assert budget.lines_of(lambda: check_id("user_id", "jane"))["identity.check_id"] >= 5


def test_added_work_is_seen() -> None:
    """One more call of ours is one more in the count; the same code counts the same each time."""

    def once() -> None:
        check_id("user_id", "jane")

    def twice() -> None:
        once()
        once()

    assert budget.calls_of(once) == budget.calls_of(once)
    assert budget.calls_of(twice).total() == 2 * budget.calls_of(once).total()
    assert budget.lines_of(twice).total() == 2 * budget.lines_of(once).total()
