"""The provider matrix: what is stored, and what the application's own exporter gets, cell by cell."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

KINDS = ["owned", "joined before", "joined after", "adopted"]
PROTOCOLS = ["asgi", "wsgi"]
ROOT = Path(__file__).resolve().parents[2]


def run_cell(kind: str, protocol: str, store: Path) -> dict[str, Any]:
    """Run one cell and return what it saw."""
    command = [sys.executable, "-m", "tests.providers.cell", kind, protocol, f"sqlite:///{store}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def tree(trace: dict[str, Any]) -> dict[str, str | None]:
    """Span name -> name of its parent."""
    spans = trace["data"]["spans"]
    names = {span["span_id"]: span["name"] for span in spans}
    assert all(span["parent_span_id"] in names or not span["parent_span_id"] for span in spans)
    return {span["name"]: names.get(span["parent_span_id"]) for span in spans}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("kind", KINDS)
def test_cell(kind: str, protocol: str, tmp_path: Path) -> None:
    """One request is one stored trace with all facts and one tree of all spans, whoever's provider makes them.

    The application's exporter gets each span once, with the facts on the root; with a provider of our own it
    does not exist, and spans made with OpenTelemetry's no-op provider are not recorded by anybody.
    """
    result = run_cell(kind, protocol, tmp_path / "cell.db")

    (stored,) = result["stored"]
    info = stored["info"]
    assert info["client_request_id"] == "req-1"
    assert info["trace_metadata"]["mlflow.trace.session"] == "s-1"
    assert info["trace_metadata"]["mlflow.trace.user"] == "jane"
    assert info["tags"]["set-in"] == "handler"
    assert info["state"] == "OK"
    assert info["execution_duration_ms"] is not None
    root = "GET /items/<int:number>" if protocol == "wsgi" else "GET /items/{number}"
    expected: dict[str, str | None] = {root: None, "work": root, "plain": "work", "inner": "plain"}
    if kind == "owned":
        expected = {root: None, "work": root, "inner": "work"}
    assert tree(stored) == expected

    exported = result["exported"]
    if kind == "owned":
        assert exported == []
        return
    assert {span["trace"] for span in exported} == {info["trace_id"].removeprefix("tr-")}
    ours = [span for span in exported if span["name"] in ("work", "plain", "inner")]
    assert sorted(span["name"] for span in ours) == ["inner", "plain", "work"]
    (top,) = [span for span in exported if span["parent"] is None]
    assert top["kind"] == "SERVER"
    assert top["attributes"]["tracemw.client_request_id"] == "req-1"
    assert top["attributes"]["session.id"] == "s-1"
    assert top["attributes"]["user.id"] == "jane"
    assert top["attributes"]["mlflow.traceTag.set-in"] == "handler"
    assert top["attributes"]["tracemw.outcome"] == "completed"
    assert top["attributes"].get("http.response.status_code", top["attributes"].get("http.status_code")) == 200
