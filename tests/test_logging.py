"""Ids on log records, of the application and in the servers' access lines."""

from __future__ import annotations

import io
import json
import logging
import logging.config
import logging.handlers
import queue
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry import context as otel_context
from opentelemetry import trace as trace_api
from opentelemetry.trace import NonRecordingSpan, SpanContext

import tracemw.logging as trace_logging
from tests import servers
from tracemw.logging import TraceContextFilter, describe, install
from tracemw.record import TraceRecord, with_record

TRACE_ID, ROOT_ID = 0xAB, 0xCD
TRACE = f"tr-{TRACE_ID:032x}"
LINE = "%(trace_id)s %(span_id)s %(client_request_id)s %(session_id)s %(user_id)s %(message)s"


@contextmanager
def request(record: TraceRecord | None = None, *, span_id: int = ROOT_ID) -> Iterator[TraceRecord]:
    """A request that is being handled, as the middleware makes it."""
    if record is None:
        record = TraceRecord(TRACE_ID, ROOT_ID)
        record.client_request_id, record.session_id, record.user_id = "req-1", "s-1", "jane"
    span = NonRecordingSpan(SpanContext(record.trace_id, span_id, False))
    context = trace_api.set_span_in_context(span, otel_context.Context())
    token = otel_context.attach(with_record(context, record))
    try:
        yield record
    finally:
        otel_context.detach(token)


@pytest.fixture
def log() -> Iterator[logging.Logger]:
    """A logger of its own, with one handler that writes to `log.handlers[0].stream`."""
    logger = logging.Logger("shop")
    handler = logging.StreamHandler(io.StringIO())
    logger.addHandler(handler)
    yield logger
    handler.close()


def text(logger: logging.Logger) -> str:
    stream = logger.handlers[0].stream  # type: ignore[attr-defined]
    return str(stream.getvalue())


def use(logger: logging.Logger, line: str = LINE, missing: str | None = "-") -> None:
    logger.handlers[0].addFilter(TraceContextFilter(missing))
    logger.handlers[0].setFormatter(logging.Formatter(line))


