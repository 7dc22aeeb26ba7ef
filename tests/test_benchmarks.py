"""The benchmarks measure what they say, on whatever machine; what they find is not judged here."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks import __main__ as command
from benchmarks import environment, gates, imports, load, plot, report, sustained
from benchmarks.rounds import Rounds, Sample, Spread, Subject, measure, spread
from benchmarks.sections import Plan, calls, growth, line, requests
from tests.servers import ROOT

PLAN = Plan(
    python=sys.executable, generations=1, rounds=2, small_rounds=1, quick=True,
    peers=frozenset({"tracemw", "tracemw-stored", "floor"}),
)  # fmt: skip


# Rounds


def test_subjects_are_measured_in_turn_each_in_its_process() -> None:
    """Each subject has a sample of each round, larger than nothing; those of one process share it."""
    subjects = [Subject("micro", "identity", case, 50) for case in ("three headers, ASGI", "nothing")]
    found = measure(subjects, rounds=3, generations=2)
    assert {len(samples) for samples in found.samples.values()} == {6}
    assert found.us(subjects[0]).median > found.us(subjects[1]).median > 0
    assert found.us(subjects[0], "cpu").median > 0
    assert found.failed == {}


def test_a_subject_that_cannot_run_is_told_and_left_out() -> None:
    """A peer that is not installed, or breaks, has its reason in the results; the others go on."""
    missing, present = Subject("fastapi", "no such peer"), Subject("micro", "identity", "nothing", 10)
    breaking = Subject("micro", "identity", "no such case", 10)
    found = measure([missing, present, breaking], rounds=1)
    assert "no such peer" in found.failed[missing]
    assert "no such case" in found.failed[breaking]
    assert list(found.samples) == [present]


def test_overhead_is_the_difference_within_a_round() -> None:
    """Noise that lasts a round is in both, and not in the overhead."""
    mine, bare = Subject("g", "mine"), Subject("g", "bare")
    noise = [0.0, 500.0, 20.0, 0.0, 90.0]
    found = Rounds(
        {mine: [Sample(50 + n, 50 + n) for n in noise], bare: [Sample(40 + n, 40 + n) for n in noise]}
    )
    assert found.over(mine, bare) == Spread(10, 10, 10)


def test_spread() -> None:
    """The median with the quartiles; one value is all three."""
    assert spread([5, 1, 2, 3, 4]) == Spread(3, 2, 4)
    assert spread([7.0]) == Spread(7, 7, 7)


def test_a_process_has_no_settings_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables that change what tracing does are not handed on."""
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    monkeypatch.setenv("TRACEMW_SAMPLE_RATE", "0")
    from benchmarks.rounds import environment as of_a_process

    assert not {"OTEL_SDK_DISABLED", "TRACEMW_SAMPLE_RATE"} & of_a_process().keys()
    assert of_a_process(BENCH_PEER="bare")["BENCH_PEER"] == "bare"


# Sections


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    """A run of all sections but the load, with few rounds."""
    found = {"requests": requests(PLAN), "calls": calls(PLAN), "growth": growth(PLAN)}
    found["imports"] = {
        name: {"median": value.median, "low": value.low, "high": value.high}
        for name, value in imports.measure(rounds=1).items()
    }
    taken = {"date": "2026-01-01", "machine": environment.machine(), "versions": {"python": "3"}, "clock": "cpu"}
    return {"taken": taken, **found, "ratios": gates.judged(found)}


@pytest.mark.slow
def test_requests_cost_more_with_tracing(results: dict[str, Any]) -> None:
    """Both frameworks are there, each with its bare application and the chosen peers; tracing costs something."""
    assert set(results["requests"]) == {"fastapi", "flask"}
    peers = results["requests"]["fastapi"]["peers"]
    assert set(peers) == {"tracemw", "tracemw-stored", "floor"}
    assert peers["tracemw"]["us"]["median"] > 0
    assert peers["tracemw-stored"]["us"]["median"] > peers["tracemw"]["us"]["median"]


@pytest.mark.slow
def test_calls_without_the_peer(results: dict[str, Any]) -> None:
    """Where MLflow is not installed our calls are measured all the same."""
    functions = results["calls"]["functions"]
    assert functions["below function"]["tracemw"]["median"] > 0
    assert results["calls"]["capture"]["small dict"]["tracemw"]["median"] > 0
    assert results["calls"]["identity"]["three headers, WSGI"]["median"] > 0


