"""Real servers under load, with and without tracing, the store being written: throughput, latency, memory."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.rounds import Spread, environment, spread

SERVERS: dict[str, list[str]] = {
    "uvicorn": [
        "-m", "uvicorn", "--factory", "benchmarks.load_apps:asgi", "--port", "{port}", "--no-access-log",
        "--log-level", "warning",
    ],
    "gunicorn": ["-m", "gunicorn", "benchmarks.load_apps:wsgi()", "--bind", "127.0.0.1:{port}"],
    "gunicorn, 4 threads": [
        "-m", "gunicorn", "benchmarks.load_apps:wsgi()", "--bind", "127.0.0.1:{port}", "--threads", "4",
    ],
}  # fmt: skip
PEERS = ("bare", "tracemw", "tracemw-unsampled")
CONNECTIONS = 8
PATH = "/users/42"
HEADERS = ["X-Request-ID: req-abc-123", "X-Session-ID: session-1", "X-User-ID: jane"]
TICKS = os.sysconf("SC_CLK_TCK")


class Burst(NamedTuple):
    """What one burst of load found.

    Attributes:
        requests: How many were answered.
        rate: Requests in a second.
        p50_ms: The median latency.
        p99_ms: The latency that one request in a hundred exceeds.
        cpu_us: The processor's time of the server for one request, all its threads.
    """

    requests: float
    rate: float
    p50_ms: float
    p99_ms: float
    cpu_us: float


class Stored(NamedTuple):
    """How much is in a server's store."""

    traces: int
    spans: int


