"""What MLflow is told of a trace: everything fits, and no two things become one by fitting."""

from __future__ import annotations

import json
import posixpath
import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.delivery.rows import span_row, trace_row
from tracemw.pipeline import mlflow_facts as facts
from tracemw.pipeline.mlflow import is_settled
from tracemw.store import StoredTrace

START = 1_790_000_000_000_000_000
WILD = st.text(st.characters() | st.sampled_from("\0\ud800/.:"), max_size=300)


@given(st.lists(st.tuples(WILD, WILD), max_size=8, unique_by=lambda pair: pair[0]))
def test_every_key_is_kept_and_fits(pairs: list[tuple[str, str]]) -> None:
    """However keys are cut and cleaned, as many come out as went in, and none is too long or empty."""
    found = facts.mapping(pairs, 20)
    assert len(found) == len(pairs)
    for key, value in found.items():
        assert 0 < len(key) <= facts.MAX_KEY and len(value) <= 20
        (key + value).encode()
        assert "\0" not in key + value


@given(WILD)
def test_tag_names_are_ones_that_the_server_takes(key: str) -> None:
    """MLflow leaves out tags of other names without a word: characters of its list, and a normal path."""
    name = facts.tag_name(key) or "_"
    assert re.fullmatch(r"[/\w.\- :]*", name)
    assert posixpath.normpath(name) == name and name != "." and not name.startswith(("..", "/"))


@pytest.mark.parametrize("name", ["app_version", "mlflow.source.name", "a/b", "a b-c:d"])
def test_usual_tag_names_stay(name: str) -> None:
    """Names that are fine are not touched."""
    assert facts.tag_name(name) == name


def test_a_long_request_id_also_travels_whole() -> None:
    """MLflow's column has 50 characters: the id is cut there, and whole in the metadata."""
    row = trace_row(1, client_request_id="r" * 80)
    info = facts.trace_info(row, "7")
    assert info["client_request_id"] == "r" * 50
    assert info["trace_metadata"]["tracemw.client_request_id"] == "r" * 80
    assert "tracemw.client_request_id" not in facts.trace_info(trace_row(1), "7")["trace_metadata"]


def test_long_sessions_and_users_stay_two() -> None:
    """Cut plainly, two people with the same beginning would become one."""
    first, second = (facts.cut_identity("s" * 300 + end) for end in "ab")
    assert len(first) == len(second) == facts.MAX_IDENTITY and first != second
    assert facts.cut_identity("jane") == "jane"


def test_everything_is_said_each_time() -> None:
    """What StartTraceV3 does not hear it resets: all facts are in every request."""
    row = trace_row(1, session_id="s", user_id="u", tags={"a": "b"}, state="ERROR")
    info = facts.trace_info(row, "7")
    assert info["trace_id"] == f"tr-{row.trace_id}"
    assert info["trace_location"]["mlflow_experiment"] == {"experiment_id": "7"}
    assert (info["state"], info["client_request_id"]) == ("ERROR", row.client_request_id)
    assert info["tags"] == {"mlflow.traceName": row.name, "a": "b"}
    expected = {"mlflow.trace.session": "s", "mlflow.trace.user": "u", "app_version": "1.4.0"}
    assert info["trace_metadata"].items() >= expected.items()
    assert (info["request_preview"], info["response_preview"]) == (row.request_preview, "200")


def test_a_trace_that_is_not_finished_has_no_duration() -> None:
    """The duration is left out, not zero."""
    assert "execution_duration" not in facts.trace_info(trace_row(1, duration_ns=None), "1")


@pytest.mark.parametrize(
    ("start_ns", "duration_ns", "time", "duration"),
    [
        (0, 1, "1970-01-01T00:00:00Z", "0.000s"),
        (START, 1_500_000_000, "2026-09-21T14:13:20Z", "1.500s"),
        (START + 7_900_000, 200_000, "2026-09-21T14:13:20.007Z", "0.001s"),
        (-5, 10**9, "1970-01-01T00:00:00Z", "1.000s"),
    ],
)
def test_times_are_those_that_the_server_computes(
    start_ns: int, duration_ns: int, time: str, duration: str
) -> None:
    """It takes whole milliseconds of the start and of the end; with others it would correct ours."""
    info = facts.trace_info(trace_row(1, start_ns=start_ns, duration_ns=duration_ns), "1")
    assert (info["request_time"], info["execution_duration"]) == (time, duration)


@pytest.mark.parametrize("outcome", ["completed", "error", "disconnected", "cancelled"])
def test_outcomes_that_the_state_does_not_say(outcome: str) -> None:
    """A client that went away is told of in the metadata; success and error the state says."""
    metadata = facts.trace_info(trace_row(1, outcome=outcome), "1")["trace_metadata"]
    assert metadata.get("tracemw.outcome") == (outcome if outcome in facts.CUT_OFF else None)


