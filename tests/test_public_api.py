"""What `import tracemw` gives, and what it costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import tracemw

NAMES = {
    "middleware": ["TraceMiddleware", "WSGITraceMiddleware", "instrument"],
    "spans": [
        "trace",
        "start_span",
        "start_span_no_context",
        "get_current_active_span",
        "get_active_trace_id",
        "get_last_active_trace_id",
    ],
    "trace": ["update_current_trace", "set_trace_tag", "delete_trace_tag", "context", "current_request"],
    "threads": ["propagate", "ContextThreadPoolExecutor", "detached"],
    "query": ["search_traces", "get_trace", "compare"],
    "low level": ["Client"],
    "entities": [
        "Trace",
        "TraceInfo",
        "TraceData",
        "TraceState",
        "Span",
        "SpanEvent",
        "SpanStatus",
        "SpanStatusCode",
        "SpanType",
    ],
    "set-up": ["configure", "flush", "shutdown", "stats", "enable", "disable"],
}

# Roots of modules that only what needs them may load.
FRAMEWORKS = ["fastapi", "starlette", "flask", "werkzeug", "django", "uvicorn", "gunicorn"]
HEAVY = [
    "mlflow",
    "pandas",
    "numpy",
    "jinja2",
    "click",
    "lark",
    "regex",
    "contextvars_extras",
    "requests",
    "grpc",
    "pytest",
]
LAZY = ["sqlite3", "asyncio", "uuid", "subprocess", "multiprocessing", "http.client", "ssl"]
EXPORTERS = ["opentelemetry.exporter", "opentelemetry.instrumentation"]


@pytest.mark.parametrize("kind", NAMES)
def test_every_promised_name_is_there(kind: str) -> None:
    """Each public name of the documentation can be used, and `__all__` lists it."""
    for name in NAMES[kind]:
        assert getattr(tracemw, name, None) is not None, f"tracemw.{name} is missing"
        assert name in tracemw.__all__


def test_all_lists_what_is_public_and_nothing_else() -> None:
    """`__all__` tells the truth in both directions: no dead name, no public name left out."""
    listed = set(tracemw.__all__)
    promised = {name for names in NAMES.values() for name in names}
    public = {
        name
        for name in dir(tracemw)
        if not name.startswith("_") and not isinstance(getattr(tracemw, name), ModuleType)
    }
    assert listed >= promised
    assert public - {"annotations"} == listed - {"__version__"}
    assert len(tracemw.__all__) == len(listed), "a name is listed twice"


def test_star_import_works_without_any_extra() -> None:
    """`from tracemw import *` gives exactly `__all__`, and needs no framework."""
    assert loaded_by("from tracemw import *", among=FRAMEWORKS) == []
    code = "from tracemw import *; import tracemw; print(set(tracemw.__all__) - set(globals()))"
    assert run(code) == "set()"


def test_importing_tracemw_is_light() -> None:
    """No framework, MLflow, exporter or command line library comes with it; nor what the SDK leaves out."""
    with_sdk = loaded_by("import opentelemetry.sdk.trace", among=LAZY + HEAVY + EXPORTERS)
    loaded = loaded_by("import tracemw", among=FRAMEWORKS + HEAVY + LAZY + EXPORTERS)
    assert set(loaded) - set(with_sdk) == set()


@pytest.mark.parametrize("framework", ["fastapi", "flask"])
def test_a_framework_loads_only_its_own_adapter(framework: str) -> None:
    """An application of one framework does not load the other one."""
    make = {
        "fastapi": "from fastapi import FastAPI; tracemw.instrument(FastAPI())",
        "flask": "from flask import Flask; tracemw.instrument(Flask('x'))",
    }
    other = {"fastapi": ["flask", "werkzeug"], "flask": ["fastapi", "starlette"]}[framework]
    assert loaded_by(f"import tracemw; {make[framework]}", among=other) == []


def test_only_the_adapters_import_frameworks() -> None:
    """The core knows no framework, and only the MLflow modules know MLflow."""
    allowed = {
        "tracemw/mlflow.py": ["mlflow"],
        "tracemw/pipeline/mlflow.py": ["mlflow"],
        "tracemw/testing.py": ["pytest"],
    }
    found = {
        f"{path}: {name}"
        for path, names in core_imports().items()
        for name in names
        if name in {*FRAMEWORKS, "mlflow", "pytest"} and name not in allowed.get(path, [])
    }
    assert found == set()


def core_imports() -> dict[str, set[str]]:
    """The root packages that each core module imports anywhere, by path."""
    package = Path(tracemw.__file__).parent
    paths = [path for path in package.rglob("*.py") if "adapters" not in path.parts]
    return {f"tracemw/{path.relative_to(package).as_posix()}": set(imported_roots(path)) for path in paths}


def imported_roots(path: Path) -> list[str]:
    """Root packages of all import statements of a file, except those for type checkers."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    roots: list[str] = []
    for node in (node for node in ast.walk(tree) if id(node) not in typing_only):
        if isinstance(node, ast.Import):
            roots += [alias.name.partition(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            roots.append((node.module or "").partition(".")[0])
    return roots


def loaded_by(code: str, among: list[str]) -> list[str]:
    """Which of some modules, or modules below them, a fresh interpreter has loaded after running code."""
    loaded = run(f"{code}\nimport sys; print(*sys.modules)").split()
    return [name for name in among if any(f"{module}.".startswith(f"{name}.") for module in loaded)]


def run(code: str) -> str:
    """Output of a fresh interpreter that has our path but loads nothing at start-up, as coverage would."""
    code = f"import sys; sys.path[:] = {sys.path!r}\n{code}"
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
