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
from tracemw.pipeline.encode import MLFLOW_SCOPE
from tracemw.settings import Settings, from_environment
from tracemw.store import Store, open_store
from tracemw.store.errors import denied, is_missing, missing_folder
from tracemw.terminal import Screen, safe
from tracemw.views import moment

MLFLOW: Final = ("mlflow", "mlflow-tracing", "mlflow-skinny")
PACKAGES: Final = (
    "tracemw", "opentelemetry-sdk", "fastapi", "starlette", "flask", "werkzeug", "uvicorn", "gunicorn",
    *MLFLOW, "pandas",
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
        warnings: What was lost before, or may not be as it was meant.
    """

    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {"ok": not self.problems, "problems": self.problems, "warnings": self.warnings, **self.facts}

    def lines(self, screen: Screen) -> Iterator[str]:
        """Yield it for people."""
        for heading, facts in self.facts.items():
            yield screen.paint(heading, "bold")
            margin = max((len(name) for name in facts), default=0)
            for name, value in facts.items():
                yield f"  {screen.paint(f'{name:<{margin}}', 'dim')}  {safe(_shown(name, value))}"
            if not facts:
                yield "  -"
        for warning in self.warnings:
            yield screen.paint("warning: ", "yellow") + safe(warning)
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
    if any(name in report.facts["versions"] for name in MLFLOW):
        report.facts["mlflow"] = _bridge()
    report.facts["environment"] = _environment()
    try:
        found = from_environment()
    except SettingError as error:
        report.problems.append(str(error))
        found = Settings()
    url = store or config.store_url(found)
    destination = config.effective_destination(found)
    reached = len(report.problems)
    report.facts["destination"] = _destination(report, found, destination, url)
    asked = config.is_remote(destination) and len(report.problems) == reached
    path = os.path.abspath(url.removeprefix("sqlite:///"))
    report.facts["store"] = _store(report, url, path, found)
    if url != "memory:" and not is_missing(path) and not os.path.isdir(path):
        report.facts |= _guarded(report, lambda: _opened(report, url, destination, asked))
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


def _destination(report: Report, found: Settings, destination: str, url: str) -> dict[str, Any]:
    facts = {"where": _masked(destination), "said by": _said_by(found), "store": url}
    if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        report.problems.append("OTEL_SDK_DISABLED is true: nothing is traced; unset it")
    if found.sample_rate is not None and found.sample_rate < 1:
        facts["sampled"] = f"{found.sample_rate:.3g} of all requests"
    if destination == "none:":
        report.problems.append("the destination is none: spans are dropped; set TRACEMW_DESTINATION")
    if config.is_remote(destination):
        facts["reached"] = _reach(report, destination)
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


def _store(report: Report, url: str, path: str, found: Settings) -> dict[str, Any]:
    if url == "memory:":
        return {"url": url, "note": "in the memory of each process; the command line cannot read it"}
    facts: dict[str, Any] = {"url": url, "path": path}
    if is_missing(path):
        folder = os.path.dirname(path)
        if not os.path.isdir(folder):
            report.problems.append(str(missing_folder(path)))
        elif not os.access(folder, os.W_OK | os.X_OK):
            report.problems.append(str(denied(path, "made")))
        return facts | {"exists": False, "note": "it is made with the first trace"}
    if os.path.isdir(path):
        report.problems.append(f"{path} is no regular file: choose another path")
        return facts
    if os.access(path, os.F_OK):
        facts["mode"] = f"{os.stat(path).st_mode & 0o777:o}"
    return facts | {"kept for": f"{found.max_age / 86400:g} days, up to {found.max_size / 2**20:,.0f} MiB"}


def _opened(report: Report, url: str, destination: str, asked: bool) -> dict[str, Any]:
    """Look into the file.

    Args:
        asked: The destination was asked, and is well.
    """
    with open_store(url, create=False) as store:
        facts = report.facts["store"] | {"writable": _writable(report, store), **_contents(store)}
        return {
            "store": facts,
            "delivery": _delivery(report, store, destination, asked),
            "troubles": _troubles(report, store),
            **_mlflow(report, store),
        }


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


def _contents(store: Store) -> dict[str, Any]:
    counts = store.stats()
    facts: dict[str, Any] = {"schema version": store.read("PRAGMA user_version")[0][0]}
    index = store.read("SELECT value FROM facts WHERE name = 'tokens'")
    facts["token index"] = index[0][0] if index else "none: this SQLite has no FTS5, searches are slower"
    facts |= {name: counts[name] for name in ("traces", "spans", "size_bytes", "oldest_ns", "newest_ns")}
    facts["in progress"] = store.read("SELECT count(*) FROM traces WHERE state = 'IN_PROGRESS'")[0][0]
    return facts


def _delivery(report: Report, store: Store, destination: str, asked: bool) -> dict[str, Any]:
    from tracemw.pipeline import delivery

    found = delivery.waiting(store)
    by = delivery.deliverer_of(store)
    facts: dict[str, Any] = {"waiting": found["waiting"], "given up": found["dead"], "done by": by or "nobody now"}
    if found["waiting"] and not config.is_remote(destination):
        report.warnings.append(
            f"{found['waiting']} traces wait for a remote destination, and none is set here: set "
            "TRACEMW_DESTINATION as the application has it, or `tracemw deliver --to URL`"
        )
    elif found["waiting"] and by is None and (due := delivery.due_now(store)):
        report.problems.append(
            f"{due} traces wait and no process delivers them: start the application, or run `tracemw deliver`"
        )
    elif asked and (line := delivery.behind(store, destination)):
        report.problems.append(line)
    if found["dead"]:
        reasons = {letter.reason or "unknown" for letter in delivery.dead_letters(store, 1000)}
        facts["reasons"] = sorted(reasons)[:10]
        report.problems.append(
            f"{found['dead']} traces were refused by the destination: see the reasons; `tracemw deliver --retry` "
            "tries them again"
        )
    return facts


def _troubles(report: Report, store: Store) -> dict[str, Any]:
    """What processes that share the store have noted of spans lost and failures swallowed."""
    facts: dict[str, Any] = {}
    for trouble in store.troubles():
        host, pid = (trouble.process.split("/") + ["?"])[:2]
        said = [f"{name.replace('_', ' ')}: {_counted(value)}" for name, value in trouble.counts.items()]
        facts[f"{host}, process {pid}, {moment(trouble.at_ns)}"] = "; ".join(said)
    if facts:
        report.warnings.append(
            f"{len(facts)} processes lost spans, or failed to trace something, while the store was kept (see "
            "`troubles`): the reasons are in their logs, of the logger `tracemw`"
        )
    return facts


def _counted(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {count}" for name, count in value.items())
    return str(value)


def _bridge() -> dict[str, Any]:
    """Whether MLflow can be bridged here: it is tried."""
    from tracemw import mlflow

    try:
        reason = mlflow.check()
    except TracemwError as error:
        reason = str(error)
    return {"bridge": "possible: call tracemw.mlflow.bridge()" if reason is None else f"not possible: {reason}"}


def _mlflow(report: Report, store: Store) -> dict[str, Any]:
    """Whether spans of MLflow's API are among the newest of the store, which the bridge alone puts there."""
    facts = report.facts.get("mlflow", {})
    sql = "SELECT count(*) FROM (SELECT scope FROM spans ORDER BY id DESC LIMIT 1000) WHERE scope = ?"
    number = store.read(sql, (MLFLOW_SCOPE,))[0][0]
    if not facts and not number:
        return {}
    used = f"yes: {number} of the newest 1,000 spans are MLflow's" if number else "none of the newest 1,000 spans"
    return {"mlflow": facts | {"bridge in use": used}}
