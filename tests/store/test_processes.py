"""Several processes and threads on one file: forked, killed, all at once."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.store.rows import span, trace, words_are
from tracemw.store import open_store

ROOT = Path(__file__).parents[2]
URL = "sqlite:///store.db"
PREAMBLE = """
import ctypes, os, sys, threading, time
from tests.store.rows import span, trace, trace_id
from tracemw.errors import StoreError
from tracemw.store import open_store

def batch(number, size=20):
    numbers = range(number * size, (number + 1) * size)
    return [trace(n) for n in numbers], [span(n, k) for n in numbers for k in range(3)]

def wait(pid):
    assert os.waitpid(pid, 0)[1] == 0
"""
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def start(script: str, *arguments: object) -> subprocess.Popen[str]:
    """Start Python with a script, in the test's directory."""
    command = [
        sys.executable,
        "-W",
        "ignore:.*fork:DeprecationWarning",
        "-c",
        PREAMBLE + script,
        *map(str, arguments),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[str], timeout: float = 60) -> str:
    """Return what a process printed; it must end by itself, without an error."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        pytest.fail(f"hangs: {out} {err}")
    assert process.returncode == 0, err
    return out


def run(script: str, *arguments: object) -> str:
    """Run a script to its end."""
    return finish(start(script, *arguments))


def check(traces: int, spans: int) -> None:
    """The file is whole and has as many rows as were written."""
    with open_store(URL) as store:
        assert store.read("PRAGMA integrity_check") == [("ok",)]
        assert store.read("SELECT count(*), count(DISTINCT start_key) FROM traces") == [(traces, traces)]
        assert store.stats()["spans"] == spans
        assert words_are(store, traces)


@forks
@pytest.mark.parametrize("fork", ["os.fork", "ctypes.PyDLL(None).fork"])
def test_parent_and_child_use_a_store_opened_before_the_fork(fork: str) -> None:
    """Nothing is lost when the parent closes its connections and the child goes on.

    With the second fork Python's hooks are not called (as in uWSGI). A connection that the child merely inherits
    is enough for SQLite to lose what it writes next, if the parent closes its own in between.
    """
    run(
        f"""
store = open_store("{URL}")
store.write(*batch(0))
read, write = os.pipe()
pid = {fork}()
if pid == 0:
    store.write(*batch(1))
    os.read(read, 1)  # until the parent has closed
    store.write(*batch(2))
    assert len(store.search(max_results=500).traces) == 80
    os._exit(0)
time.sleep(0.3)
store.write(*batch(3))
store.close()
os.write(write, b"x")
wait(pid)
"""
    )
    check(80, 240)


@forks
def test_fork_while_threads_write() -> None:
    """A fork in the middle of other threads' transactions neither hangs nor harms, in parent and child."""
    run(
        f"""
store = open_store("{URL}")
def work(first):
    for number in range(first, first + 40):
        store.write(*batch(number))
threads = [threading.Thread(target=work, args=(k * 40,)) for k in range(3)]
for thread in threads: thread.start()
pids = []
for number in range(120, 130):
    pid = os.fork()
    if pid == 0:
        store.write(*batch(number))
        store.close()
        os._exit(0)
    pids.append(pid)
    time.sleep(0.01)
for thread in threads: thread.join()
for pid in pids: wait(pid)
store.close()
"""
    )
    check(2600, 7800)


@forks
def test_a_store_in_memory_is_not_the_childs() -> None:
    """A child begins with an empty one, and leaves the parent's alone."""
    run(
        """
store = open_store("memory:")
store.write(*batch(0))
pid = os.fork()
if pid == 0:
    assert store.search().traces == []
    store.write(*batch(1))
    assert len(store.search().traces) == 20
    os._exit(0)
wait(pid)
assert len(store.search().traces) == 20
"""
    )


WRITER = f"""
first, count, pause = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
store = open_store("{URL}")
for number in range(first, first + count):
    store.write(*batch(number))
    print(number, flush=True)
    time.sleep(pause)
store.close()
"""


PATIENT_WRITER = WRITER.replace(
    "    store.write(*batch(number))",
    """    for attempt in range(50):
        try:
            store.write(*batch(number))
            break
        except StoreError as error:
            if attempt == 49 or not error.retry: raise
            time.sleep(0.01)""",
)