@pytest.mark.parametrize(
    ("stored", "sent"),
    [
        ('{"q": "x"}', '{"q": "x"}'),
        ("[1, 2]", "[1, 2]"),
        ("42", 42),
        ("1.5", 1.5),
        ("true", True),
        ("null", None),
        ('"hello"', "hello"),
        ('"42"', "42"),
        ('"{\\"a\\": 1}"', '"{\\"a\\": 1}"'),
        ("no json", "no json"),
        ('{"q": "a\\u0000b"}', '{"q":"a\ufffdb"}'),
        ('"a\\u0000b"', "a\ufffdb"),
    ],
)
def test_mlflow_reads_inputs_and_outputs_as_they_were(stored: str, sent: Any) -> None:
    """Its server decodes JSON text of objects and lists, not of numbers nor of text that looks like either."""
    found = facts.span_attributes(span_row(trace_row(1), 1, attributes={"mlflow.spanOutputs": stored}))
    assert found["mlflow.spanOutputs"] == sent


def test_other_attributes_keep_their_types() -> None:
    """Numbers stay numbers and text stays text, whatever it looks like."""
    attributes = {"n": 5, "f": 1.5, "b": True, "s": "42", "l": [1, 2]}
    assert facts.span_attributes(span_row(trace_row(1), 1, attributes=attributes)) == attributes


def test_the_trace_id_of_another_server_is_not_sent() -> None:
    """Older servers would store the span under it."""
    attributes = {"mlflow.traceRequestId": '"tr-0"', "mlflow.spanType": json.dumps("T" * 600)}
    found = facts.span_attributes(span_row(trace_row(1), 1, attributes=attributes))
    assert list(found) == ["mlflow.spanType"] and len(found["mlflow.spanType"]) == facts.MAX_SPAN_TYPE


@pytest.mark.parametrize(
    ("status", "outcome", "shown"),
    [
        ("UNSET", None, "OK"),
        ("UNSET", "completed", "OK"),
        ("UNSET", "cancelled", "UNSET"),
        ("UNSET", "disconnected", "UNSET"),
        ("ERROR", "error", "ERROR"),
        ("OK", None, "OK"),
    ],
)
def test_a_span_that_ended_without_error_is_ok(status: str, outcome: str | None, shown: str) -> None:
    """As MLflow has it; one that was cut off is neither OK nor an error."""
    attributes = {} if outcome is None else {"tracemw.outcome": outcome}
    assert facts.status_of(span_row(trace_row(1), 1, status=status, attributes=attributes)) == shown


def test_the_servers_own_tags_are_not_sent() -> None:
    """Where a trace came from another server, its place there would be believed."""
    row = trace_row(1, tags={"mlflow.artifactLocation": "s3://x", "mlflow.traceName": "renamed"})
    assert facts.tags(row) == {"mlflow.traceName": "renamed"}


def test_what_goes_as_attributes_of_the_root_alone() -> None:
    """Tags win over metadata of the same name; text that looks like JSON is read as the text it is."""
    metadata = {"a": "metadata", "j": '{"x": 1}', "b c!": "d", "mlflow.source.name": "app"}
    row = trace_row(1, metadata=metadata, tags={"a": "tag"})
    found = facts.on_the_root(row)
    assert found["mlflow.traceTag.a"] == "tag"
    assert json.loads(found["mlflow.traceTag.j"]) == '{"x": 1}'
    assert found["mlflow.traceTag.b c_"] == "d"
    assert not any("mlflow.source" in key for key in found)
    assert found["mlflow.traceTag.client_request_id"] == row.client_request_id
    assert found["mlflow.traceTag.mlflow.traceName"] == row.name
    assert json.loads(found["mlflow.spanInputs"]) == row.request_preview


def test_which_traces_may_be_told_of_before_their_spans() -> None:
    """Those that the server will not change on seeing the spans: finished ones, all spans within their time."""
    row = trace_row(1)

    def settled(trace_row: Any = row, **changes: Any) -> bool:
        return is_settled(StoredTrace(trace_row, [span_row(row, 1), span_row(row, 2, **changes)], 1, 1))

    assert settled()
    assert not settled(end_ns=row.start_ns + 10 * (row.duration_ns or 0))
    assert not settled(start_ns=row.start_ns - 1_000_000)
    assert not settled(replace(row, duration_ns=None))
    assert not settled(replace(row, state="STATE_UNSPECIFIED"))
    assert not settled(replace(row, has_parent=True))


@pytest.mark.parametrize(
    ("preview", "shown"),
    [
        ('{"body": {"question": "x"}}', '{"body": {"question": "x"}}'),
        ('{"body": {"quest', json.dumps('{"body": {"quest')),  # cut
        ("hello", '"hello"'),
        ('"hello"', '"hello"'),
        ("200", '"200"'),
        (None, None),
    ],
)
def test_a_requests_root_shows_the_previews(preview: str | None, shown: str | None) -> None:
    """As JSON text; only a request's root does, and what it has of its own counts."""
    row = trace_row(1, request_preview=preview, response_preview="done")
    root = replace(span_row(row, 1), kind="SERVER")
    found = facts.shown_of_the_request(row, root)
    assert (found.get("mlflow.spanInputs"), found["mlflow.spanOutputs"]) == (shown, '"done"')
    assert facts.shown_of_the_request(row, replace(root, kind="INTERNAL")) == {}
    assert facts.shown_of_the_request(row, replace(span_row(row, 2), kind="SERVER")) == {}
    own = replace(root, attributes=json.dumps({"mlflow.spanInputs": '"own"'}))
    assert facts.span_attributes(own, found, decode=True)["mlflow.spanInputs"] == "own"
