"""The console destination: a line per ended trace."""

from __future__ import annotations

import io
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.delivery.rows import span_row, trace_row
from tracemw.pipeline.console import RECENT, ConsoleSink, line


def written(*traces: object) -> str:
    """What a console shows of these traces, written one after the other."""
    stream = io.StringIO()
    sink = ConsoleSink(stream)
    for trace in traces:
        sink.write([trace], [])  # type: ignore[list-item]
    return stream.getvalue()


def test_a_line_says_what_a_developer_looks_for() -> None:
    """Time, method and route, status, duration, user, session and trace id are on one line."""
    trace = trace_row(1, method="GET", route="/items/{id}", status_code=200, user_id="jane", session_id="s-1")
    text = line(trace)
    for part in ("GET /items/{id}", "200", "12.5 ms", "user=jane", "session=s-1", f"tr-{trace.trace_id}"):
        assert part in text
    assert "ERROR" not in text


def test_a_trace_outside_a_request_shows_its_name() -> None:
    """Without method and route there is the trace's name."""
    assert "nightly job" in line(trace_row(1, name="nightly job", method=None, route=None))


def test_a_failure_shows_its_message() -> None:
    """The root's status message says what went wrong."""
    trace = trace_row(1, state="ERROR", status_code=500)
    root = span_row(trace, 1, status="ERROR", status_message="ValueError: boom")
    assert line(trace, [root]).endswith("ValueError: boom")


def test_a_disconnected_client_is_no_error() -> None:
    """The outcome stands where the state says nothing."""
    assert "disconnected" in line(trace_row(1, state="STATE_UNSPECIFIED", outcome="disconnected"))


def test_each_trace_is_printed_once_when_it_has_ended() -> None:
    """Nothing while in progress, one line at the end, none for later changes."""
    trace = trace_row(1)
    assert written(replace(trace, duration_ns=None)) == ""
    assert written(replace(trace, duration_ns=None), trace, replace(trace, tags={"a": "b"})).count("\n") == 1


def test_what_is_remembered_is_bounded() -> None:
    """The traces known to be printed do not pile up."""
    sink = ConsoleSink(io.StringIO())
    sink.write([trace_row(number) for number in range(RECENT + 50)], [])
    assert len(sink._printed) == RECENT


@given(st.text(), st.text())
def test_no_control_character_reaches_the_terminal(name: str, user: str) -> None:
    """Whatever a caller sent, the line is one line of printable characters."""
    assert line(trace_row(1, name=name, user_id=user, method=None)).isprintable()


def test_a_narrow_encoding_escapes_what_it_lacks() -> None:
    """An ASCII console gets the line with escapes, not an exception."""
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    ConsoleSink(stream).write([trace_row(1, user_id="Jörg")], [])
    assert b"user=J\\xf6rg" in raw.getvalue()


def test_a_closed_console_is_no_failure() -> None:
    """Writing to a stream that is gone raises nothing: the writer thread would try again for ever."""
    stream = io.StringIO()
    stream.close()
    ConsoleSink(stream).write([trace_row(1)], [])


def test_without_a_stream_it_is_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    """It is looked up at each write, so that whoever replaces `sys.stderr` gets the lines."""
    ConsoleSink().write([trace_row(1)], [])
    assert "tr-" in capsys.readouterr().err


def test_a_process_without_a_console(monkeypatch: pytest.MonkeyPatch) -> None:
    """`pythonw` has no stderr at all."""
    monkeypatch.setattr(sys, "stderr", None)
    ConsoleSink().write([trace_row(1)], [])
