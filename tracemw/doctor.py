"""What `tracemw doctor` looks at: what is configured, where traces go, and whether they can get there."""

from __future__ import annotations

import os
import platform
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any, Final

from tracemw import config, settings
from tracemw.errors import SettingError, StoreError, TracemwError
from tracemw.settings import Settings, from_environment
from tracemw.store import Store, open_store
from tracemw.terminal import Screen, safe
from tracemw.views import moment

PACKAGES: Final = (
    "tracemw", "opentelemetry-sdk", "fastapi", "starlette", "flask", "werkzeug", "uvicorn", "gunicorn",
    "mlflow", "mlflow-tracing", "mlflow-skinny", "pandas",
)  # fmt: skip
_STANDARD_VARIABLES: Final = (
    "APP_ENVIRONMENT",
    "APP_VERSION",
    "DEPLOYMENT_ID",
    "REGION",
    "MLFLOW_TRACKING_URI",
    "OTEL_EXPORTER_OTLP_ENDPOINT",
    "OTEL_SDK_DISABLED",
    "OTEL_TRACES_SAMPLER",
    "OTEL_SERVICE_NAME",
    "OTEL_RESOURCE_ATTRIBUTES",
)


@dataclass
class Report:
    """What was found.

    Attributes:
        facts: By heading, name and value.
        problems: What keeps traces from being stored or delivered, each with what to do.
    """

    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {"ok": not self.problems, "problems": self.problems, **self.facts}

    def lines(self, screen: Screen) -> Iterator[str]:
        """Yield it for people."""
        for heading, facts in self.facts.items():
            yield screen.paint(heading, "bold")
            margin = max((len(name) for name in facts), default=0)
            for name, value in facts.items():
                yield f"  {screen.paint(f'{name:<{margin}}', 'dim')}  {safe(_shown(name, value))}"
            if not facts:
                yield "  -"
        for problem in self.problems:
            yield screen.paint("problem: ", "red") + safe(problem)
        if not self.problems:
            yield screen.paint("no problem found", "green")


def _shown(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name == "size_bytes":
        return f"{value / 2**20:,.1f} MiB"
    return moment(value) if name.endswith("_ns") else str(value)


def examine(store: str | None = None) -> Report:
    """Look at everything.

    Args:
        store: URL of the store, if it is not the configured one.
    """
    report = Report()
    report.facts["versions"] = _versions()
    report.facts["frameworks"] = _frameworks(report)
    report.facts["environment"] = _environment()
    try:
        found = from_environment()
    except SettingError as error:
        report.problems.append(str(error))
        found = Settings()
    url = store or config.store_url(found)
    report.facts["destination"] = _destination(report, found, url)
    report.facts["store"] = _guarded(report, lambda: _store(report, url, found))
    return report


def _guarded(report: Report, look: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return look()
    except TracemwError as error:
        report.problems.append(str(error))
        return {}


def _versions() -> dict[str, str]:
    python = f"{platform.python_implementation()} {platform.python_version()}"
    found = {"python": python, "platform": platform.platform(), "sqlite": sqlite3.sqlite_version}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _frameworks(report: Report) -> dict[str, str]:
    """Whether the adapters know the installed versions: one request to a tiny application of each framework."""
    from tracemw.adapters.check import check

    found = check()
    for name, problems in found.items():
        report.problems += [f"{name}: {problem}" for problem in problems]
    return {name: "; ".join(problems) or "as its adapter knows it" for name, problems in found.items()}


def _environment() -> dict[str, str]:
    """Variables that are set and count, and settings that they change; secrets in URLs are masked."""
    names = sorted(name for name in os.environ if name.startswith("TRACEMW_")) + list(_STANDARD_VARIABLES)
    return {name: _masked(os.environ[name]) for name in names if os.environ.get(name)}


def _destination(report: Report, found: Settings, url: str) -> dict[str, Any]:
    destination = config.effective_destination(found)
    facts = {"where": _masked(destination), "said by": _said_by(found), "store": url}
    if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        report.problems.append("OTEL_SDK_DISABLED is true: nothing is traced; unset it")
    if found.sample_rate is not None and found.sample_rate < 1:
        facts["sampled"] = f"{found.sample_rate:.3g} of all requests"
    if destination == "none:":
        report.problems.append("the destination is none: spans are dropped; set TRACEMW_DESTINATION")
    if config.is_remote(destination):
        facts["reached"] = _reach(report, destination)
    facts["dropped"] = "counted by each process: tracemw.stats() in the application"
    return facts


def _said_by(found: Settings) -> str:
    if found.destination is not None:
        return settings.variable("destination")
    if config.effective_destination(found) == settings.DEFAULT_DESTINATION:
        return "nobody: the default"
    return "MLFLOW_TRACKING_URI" if os.environ.get("MLFLOW_TRACKING_URI") else "OTEL_EXPORTER_OTLP_ENDPOINT"


def _masked(text: str) -> str:
    from tracemw.pipeline.target import masked

    return masked(text) if "://" in text else text


def _reach(report: Report, destination: str) -> str:
    from tracemw.pipeline import delivery

    fine, line = delivery.check(destination)
    if not fine:
        report.problems.append(f"{_masked(destination)}: {line}; traces wait in the store meanwhile")
    return line


def _store(report: Report, url: str, found: Settings) -> dict[str, Any]:
    if url == "memory:":
        return {"url": url, "note": "in the memory of each process; the command line cannot read it"}
    path = os.path.abspath(url.removeprefix("sqlite:///"))
    facts: dict[str, Any] = {"url": url, "path": path}
    if not os.path.exists(path):
        folder = os.path.dirname(path)
        if not os.access(folder, os.W_OK | os.X_OK):
            report.problems.append(f"{folder} is no directory that can be written: {path} cannot be made")
        return facts | {"exists": False, "note": "it is made with the first trace"}
    facts["mode"] = f"{os.stat(path).st_mode & 0o777:o}"
    with open_store(url, create=False) as store:
        facts |= {"writable": _writable(report, store), **_contents(report, store)}
    return facts | {"kept for": f"{found.max_age / 86400:g} days, up to {found.max_size / 2**20:,.0f} MiB"}


def _writable(report: Report, store: Store) -> bool:
    """Write something, and take it away again: permissions alone do not tell of a full or a locked disk."""
    owner = f"doctor-{os.getpid()}"
    try:
        store.lease(owner, owner, 1.0)
        store.release(owner, owner)
    except StoreError as error:
        report.problems.append(str(error))
        return False
    return True


def _contents(report: Report, store: Store) -> dict[str, Any]:
    counts = store.stats()
    facts: dict[str, Any] = {"schema version": store.read("PRAGMA user_version")[0][0]}
    index = store.read("SELECT value FROM facts WHERE name = 'tokens'")
    facts["token index"] = index[0][0] if index else "none: this SQLite has no FTS5, searches are slower"
    facts |= {name: counts[name] for name in ("traces", "spans", "size_bytes", "oldest_ns", "newest_ns")}
    facts |= {"waiting for delivery": counts["waiting"], "given up": counts["dead"]}
    running = store.read("SELECT count(*) FROM traces WHERE state = 'IN_PROGRESS'")[0][0]
    facts["in progress"] = running
    if counts["dead"]:
        letters = store.outbox_dead(1000)
        reasons = {letter.reason or "unknown" for letter in letters}
        facts["reasons"] = sorted(reasons)[:10]
        report.problems.append(
            f"{counts['dead']} traces were refused by the destination: see the reasons; `tracemw deliver --retry` "
            "tries them again"
        )
    return facts
