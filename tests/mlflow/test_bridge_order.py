"""`@mlflow.trace` anywhere among a handler's decorators: exactly one handler span, as with `@tracemw.trace`."""

from __future__ import annotations

import importlib.util
import logging
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tracemw.mlflow
from tests.adapters import apps
from tests.adapters.test_order import SITES, check, orders
from tests.adapters.trees import get, tree, trees, wsgi_get
from tests.adapters.versions import FASTAPI, streams_generators
from tests.mlflow.types import MLflow
from tracemw.testing import capture_traces


@contextmanager
def mlflow_s_decorator() -> Iterator[None]:
    """The test sites' handlers are decorated with MLflow's `trace` instead of ours."""
    mlflow = pytest.importorskip("mlflow")
    assert tracemw.mlflow.bridge()
    before = apps.trace
    apps.trace = mlflow.trace(name="handler", span_type="AGENT", attributes=apps.ATTRIBUTES)
    try:
        yield
    finally:
        apps.trace = before
        tracemw.mlflow.unbridge()


@pytest.mark.parametrize("where", sorted(SITES))
@settings(max_examples=40)
@given(data=st.data())
def test_any_order_gives_the_same_tree(where: str, data: st.DataObject) -> None:
    """Closures in a factory, decorated while MLflow is bridged, in every framework, of every kind."""
    pytest.importorskip(where.partition(" ")[0])
    make, kinds = SITES[where]
    kind = data.draw(st.sampled_from(kinds), label="kind")
    order = data.draw(orders, label="decorators, outermost first")
    if "fastapi" in where and "generator" in kind and not streams_generators(FASTAPI):
        return
    with mlflow_s_decorator():
        check(make(kind, order), where, kind)


FASTAPI_MODULE = """
import functools
import mlflow, tracemw
from fastapi import FastAPI

app = FastAPI()
app.add_middleware(tracemw.TraceMiddleware)
NAME, attributes = "handler", {"k": "v"}

def timed(fn):
    @functools.wraps(fn)
    async def call(*args, **kwargs):
        return await fn(*args, **kwargs)
    return call

@mlflow.trace
@app.get("/plain")
async def plain():
    return "plain"

@timed
@mlflow.trace(name=NAME, span_type=mlflow.entities.SpanType.AGENT, attributes=attributes)
@timed
@app.get("/named")
@timed
async def named():
    return "named"

@app.get("/inside")
@mlflow.trace
async def inside():
    return "inside"

@app.get("/none")
async def none():
    return "none"
"""

FLASK_FACTORY = """
import mlflow, tracemw
from flask import Flask

def create_app():
    app = Flask("site")
    tracemw.instrument(app)

    @mlflow.trace(span_type="AGENT")
    @app.get("/closure")
    def closure():
        return "closure"

    @mlflow.trace(name=str(1 + 1))
    @app.get("/computed")
    def computed():
        return "computed"

    return app
"""


def module(path: Path, name: str, source: str) -> Any:
    """Import a module from source, as an application's that was imported before the bridge was there."""
    file = path / f"{name}.py"
    file.write_text(textwrap.dedent(source))
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    made = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def test_modules_imported_before(tmp_path: Path, unbridged: MLflow) -> None:
    """Functions of a module are found by their name, or their decorators are read in the source."""
    pytest.importorskip("fastapi")
    app = module(tmp_path, "imported_before", FASTAPI_MODULE).app
    try:
        assert tracemw.mlflow.bridge()
        with capture_traces(span_name_suffixes=False) as traces:
            for path in ("/plain", "/named", "/inside", "/none"):
                assert get(app, path).status == 200
        assert trees(traces) == [
            {"GET /plain": {"plain": {}}},
            {"GET /named": {"handler": {}}},
            {"GET /inside": {"inside": {}}},
            {"GET /none": {}},
        ]
        (span,) = traces[1].search_spans(name="handler")
        assert (span.span_type, span.get_attribute("k"), span.outputs) == ("AGENT", "v", "named")
    finally:
        tracemw.mlflow.unbridge()
        del sys.modules["imported_before"]