@pytest.mark.slow
def test_growth_is_told_with_its_slope(results: dict[str, Any]) -> None:
    """Every kind has its sizes, a slope and an exponent; a payload is cut, so that it stops growing."""
    kinds = results["growth"]["kinds"]
    assert set(kinds) == {"spans", "spans-stored", "attributes", "payload", "streams"}
    assert kinds["spans"]["slope"] > 0
    assert kinds["payload"]["exponent"] < 0.9
    assert results["growth"]["streams"]["traced_kb"] > results["growth"]["streams"]["bare_kb"] > 0
    assert [row["traces"] for row in results["growth"]["store"]] == [1000, 10000]


def test_a_line() -> None:
    """The slope is that between the last two; the exponent is 1 for a line, 2 for a square, 0 for a constant."""
    assert line([1, 10, 100], [15, 60, 510])["slope"] == 5
    assert line([10, 100], [20, 200])["exponent"] == 1
    assert line([10, 100], [1, 100])["exponent"] == 2
    assert line([10, 100], [7, 7])["exponent"] == 0


@pytest.mark.slow
def test_imports(results: dict[str, Any]) -> None:
    """Ours and the SDK's are there; what is not installed is left out."""
    found = results["imports"]
    assert found["tracemw"]["median"] > 0 and found["opentelemetry.sdk.trace"]["median"] > 0


# Gates


@pytest.mark.slow
def test_gates_are_judged_from_what_was_measured(results: dict[str, Any]) -> None:
    """A ratio whose parts were measured is judged; one that lacks a part is left out."""
    judged = {(row["what"], row["against"]): row for row in results["ratios"]}
    assert ("`TraceMiddleware`", "one span of the SDK in the same place") in judged
    assert ("`TraceMiddleware`", "MLflow by hand") not in judged


@pytest.mark.parametrize(
    ("ratio", "at_least", "reaches_goal", "holds"),
    [(0.5, False, True, True), (0.75, False, False, True), (0.9, False, False, False), (0.9, True, True, True)],
)
def test_a_gate(ratio: float, at_least: bool, reaches_goal: bool, holds: bool) -> None:
    """A cost has to be below its limits, a throughput above."""
    gate = gates.Gate("ours", "theirs", 0.7, 0.85, lambda _: ratio, at_least)
    assert gate.reaches(ratio, gate.goal) is reaches_goal
    assert gate.reaches(ratio, gate.gate) is holds


# Reports


@pytest.fixture
def stored() -> dict[str, Any]:
    """The results that the performance page shows: a complete run."""
    found: dict[str, Any] = json.loads((ROOT / "docs/performance.json").read_text())
    return found


def test_report(stored: dict[str, Any]) -> None:
    """Each section has its title and tables whose rows have as many cells as their head."""
    text = report.markdown(stored)
    for title in ("What has to hold", "Requests", "Calls", "Imports", "Under load", "Growth"):
        assert f"### {title}\n" in text
    for block in text.split("\n\n"):
        rows = [row for row in block.splitlines() if row.startswith("|")]
        assert len({row.count("|") for row in rows}) <= 1, block


def test_report_is_put_between_the_marks(stored: dict[str, Any]) -> None:
    """The page's own text stays; a second run replaces what the first has written."""
    page = f"# Title\n\n{report.BEGIN}\nfrom before\n{report.END}\n\nMore.\n"
    once = report.inserted(page, stored)
    assert once.startswith("# Title\n") and once.endswith("\n\nMore.\n") and "from before" not in once
    assert report.inserted(once, stored) == once
    with pytest.raises(ValueError, match="no place for the results"):
        report.inserted("# Title\n", stored)


def test_a_peer_that_was_not_measured_is_in_the_table(stored: dict[str, Any]) -> None:
    """It has a row that says so, and no bar."""
    peers = {"sentry": {"label": "Sentry", "failed": "No module named 'sentry_sdk'"}}
    found = {**stored["requests"], "fastapi": {**stored["requests"]["fastapi"], "peers": peers}}
    assert "| Sentry | not measured |" in report.requests({"requests": found})
    assert plot.bars({"requests": found}).count("Sentry") == 1  # Flask's


@pytest.mark.parametrize("draw", [plot.bars, plot.lines])
def test_plots_are_drawings(stored: dict[str, Any], draw: Any) -> None:
    """Plots are well-formed SVG with everything inside of the drawing."""
    root = ElementTree.fromstring(draw(stored))
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    _, _, width, height = (float(part) for part in root.attrib["viewBox"].split())
    for text in root.iter("{http://www.w3.org/2000/svg}text"):
        x, long = float(text.attrib["x"]), 7.0 * len(text.text or "")
        start = {"start": x, "middle": x - long / 2, "end": x - long}[text.attrib["text-anchor"]]
        assert start >= 0 and start + long <= width, text.text
        assert 0 <= float(text.attrib["y"]) <= height


