"""Back ends that the tests of this folder share."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.delivery import backends
from tracemw.store import Store, open_store


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[backends.Mlflow]:
    """A real MLflow server, one for all tests of this process."""
    python = backends.mlflow_python()
    if python is None:
        pytest.skip("no Python with MLflow: `make` makes .venv-mlflow, or TRACEMW_TEST_MLFLOW names one")
    server = backends.Mlflow(python, tmp_path_factory.mktemp("mlflow"))
    yield server
    server.kill()


@pytest.fixture(scope="session")
def reader(mlflow_server: backends.Mlflow) -> Iterator[backends.Reader]:
    """MLflow's own client, looking at that server."""
    made = backends.Reader(mlflow_server.python, mlflow_server.url)
    yield made
    made.close()


@pytest.fixture
def experiment() -> str:
    """Name of an experiment that no other test has."""
    return f"test-{uuid.uuid4().hex[:12]}"


@pytest.fixture
def proxy(mlflow_server: backends.Mlflow) -> Iterator[backends.Proxy]:
    """A proxy before the MLflow server."""
    made = backends.Proxy(mlflow_server.url)
    yield made
    made.off()


@pytest.fixture
def collector() -> Iterator[backends.Collector]:
    """An OTLP receiver."""
    made = backends.Collector()
    yield made
    made.off()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """An empty store in a file."""
    with open_store(f"sqlite:///{tmp_path}/traces.db") as made:
        yield made