class TestFilter:
    def test_the_ids_of_the_request(self, log: logging.Logger) -> None:
        """Inside a request every record has the ids of trace, current span, request, session and user."""
        use(log)
        with request(span_id=0xEF):
            log.warning("hello")
        assert text(log) == f"{TRACE} {0xEF:016x} req-1 s-1 jane hello\n"

    @pytest.mark.parametrize(("missing", "shown"), [("-", "-"), ("", ""), (None, "None")])
    def test_outside_a_request(self, log: logging.Logger, missing: str | None, shown: str) -> None:
        """Outside a request the fields are there too, so that formats that name them work."""
        use(log, missing=missing)
        log.warning("hello")
        assert text(log) == f"{' '.join([shown] * 5)} hello\n"

    def test_a_trace_that_is_not_recorded(self, log: logging.Logger) -> None:
        """An excluded or unsampled request has its request id; a trace that nobody can find is not named."""
        use(log)
        record = TraceRecord(TRACE_ID, ROOT_ID, recording=False)
        record.client_request_id = "req-1"
        with request(record):
            log.warning("hello")
        assert text(log) == "- - req-1 - - hello\n"

    def test_a_span_of_another_trace(self, log: logging.Logger) -> None:
        """A span id is only named next to the trace that it belongs to."""
        use(log)
        with request(), trace_api.use_span(NonRecordingSpan(SpanContext(1, 2, False))):
            log.warning("hello")
        assert text(log).startswith(f"{TRACE} - req-1")

    def test_the_application_s_own_fields_stay(self, log: logging.Logger) -> None:
        """`extra={"user_id": ...}` neither raises nor is it overwritten."""
        use(log)
        with request():
            log.warning("hello", extra={"user_id": "from extra"})
        assert text(log).endswith("s-1 from extra hello\n")

    def test_a_queue_handler(self, log: logging.Logger) -> None:
        """What the filter found in the request's thread is what a listener in another thread writes."""
        use(log)
        records: queue.Queue[logging.LogRecord] = queue.Queue()
        sender = logging.handlers.QueueHandler(records)
        sender.addFilter(TraceContextFilter())
        with request():
            sender.handle(logging.LogRecord("shop", logging.INFO, "", 0, "hello", None, None))
        log.handlers[0].handle(records.get())
        assert text(log).startswith(f"{TRACE} ")

    def test_a_failure_of_ours_does_not_fail_the_call(
        self, log: logging.Logger, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Should the context be unreadable, the line is written without ids."""
        monkeypatch.setattr(trace_logging, "current_record", lambda: 1 / 0)
        use(log)
        log.warning("hello")
        assert text(log) == "- - - - - hello\n"

    @given(st.text(), st.text())
    def test_no_id_breaks_a_line(self, session: str, user: str) -> None:
        """Whatever ids hold (line separators, escapes, surrogates): one line, printable, encodable."""
        record = TraceRecord(TRACE_ID, ROOT_ID)
        record.session_id, record.user_id = session, user
        entry = logging.LogRecord("shop", logging.INFO, "", 0, "hello", None, None)
        with request(record):
            TraceContextFilter().filter(entry)
        line = logging.Formatter(LINE).format(entry)
        assert line.isprintable() and len(line.splitlines()) == 1 and line.encode()
        assert describe(record).isprintable()

    def test_printable_ids_are_shown_as_they_are(self) -> None:
        """Ordinary names in any script are not escaped."""
        record = TraceRecord(TRACE_ID, ROOT_ID)
        record.user_id = "Jürgen 用户 🙂"
        entry = logging.LogRecord("shop", logging.INFO, "", 0, "hello", None, None)
        with request(record):
            TraceContextFilter().filter(entry)
        assert entry.__dict__["user_id"] == "Jürgen 用户 🙂"


class TestDescribe:
    def test_the_ids_as_one_phrase(self) -> None:
        """`name=value` pairs that can be told apart whatever the values are."""
        record = TraceRecord(TRACE_ID, ROOT_ID)
        record.client_request_id, record.user_id = "req-1", 'a "b" user_id=root'
        expected = f'trace_id={TRACE} client_request_id=req-1 session_id=- user_id="a \\"b\\" user_id=root"'
        assert describe(record) == expected
        assert describe(None) == "trace_id=- client_request_id=- session_id=- user_id=-"


class TestInstall:
    def test_on_a_logger_s_handlers(self, log: logging.Logger) -> None:
        """The handlers' own formats may name the fields; calling it twice changes nothing."""
        log.handlers[0].setFormatter(logging.Formatter(LINE))
        install(log)
        install(log)
        assert len(log.handlers[0].filters) == 1
        with request():
            log.warning("hello")
        assert text(log) == f"{TRACE} {ROOT_ID:016x} req-1 s-1 jane hello\n"

    def test_appended_to_lines(self, log: logging.Logger) -> None:
        """`append=True` leaves the format and writes the ids at the end of the first line, once."""
        install(log)
        install(log, append=True)
        install(log, append=True)
        with request():
            log.warning("hello\nworld")
        ids = f"trace_id={TRACE} client_request_id=req-1 session_id=s-1 user_id=jane"
        assert text(log) == f"hello {ids}\nworld\n"

    def test_in_a_logging_configuration(self) -> None:
        """The filter can be named in `logging.config.dictConfig`."""
        logging.config.dictConfig(
            {
                "version": 1,
                "disable_existing_loggers": False,
                "filters": {"trace": {"()": "tracemw.logging.TraceContextFilter", "missing": "none"}},
                "formatters": {"line": {"format": LINE}},
                "handlers": {
                    "memory": {
                        "class": "logging.handlers.BufferingHandler",
                        "capacity": 9,
                        "filters": ["trace"],
                        "formatter": "line",
                    }
                },
                "loggers": {"tests.configured": {"handlers": ["memory"], "propagate": False}},
            }
        )
        logger = logging.getLogger("tests.configured")
        (handler,) = logger.handlers
        logger.error("hello")
        assert handler.format(handler.buffer[0]) == "none none none none none hello"  # type: ignore[attr-defined]
        logger.handlers.clear()
        handler.close()

    def test_a_root_logger_without_handlers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where nothing is configured, one call gives lines on stderr that show trace and request id."""
        root = logging.RootLogger(logging.WARNING)
        monkeypatch.setattr(logging, "root", root)
        monkeypatch.setattr(logging.Logger, "root", root)
        monkeypatch.setattr(logging, "getLogger", lambda name=None: root)
        install(append=True)
        (handler,) = root.handlers
        stream = io.StringIO()
        handler.setStream(stream)  # type: ignore[attr-defined]
        with request():
            root.warning("hello")
        assert re.fullmatch(rf"[\d :,-]+ WARNING root \[{TRACE} req-1\] hello\n", stream.getvalue())


APP = """
import logging
import tracemw.logging
from tracemw.asgi import TraceMiddleware
from tracemw.wsgi import WSGITraceMiddleware

tracemw.logging.install()
tracemw.logging.install("uvicorn.access", append=True)
log = logging.getLogger("shop")

async def handle(scope, receive, send):
    if scope["type"] == "http":
        log.warning("handling %s", scope["path"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})

def serve(environ, start_response):
    log.warning("handling %s", environ["PATH_INFO"])
    start_response("200 OK", [("Content-Length", "2")])
    return [b"ok"]

asgi = TraceMiddleware(handle)
wsgi = WSGITraceMiddleware(serve)
"""
SENT = {"X-Request-ID": "req-7", "X-Session-ID": "s 7", "X-User-ID": "j\u00fcrgen".encode()}


class TestServers:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        (tmp_path / "web.py").write_text(APP)
        return tmp_path

    def lines(self, server: servers.Server, word: str) -> list[str]:
        return [line for line in server.output().splitlines() if word in line]

    @pytest.mark.parametrize("options", [("--http", "h11"), ("--log-level", "info")])
    def test_uvicorn(self, folder: Path, options: tuple[str, ...]) -> None:
        """uvicorn writes its access line inside the request: it has the ids, without a configuration file."""
        with servers.uvicorn("web:asgi", *options, cwd=folder, env={"TRACEMW_DESTINATION": "memory:"}) as server:
            trace_id = server.get("/items/7", headers=_pairs(SENT)).header("x-trace-id")
            access = servers.wait_for(lambda: self.lines(server, '"GET /items/7'))
            (handled,) = self.lines(server, "handling /items/7")
        ids = f'trace_id={trace_id} client_request_id=req-7 session_id="s 7" user_id=jürgen'
        assert access[0].endswith(f'"GET /items/7 HTTP/1.1" 200 OK {ids}') or access[0].endswith(f"200 {ids}")
        assert f"[{trace_id} req-7]" in handled

    def test_uvicorn_with_a_configuration_file(self, folder: Path) -> None:
        """The same by `--log-config`: the filter on the handler, the fields in uvicorn's own formatter."""
        (folder / "web.py").write_text(APP.replace('tracemw.logging.install("uvicorn.access", append=True)', ""))
        config: dict[str, Any] = {
            "version": 1,
            "disable_existing_loggers": False,
            "filters": {"trace": {"()": "tracemw.logging.TraceContextFilter"}},
            "formatters": {
                "access": {
                    "()": "uvicorn.logging.AccessFormatter",
                    "fmt": "%(trace_id)s %(client_request_id)s %(request_line)s",
                },
                "default": {"format": "%(message)s"},
            },
            "handlers": {
                "access": {
                    "class": "logging.StreamHandler",
                    "formatter": "access",
                    "filters": ["trace"],
                },
                "default": {"class": "logging.StreamHandler", "formatter": "default"},
            },
            "loggers": {
                "uvicorn": {"handlers": ["default"], "level": "INFO", "propagate": False},
                "uvicorn.access": {"handlers": ["access"], "level": "INFO", "propagate": False},
            },
        }
        (folder / "log.json").write_text(json.dumps(config))
        options = ("--log-config", "log.json")
        with servers.uvicorn("web:asgi", *options, cwd=folder, env={"TRACEMW_DESTINATION": "memory:"}) as server:
            trace_id = server.get("/a", headers=_pairs(SENT)).header("x-trace-id")
            assert servers.wait_for(lambda: self.lines(server, f"{trace_id} req-7 GET /a HTTP/1.1"))

    @pytest.mark.parametrize("options", [(), ("--threads", "2")])
    def test_gunicorn(self, folder: Path, options: tuple[str, ...]) -> None:
        """gunicorn's access line takes the ids from the response headers, in its own configuration."""
        (folder / "gunicorn.conf.py").write_text(
            "from tracemw.logging import GUNICORN_ACCESS_FORMAT as access_log_format\naccesslog = '-'\n"
        )
        with servers.gunicorn("web:wsgi", *options, cwd=folder, env={"TRACEMW_DESTINATION": "memory:"}) as server:
            trace_id = server.get("/items/7", headers=_pairs(SENT)).header("x-trace-id")
            access = servers.wait_for(lambda: self.lines(server, '"GET /items/7'))
            (handled,) = self.lines(server, "handling /items/7")
        assert access[0].endswith(f"trace_id={trace_id} client_request_id=req-7")
        assert f"[{trace_id} req-7]" in handled


def _pairs(headers: dict[str, Any]) -> list[tuple[str, Any]]:
    return list(headers.items())
