"""Real servers for tests: started as processes on free loopback ports, stopped by their own pid.

    with servers.uvicorn("example_apps.fastapi_chat.app:app", env={"TRACEMW_DESTINATION": url}) as server:
        answer = server.post("/chat", {"question": "What is a span?"}, headers={"X-User-ID": "jane"})
        assert answer.status == 200

The server binds port 0 and says in its log which port it got: nothing else can take the port in between, so
tests may run in parallel. Only the standard library is used, so that a test can send whatever bytes it needs.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

ROOT = Path(__file__).resolve().parent.parent
START_TIMEOUT = 30.0
STOP_TIMEOUT = 15.0

# What the machine's own environment says must not change what a test sees.
_OURS = re.compile(
    r"^(TRACEMW|APP|OTEL|MLFLOW|DEPLOYMENT|REGION|K8S|KUBERNETES|AWS|GOOGLE|K|GAE|WEBSITE|FLY|RENDER|HEROKU|DYNO|VERCEL"
    r"|UVICORN|GUNICORN)(_|$)"
)
# uvicorn: "Uvicorn running on http://127.0.0.1:40213"; gunicorn: "Listening at: http://127.0.0.1:40213 (12)".
_LISTENING = re.compile(r"(?:running on|Listening at:) http://127\.0\.0\.1:(\d+)")

Headers = Mapping[str, str] | Iterable[tuple[str, str | bytes]]


class ServerError(AssertionError):
    """The server did not start, or did not stop when it was told to; the message ends with its log."""


@dataclass(frozen=True)
class Answer:
    """A whole response: `headers` is a list of pairs in wire order."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes

    def header(self, name: str) -> str | None:
        """The first value of a header, None without one."""
        return next((value for key, value in self.headers if key.lower() == name.lower()), None)

    @property
    def text(self) -> str:
        """The body as UTF-8 text."""
        return self.body.decode()

    def json(self) -> Any:
        """The body read as JSON."""
        return json.loads(self.body)


@dataclass
class Server:
    """A running server process.

    Attributes:
        process: The process that was started (with gunicorn: the arbiter).
        log: The file that its stdout and stderr go to.
        port: The loopback port it listens on.
    """

    process: subprocess.Popen[bytes]
    log: Path
    port: int = 0
    _stopped: bool = field(default=False, repr=False)

    @property
    def url(self) -> str:
        """The base URL, without a slash at the end."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """Process id of the server (with gunicorn or `--workers`: of the parent)."""
        return self.process.pid

    def output(self) -> str:
        """What the server has logged until now."""
        return self.log.read_text(errors="replace")

    def get(self, path: str, headers: Headers = (), *, timeout: float = 20.0) -> Answer:
        """`request("GET", …)`."""
        return self.request("GET", path, headers, timeout=timeout)

    def post(
        self, path: str, value: object = None, headers: Headers = (), *, timeout: float = 20.0
    ) -> Answer:
        """Post a value as JSON."""
        pairs = [("Content-Type", "application/json"), *_pairs(headers)]
        return self.request("POST", path, pairs, json.dumps(value).encode(), timeout=timeout)

    def request(
        self, method: str, path: str, headers: Headers = (), body: bytes = b"", *, timeout: float = 20.0
    ) -> Answer:
        """Send one request on its own connection and read the whole response."""
        with self.open(method, path, headers, body, timeout=timeout) as response:
            return Answer(response.status, response.getheaders(), response.read())

    @contextmanager
    def open(
        self, method: str, path: str, headers: Headers = (), body: bytes = b"", *, timeout: float = 20.0
    ) -> Iterator[Any]:
        """Send a request and yield the `http.client.HTTPResponse` before its body is read.

        Leaving the block closes the connection: leave early to be a client that goes away in mid-stream.
        """
        connection = HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.putrequest(method, path)
            for name, value in _pairs(headers):
                connection.putheader(name, value)
            if body or method in {"POST", "PUT", "PATCH"}:
                connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            response = connection.getresponse()
            try:
                yield response
            finally:
                response.close()
        finally:
            connection.close()

    def workers(self) -> list[int]:
        """Process ids of the server's direct children (gunicorn's or uvicorn's workers); Linux only."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children")
        return [int(pid) for pid in children.read_text().split()] if children.exists() else []

    def stop(self, sig: int = signal.SIGTERM, timeout: float = STOP_TIMEOUT) -> int:
        """Ask the server to stop and wait for it.

        Returns:
            Its return code (uvicorn raises the signal again after a graceful stop: -15).

        Raises:
            ServerError: It hung; it has then been killed, with its workers.
        """
        self._stopped = True
        if self.process.poll() is None:
            self.process.send_signal(sig)
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise ServerError(f"the server did not stop within {timeout} s\n{self.output()}") from None

    def kill(self) -> None:
        """SIGKILL for the server and every process of its session: the test started all of them."""
        self._stopped = True
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait(STOP_TIMEOUT)


