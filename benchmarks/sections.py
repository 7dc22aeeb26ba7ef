"""The sections of a run: each measures something and returns plain values, as they go into the JSON."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks import imports, load, sustained
from benchmarks.growth import SIZES, UNITS
from benchmarks.peers import PEERS
from benchmarks.rounds import Rounds, Spread, Subject, environment, measure

BARE = "bare"


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        python: The interpreter of the environment that has the peers.
        clock: "cpu": the processor's time, of all threads; "wall": the time on the wall, which other processes of
            the machine make longer.
        generations: How often the processes of the requests are started anew.
        peers: Only these; None for all.
    """

    python: str
    clock: str = "cpu"
    generations: int = 3
    rounds: int = 15
    small_rounds: int = 10
    load_rounds: int = 12
    load_seconds: float = 2
    quick: bool = False
    peers: frozenset[str] | None = None
    tell: Callable[[str], None] = lambda text: None

    @classmethod
    def made_quick(cls, **given: Any) -> Plan:
        """Return one that takes a minute or two."""
        return cls(generations=1, rounds=10, small_rounds=5, load_rounds=3, load_seconds=2, quick=True, **given)


def plain(value: Spread) -> dict[str, float]:
    """Return a spread as it is written."""
    return {name: _rounded(number) for name, number in value._asdict().items()}


def _rounded(number: float) -> float:
    return number if number == 0 or not math.isfinite(number) else float(f"{number:.4g}")


# Requests: overhead over the bare application, for every peer.


def requests(plan: Plan) -> dict[str, Any]:
    """Measure what each peer adds to a request."""
    found: dict[str, Any] = {}
    for framework, peers in PEERS.items():
        plan.tell(f"requests: {framework}")
        names = [name for name in peers if plan.peers is None or name in plan.peers or name == BARE]
        subjects = {name: Subject(framework, name, number=300) for name in names}
        rounds = measure(
            subjects.values(), python=plan.python, rounds=plan.rounds, generations=plan.generations
        )
        base = subjects[BARE]
        if base in rounds.failed:
            raise RuntimeError(f"the bare {framework} application does not run: {rounds.failed[base]}")
        found[framework] = {
            "bare": {"us": plain(rounds.us(base, plan.clock)), "wall_us": plain(rounds.us(base))},
            "peers": {
                name: _overhead(rounds, subject, base, plan.clock) | {"label": peers[name][0]}
                for name, subject in subjects.items()
                if name != BARE
            },
        }
    return found


def _overhead(rounds: Rounds, subject: Subject, base: Subject, clock: str) -> dict[str, Any]:
    if subject in rounds.failed:
        return {"failed": rounds.failed[subject]}
    return {"us": plain(rounds.over(subject, base, clock)), "wall_us": plain(rounds.over(subject, base))}


# Calls: small things, each alone.

FUNCTIONS = {
    "function": "plain function",
    "coroutine": "plain coroutine",
    "method": "plain method",
    "generator": "plain generator",
    "async generator": "plain async generator",
    "exception": "plain exception",
    "with": "nothing",
    "below function": "plain function",
    "below coroutine": "plain coroutine",
    "below with": "nothing",
}
HEAVY = {"list of 1,000,000", "bytes of 1 MB", "text of 10 kB", "list of 1,000 floats", "20 dataclasses"}


def calls(plan: Plan) -> dict[str, Any]:
    """Measure one traced call of each kind, ours and MLflow's; capture; identity."""
    plan.tell("calls")
    listed = subprocess.run(
        [plan.python, "-c", "from benchmarks.micro import *; import json; print(json.dumps(names()))"],
        capture_output=True, text=True, check=True, env=environment(),
    )  # fmt: skip
    cases: dict[str, list[str]] = json.loads(listed.stdout)
    subjects = [Subject("micro", library, case, 250) for library in ("tracemw", "mlflow") for case in _all_cases()]
    subjects += [Subject("micro", "capture", case, _often(case)) for case in cases["capture"]]
    subjects += [Subject("micro", "identity", case, 1000) for case in cases["identity"]]
    subjects += [Subject("micro", "floor", case, 1000) for case in ("span", "nothing")]
    rounds = measure(subjects, python=plan.python, rounds=plan.small_rounds)

    def over(library: str, case: str, base: str, number: int = 250) -> dict[str, float] | None:
        mine, bare = Subject("micro", library, case, number), Subject("micro", library, base, number)
        return plain(rounds.over(mine, bare, plan.clock)) if mine in rounds.samples else None

    def alone(library: str, case: str, number: int) -> dict[str, float]:
        return plain(rounds.us(Subject("micro", library, case, number), plan.clock))

    return {
        "functions": {
            case: {library: over(library, case, base) for library in ("tracemw", "mlflow")}
            for case, base in FUNCTIONS.items()
        },
        "floor": over("floor", "span", "nothing", 1000),
        "capture": {
            case: {
                "tracemw": alone("capture", case, _often(case)),
                "json": alone("capture", f"json {case}", _often(case)),
            }
            for case in cases["capture"]
            if not case.startswith("json ")
        },
        "identity": {
            case: over("identity", case, "nothing", 1000) for case in cases["identity"] if case != "nothing"
        },
    }


