"""An MLflow server on PostgreSQL, which refuses what SQLite lets pass: NUL characters, texts that are too long."""

from __future__ import annotations

import glob
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator

import pytest

from tests.delivery.backends import Mlflow, Reader, mlflow_python
from tests.delivery.rows import span_row, trace_row
from tests.servers import wait_for
from tracemw.pipeline.delivery import Delivered, run_deliverer
from tracemw.store import Store

pytestmark = pytest.mark.slow


@pytest.fixture
def postgresql() -> Iterator[str]:
    """A PostgreSQL server of the test's own; yields the URL of a database."""
    debians = glob.glob("/usr/lib/postgresql/*/bin")  # not in PATH
    path = os.pathsep.join([os.environ["PATH"], *debians])
    tools = {name: shutil.which(name, path=path) for name in ("initdb", "postgres", "psql")}
    if not all(tools.values()):
        pytest.skip("no PostgreSQL (apt install postgresql)")
    user = "postgres" if os.geteuid() == 0 else None  # it does not run as root
    # Not below pytest's folder: each run of pytest takes everybody else's rights to that away.
    with tempfile.TemporaryDirectory(prefix="postgresql-", ignore_cleanup_errors=True) as folder:
        if user is not None:
            shutil.chown(folder, user)
        yield from serve({name: str(tool) for name, tool in tools.items()}, user, folder)


def serve(tools: dict[str, str], user: str | None, folder: str) -> Iterator[str]:
    """Make a cluster in a folder, and serve it."""
    data = f"{folder}/data"
    subprocess.run(
        [tools["initdb"], "-D", data, "-U", "mlflow", "--auth", "trust", "--no-sync"],
        check=True, capture_output=True, user=user, cwd=folder,
    )  # fmt: skip
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories=", "-c", "fsync=off"]
    process = subprocess.Popen(
        [tools["postgres"], "-D", data, "-p", str(port), *options],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, user=user, cwd=folder,
    )  # fmt: skip
    ask = [tools["psql"], "-h", "127.0.0.1", "-p", str(port), "-U", "mlflow", "-d", "postgres", "-c"]
    try:
        made = [*ask, "CREATE DATABASE mlflow"]
        wait_for(lambda: subprocess.run(made, capture_output=True).returncode == 0, timeout=30.0, interval=0.2)
        yield f"postgresql+psycopg2://mlflow@127.0.0.1:{port}/mlflow"
    finally:
        process.terminate()
        process.wait(30)


def test_a_server_on_postgresql(
    postgresql: str, tmp_path_factory: pytest.TempPathFactory, store: Store, experiment: str
) -> None:
    """All of fifty wild and fifty plain traces; none of the server's columns refuses one."""
    python = mlflow_python()
    if python is None:
        pytest.skip("no Python with MLflow")
    if subprocess.run([python, "-c", "import psycopg2"], capture_output=True).returncode:
        pytest.skip("MLflow's Python has no psycopg2")
    server = Mlflow(python, tmp_path_factory.mktemp("mlflow"), "--backend-store-uri", postgresql)
    reader = Reader(python, server.url)
    try:
        fill_with_wild_ones(store)
        began = time.monotonic()
        destination = f"mlflow+{server.url}?experiment={experiment}"
        assert run_deliverer(store.url, destination, once=True, timeout=120.0) == Delivered(100, 0, 0, None)
        print(f"{100 / (time.monotonic() - began):.0f} traces/s")
        found = reader.search(experiment)
        assert len(found) == 100 and all(len(trace["spans"]) == 2 for trace in found)
        fill_with_wild_ones(store, 1000)
        fast = f"{destination}&fidelity=fast"
        assert run_deliverer(store.url, fast, once=True, timeout=120.0) == Delivered(100, 0, 0, None)
        assert len(reader.search(experiment, spans=False)) == 200
    finally:
        reader.close()
        server.kill()


def fill_with_wild_ones(store: Store, start: int = 0) -> None:
    """Queue a hundred traces, every other one full of what databases do not like."""
    wild, long = "a\0b\ud800c", "x" * 20_000
    text = json.dumps({"messages": [{"role": "user", "content": wild}], wild: wild})
    for number in range(start, start + 100):
        row = trace_row(number)
        attributes = {"mlflow.spanInputs": json.dumps({"q": "x"})}
        if number % 2:
            row = trace_row(
                number, name=wild + long, client_request_id=wild + "r" * 100, session_id=wild + long, user_id=long,
                request_preview=wild + long, tags={wild: wild, long: long}, metadata={wild: wild, long: long},
            )  # fmt: skip
            attributes = {"mlflow.spanInputs": text, "mlflow.spanType": json.dumps(long), wild: wild}
        spans = [span_row(row, 1, attributes=attributes), span_row(row, 2, name=wild)]
        store.write([row], spans, outbox=True)
