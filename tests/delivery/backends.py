"""What traces are delivered to in tests: an OTLP receiver, a proxy that can be told to fail, an MLflow server.

The OTLP receiver speaks the real protocol (OpenTelemetry's own messages); the MLflow server is MLflow's.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import socket
import ssl
import subprocess
import threading
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests import servers


@dataclass(frozen=True)
class Request:
    """A request as it came; `body` is decompressed."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes
    peer: int  # port of the client: tells connections apart


@dataclass(frozen=True)
class Reply:
    """What is answered."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


class HttpServer:
    """A server in this process; `handle` answers. It can be shut off and put on again, on the same port."""

    def __init__(self, handle: Callable[[Request], Reply], tls: ssl.SSLContext | None = None) -> None:
        self._handle = handle
        self._tls = tls
        self._open: set[socket.socket] = set()
        self._server: ThreadingHTTPServer | None = None
        self.port = 0
        self.on()

    @property
    def url(self) -> str:
        """The base URL."""
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}"

    def on(self) -> None:
        """Listen."""
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = 1 << 16  # one packet per answer

            def setup(self) -> None:
                super().setup()
                outer._open.add(self.connection)

            def finish(self) -> None:
                outer._open.discard(self.connection)
                try:
                    super().finish()
                except OSError:
                    pass

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                headers = dict(self.headers.items())
                request = Request(
                    self.command, self.path, headers, _decompressed(body, headers), self.client_address[1]
                )
                reply = outer._handle(request)
                self.send_response(reply.status)
                for name, value in {"Content-Length": str(len(reply.body)), **reply.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(reply.body)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = answer

            def handle_one_request(self) -> None:
                try:
                    super().handle_one_request()
                except OSError:  # shut off in the middle
                    self.close_connection = True

            def log_message(self, format: str, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            allow_reuse_address = True

        self._server = Server(("127.0.0.1", self.port), Handler)
        if self._tls is not None:
            self._server.socket = self._tls.wrap_socket(self._server.socket, server_side=True)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def off(self) -> None:
        """Stop listening and cut all connections."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None
        for connection in list(self._open):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass


class Collector(HttpServer):
    """An OTLP receiver.

    Attributes:
        requests: Those that were taken, decoded.
        seen: All requests, in order.
        judge: Answers a request in place of the collector, unless it returns None.
    """

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.requests: list[ExportTraceServiceRequest] = []
        self.seen: list[Request] = []
        self.judge: Callable[[Request], Reply | None] = lambda request: None
        super().__init__(self._receive, tls)

    def _receive(self, request: Request) -> Reply:
        self.seen.append(request)
        reply = self.judge(request)
        if reply is not None:
            return reply
        message = ExportTraceServiceRequest()
        message.ParseFromString(request.body)
        self.requests.append(message)
        return Reply()

    @property
    def spans(self) -> list[Any]:
        """All spans received, as protobuf messages."""
        return [
            span
            for request in self.requests
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]

    @property
    def traces(self) -> list[str]:
        """Trace ids of the root spans received, in order of arrival."""
        return [span.trace_id.hex() for span in self.spans if not span.parent_span_id]


class Proxy(HttpServer):
    """Passes requests on to another server.

    Attributes:
        judge: Answers a request in place of that server, unless it returns None.
    """

    def __init__(self, upstream: str) -> None:
        self.upstream = urlsplit(upstream)
        self.judge: Callable[[Request], Reply | None] = lambda request: None
        self.seen: list[Request] = []
        super().__init__(self._pass_on)

    def _pass_on(self, request: Request) -> Reply:
        self.seen.append(request)
        reply = self.judge(request)
        if reply is not None:
            return reply
        connection = HTTPConnection(self.upstream.hostname or "", self.upstream.port, timeout=30)
        try:
            skipped = ("content-encoding", "content-length", "host", "connection")
            headers = {name: value for name, value in request.headers.items() if name.lower() not in skipped}
            connection.request(request.method, request.path, request.body, headers)
            response = connection.getresponse()
            kind = {"Content-Type": response.getheader("Content-Type") or "text/plain"}
            return Reply(response.status, response.read(), kind)
        except OSError:
            return Reply(502, b"nobody there")
        finally:
            connection.close()


