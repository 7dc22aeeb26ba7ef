"""What has to hold: our overhead against somebody's, as ratios within one run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

Results = Mapping[str, Any]


class Gate(NamedTuple):
    """One ratio.

    Attributes:
        what: Whose cost.
        against: Against whose.
        goal: Where it should be.
        gate: Where it has to be.
        find: Returns the ratio from the results; KeyError where that was not measured.
        at_least: The ratio has to be as high, not as low.
    """

    what: str
    against: str
    goal: float
    gate: float
    find: Callable[[Results], float]
    at_least: bool = False

    def reaches(self, ratio: float, limit: float) -> bool:
        """Say whether a ratio is on the right side of a limit."""
        return ratio >= limit if self.at_least else ratio <= limit


def _requests(framework: str, peer: str, ours: str = "tracemw") -> Callable[[Results], float]:
    def find(results: Results) -> float:
        peers = results["requests"][framework]["peers"]
        return float(peers[ours]["us"]["median"] / peers[peer]["us"]["median"])

    return find


def _function(case: str) -> Callable[[Results], float]:
    def find(results: Results) -> float:
        both = results["calls"]["functions"][case]
        if both["tracemw"] is None or both["mlflow"] is None:
            raise KeyError(case)
        return float(both["tracemw"]["median"] / both["mlflow"]["median"])

    return find


def _import(what: str) -> Callable[[Results], float]:
    def find(results: Results) -> float:
        found = results["imports"]
        return float(found[what]["median"] / found["opentelemetry.sdk.trace"]["median"])

    return find


def _load(server: str, field: str) -> Callable[[Results], float]:
    return lambda results: float(results["load"]["servers"][server]["tracemw"][field])


def _kept_up(results: Results) -> float:
    found = results["sustained"]
    return float(found["made"] / found["asked"] * found["stored"])


REQUEST, SMALL = "`TraceMiddleware`", "one `@tracemw.trace` call"

GATES = [
    Gate(REQUEST, "FastAPI native telemetry, no operation spans", 0.70, 0.85, _requests("fastapi", "native")),
    Gate(REQUEST, "OpenTelemetry contrib, no send/receive spans", 0.33, 0.45,
         _requests("fastapi", "contrib-lean")),
    Gate(REQUEST, "MLflow by hand", 0.12, 0.15, _requests("fastapi", "mlflow")),
    Gate(REQUEST, "one span of the SDK in the same place", 1.8, 2.2, _requests("fastapi", "floor")),
    Gate("`WSGITraceMiddleware`", "OpenTelemetry contrib", 0.30, 0.40, _requests("flask", "contrib")),
    Gate(SMALL, "one `@mlflow.trace` call, each a trace of its own", 0.25, 0.35, _function("function")),
    Gate(SMALL, "one `@mlflow.trace` call, each inside a trace", 0.25, 0.35, _function("below function")),
    Gate("`import tracemw`", "`import opentelemetry.sdk.trace`", 1.3, 1.6, _import("tracemw")),
    Gate("`import tracemw`, names used", "`import opentelemetry.sdk.trace`", 1.3, 1.6,
         _import("tracemw, its names used")),
    Gate("throughput, uvicorn", "the bare application", 0.85, 0.85, _load("uvicorn", "throughput_ratio"), True),
    Gate("throughput, gunicorn", "the bare application", 0.85, 0.85, _load("gunicorn", "throughput_ratio"), True),
    Gate("p99 latency, uvicorn", "the bare application", 1.2, 1.2, _load("uvicorn", "p99_ratio")),
    Gate("p99 latency, gunicorn", "the bare application", 1.2, 1.2, _load("gunicorn", "p99_ratio")),
    Gate("spans/s beside a server, all stored", "10,000", 1.0, 0.95, _kept_up, True),
]  # fmt: skip


def judged(results: Results) -> list[dict[str, Any]]:
    """Return the ratios that can be told from the results, each with what it should be and whether it is."""
    rows = []
    for gate in GATES:
        try:
            ratio = gate.find(results)
        except KeyError:
            continue
        rows.append(
            {
                "what": gate.what,
                "against": gate.against,
                "ratio": round(ratio, 3),
                "goal": gate.goal,
                "gate": gate.gate,
                "reaches_goal": gate.reaches(ratio, gate.goal),
                "holds": gate.reaches(ratio, gate.gate),
            }
        )
    return rows
