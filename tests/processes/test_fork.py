"""A process forked while traces are open or queued: the parent's stay the parent's, the child's are stored too."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tracemw.store import open_store

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

MULTIPROCESSING = """
import multiprocessing, sys
import tracemw

@tracemw.trace
def work(name):
    return name

def child(number):
    for i in range(30):
        work(f"child {number} {i}")

if __name__ == "__main__":
    tracemw.configure(destination=sys.argv[1])
    for i in range(30):
        work(f"before {i}")
    context = multiprocessing.get_context(sys.argv[2])
    children = [context.Process(target=child, args=(n,)) for n in range(3)]
    for c in children: c.start()
    for c in children: c.join(20)
    assert [c.exitcode for c in children] == [0, 0, 0], [c.exitcode for c in children]
    for i in range(30):
        work(f"after {i}")
"""

RAW_FORK = """
import os, sys
import tracemw

tracemw.configure(destination=sys.argv[1])
with tracemw.start_span("parent"):
    pid = os.fork()
    if pid == 0:
        with tracemw.start_span("in the child"):
            pass
        os._exit(0 if tracemw.flush(10) else 1)
    _, status = os.waitpid(pid, 0)
    assert status == 0
"""

SIGTERM = """
import os, signal, sys, time
import tracemw

tracemw.configure(destination=sys.argv[1])
for i in range(30):
    with tracemw.start_span(f"span {i}"):
        pass
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(20)
"""


def run(tmp_path: Path, code: str, *arguments: str, returncode: int = 0) -> list[tuple[str, int]]:
    """Run a script; returns name and number of spans of each trace that it stored."""
    script, path = tmp_path / "script.py", tmp_path / "t.db"
    script.write_text(code)
    command = [sys.executable, str(script), f"sqlite:///{path}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == returncode, done.stderr
    store = open_store(f"sqlite:///{path}", create=False)
    try:
        traces = store.search(max_results=1000, include_spans=True).traces
        assert {trace.row.state for trace in traces} == {"OK"}
        return sorted((trace.row.name, len(trace.spans)) for trace in traces)
    finally:
        store.close()


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing(tmp_path: Path, method: str) -> None:
    """Workers of `multiprocessing` leave by `os._exit`, past `atexit`; their traces are stored all the same."""
    environment_of_spawned = ["fork"] if method == "fork" else [method]
    if method == "fork":
        assert run(tmp_path, MULTIPROCESSING, *environment_of_spawned) == [("work", 1)] * 150
    else:  # a spawned child is configured by its environment, not by what the parent's main block did
        os.environ["TRACEMW_DESTINATION"] = f"sqlite:///{tmp_path / 't.db'}"
        try:
            assert run(tmp_path, MULTIPROCESSING, *environment_of_spawned) == [("work", 1)] * 150
        finally:
            del os.environ["TRACEMW_DESTINATION"]


def test_fork_within_a_span(tmp_path: Path) -> None:
    """A span open at the fork is the parent's to end; what the child makes inside it lands in the same trace."""
    assert run(tmp_path, RAW_FORK) == [("parent", 2)]


def test_sigterm_in_a_plain_process(tmp_path: Path) -> None:
    """SIGTERM stores what is queued, then ends the process as it would have without us."""
    assert len(run(tmp_path, SIGTERM, returncode=-signal.SIGTERM)) == 30
