"""The bridge is there for one test, and gone after it: other tests of the process know nothing of it."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator
from typing import cast

import pytest

import tracemw.mlflow
from tests.mlflow.types import MLflow


@pytest.fixture
def unbridged() -> MLflow:
    """MLflow as it is; skips where it is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return cast(MLflow, importlib.import_module("mlflow"))
        except ModuleNotFoundError:
            pytest.skip("MLflow is not installed")


@pytest.fixture
def mlflow(unbridged: MLflow) -> Iterator[MLflow]:
    """MLflow, bridged."""
    assert tracemw.mlflow.bridge()
    yield unbridged
    tracemw.mlflow.unbridge()
