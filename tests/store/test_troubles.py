"""Notes of what went wrong in the processes that share a file."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.store.rows import trace
from tracemw.store import open_store, troubles

PROCESS = """
import sys, os, tracemw
from tracemw import guard, pipeline
tracemw.configure(destination="sqlite:///" + sys.argv[1])
def span():
    with tracemw.start_span("x"):
        pass
    tracemw.flush()
span()
if sys.argv[2] != "well":
    guard.report("somewhere", ValueError("no"))
    pipeline.current()._drop(3, "the queue is full")
if sys.argv[2] == "fork" and os.fork() == 0:
    guard.report("in the child", ValueError("no"))
    span()
    tracemw.shutdown()
    os._exit(0)
if sys.argv[2] == "fork":
    os.wait()
"""


def run(path: Path, how: str) -> None:
    """Run a process that stores a span, and has the trouble asked for."""
    command = [sys.executable, "-c", PROCESS, str(path), how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_what_a_process_lost_is_known_to_others(tmp_path: Path) -> None:
    """A process leaves a note of dropped spans and of failures that it swallowed; one without any leaves none."""
    path = tmp_path / "store.db"
    run(path, "well")
    with open_store(f"sqlite:///{path}") as store:
        assert store.troubles() == []
        run(path, "bad")
        (found,) = store.troubles()
        assert found.counts == {"dropped_spans": 3, "failures": {"somewhere": 1}}
        assert abs(found.at_ns - time.time_ns()) < 60 * 10**9 and found.process.count("/") == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_tells_of_itself(tmp_path: Path) -> None:
    """The parent's losses are not the child's."""
    path = tmp_path / "store.db"
    run(path, "fork")
    with open_store(f"sqlite:///{path}") as store:
        counts = [found.counts for found in store.troubles()]
        assert {"failures": {"in the child": 1}} in counts
        assert {"dropped_spans": 3, "failures": {"somewhere": 1}} in counts and len(counts) == 2


def test_notes_are_replaced_bounded_and_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """One note per process, those of the newest, kept as long as traces; searching works as before."""
    monkeypatch.setattr(troubles, "KEPT", 3)
    with open_store("memory:") as store:
        store.write([trace(1)], [])
        for number in range(5):
            store.note_trouble(f"host/{number}/\ud800", {"dropped_spans": 1})
        store.note_trouble("host/4/\ud800", {"dropped_spans": 2})
        assert [found.process[:6] for found in store.troubles()] == ["host/4", "host/3", "host/2"]
        assert store.troubles()[0].counts == {"dropped_spans": 2}
        assert len(store.search("user = 'jane'").traces) == 1
        store.purge(max_age_s=3600)
        assert len(store.troubles()) == 3
        store.purge(max_age_s=0)
        assert store.troubles() == []