def _decompressed(body: bytes, headers: Mapping[str, str]) -> bytes:
    encoding = next((value for name, value in headers.items() if name.lower() == "content-encoding"), "")
    if encoding == "gzip":
        return gzip.decompress(body)
    return zlib.decompress(body) if encoding == "deflate" else body


# MLflow


def mlflow_python() -> str | None:
    """Return a Python that has MLflow: TRACEMW_TEST_MLFLOW names it, else `.venv-mlflow` in the repository."""
    named = _MLFLOW_PYTHON or str(servers.ROOT / ".venv-mlflow" / "bin" / "python")
    if os.path.exists(named):
        return named
    return None


_MLFLOW_PYTHON = os.environ.get("TRACEMW_TEST_MLFLOW")  # read before the tests' environment is cleaned


def mlflow_environment() -> dict[str, str]:
    """Variables for every process that imports MLflow: it sends nothing anywhere else."""
    return {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }


class Mlflow:
    """An MLflow server on a database of its own; it can be killed and started again on the same port."""

    def __init__(self, python: str, folder: Path, *options: str) -> None:
        self.python = python
        self.folder = folder
        self._options = options
        self._context: Any = None
        self._server: servers.Server | None = None
        self.port = 0
        self.start()

    @property
    def url(self) -> str:
        """The base URL."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def version(self) -> tuple[int, ...]:
        """Version of the server."""
        assert self._server is not None
        return tuple(map(int, self._server.get("/version").text.split(".")))

    def start(self) -> None:
        """Start the server and wait until it answers."""
        command = [self.python, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", *(self._options or ("--backend-store-uri", "sqlite:///mlflow.db"))]
        self._context = servers.serve(command, env=mlflow_environment(), cwd=self.folder, timeout=90.0)
        self._server = self._context.__enter__()
        self.port = self._server.port
        servers.wait_for(self._answers, timeout=30.0)

    def _answers(self) -> bool:
        assert self._server is not None
        try:
            return self._server.get("/version").status == 200
        except OSError:
            return False

    def kill(self) -> None:
        """End it at once."""
        if self._server is not None:
            self._server.kill()
            self._context.__exit__(None, None, None)
            self._server = None


class Reader:
    """MLflow's own client, in a process of its own (it stays: importing MLflow takes seconds)."""

    def __init__(self, python: str, url: str) -> None:
        script = Path(__file__).with_name("mlflow_reader.py")
        environment = servers.clean_environment({**mlflow_environment(), "MLFLOW_TRACKING_URI": url})
        self._process = subprocess.Popen(
            [python, str(script)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, text=True,
        )  # fmt: skip

    def search(
        self, experiment: str, filter_string: str | None = None, spans: bool = True
    ) -> list[dict[str, Any]]:
        """Return the traces that MLflow finds, oldest first, as `told` in `mlflow_reader.py` has it."""
        assert self._process.stdin is not None and self._process.stdout is not None
        question = {"experiment": experiment, "filter": filter_string, "spans": spans}
        print(json.dumps(question), file=self._process.stdin, flush=True)
        answer = json.loads(self._process.stdout.readline())
        assert isinstance(answer, list), answer
        return answer

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(20)
        self._process.stdout.close()


# Certificates


def certificate(folder: Path) -> tuple[Path, Path]:
    """Return a self-signed certificate for 127.0.0.1 and its key, made by OpenSSL's command."""
    openssl = shutil.which("openssl")
    assert openssl, "these tests need the command openssl"
    pem, key = folder / "cert.pem", folder / "key.pem"
    command = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(pem)]
    subprocess.run(command, check=True, capture_output=True)
    return pem, key

