"""Processes that share a store: one of them delivers, another takes over, none loses anything."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import servers
from tests.delivery.backends import Collector, Reply
from tests.servers import wait_for
from tracemw.pipeline import lease as leases
from tracemw.pipeline.lease import Lease
from tracemw.store import Store

PROGRAM = """
import os, sys, time
import tracemw

@tracemw.trace
def work(i):
    tracemw.update_current_trace(client_request_id=f"{os.getpid()}-{i}")

def several(count):
    for i in range(count):
        work(i)
"""


STORED = "tracemw.flush(delivered=False); print('stored', flush=True); time.sleep(60)"


def start(body: str, **env: str) -> subprocess.Popen[str]:
    """Run a program that traces; its output is read line by line."""
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM + textwrap.dedent(body)],
        env=servers.clean_environment({"PYTHONPATH": str(servers.ROOT), **env}),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def end(process: subprocess.Popen[str], *, kill: bool = False, timeout: float = 20.0) -> int:
    """Wait for the process (after SIGKILL if wanted) and close what is open."""
    if kill:
        process.kill()
    try:
        return process.wait(timeout)
    finally:
        process.kill()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


def line(process: subprocess.Popen[str]) -> str:
    """The next line it prints."""
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.fixture
def env(tmp_path: Path, collector: Collector) -> Iterator[dict[str, str]]:
    """Variables of a process that delivers to the collector from a store in the test's folder."""
    yield {
        "TRACEMW_DESTINATION": f"otlp+{collector.url}",
        "TRACEMW_STORE": f"sqlite:///{tmp_path}/shared.db",
    }


def test_a_killed_process_loses_nothing_that_was_stored(env: dict[str, str], collector: Collector) -> None:
    """SIGKILL while the back end is down: the next process delivers what this one stored, and its own."""
    collector.judge = lambda request: Reply(503)
    first = start(f"several(200); {STORED}", **env)
    assert line(first) == "stored"
    wait_for(lambda: collector.seen)
    end(first, kill=True)
    collector.judge = lambda request: None
    second = start("several(1); print(tracemw.flush(20))", **env)
    assert line(second) == "True"
    assert end(second) == 0
    assert len(collector.traces) == len(set(collector.traces)) == 201


def test_killed_in_the_middle_of_delivery(env: dict[str, str], collector: Collector) -> None:
    """What was sent and not yet noted is sent again; nothing is missing."""

    def slowly(request: object) -> None:
        time.sleep(0.2)

    collector.judge = slowly
    first = start(f"several(600); {STORED}", **env)
    assert line(first) == "stored"
    wait_for(lambda: len(collector.requests) >= 1, interval=0.005)
    end(first, kill=True)
    second = start("several(1); print(tracemw.flush(30))", **env)
    assert line(second) == "True"
    end(second)
    assert len(set(collector.traces)) == 601


def test_of_several_processes_one_delivers_and_another_takes_over(
    env: dict[str, str], collector: Collector
) -> None:
    """When the one with the lease is killed, the next one sees it and does not wait for the lease to run out."""
    body = """
    for command in sys.stdin:
        several(5)
        print(tracemw.flush(20), tracemw.stats()["delivery"]["active"], flush=True)
    """
    processes = [start(body, **env) for _ in range(3)]
    try:
        answers = []
        for process in processes:
            assert process.stdin is not None
            print("go", file=process.stdin, flush=True)
            answers.append(line(process))
        assert sorted(answers) == ["True False", "True False", "True True"]
        holder = answers.index("True True")
        end(processes[holder], kill=True)
        other = processes[(holder + 1) % 3]
        assert other.stdin is not None
        began = time.monotonic()
        print("go", file=other.stdin, flush=True)
        assert line(other).startswith("True")
        assert time.monotonic() - began < leases.TTL / 3
        assert len(set(collector.traces)) == 20
    finally:
        for process in processes:
            end(process, kill=True)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("parent_first", [True, False])
def test_a_forked_child_delivers_its_own(env: dict[str, str], collector: Collector, parent_first: bool) -> None:
    """Also if the parent had delivered before the fork (gunicorn --preload with a warm-up request)."""
    body = f"""
    import warnings
    warnings.simplefilter("ignore", DeprecationWarning)
    if {parent_first}:
        several(3); assert tracemw.flush(20)
    pid = os.fork()
    several(10)
    delivered = tracemw.flush(20)
    if pid == 0:
        os._exit(0 if delivered else 1)
    print(delivered, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    """
    process = start(body, **env)
    assert line(process) == "True 0"
    end(process)
    assert len(collector.traces) == len(set(collector.traces)) == (23 if parent_first else 20)


def test_the_end_of_a_process_waits_for_no_back_end(env: dict[str, str], collector: Collector) -> None:
    """The store keeps what is not delivered: a silent back end does not hold up exit or SIGTERM."""
    collector.judge = lambda request: time.sleep(30)
    process = start("several(20); time.sleep(1); print('traced', flush=True)", **env)
    assert line(process) == "traced"
    began = time.monotonic()
    assert end(process) == 0
    assert time.monotonic() - began < 5
    process = start("several(20); time.sleep(1); print('traced', flush=True); time.sleep(60)", **env)
    assert line(process) == "traced"
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert end(process) == -signal.SIGTERM
    assert time.monotonic() - began < 5
    collector.judge = lambda request: None
    process = start("several(1); print(tracemw.flush(20))", **env)
    assert line(process) == "True"
    end(process)
    assert len(set(collector.traces)) == 41


# The lease.


def test_one_holder_at_a_time(store: Store) -> None:
    """Others get it when it is given back."""
    first, second = Lease(lambda: store, "x"), Lease(lambda: store, "x")
    assert first.hold() and not second.hold() and first.hold()
    assert Lease(lambda: store, "y").hold()
    first.release()
    assert second.hold() and not first.hold()
    assert second.held and not first.held


def test_a_lease_that_is_not_renewed_runs_out(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A holder on another machine may have died."""
    monkeypatch.setattr(leases, "TTL", 0.2)
    first, second = Lease(lambda: store, "x"), Lease(lambda: store, "x")
    assert first.hold() and not second.hold()
    time.sleep(0.25)
    assert second.hold()
    monkeypatch.setattr(leases, "RENEWAL", 0.0)
    assert not first.hold()


def test_a_renewed_lease_is_kept(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as it is asked for in time."""
    monkeypatch.setattr(leases, "TTL", 0.3)
    monkeypatch.setattr(leases, "RENEWAL", 0.1)
    first, second = Lease(lambda: store, "x"), Lease(lambda: store, "x")
    for _ in range(8):
        assert first.hold() and not second.hold()
        time.sleep(0.1)


@pytest.mark.skipif(not leases._namespace(), reason="needs /proc")
def test_who_is_dead_and_who_cannot_be_told() -> None:
    """A process of this machine that is gone, or whose number another one has now; not one of another machine."""
    me = leases._process(os.getpid())
    host, namespace, pid, started = me.split("/")
    assert not leases.is_dead(f"{me}/abc")
    assert leases.is_dead(f"{host}/{namespace}/{pid}/1{started}/abc")
    assert leases.is_dead(f"{host}/{namespace}/999999999/5/abc")
    assert not leases.is_dead(f"other-host/{namespace}/999999999/5/abc")
    assert not leases.is_dead(f"{host}/pid:[1]/999999999/5/abc")
    assert not leases.is_dead("something else")
