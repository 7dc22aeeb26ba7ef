"""Living with the telemetry of others: one trace per request, whoever opens its root."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.adapters.coexist import CASES, is_wsgi

ROOT = Path(__file__).resolve().parents[2]
# Path -> status, state, exceptions on the root and on the handler's span, what is below the root.
EXPECTED: dict[str, tuple[int, str, int, int, list[Any]]] = {
    "/items/7": (200, "OK", 0, 0, [["handler", [["inside", []]]]]),
    "/broken/7": (500, "ERROR", 1, 1, [["handler", []]]),
    "/refused/7": (418, "OK", 0, 1, [["handler", []]]),
    "/nowhere": (404, "OK", 0, 0, []),
}
PREFIXES = {
    "fastapi_mounted": "/{tenant}",
    "fastapi_mounted_only": "/sub",
    "fastapi_mounted_around": "/sub",
    "flask_dispatched": "/acme",
}


def run(when: str) -> dict[str, Any]:
    """Run all cases, with the application's provider set before us, after us, or not at all."""
    command = [sys.executable, "-m", "tests.adapters.coexist", when]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def check(case: str, found: dict[str, Any], when: str) -> None:
    """One case: one stored trace for each request, and one in the application's exporter."""
    for path, (status, state, exceptions, handler_exceptions, tree) in EXPECTED.items():
        (trace,) = found[path]
        number = "<int:number>" if is_wsgi(case) else "{number}"
        route = None if path == "/nowhere" else PREFIXES.get(case, "") + path.replace("7", number)
        assert route is None or trace["route"] == route
        assert trace["root"] == ("GET" if route is None else f"GET {route}")
        assert (trace["status"], trace["state"]) == (status, state)
        assert (trace["request"], trace["session"]) == ("req-1", "s-1")
        assert trace["headers"] == [True, True, 1]
        assert trace["tree"] == tree
        assert (trace["exceptions"], trace["handler_exceptions"]) == (exceptions, handler_exceptions)
    if when != "none":
        assert found["exported traces"] == len(EXPECTED)


@pytest.mark.parametrize("when", ["before", "after", "none"])
def test_one_trace_per_request(when: str) -> None:
    """One trace, our facts on its root, our headers once, the handler's span, nothing of the framework's own.

    Whoever else traces, wherever our middleware stands, and whenever the application's provider is set. With
    `operation_spans` the framework's spans are stored, and previews still are the handler's.
    """
    results = run(when)
    failed = {}
    for case in CASES:
        try:
            check(case, results[case], when)
        except (AssertionError, ValueError) as exc:
            failed[case] = str(exc)
    assert failed == {}
    assert results["failures"] == {}
    for trace in results.get("operation spans", ()):
        assert [name for name, _ in trace["tree"]][:2] == ["fastapi.dependencies", "fastapi.endpoint"]
        assert trace["tree"][1][1] == [["handler", [["inside", []]]]]
        assert trace["preview"] == '{"number": 7}'
    for trace in results.get("websocket", ()):
        assert (trace["root"], trace["tree"]) == ("WS /live/{number}", [["handler", []]])
