"""What is recorded of an exception."""

from __future__ import annotations

import ast
import traceback

import pytest

from tracemw.failure import MESSAGE, STACKTRACE, TYPE, exception_attributes


def failing() -> BaseException:
    """An exception with a cause, raised in lines that Python would put marks below."""
    with pytest.raises(ValueError) as caught:
        try:
            {"a": 1}["b"] + 1
        except KeyError as exc:
            raise ValueError("no b") from exc
    return caught.value


def test_the_stack_trace_is_python_s_without_marks() -> None:
    """Cause, files, lines and messages are as Python prints them."""
    exc = failing()
    attributes = exception_attributes(exc)
    assert (attributes[TYPE], attributes[MESSAGE]) == ("ValueError", "no b")
    printed = "".join(traceback.format_exception(exc)).splitlines()
    without_marks = [line for line in printed if line.strip(" ^~")]
    assert [line for line in attributes[STACKTRACE].splitlines() if line] == without_marks


def test_recording_an_exception_parses_no_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dropped request ends wherever the garbage collector runs, also while the application parses code."""
    exc = failing()
    monkeypatch.setattr(ast, "parse", None)
    assert "KeyError: 'b'" in exception_attributes(exc)[STACKTRACE]
