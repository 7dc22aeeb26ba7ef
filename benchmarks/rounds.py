"""Interleaved rounds: each subject in a process of its own, asked in turn: all of them meet the same noise."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent

# What a machine's environment could change about the subjects.
PREFIXES = ("TRACEMW_", "OTEL_", "MLFLOW_", "DD_", "SENTRY_", "ELASTIC_", "LOGFIRE_", "APP_", "PYTHON", "COV")


class Sample(NamedTuple):
    """One measurement: microseconds for one operation, by the wall's clock and by the processor's."""

    wall: float
    cpu: float


class Subject(NamedTuple):
    """What is measured: which worker (`python -m benchmarks.worker GROUP NAME`), which case in it, how often.

    Attributes:
        number: Operations in one round.
    """

    group: str
    name: str
    case: str = ""
    number: int = 300

    @property
    def process(self) -> tuple[str, str]:
        """Which process measures it; subjects that differ in the case only share one."""
        return self.group, self.name


class WorkerFailed(Exception):
    """A worker did not start or died; the text is the end of what it said."""


def environment(**extra: str) -> dict[str, str]:
    """Return the environment of a subject's process."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(PREFIXES)}
    return {**kept, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "", "PYTHONHASHSEED": "0", **extra}


class Worker:
    """A subject's process, in a folder of its own.

    Args:
        process: The worker's group and name.
        python: The interpreter of the environment that has the peers.
    """

    def __init__(self, process: tuple[str, str], python: str = sys.executable) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="bench-")
        self._errors = tempfile.TemporaryFile(mode="w+", errors="replace")
        self._process = subprocess.Popen(
            [python, "-m", "benchmarks.worker", *process],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
            cwd=self._folder.name, env=environment(),
        )  # fmt: skip

    def wait_ready(self) -> None:
        """Wait until it can be asked."""
        if self._line() != "ready":
            raise WorkerFailed(self._said())

    def ask(self, case: str, number: int) -> Sample:
        """Have a case done so many times."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{number} {case}\n")
            self._process.stdin.flush()
            wall, cpu = self._line().split()
        except (OSError, ValueError) as exc:
            raise WorkerFailed(self._said()) from exc
        return Sample(float(wall), float(cpu))

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def _said(self) -> str:
        self._process.kill()
        self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()
        return lines[-1] if lines else f"exit code {self._process.returncode}"

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.close()
            self._process.wait(10)
        except (OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()
        self._folder.cleanup()


class Spread(NamedTuple):
    """A median and the middle half of what it is the median of."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Return the median and the quartiles."""
    if len(values) < 2:
        return Spread(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


@dataclass
class Rounds:
    """What all rounds gave.

    Attributes:
        samples: For each subject one sample per round; rounds line up across subjects.
        failed: Why a subject could not be measured.
    """

    samples: dict[Subject, list[Sample]] = field(default_factory=dict)
    failed: dict[Subject, str] = field(default_factory=dict)

    def us(self, subject: Subject, clock: str = "wall") -> Spread:
        """Return the time of one operation."""
        return spread([getattr(sample, clock) for sample in self.samples[subject]])

    def over(self, subject: Subject, base: Subject, clock: str = "wall") -> Spread:
        """Return what an operation takes longer than another one, compared within each round."""
        pairs = zip(self.samples[subject], self.samples[base], strict=True)
        return spread([getattr(mine, clock) - getattr(bare, clock) for mine, bare in pairs])


def measure(
    subjects: Iterable[Subject],
    *,
    python: str = sys.executable,
    rounds: int = 20,
    generations: int = 1,
    tell: Callable[[str], None] = lambda text: None,
) -> Rounds:
    """Measure subjects in turn, round after round.

    Args:
        subjects: What to measure.
        python: The interpreter of the environment that has the peers.
        rounds: Rounds in each generation.
        generations: How often all processes are started anew: where memory came to lie makes a difference, too.
        tell: Gets a line about what is being done.
    """
    found = Rounds()
    subjects = list(subjects)
    for generation in range(generations):
        tell(f"processes {generation + 1} of {generations}")
        workers = _started(subjects, python, found)
        try:
            left = [subject for subject in subjects if subject not in found.failed]
            for number in range(rounds):
                _round(left, workers, found, turn=number)
                left = [subject for subject in left if subject not in found.failed]
        finally:
            for worker in workers.values():
                worker.close()
    for subject in found.failed:
        found.samples.pop(subject, None)
    return found


def _started(subjects: Sequence[Subject], python: str, found: Rounds) -> dict[tuple[str, str], Worker]:
    workers: dict[tuple[str, str], Worker] = {}
    for process in dict.fromkeys(s.process for s in subjects if s not in found.failed):
        worker = Worker(process, python)
        try:
            worker.wait_ready()
        except WorkerFailed as exc:
            worker.close()
            found.failed.update({subject: str(exc) for subject in subjects if subject.process == process})
            continue
        workers[process] = worker
    return workers


def _round(
    subjects: Sequence[Subject], workers: Mapping[tuple[str, str], Worker], found: Rounds, turn: int
) -> None:
    """Ask everybody once; each round begins with another one."""
    start = turn * 7 % max(1, len(subjects))
    for subject in (*subjects[start:], *subjects[:start]):
        try:
            sample = workers[subject.process].ask(subject.case, subject.number)
        except WorkerFailed as exc:
            found.failed[subject] = str(exc)
            continue
        found.samples.setdefault(subject, []).append(sample)