class Server:
    """One server process (with its children) that serves one application.

    Args:
        command: How it is started, with `{port}` in it.
        peer: What the application is traced with.
        work: The handler's amount of work.
        python: The interpreter.
    """

    def __init__(self, command: Sequence[str], peer: str, work: int, python: str) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="bench-")
        self.port = _free_port()
        self._log = Path(self.folder.name, "log").open("w+")
        self.process = subprocess.Popen(
            [python, *(part.format(port=self.port) for part in command)],
            cwd=self.folder.name, env=environment(BENCH_PEER=peer, BENCH_WORK=str(work)),
            stdout=self._log, stderr=self._log,
        )  # fmt: skip

    def wait_ready(self, seconds: float = 30) -> None:
        """Wait until it answers."""
        until = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < until:
            try:
                self._ask()
                return
            except OSError:
                time.sleep(0.05)
        self._log.seek(0)
        raise RuntimeError(f"the server did not start: {self._log.read()[-2000:]}")

    def _ask(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("GET", PATH)
            status = connection.getresponse().status
        finally:
            connection.close()
        if status != 200:
            raise RuntimeError(f"the server answers with {status}")

    def burst(self, seconds: float) -> Burst:
        """Load it for so many seconds."""
        before = self._cpu()
        found = _load(self.port, seconds)
        cpu = (self._cpu() - before) / max(1, found["requests"]) * 1e6
        return Burst(found["requests"], found["rate"], found["p50_ms"], found["p99_ms"], cpu)

    def _pids(self) -> list[int]:
        pids = [self.process.pid]
        for pid in pids:
            try:
                pids += [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
            except OSError:  # it has ended, or this is not Linux
                continue
        return pids

    def _cpu(self) -> float:
        ticks = 0
        for pid in self._pids():
            try:
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            ticks += int(fields[11]) + int(fields[12])
        return ticks / TICKS

    def megabytes(self) -> float:
        """Return what it has in memory."""
        total = 0
        for pid in self._pids():
            try:
                found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
            except OSError:
                continue
            total += int(found[1]) if found else 0
        return total / 1024

    def stop(self) -> Stored:
        """End it; return what is in its store."""
        self.process.terminate()
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        stored = _stored(Path(self.folder.name, "load.db"))
        self._log.close()
        self.folder.cleanup()
        return stored


def _stored(path: Path) -> Stored:
    if not path.exists():
        return Stored(0, 0)
    connection = sqlite3.connect(path)
    try:
        counts = [connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in Stored._fields]
        return Stored(*counts)
    finally:
        connection.close()


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


# The generator.


def generator() -> str:
    """Return the name of what makes the load."""
    return "wrk" if shutil.which("wrk") else "the Python load generator"


def _load(port: int, seconds: float) -> dict[str, float]:
    wrk = shutil.which("wrk")
    if wrk is None:
        command = [sys.executable, "-m", "benchmarks.load_client", "127.0.0.1", str(port), PATH]
        command += [str(CONNECTIONS), str(seconds), *HEADERS]
        return json.loads(_output(command))  # type: ignore[no-any-return]
    command = [wrk, "-t1", f"-c{CONNECTIONS}", f"-d{max(1, round(seconds))}s", "--latency"]  # whole seconds only
    for header in HEADERS:
        command += ["-H", header]
    return parse_wrk(_output([*command, f"http://127.0.0.1:{port}{PATH}"]))


def _output(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment())
    if done.returncode:
        raise RuntimeError(f"{command[0]}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


_UNITS = {"us": 0.001, "ms": 1.0, "s": 1000.0, "m": 60_000.0}


def parse_wrk(text: str) -> dict[str, float]:
    """Return what wrk's report says.

    Raises:
        RuntimeError: Requests have failed.
    """
    if "Non-2xx" in text:
        raise RuntimeError(f"requests failed under load: {text}")
    latencies = {
        percent: float(number) * _UNITS[unit]
        for percent, number, unit in re.findall(r"^\s+(50|99)%\s+([\d.]+)(us|ms|s|m)$", text, re.MULTILINE)
    }
    rate, requests = re.search(r"Requests/sec:\s+([\d.]+)", text), re.search(r"(\d+) requests in", text)
    if rate is None or requests is None or len(latencies) != 2:
        raise RuntimeError(f"not what wrk prints: {text}")
    return {
        "rate": float(rate[1]),
        "requests": float(requests[1]),
        "p50_ms": latencies["50"],
        "p99_ms": latencies["99"],
    }


# The measurement.


class Outcome(NamedTuple):
    """One application under one server.

    Attributes:
        rate, p50_ms, p99_ms, cpu_us: As of a burst, over all of them.
        megabytes: In memory after them.
        throughput_ratio: Requests in a second, against the bare application's in the same round, which meets the
            same neighbours: the median of the rounds.
        p99_ratio: Likewise for the latency that one request in a hundred exceeds.
        cpu_ratio: The bare application's processor time for a request against this one's: the throughput's ratio
            as it would be where the processor is all that counts.
        stored: The share of requests that are in the store.
    """

    rate: Spread
    p50_ms: Spread
    p99_ms: Spread
    cpu_us: Spread
    megabytes: float
    throughput_ratio: float
    p99_ratio: float
    cpu_ratio: float
    stored: float


def measure(
    *,
    python: str = sys.executable,
    rounds: int = 5,
    seconds: float = 3,
    warm_up: float = 1,
    servers: Sequence[str] = tuple(SERVERS),
    peers: Sequence[str] = PEERS,
    tell: Callable[[str], None] = lambda text: None,
) -> dict[str, dict[str, Outcome]]:
    """Load each server in turn with each application; the bare one is among the peers."""
    work = int(_output([python, "-m", "benchmarks.load_apps"]))
    found = {}
    for name in servers:
        tell(name)
        found[name] = _measure_server(SERVERS[name], peers, work, python, rounds, seconds, warm_up)
    return found


def _measure_server(
    command: Sequence[str],
    peers: Sequence[str],
    work: int,
    python: str,
    rounds: int,
    seconds: float,
    warm_up: float,
) -> dict[str, Outcome]:
    running = {peer: Server(command, peer, work, python) for peer in peers}
    bursts: dict[str, list[Burst]] = {peer: [] for peer in peers}
    try:
        for server in running.values():
            server.wait_ready()
            server.burst(warm_up)
        for number in range(rounds):
            for peer in peers if number % 2 == 0 else reversed(peers):
                bursts[peer].append(running[peer].burst(seconds))
        memory = {peer: server.megabytes() for peer, server in running.items()}
    finally:
        stored = {peer: server.stop() for peer, server in running.items()}
    return {peer: _outcome(bursts[peer], bursts["bare"], memory[peer], stored[peer].traces) for peer in peers}


def _outcome(mine: list[Burst], bare: list[Burst], megabytes: float, stored: int) -> Outcome:
    def ratio(field: str) -> float:
        pairs = zip(mine, bare, strict=True)  # of the same round
        return float(statistics.median(getattr(a, field) / getattr(b, field) for a, b in pairs))

    served = sum(burst.requests for burst in mine)
    rate, p50, p99, cpu = (spread([getattr(burst, name) for burst in mine]) for name in Burst._fields[1:])
    return Outcome(
        rate, p50, p99, cpu, megabytes, ratio("rate"), ratio("p99_ms"), 1 / ratio("cpu_us"),
        min(1.0, stored / served),
    )  # fmt: skip
