"""Runs the tests of the adapters with the oldest versions of the frameworks that are claimed, and some between.

With MLflow's oldest, those of the bridge as well.

    python -m tests.versions [NAME ...]     all, or those named; pytest's options after `--`

The newest versions are what `make test` has installed. Each set gets an environment of its own in
`.venv/versions`, which is kept and made anew when its requirements change.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[1]
HOME: Final = Path(os.environ.get("VERSIONS_HOME", ROOT / ".venv" / "versions"))

# FastAPI pins Starlette, and each step here is one of those at which what we use of it has changed.
SETS: Final[dict[str, tuple[str, ...]]] = {
    "oldest": ("fastapi==0.110.0", "flask[async]==2.3.0", "werkzeug==2.3.0"),
    "starlette": ("starlette==0.37.0", "flask[async]==3.0.0", "werkzeug==3.0.0"),
    "middle": ("fastapi==0.115.*", "flask[async]==3.0.*", "werkzeug==3.0.*"),
    "nested": ("fastapi==0.137.*", "flask[async]==3.1.*"),
    "telemetry": ("fastapi==0.142.0", "flask[async]==3.1.*", "mlflow-tracing==3.10.0"),
}
OURS: Final = (
    "opentelemetry-sdk", "contextvars-extras", "click", "lark", "regex", "hypothesis", "pytest>=8.3",
)  # fmt: skip


def environment(name: str) -> Path:
    """Return the Python of a set, with everything installed."""
    wanted = SETS[name] + OURS
    stamp = hashlib.sha256("\n".join((sys.version, *wanted)).encode()).hexdigest()[:12]
    home = HOME / name
    python, done = home / "bin" / "python", home / f"installed-{stamp}"
    if not done.exists():
        print(f"making {home} ...", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(home)], check=True)
        command = [str(python), "-m", "pip", "install", "-qq", "--disable-pip-version-check", *wanted]
        subprocess.run(command, check=True)
        done.touch()
    return python


def run(name: str, options: list[str]) -> int:
    """Run the tests with one set and return pytest's exit code."""
    python = environment(name)
    print(f"== {name}: {', '.join(SETS[name])}", flush=True)
    command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "tracemw.testing", *options]
    variables = {key: value for key, value in os.environ.items() if not key.startswith(("COV", "PYTEST"))}
    variables["PYTHONPATH"] = str(ROOT)  # tracemw is not installed there
    folders = ["tests/adapters"]
    if any(wanted.startswith("mlflow") for wanted in SETS[name]):
        folders.append("tests/mlflow")
    return subprocess.run([*command, *folders], cwd=ROOT, env=variables).returncode


def main(arguments: list[str]) -> int:
    """Run the sets that are named, or all."""
    at = arguments.index("--") if "--" in arguments else len(arguments)
    names, options = arguments[:at] or list(SETS), arguments[at + 1 :]
    unknown = [name for name in names if name not in SETS]
    if unknown:
        print(f"unknown: {', '.join(unknown)}; there are {', '.join(SETS)}", file=sys.stderr)
        return 2
    failed = [name for name in names if run(name, options) != 0]
    if failed:
        print(f"failed with {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