def write_at_once(processes: int, batches: int, pause: float) -> None:
    """Start processes that write to one file, none of which is there before."""
    started = [start(WRITER, n * batches, batches, pause) for n in range(processes)]
    for process in started:
        finish(process, 300)
    check(processes * batches * 20, processes * batches * 60)


@pytest.mark.parametrize("ends", [("",), ("", "-wal", "-shm")])
def test_a_file_removed_while_processes_write(ends: tuple[str, ...]) -> None:
    """Whoever removes the file, with or without its log and index, gets a whole new one, from all writers."""
    started = [start(PATIENT_WRITER, n * 1000, 60, 0.01) for n in range(3)]
    for process in started:
        assert process.stdout is not None
        process.stdout.readline()
    for _ in range(3):
        time.sleep(0.15)
        for end in ends:
            Path(f"store.db{end}").unlink(missing_ok=True)
    for process in started:
        finish(process)
    with open_store(URL) as store:
        assert store.read("PRAGMA integrity_check") == [("ok",)]
        numbers = {int(trace_id, 16) // 20 for (trace_id,) in store.read("SELECT trace_id FROM traces")}
        assert {59, 1059, 2059} <= numbers
        assert store.stats()["spans"] == 3 * store.stats()["traces"]


def test_eight_processes_at_once() -> None:
    """Every row of eight processes arrives, without an error, from making the file on."""
    write_at_once(8, 15, 0.0)


@pytest.mark.slow
def test_eight_processes_for_a_minute() -> None:
    """The same for a minute, at the pace of busy servers."""
    write_at_once(8, 600, 0.1)


def kill_while_writing(rounds: int) -> None:
    """Kill a writer at a random moment, again and again; what it had written must be there."""
    generator = random.Random(5)
    acknowledged: list[int] = []
    for number in range(rounds):
        process = start(WRITER, number * 10_000, 10_000, 0.0)
        assert process.stdout is not None
        acknowledged.append(int(process.stdout.readline()))
        killer = threading.Timer(generator.random() * 0.3, process.kill)
        killer.start()
        acknowledged += [int(line) for line in process.stdout if line.endswith("\n")]
        process.communicate()
        killer.join()
        with open_store(URL) as store:
            assert store.read("PRAGMA integrity_check") == [("ok",)]
            found = store.stats()
            assert found["traces"] % 20 == 0 and found["spans"] == found["traces"] * 3, "half a batch"
            assert len(acknowledged) * 20 <= found["traces"] <= (len(acknowledged) + number + 1) * 20
            there = {int(trace_id, 16) // 20 for (trace_id,) in store.read("SELECT trace_id FROM traces")}
            assert set(acknowledged) <= there


def test_killed_while_writing() -> None:
    """SIGKILL at any moment leaves a whole file with every batch whose write had returned."""
    kill_while_writing(4)


@pytest.mark.slow
def test_killed_while_writing_again_and_again() -> None:
    """The same many times."""
    kill_while_writing(60)


def test_threads_write_read_and_change() -> None:
    """Threads share one object: writing, searching, patching, deleting and purging at once loses nothing else."""
    failures: list[BaseException] = []

    def guarded(action: Callable[[], None]) -> None:
        try:
            action()
        except BaseException as error:
            failures.append(error)

    with open_store(URL) as store:

        def write(first: int) -> None:
            for number in range(first, first + 200):
                store.write([trace(number)], [span(number), span(number, 1)])

        def read() -> None:
            end = time.monotonic() + 0.5
            while time.monotonic() < end:
                for found in store.search("user = 'jane'", max_results=20).traces:
                    assert found.row.user_id == "jane"
                    assert found.row.state == "IN_PROGRESS" or len(found.spans) == 2

        def change() -> None:
            for number in range(0, 200, 7):
                store.patch(f"{number:032x}", tags={"seen": "yes"})
                store.delete(trace_ids=[f"{number + 1000:032x}"])
                store.purge(max_age_s=10**9)

        work = [*(partial(write, n * 200) for n in range(3)), read, read, change]
        threads = [threading.Thread(target=guarded, args=(action,)) for action in work]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
    check(600, 1200)