def test_closures_decorated_before(tmp_path: Path, unbridged: MLflow, caplog: pytest.LogCaptureFixture) -> None:
    """In a factory only the source tells; what it does not tell is said."""
    pytest.importorskip("flask")
    made = module(tmp_path, "factory_before", FLASK_FACTORY)
    app = made.create_app()
    try:
        with caplog.at_level(logging.WARNING):
            assert tracemw.mlflow.bridge()
            with capture_traces() as traces:
                for path in ("/closure", "/computed", "/computed"):
                    assert wsgi_get(app, path)[0] == 200
        assert trees(traces) == [{"GET /closure": {"closure": {}}}, {"GET /computed": {}}, {"GET /computed": {}}]
        said = [r.getMessage() for r in caplog.records if "cannot be made out" in r.getMessage()]
        assert len(said) == 1 and "computed" in said[0] and "str(1 + 1)" in said[0]
    finally:
        tracemw.mlflow.unbridge()
        del sys.modules["factory_before"]


def test_the_bridge_comes_while_the_application_serves(tmp_path: Path, unbridged: MLflow) -> None:
    """Requests after it have their handler spans."""
    pytest.importorskip("fastapi")
    app = module(tmp_path, "serves_already", FASTAPI_MODULE).app
    try:
        with capture_traces() as traces:
            get(app, "/plain")
            assert tracemw.mlflow.bridge()
            get(app, "/plain")
        assert trees(traces) == [{"GET /plain": {}}, {"GET /plain": {"plain": {}}}]
    finally:
        tracemw.mlflow.unbridge()
        del sys.modules["serves_already"]


def test_both_decorators_on_one_handler(mlflow: MLflow) -> None:
    """Above the route decorator there is one span: what is called is the handler, and ours was there first."""
    pytest.importorskip("fastapi")
    from fastapi import FastAPI

    app = FastAPI()
    app.add_middleware(tracemw.TraceMiddleware)

    @mlflow.trace(name="theirs")
    @app.get("/both")
    @tracemw.trace(name="ours")
    def both() -> str:
        return "x"

    @mlflow.trace(name="outer")
    @app.get("/twice")
    @mlflow.trace(name="inner")
    def twice() -> str:
        return "x"

    with capture_traces() as traces:
        get(app, "/both")
        get(app, "/twice")
    assert trees(traces) == [{"GET /both": {"ours": {}}}, {"GET /twice": {"inner": {}}}]


def test_called_directly_it_is_one_span(mlflow: MLflow) -> None:
    """A handler that Python code calls by its name."""
    pytest.importorskip("flask")
    from flask import Flask

    app = Flask("site")
    tracemw.instrument(app)

    @mlflow.trace
    @app.get("/")
    def handler() -> str:
        return "x"

    with capture_traces() as traces:
        assert wsgi_get(app, "/")[0] == 200
        assert handler() == "x"
    assert trees(traces) == [{"GET /": {"handler": {}}}, {"handler": {}}]


def test_methods(mlflow: MLflow) -> None:
    """Class-based views: methods, above and below `@classmethod` and `@staticmethod`."""
    pytest.importorskip("flask")
    from flask import Flask
    from flask.views import MethodView

    class Item(MethodView):
        @mlflow.trace
        def get(self) -> str:
            return self.by_class() + self.by_none()

        @mlflow.trace
        @classmethod
        def by_class(cls) -> str:
            return "a"

        @staticmethod
        @mlflow.trace
        def by_none() -> str:
            return "b"

    app = Flask("site")
    tracemw.instrument(app)
    app.add_url_rule("/", view_func=Item.as_view("item"))
    with capture_traces() as traces:
        assert wsgi_get(app, "/")[1] == b"ab"
    assert tree(traces[0]) == {"GET /": {"get": {"by_class": {}, "by_none": {}}}}


def test_the_decorator_itself(mlflow: MLflow) -> None:
    """While bridged it takes what MLflow's takes, refuses what it refuses, and returns what it returns."""
    import inspect

    def plain(number: int, *more: int, key: str = "x") -> int:
        """Said of it."""
        return number

    decorators: list[Callable[..., Any]] = [mlflow.trace, mlflow.trace(), mlflow.trace(name="n")]
    for decorate in decorators:
        made = decorate(plain)
        assert (made.__name__, made.__doc__, made.__wrapped__) == ("plain", "Said of it.", plain)
        assert inspect.signature(made) == inspect.signature(plain)
        assert made(5) == 5
    with pytest.raises(mlflow.MlflowException, match="output_reducer"):
        mlflow.trace(plain, output_reducer=list)
    with pytest.raises(mlflow.MlflowException, match="between 0.0 and 1.0"):
        mlflow.trace(sampling_ratio_override=2.0)