def _all_cases() -> list[str]:
    return [*FUNCTIONS, *dict.fromkeys(FUNCTIONS.values())]


def _often(case: str) -> int:
    return 3 if "1,000,000" in case else 50 if case.removeprefix("json ") in HEAVY else 300


# Imports, load.


def imported(plan: Plan) -> dict[str, Any]:
    """Measure imports, in milliseconds."""
    plan.tell("imports")
    found = imports.measure(plan.python, rounds=plan.small_rounds)
    return {name: plain(value) for name, value in found.items()}


def loaded(plan: Plan) -> dict[str, Any]:
    """Measure real servers under load."""
    servers = ("uvicorn", "gunicorn") if plan.quick else tuple(load.SERVERS)
    found = load.measure(
        python=plan.python, rounds=plan.load_rounds, seconds=plan.load_seconds, servers=servers,
        tell=lambda name: plan.tell(f"load: {name}"),
    )  # fmt: skip
    return {
        "generator": load.generator(),
        "connections": load.CONNECTIONS,
        "servers": {
            server: {peer: _plain_outcome(outcome) for peer, outcome in peers.items()}
            for server, peers in found.items()
        },
    }


def kept_up(plan: Plan) -> dict[str, Any]:
    """Measure many spans a second beside a server."""
    plan.tell("sustained")
    found = sustained.measure(python=plan.python, seconds=5 if plan.quick else 20)
    return {"asked": sustained.SPANS, **_plain_outcome(found)}


def _plain_outcome(outcome: load.Outcome | sustained.Outcome) -> dict[str, Any]:
    return {
        name: plain(value) if isinstance(value, Spread) else _rounded(value)
        for name, value in outcome._asdict().items()
    }


# Growth.


def growth(plan: Plan) -> dict[str, Any]:
    """Measure how cost grows with what there is more and more of."""
    plan.tell("growth")
    subjects = {
        (name, size): Subject("growth", name, str(size), 100 if name == "payload" else max(2, 200 // size))
        for name, sizes in SIZES.items()
        for size in sizes
    }
    rounds = measure(subjects.values(), python=plan.python, rounds=max(3, plan.small_rounds // 2))
    command = [plan.python, "-m", "benchmarks.growth", *(["--quick"] if plan.quick else [])]
    other = subprocess.run(command, capture_output=True, text=True, check=True, env=environment())
    kinds = {}
    for name, sizes in SIZES.items():
        times = [rounds.us(subjects[name, size], plan.clock).median for size in sizes]
        kinds[name] = {"unit": UNITS[name], **line(sizes, times)}
    return {"kinds": kinds, **json.loads(other.stdout)}


def line(sizes: list[int], times: list[float]) -> dict[str, Any]:
    """Return the slope at the end, and how far it is from a line.

    Args:
        sizes: How much there is; each several times the one before.
        times: What it takes.

    Returns:
        `slope`: what one more takes, between the last two sizes; `exponent`: of the power law through them, where
        1 is linear and 0 does not grow.
    """
    return {
        "sizes": {str(size): _rounded(time) for size, time in zip(sizes, times, strict=True)},
        "slope": _rounded((times[-1] - times[-2]) / (sizes[-1] - sizes[-2])),
        "exponent": round(math.log(times[-1] / times[-2]) / math.log(sizes[-1] / sizes[-2]), 2),
    }


SECTIONS: dict[str, Callable[[Plan], dict[str, Any]]] = {
    "requests": requests,
    "calls": calls,
    "imports": imported,
    "load": loaded,
    "sustained": kept_up,
    "growth": growth,
}
