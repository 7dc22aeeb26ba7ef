"""What an import takes: each in a fresh process, in turn."""

from __future__ import annotations

import subprocess
import sys

from benchmarks.rounds import Spread, environment, spread

IMPORTS = {
    "opentelemetry.sdk.trace": "import opentelemetry.sdk.trace",
    "tracemw": "import tracemw",
    # Names are imported when they are first used: this is what an application has imported in the end.
    "tracemw, its names used": "import tracemw; tracemw.TraceMiddleware; tracemw.trace; tracemw.start_span",
    "fastapi": "import fastapi",
    "mlflow": "import mlflow",
    "logfire": "import logfire",
    "sentry_sdk": "import sentry_sdk",
    "ddtrace": "import ddtrace",
}

TIMED = """
import time
began = time.process_time()
{}
print((time.process_time() - began) * 1000)
"""


def measure(python: str = sys.executable, *, rounds: int = 10) -> dict[str, Spread]:
    """Return milliseconds of the processor's time for each import; those that are not installed are left out."""
    times: dict[str, list[float]] = {name: [] for name in IMPORTS}
    for number in range(rounds + 1):  # the first one compiles
        for name, statement in IMPORTS.items():
            done = subprocess.run(
                [python, "-c", TIMED.format(statement)],
                capture_output=True, text=True, check=False, env=environment(),
            )  # fmt: skip
            if done.returncode == 0 and number:
                times[name].append(float(done.stdout))
    return {name: spread(values) for name, values in times.items() if values}
