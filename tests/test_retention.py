"""Retention: a process that writes keeps its store within the limits, without anybody asking."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

import tracemw
from tests.servers import wait_for
from tracemw.pipeline import retention


def names() -> list[str]:
    """Names of all stored traces."""
    return sorted(trace.data.spans[0].name for trace in tracemw.search_traces())


def test_old_traces_go_by_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traces older than `max_age` seconds are removed while others are written."""
    monkeypatch.setattr(retention, "INTERVAL", 0.0)
    tracemw.configure(destination=f"sqlite:///{tmp_path}/t.db", max_age=0.5)
    try:
        with tracemw.start_span("old"):
            pass
        assert tracemw.flush()
        assert names() == ["old"]

        def only_new_ones() -> bool:
            with tracemw.start_span("new"):
                pass
            return "old" not in names()

        wait_for(only_new_ones)
    finally:
        tracemw.configure(destination="none:")


def test_a_process_that_ends_after_its_first_trace(tmp_path: Path) -> None:
    """It ends at once: where the interpreter starts no threads any more, there is no removal either."""
    script = f"""
import tracemw
tracemw.configure(destination="sqlite:///{tmp_path}/t.db")
with tracemw.start_span("x"):
    pass
"""
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert time.monotonic() - started < 4.5