def uvicorn(
    app: str,
    *options: str,
    env: Mapping[str, str] | None = None,
    cwd: Path | str = ROOT,
    timeout: float = START_TIMEOUT,
) -> AbstractContextManager[Server]:
    """Run `uvicorn APP OPTIONS`; arguments and result as for `serve`."""
    command = [sys.executable, "-m", "uvicorn", app, "--host", "127.0.0.1", "--port", "0", *options]
    return serve(command, env=env, cwd=cwd, timeout=timeout)


def gunicorn(
    app: str,
    *options: str,
    env: Mapping[str, str] | None = None,
    cwd: Path | str = ROOT,
    timeout: float = START_TIMEOUT,
) -> AbstractContextManager[Server]:
    """Run `gunicorn APP OPTIONS`; arguments and result as for `serve`."""
    # Newer versions open a control socket in the home directory, which test runs would share.
    alone = ["--no-control-socket"] if _version("gunicorn") >= (25, 1) else []
    command = [sys.executable, "-m", "gunicorn", app, "--bind", "127.0.0.1:0", *alone, *options]
    return serve(command, env=env, cwd=cwd, timeout=timeout)


@contextmanager
def serve(
    command: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | str = ROOT,
    timeout: float = START_TIMEOUT,
) -> Iterator[Server]:
    """Run a server and yield it once it listens; at the end stop it, whatever happened.

    Args:
        command: The command line. It binds port 0 of 127.0.0.1 and logs the address, worded as uvicorn or
            gunicorn words it.
        env: Environment variables on top of the machine's (without tracing and platform variables).
        cwd: Working directory, the repository by default; modules in it can be imported.
        timeout: Seconds to wait for the port.

    Raises:
        ServerError: The server ended or stayed silent instead of listening, or did not stop when told to.
    """
    with tempfile.TemporaryDirectory(prefix="tracemw-server-") as folder:
        log = Path(folder, "log")
        server = Server(_start(command, env or {}, Path(cwd), log), log)
        try:
            server.port = _port(server, timeout)
            yield server
            if not server._stopped:
                server.stop()
        finally:
            server.kill()


def clean_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The machine's environment without the variables that tracing reads, and with `extra`."""
    env = {key: value for key, value in os.environ.items() if not _OURS.match(key)}
    return {**env, "PYTHONUNBUFFERED": "1", **(extra or {})}


def wait_for(what: Callable[[], T], timeout: float = 10.0, interval: float = 0.05) -> T:
    """Call `what` until its result is true; returns that result.

    Raises:
        AssertionError: It was not true within the timeout; the message shows the last result.
    """
    end = time.monotonic() + timeout
    while not (result := what()):
        assert time.monotonic() < end, f"still {result!r} after {timeout} s"
        time.sleep(interval)
    return result


def _start(command: Sequence[str], env: Mapping[str, str], cwd: Path, log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as output:
        return subprocess.Popen(
            command,
            cwd=cwd,
            env=clean_environment(env),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that kill() reaches workers whose parent is gone
        )


def _port(server: Server, timeout: float) -> int:
    end = time.monotonic() + timeout
    while True:
        ended = server.process.poll() is not None
        found = _LISTENING.search(server.output())
        if found and not ended and _listens(int(found.group(1))):
            return int(found.group(1))
        if ended or time.monotonic() > end:
            what = (
                f"ended with code {server.process.returncode}" if ended else f"is not there after {timeout} s"
            )
            raise ServerError(f"the server {what}\n{server.output()}")
        time.sleep(0.02)


def _listens(port: int) -> bool:
    """uvicorn with several workers names the address before one of them listens on it."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except ConnectionRefusedError:
        return False
    return True


def _version(distribution: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version(distribution))[:2])


def _pairs(headers: Headers) -> list[tuple[str, str | bytes]]:
    return list(headers.items()) if isinstance(headers, Mapping) else list(headers)
