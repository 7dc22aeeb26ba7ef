"""Measures what tracing costs, against every peer, and says whether it is as little as it has to be.

    python -m benchmarks                        all of it; writes docs/performance.*
    python -m benchmarks --quick                in a minute or two; writes benchmarks/results/
    python -m benchmarks --only requests,calls  some sections
    python -m benchmarks --peers tracemw,native some peers (the bare application is always there)
    python -m benchmarks --check                exit code 1 if a gate is missed

The peers are installed into `.venv-bench`, once.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from benchmarks import environment, gates, plot, report
from benchmarks.peers import PEERS
from benchmarks.rounds import HERE, ROOT
from benchmarks.sections import SECTIONS, Plan

RESULTS = HERE / "results"
PAGE = ROOT / "docs" / "performance.md"


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return what the command line says."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--only", type=_names(set(SECTIONS)), metavar="SECTIONS", help=", ".join(SECTIONS))
    every = {name for peers in PEERS.values() for name in peers}
    parser.add_argument("--peers", type=_names(every), help="of the requests' section")
    parser.add_argument("--clock", choices=("cpu", "wall"), default="cpu", help="which time is compared")
    parser.add_argument("--check", action="store_true", help="fail if a gate is missed")
    parser.add_argument("--python", help="an interpreter that has the peers, instead of making an environment")
    parser.add_argument("--into", type=Path, help="the folder that the results are written to")
    return parser.parse_args(arguments)


def _names(allowed: set[str]) -> Any:
    def parse(text: str) -> frozenset[str]:
        chosen = frozenset(name.strip() for name in text.split(","))
        if unknown := chosen - allowed:
            known = ", ".join(sorted(allowed))
            raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: not one of {known}")
        return chosen

    return parse


def run(chosen: argparse.Namespace, python: str) -> dict[str, Any]:
    """Measure what was asked for."""
    began = time.monotonic()

    def tell(text: str) -> None:
        print(f"{time.monotonic() - began:5.0f} s  {text}", file=sys.stderr, flush=True)

    make = Plan.made_quick if chosen.quick else Plan
    plan = make(python=python, clock=chosen.clock, peers=chosen.peers, tell=tell)
    results: dict[str, Any] = {
        "taken": {
            "date": datetime.date.today().isoformat(),
            "machine": environment.machine(),
            "versions": environment.versions(python),
            "clock": chosen.clock,
            "quick": chosen.quick,
        }
    }
    for name, section in SECTIONS.items():
        if chosen.only is not None and name not in chosen.only:
            continue
        try:
            results[name] = section(plan)
        except Exception as exc:  # what the other sections found is not lost
            traceback.print_exc()
            results["taken"].setdefault("failed", {})[name] = str(exc).partition("\n")[0]
    results["ratios"] = gates.judged(results)
    results["taken"]["seconds"] = round(time.monotonic() - began)
    return results


def store(results: dict[str, Any], folder: Path) -> None:
    """Write the results: JSON, Markdown (into the page, where the folder has it), plots."""
    folder.mkdir(parents=True, exist_ok=True)
    if folder == RESULTS:
        (folder / ".gitignore").write_text("*\n")
    (folder / "performance.json").write_text(json.dumps(results, indent=1) + "\n")
    page = folder / PAGE.name
    if page == PAGE:
        page.write_text(report.inserted(page.read_text(), results))
    else:
        page.write_text(report.markdown(results, level=2) + "\n")
    if "requests" in results:
        (folder / "performance.svg").write_text(plot.bars(results))
    if "growth" in results:
        (folder / "performance-growth.svg").write_text(plot.lines(results))


def is_complete(chosen: argparse.Namespace) -> bool:
    """True where everything is measured, in full: worth to be written onto the page."""
    return not chosen.quick and chosen.only is None and chosen.peers is None


def main() -> int:
    """Run the command."""
    chosen = options()
    results = run(chosen, chosen.python or environment.prepared())
    failed = results["taken"].get("failed", {})
    folder = chosen.into or (PAGE.parent if is_complete(chosen) and not failed else RESULTS)
    store(results, folder)
    print(report.markdown(results, level=2))
    print(f"\nwritten to {folder}")
    missed = [row for row in results["ratios"] if not row["holds"]]
    for row in missed:
        print(f"missed: {row['what']} against {row['against']}: {row['ratio']:.2f}, has to be {row['gate']:.2f}")
    for name, why in failed.items():
        print(f"not measured: {name}: {why}")
    return 1 if failed or (missed and chosen.check) else 0


if __name__ == "__main__":
    sys.exit(main())
