"""Previews say what was asked and answered, by MLflow's rules."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracemw.previews import request_preview, response_preview, shorten

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "First question"},
    {"role": "assistant", "content": "First answer"},
    {"role": "user", "content": "Second question"},
]
PARTS = [
    {"type": "image_url", "url": "…"},
    {"type": "text", "text": "What is this?"},
    {"type": "text", "text": "x"},
]


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        ({"messages": TALK, "model": "m"}, "Second question"),
        ({"input": TALK}, "Second question"),
        ({"request": {"input": TALK}}, "Second question"),
        ({"request": {"request": {"messages": TALK}}}, "Second question"),
        ({"messages": [{"role": "user", "content": PARTS}]}, "What is this?"),
        ({"messages": [{"role": "user", "content": ["Plain part"]}]}, "Plain part"),
        ({"messages": TALK[:1]}, "Be brief."),
        ({"messages": [{"role": "user"}, "no message", TALK[1]]}, "First question"),
    ],
)
def test_request_of_a_chat(inputs: Any, expected: str) -> None:
    """The last user message; the last message if no user spoke; of parts the first that is text."""
    assert request_preview(json.dumps(inputs)) == expected


@pytest.mark.parametrize(
    ("outputs", "expected"),
    [
        ({"choices": [{"message": {"role": "assistant", "content": "Answer"}}]}, "Answer"),
        ({"output": [{"role": "assistant", "content": [{"type": "output_text", "text": "Answer"}]}]}, "Answer"),
        ({"messages": TALK}, "First answer"),
    ],
)
def test_response_of_a_chat(outputs: Any, expected: str) -> None:
    """The last assistant message, of chat completions and of responses."""
    assert response_preview(json.dumps(outputs)) == expected


@pytest.mark.parametrize(
    "value",
    [
        {"question": "hi", "k": 3},
        {"messages": []},
        {"messages": "none"},
        {"messages": [{"role": "user", "content": None}]},
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        {"choices": [{"text": "old"}]},
        {"choices": ["x"]},
        {"request": "x"},
        [{"messages": TALK}],
        "plain text",
        17,
        None,
    ],
)
def test_all_else_is_shown_as_json(value: Any) -> None:
    """What is no chat, or has no text, is shown as it was recorded."""
    text = json.dumps(value)
    assert request_preview(text) == response_preview(text) == text


def test_what_was_not_recorded_has_no_preview() -> None:
    """None stays None, so that something else can stand in."""
    assert request_preview(None) is None
    assert response_preview(None) is None


def test_text_that_is_no_json_is_shown_as_it_is() -> None:
    """A preview never fails for its text."""
    assert request_preview('{"messages": [') == '{"messages": ['


def test_nesting_without_end_is_shown_as_it_is() -> None:
    """JSON that is nested too deep to be read is no chat."""
    text = '{"request": ' * 100_000
    assert str(request_preview(text)).endswith("...")


@pytest.mark.parametrize("length", [999, 1_000])
def test_a_thousand_characters_are_kept(length: int) -> None:
    """MLflow's column has as many."""
    assert shorten("x" * length) == "x" * length


def test_longer_text_is_cut() -> None:
    """To a thousand characters, the last three of which say so."""
    assert shorten("x" * 1_001) == "x" * 997 + "..."
    assert (
        request_preview(json.dumps({"messages": [{"role": "user", "content": "y" * 5_000}]})) == "y" * 997 + "..."
    )


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["messages", "choices", "message", "input", "output", "request", "role", "content"]),
            inner,
        )
    ),
)


@given(JSON_VALUES)
def test_any_json_has_a_preview_that_can_be_stored(value: Any) -> None:
    """At most a thousand characters, without NUL and without what UTF-8 cannot hold; never an exception."""
    for preview in (request_preview(json.dumps(value)), response_preview(json.dumps(value))):
        assert preview is not None and len(preview) <= 1_000 and "\0" not in preview
        preview.encode("utf-8")


def test_characters_that_stores_refuse() -> None:
    """NUL and lone surrogates, which JSON can hide, are replaced."""
    content = '{"messages": [{"role": "user", "content": "a\\u0000b\\ud800c"}]}'
    assert request_preview(content) == "a\ufffdb?c"
