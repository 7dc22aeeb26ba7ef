"""A store that another process has locked: nobody else is held up, ends are bounded, losses are said."""

from __future__ import annotations

import logging
import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path

import pytest

import tracemw
from tracemw import config, guard, pipeline

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.fixture
def locked(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    """Tracing goes to a store; the connection returned has it locked."""
    previous, before = pipeline.use(None), config._state.settings
    guard._last_logged.clear()
    tracemw.configure(destination=f"sqlite:///{tmp_path}/t.db")
    trace(1)
    assert tracemw.flush(10)
    with closing(sqlite3.connect(tmp_path / "t.db", isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield connection
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        tracemw.shutdown(1)
    pipeline.use(previous)
    config._state.settings = before


def trace(number: int) -> None:
    """Make traces."""
    for _ in range(number):
        with tracemw.start_span("work"):
            pass


def writers() -> int:
    """Count the writer threads that tests before may have left out."""
    return sum(thread.name == "tracemw-writer" for thread in threading.enumerate())


def test_shutdown_leaves_no_thread(locked: sqlite3.Connection) -> None:
    """`shutdown` ends the writer whether the store takes what is left or not; a later span starts one again."""
    others = writers() - 1
    trace(3)
    began = time.monotonic()
    for _ in range(3):
        assert not tracemw.shutdown(timeout=0.1)
        assert writers() == others
        trace(1)
    assert time.monotonic() - began < 4.5
    assert writers() <= others + 1
    locked.execute("ROLLBACK")
    assert tracemw.flush(20)
    assert locked.execute("SELECT count(*) FROM spans").fetchone() == (7,)
    assert tracemw.stats()["dropped"] == 0


def test_configure_away(
    locked: sqlite3.Connection, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Other settings are in force within the time promised, and what is lost with the old store is said."""
    monkeypatch.setattr(config, "SWITCH_FLUSH", 0.5)
    trace(3)
    began = time.monotonic()
    with caplog.at_level(logging.ERROR, "tracemw"):
        tracemw.configure(destination="memory:")
    assert time.monotonic() - began < 3
    assert "3 spans are lost" in caplog.text


@forks
def test_a_fork_does_not_wait_for_the_lock(locked: sqlite3.Connection) -> None:
    """Only a transaction that has begun keeps a fork waiting, not one that waits itself."""
    trace(3)
    time.sleep(0.4)  # the writer is at it
    began = time.monotonic()
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    assert time.monotonic() - began < 2
    os.waitpid(pid, 0)


LOCKED = """
import multiprocessing, sqlite3, sys, time
import tracemw

def work():
    with tracemw.start_span("in the worker"):
        pass

if __name__ == "__main__":
    tracemw.configure(destination="sqlite:///t.db")
    work()
    tracemw.flush()
    other = sqlite3.connect("t.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    work()
    if sys.argv[1] == "worker":
        time.sleep(0.3)
        process = multiprocessing.get_context("fork").Process(target=work)
        began = time.monotonic()
        process.start()
        process.join()
        assert time.monotonic() - began < 8, time.monotonic() - began
        other.execute("ROLLBACK")
"""


@forks
@pytest.mark.slow
@pytest.mark.parametrize("who", ["process", "worker"])
def test_the_end_of_a_process(who: str) -> None:
    """It waits five seconds for the store; then it says how many spans are lost."""
    command = [sys.executable, "-W", "ignore:.*fork:DeprecationWarning", "-c", LOCKED, who]
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began < 12
    assert "1 spans are lost, they could not be stored" in done.stderr


GREENLETS = """
from gevent import monkey; monkey.patch_all()
import sqlite3, time
import tracemw

tracemw.configure(destination="sqlite:///t.db")
with tracemw.start_span("first"):
    pass
assert tracemw.flush(10)
other = sqlite3.connect("t.db", isolation_level=None)
other.execute("BEGIN IMMEDIATE")
with tracemw.start_span("second"):
    pass
longest, end = 0.0, time.monotonic() + 2
while time.monotonic() < end:
    began = time.monotonic()
    time.sleep(0.005)  # another greenlet, in truth
    longest = max(longest, time.monotonic() - began)
other.execute("ROLLBACK")
assert tracemw.flush(10)
print(longest)
"""


@pytest.mark.skipif(find_spec("gevent") is None, reason="needs gevent")
def test_greenlets_go_on_while_the_writer_waits() -> None:
    """Where threads are greenlets, the writer's waiting for a lock must not stop the others."""
    done = subprocess.run([sys.executable, "-c", GREENLETS], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1


HOLDER = """
import os, sys, threading, time
import tracemw
from tracemw import config, pipeline, provider
from tracemw.store import connections

tracemw.configure(destination="sqlite:///t.db")
held, done = threading.Event(), threading.Event()

def hold():
    with config._lock, pipeline._lock, provider._providers.lock, connections._files:
        held.set()
        done.wait()

threading.Thread(target=hold).start()
held.wait()
pid = os.fork()
if pid == 0:
    tracemw.configure(destination="sqlite:///child.db")
    with tracemw.start_span("in the child"):
        pass
    os._exit(0 if tracemw.flush(10) else 1)
for _ in range(200):
    found, status = os.waitpid(pid, os.WNOHANG)
    if found:
        break
    time.sleep(0.1)
else:
    os.kill(pid, 9)
done.set()
assert found and status == 0, (found, status)
"""


@forks
def test_locks_held_by_another_thread_at_a_fork() -> None:
    """The child does not have that thread: it starts with free locks."""
    command = [sys.executable, "-W", "ignore:.*fork:DeprecationWarning", "-c", HOLDER]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


SCRIPT = """
import os
import tracemw

with tracemw.start_span("first"):
    pass
os.mkdir("elsewhere")
os.chdir("elsewhere")
with tracemw.start_span("second"):
    pass
assert len(tracemw.search_traces()) == 2
"""


def test_what_a_script_leaves(tmp_path: Path) -> None:
    """One file, where the log line said it is, with all rows in it, though the script went elsewhere."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert f"traces are stored in {tmp_path}/tracemw.db" in done.stderr
    assert sorted(path.name for path in tmp_path.rglob("tracemw.db*")) == ["tracemw.db"]
    with closing(sqlite3.connect(f"file:{tmp_path}/tracemw.db?mode=ro&immutable=1", uri=True)) as plain:
        assert plain.execute("SELECT count(*) FROM traces").fetchone() == (2,)
