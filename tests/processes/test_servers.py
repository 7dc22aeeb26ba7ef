"""Nothing is lost when servers fork, recycle their workers, stop or are killed; and nothing hangs."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests import servers
from tracemw.store import open_store

FASTAPI = "tests.processes.apps:fastapi_app"
FLASK = "tests.processes.apps:flask_app"


def send(server: servers.Server, number: int) -> set[int]:
    """Send requests one after the other; returns the pids of the processes that answered."""
    pids = set()
    for i in range(number):
        answer = server.get(f"/work/{i}", headers={"X-Request-ID": f"r-{i}"})
        assert answer.status == 200, server.output()
        pids.add(answer.json()["pid"])
    return pids


def stored(path: Path) -> list[Any]:
    """All stored traces, read in this process."""
    store = open_store(f"sqlite:///{path}", create=False)
    try:
        return store.search(max_results=5000, include_spans=True).traces
    finally:
        store.close()


def assert_complete(path: Path, number: int) -> None:
    """Every request is one finished trace with its spans and its id."""
    requests = [trace for trace in stored(path) if trace.row.method == "GET"]
    assert sorted(t.row.client_request_id or "" for t in requests) == sorted(f"r-{i}" for i in range(number))
    assert {t.row.state for t in requests} == {"OK"}
    assert {len(t.spans) for t in requests} == {2}


@pytest.mark.parametrize("lifespan", ["on", "off"])
def test_uvicorn_sigterm(tmp_path: Path, lifespan: str) -> None:
    """SIGTERM right behind the last response loses nothing, with lifespan events and without."""
    env = {"TRACEMW_DESTINATION": f"sqlite:///{tmp_path}/t.db"}
    with servers.uvicorn(FASTAPI, "--lifespan", lifespan, env=env) as server:
        send(server, 60)
        server.stop(signal.SIGTERM)
    assert_complete(tmp_path / "t.db", 60)


def test_gunicorn_sigterm(tmp_path: Path) -> None:
    """Two workers write one file without an error, and SIGTERM loses nothing."""
    env = {"TRACEMW_DESTINATION": f"sqlite:///{tmp_path}/t.db"}
    with servers.gunicorn(FLASK, "-w", "2", env=env) as server:
        send(server, 60)
        server.stop(signal.SIGTERM)
        assert "lock" not in server.output()
    assert_complete(tmp_path / "t.db", 60)


def test_gunicorn_preload_with_a_trace_before_the_fork(tmp_path: Path) -> None:
    """A trace recorded before the fork is stored once, by the parent; the children store theirs; nothing hangs."""
    env = {"TRACEMW_DESTINATION": f"sqlite:///{tmp_path}/t.db", "WARM_UP": "1"}
    with servers.gunicorn(FLASK, "-w", "2", "--preload", "--threads", "2", env=env) as server:
        send(server, 60)
        server.stop(signal.SIGTERM)
    assert_complete(tmp_path / "t.db", 60)
    warm_up = [trace for trace in stored(tmp_path / "t.db") if trace.row.name == "warm-up"]
    assert [len(trace.spans) for trace in warm_up] == [2]


def test_gunicorn_recycles_its_workers(tmp_path: Path) -> None:
    """Workers that end after some requests (`max_requests`) leave nothing behind unstored."""
    env = {"TRACEMW_DESTINATION": f"sqlite:///{tmp_path}/t.db"}
    with servers.gunicorn(FLASK, "-w", "1", "--max-requests", "15", env=env) as server:
        pids = send(server, 60)
        server.stop(signal.SIGTERM)
    assert len(pids) > 1
    assert_complete(tmp_path / "t.db", 60)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kill_9(tmp_path: Path) -> None:
    """SIGKILL costs at most the last quarter of a second, and the file is intact."""
    path = tmp_path / "t.db"
    with servers.uvicorn(FASTAPI, env={"TRACEMW_DESTINATION": f"sqlite:///{path}"}) as server:
        send(server, 40)
        time.sleep(0.5)  # twice the promise: the machine may be busy
        server.kill()
    assert_complete(path, 40)
    store = open_store(f"sqlite:///{path}", create=False)
    store.close()