def test_what_is_written(stored: dict[str, Any], tmp_path: Path) -> None:
    """JSON that can be read again, the tables, both plots."""
    command.store(stored, tmp_path / "new")
    assert json.loads((tmp_path / "new/performance.json").read_text()) == stored
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "performance-growth.svg", "performance.json", "performance.md", "performance.svg",
    ]  # fmt: skip


def test_the_page_says_what_was_measured(stored: dict[str, Any]) -> None:
    """The tables of the performance page are those of the stored results."""
    page = (ROOT / "docs/performance.md").read_text()
    assert report.inserted(page, stored) == page
    assert (ROOT / "docs/performance.svg").read_text() == plot.bars(stored)
    assert (ROOT / "docs/performance-growth.svg").read_text() == plot.lines(stored)


# Load

WRK = """Running 4s test @ http://127.0.0.1:8000/users/42
  1 threads and 8 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency    12.11ms    4.21ms  61.11ms   89.11%
    Req/Sec   668.11     80.11     0.85k    72.50%
  Latency Distribution
     50%  850.00us
     75%   12.90ms
     90%   14.61ms
     99%    1.02s
  2664 requests in 4.00s, 1.02MB read
Requests/sec:    665.52
Transfer/sec:    261.27KB
"""


def test_what_wrk_prints_is_understood() -> None:
    """Latencies come in several units; failed requests are no throughput."""
    found = load.parse_wrk(WRK)
    assert found == {"rate": 665.52, "requests": 2664.0, "p50_ms": 0.85, "p99_ms": 1020.0}
    with pytest.raises(RuntimeError, match="requests failed"):
        load.parse_wrk(WRK + "  Non-2xx or 3xx responses: 12\n")
    with pytest.raises(RuntimeError, match="not what wrk prints"):
        load.parse_wrk("unable to connect")


@pytest.mark.parametrize("server", ["uvicorn", "gunicorn"])
def test_a_real_server_under_load(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both applications answer, with the Python generator as well; every request of the traced one is stored."""
    monkeypatch.setattr(shutil, "which", lambda name: None)
    found = load.measure(rounds=1, seconds=0.3, warm_up=0.1, servers=[server], peers=["bare", "tracemw"])
    bare, traced = found[server]["bare"], found[server]["tracemw"]
    assert bare.rate.median > 0 and traced.rate.median > 0
    assert traced.p99_ms.median >= traced.p50_ms.median > 0
    assert traced.megabytes > 5
    assert (bare.stored, traced.stored) == (0, 1)
    assert bare.throughput_ratio == 1


def test_spans_beside_a_server_are_counted() -> None:
    """What was asked for is made, and what is in the store is counted, without what the measuring asked for."""
    found = sustained.measure(seconds=1, spans=1000)
    assert 0 < found.made <= 1200
    assert (found.stored, found.dropped) == (1, 0)
    assert found.megabytes > 5


def test_a_server_that_does_not_start_says_why() -> None:
    """Its log is in the message."""
    server = load.Server(["-c", "raise SystemExit('no such application')"], "bare", 1, sys.executable)
    try:
        with pytest.raises(RuntimeError, match="no such application"):
            server.wait_ready()
    finally:
        assert server.stop() == (0, 0)


# The command


def test_the_command_line() -> None:
    """Sections and peers are checked; a run of a part does not overwrite the page."""
    chosen = command.options(["--only", "requests, imports", "--peers", "tracemw,native", "--quick"])
    assert chosen.only == {"requests", "imports"} and chosen.peers == {"tracemw", "native"}
    assert not command.is_complete(chosen)
    assert command.is_complete(command.options([]))
    with pytest.raises(SystemExit):
        command.options(["--only", "everything"])


@pytest.mark.slow
def test_a_run(tmp_path: Path) -> None:
    """One command measures, prints the tables, writes files."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--quick", "--only", "imports", "--python", sys.executable,
         "--into", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "| `import tracemw` |" in done.stdout
    assert json.loads((tmp_path / "performance.json").read_text())["ratios"]


def test_requirements_of_the_peers() -> None:
    """Every peer that is no part of the development environment is among what the benchmarks install."""
    wanted = " ".join(environment.requirements())
    for name in ("elastic-apm", "sentry-sdk", "ddtrace", "logfire", "asgi-correlation-id", "mlflow-tracing"):
        assert name in wanted
