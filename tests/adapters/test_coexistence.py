"""Living with the telemetry of others: one trace per request, whoever opens its root."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.adapters.coexist import CASES

ROOT = Path(__file__).resolve().parents[2]
# Path -> status, state, exceptions on the root and on the handler's span, what is below the root.
EXPECTED: dict[str, tuple[int, str, int, int, list[Any]]] = {
    "/items/7": (200, "OK", 0, 0, [["handler", [["inside", []]]]]),
    "/broken/7": (500, "ERROR", 1, 1, [["handler", []]]),
    "/refused/7": (418, "OK", 0, 1, [["handler", []]]),
    "/nowhere": (404, "OK", 0, 0, []),
}
# Starlette's telemetry stands inside of what answers errors: neither it nor we learn that the answer was 500.
WITHOUT_STATUS = ("starlette_telemetry_outer", "starlette_telemetry_inner")
PREFIXES = {"fastapi_mounted": "/{tenant}", "fastapi_mounted_only": "/sub", "flask_dispatched": "/acme"}


@pytest.fixture(scope="module", params=["before", "after", "none"])
def results(request: pytest.FixtureRequest) -> dict[str, Any]:
    """All cases, with the application's provider set before us, after us, or not at all."""
    command = [sys.executable, "-m", "tests.adapters.coexist", request.param]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    found["when"] = request.param
    return found


@pytest.mark.parametrize("case", sorted(CASES))
def test_one_trace_per_request(results: dict[str, Any], case: str) -> None:
    """One stored trace, our facts on its root, the handler's span below that, nothing of the framework's own.

    What the application's exporter gets is one trace for each request, too.
    """
    found = results[case]
    for path, (status, state, exceptions, handler_exceptions, tree) in EXPECTED.items():
        (trace,) = found[path]
        if case in WITHOUT_STATUS and status == 500:
            status = None  # type: ignore[assignment]
        number = "<int:number>" if "flask" in case or "wsgi" in case else "{number}"
        name = path.replace("7", number)
        route = None if path == "/nowhere" else PREFIXES.get(case, "") + name
        assert route is None or trace["route"] == route
        assert trace["root"] == ("GET" if route is None else f"GET {route}")
        assert (trace["status"], trace["state"]) == (status, state)
        assert (trace["request"], trace["session"]) == ("req-1", "s-1")
        assert trace["tree"] == tree
        assert (trace["exceptions"], trace["handler_exceptions"]) == (exceptions, handler_exceptions)
    if results["when"] != "none":
        assert found["exported traces"] == len(EXPECTED)


def test_nothing_of_ours_failed(results: dict[str, Any]) -> None:
    """No hook of ours had to be silenced in any case."""
    assert results["failures"] == {}
