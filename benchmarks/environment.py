"""The environment that the peers run in: made once, in the checkout, and again when what it holds has changed."""

from __future__ import annotations

import hashlib
import platform
import subprocess
import sys
import venv
from pathlib import Path

from benchmarks.rounds import HERE, ROOT

FOLDER = ROOT / ".venv-bench"
REQUIREMENTS = HERE / "requirements.txt"


def prepared(folder: Path = FOLDER) -> str:
    """Return the interpreter of an environment that has the peers and this checkout of tracemw.

    A peer that cannot be installed (no wheel for this Python) is left out: its row says so.
    """
    python = folder / "bin" / "python"
    marker = folder / f".holds-{_digest()}"
    if not marker.exists():
        print(f"Making {folder.name} with Python {platform.python_version()} and the peers ...", flush=True)
        venv.create(folder, with_pip=True, clear=True)
        _install(str(python), "--editable", str(ROOT))
        if not _install(str(python), "-r", str(REQUIREMENTS)):
            for requirement in requirements():
                if not _install(str(python), requirement):
                    print(f"  could not be installed: {requirement}", flush=True)
        marker.touch()
    return str(python)


def requirements() -> list[str]:
    """Return what the peers need."""
    lines = [line.partition("#")[0].strip() for line in REQUIREMENTS.read_text().splitlines()]
    return [line for line in lines if line]


def _install(python: str, *what: str) -> bool:
    command = [python, "-m", "pip", "install", "-qq", "--disable-pip-version-check", *what]
    return subprocess.run(command, check=False).returncode == 0


def _digest() -> str:
    """Return what the environment depends on, as a short text."""
    project = (ROOT / "pyproject.toml").read_text()
    needed = project[project.index("\ndependencies = ") : project.index("\n[project.optional-dependencies]")]
    parts = (sys.version, REQUIREMENTS.read_text(), needed, str(ROOT))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


VERSIONS = """
import importlib.metadata as m, json, platform, sqlite3
found = {d.metadata["Name"]: d.version for d in m.distributions()}
wanted = %r
print(json.dumps({"python": platform.python_version(), "sqlite": sqlite3.sqlite_version,
                  **{name: found[name] for name in wanted if name in found}}))
"""
NAMED = (
    "opentelemetry-sdk", "fastapi", "starlette", "flask", "Flask", "uvicorn", "gunicorn", "mlflow-tracing",
    "opentelemetry-instrumentation-fastapi", "opentelemetry-instrumentation-flask", "elastic-apm", "sentry-sdk",
    "ddtrace", "logfire", "asgi-correlation-id",
)  # fmt: skip


def versions(python: str) -> dict[str, str]:
    """Return the versions of what is measured."""
    import json

    output = subprocess.run([python, "-c", VERSIONS % (NAMED,)], capture_output=True, text=True, check=True).stdout
    found: dict[str, str] = json.loads(output)
    return found


def machine() -> str:
    """Return one line about the machine."""
    import os

    model = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    except OSError:  # not Linux
        pass
    return f"{model}, {os.cpu_count()} CPUs, {platform.system()}"
