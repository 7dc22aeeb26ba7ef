"""Traces and spans as plain values: MLflow's names, aliases and dictionaries, made from the store's rows."""

from __future__ import annotations

import copy
import json
import pickle
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import Link as OTelLink
from opentelemetry.trace import SpanKind, Status, StatusCode

from tracemw.entities import (
    EntityError,
    Link,
    Span,
    SpanEvent,
    SpanLogLevel,
    SpanStatus,
    SpanStatusCode,
    SpanType,
    Trace,
    TraceData,
    TraceInfo,
    TraceLocation,
    TraceState,
    TraceStatus,
)
from tracemw.errors import TracemwError
from tracemw.store.rows import SpanRow, StoredTrace, TraceRow

TRACE = "0af7651916cd43dd8448eb211c80319c"
START = 1_795_239_340_161_316_074


def span_row(number: int, parent: int | None = 1, name: str = "step", **facts: Any) -> SpanRow:
    """A row: `attributes`, `events` and `links` as values; starts follow the numbers."""
    facts = {
        "span_type": None,
        "kind": "INTERNAL",
        "status": "UNSET",
        "status_message": None,
        "scope": "tracemw",
    } | facts
    facts.setdefault("start_ns", START + number)
    facts.setdefault("end_ns", facts["start_ns"] + 2_000_000)
    facts |= {
        key: json.dumps(facts.pop(key, empty))
        for key, empty in (("attributes", {}), ("events", []), ("links", []))
    }
    parent_id = None if parent is None else f"{parent:016x}"
    return SpanRow(trace_id=TRACE, span_id=f"{number:016x}", parent_id=parent_id, name=name, **facts)


def stored(*spans: SpanRow, **facts: Any) -> StoredTrace:
    """A trace with these rows."""
    known: dict[str, Any] = dict.fromkeys(TraceRow.__slots__)
    known |= {"trace_id": TRACE, "root_span_id": f"{1:016x}", "has_parent": False, "name": "GET /ask"}
    known |= {"start_ns": START, "duration_ns": 12_900_000, "state": "OK", "metadata": {}, "tags": {}}
    return StoredTrace(TraceRow(**known | facts), list(spans), id=1, revision=1)


def trace_of(*spans: SpanRow, suffixes: bool = True, **facts: Any) -> Trace:
    return Trace.from_stored(stored(*spans, **facts), suffixes=suffixes)


# What MLflow 3.17 wrote for a span with these facts.
MLFLOW_SPAN = {
    "trace_id": "Xlku5v0Sg2IxynmFgesZOg==",
    "span_id": "Yv9jOYymCro=",
    "parent_span_id": None,
    "name": "x",
    "start_time_unix_nano": 1795239340161316074,
    "end_time_unix_nano": 1795239340161957596,
    "events": [{"name": "e", "time_unix_nano": 1795239340161627136, "attributes": {"a": [1, 2], "b": "c"}}],
    "status": {"code": "STATUS_CODE_OK", "message": ""},
    "attributes": {
        "mlflow.traceRequestId": '"tr-5e592ee6fd12836231ca798581eb193a"',
        "mlflow.spanType": '"LLM"',
        "mlflow.spanInputs": '{"a": 1}',
        "k": "[1, 2]",
        "s": '"text"',
        "n": "3",
        "mlflow.spanLogLevel": "20",
    },
    "links": [],
}
MLFLOW_INFO = {
    "trace_id": "tr-5e592ee6fd12836231ca798581eb193a",
    "trace_location": {"type": "MLFLOW_EXPERIMENT", "mlflow_experiment": {"experiment_id": "7"}},
    "request_time": "2009-02-13T23:31:30.123Z",
    "state": "OK",
    "trace_metadata": {"a": "b"},
    "tags": {"t": "u"},
    "request_preview": '{"x":1}',
    "execution_duration_ms": 12,
}


class TestStatus:
    def test_takes_names_and_codes(self) -> None:
        """A name becomes the code."""
        assert SpanStatus("ERROR", "boom") == SpanStatus(SpanStatusCode.ERROR, "boom")
        assert SpanStatus("OK").description == ""

    def test_refuses_other_names(self) -> None:
        """The message says which there are."""
        with pytest.raises(EntityError, match="FINE is not a valid SpanStatusCode value: use UNSET, OK or ERROR"):
            SpanStatus("FINE")
        assert issubclass(EntityError, (TracemwError, ValueError))


class TestEvent:
    def test_of_an_exception(self) -> None:
        """Message, type and stack trace, under OpenTelemetry's names."""
        try:
            raise ValueError("boom")
        except ValueError as error:
            event = SpanEvent.from_exception(error)
        assert event.name == "exception"
        assert event.attributes["exception.message"] == "boom"
        assert event.attributes["exception.type"] == "ValueError"
        assert event.attributes["exception.stacktrace"].rstrip().endswith("ValueError: boom")

    def test_timestamp_is_now_unless_given(self) -> None:
        """Each event has its own."""
        assert SpanEvent("a").timestamp > START // 2
        assert SpanEvent("a", 5, {"b": 1}).json() == {"name": "a", "timestamp": 5, "attributes": '{"b": 1}'}
        assert SpanEvent("a", 5).json()["attributes"] is None


class TestSpan:
    def span(self, **facts: Any) -> Span:
        known: dict[str, Any] = {"trace_id": f"tr-{TRACE}", "span_id": f"{1:016x}", "name": "x"}
        return Span(**known | {"start_time_ns": 1} | facts)

    def test_properties_read_the_attributes(self) -> None:
        """MLflow's attributes have names of their own."""
        span = self.span(
            attributes={
                "mlflow.spanInputs": {"q": 1}, "mlflow.spanOutputs": "a", "mlflow.spanType": "LLM",
                "mlflow.spanLogLevel": 20, "mlflow.spanDescription": "d", "mlflow.llm.model": "m",
                "mlflow.llm.cost": {"total_cost": 0.1}, "own": 5,
            }
        )  # fmt: skip
        assert (span.inputs, span.outputs, span.span_type) == ({"q": 1}, "a", SpanType.LLM)
        assert (span.log_level, span.description, span.model_name) == (SpanLogLevel.INFO, "d", "m")
        assert span.llm_cost == {"total_cost": 0.1}
        assert span.get_attribute("own") == 5 and span.get_attribute("none") is None
        assert span.request_id == span.trace_id == f"tr-{TRACE}"

    def test_defaults(self) -> None:
        """What was not recorded is None, the type is UNKNOWN, the original name is the name."""
        span = self.span()
        assert (span.inputs, span.outputs, span.log_level, span.description) == (None, None, None, None)
        assert (span.span_type, span.original_name, span.parent_id) == ("UNKNOWN", "x", None)
        assert span.status.status_code == SpanStatusCode.UNSET

    def test_is_immutable(self) -> None:
        """A span that was recorded does not change."""
        span = self.span(attributes={"a": 1})
        with pytest.raises(AttributeError):
            span.name = "y"  # type: ignore[misc]
        span.attributes["a"] = 2
        assert span.attributes == {"a": 1}

    @pytest.mark.parametrize(
        ("key", "hint"),
        [
            ("inputs", "`span.inputs`"),
            ("own", r"`span.get_attribute\('own'\)`"),
            ("zzz", "attribute access"),
            (0, "attri"),
        ],
    )
    def test_is_no_dictionary(self, key: object, hint: str) -> None:
        """Whoever takes it for one is told what to write."""
        with pytest.raises(TypeError, match=f"'Span' object is not subscriptable.*{hint}"):
            self.span(attributes={"own": 1})[key]

    def test_cannot_be_iterated(self) -> None:
        """Neither directly nor by `in`."""
        with pytest.raises(TypeError, match="'Span' object is not iterable.*attribute access"):
            iter(self.span())
        with pytest.raises(TypeError, match="not iterable"):
            "x" in self.span()  # type: ignore[operator]  # noqa: B015

    def test_is_a_value(self) -> None:
        """Equal if all facts are; can be copied, pickled, and kept in sets."""
        span = self.span(attributes={"a": [1]}, links=[Link("tr-1", "2")])
        assert span == copy.deepcopy(span) == pickle.loads(pickle.dumps(span))
        assert span != self.span()
        assert len({span, copy.copy(span)}) == 1
        assert repr(span) == f"Span(name='x', trace_id='tr-{TRACE}', span_id='0000000000000001', parent_id=None)"

    def test_reads_and_writes_what_mlflow_wrote(self) -> None:
        """Version 3: ids in base64, attributes as JSON text."""
        span = Span.from_dict(MLFLOW_SPAN)
        assert (span.trace_id, span.span_id) == ("tr-5e592ee6fd12836231ca798581eb193a", "62ff63398ca60aba")
        assert span.attributes["k"] == [1, 2] and span.attributes["s"] == "text" and span.attributes["n"] == 3
        assert span.status == SpanStatus("OK")
        assert span.to_dict() == MLFLOW_SPAN

    def test_reads_what_mlflow_2_wrote(self) -> None:
        """Version 2: ids in hexadecimal digits within a context."""
        span = Span.from_dict(
            {
                "context": {"trace_id": f"0x{TRACE}", "span_id": "0x0000000000000002"},
                "parent_id": "0x0000000000000001", "name": "x", "start_time": 1, "end_time": 2,
                "status_code": "ERROR", "status_message": "boom",
                "attributes": {"mlflow.traceRequestId": '"abc"', "mlflow.spanInputs": '{"a": 1}'},
                "events": [{"name": "e", "timestamp": 1, "attributes": {}}],
            }
        )  # fmt: skip
        assert (span.trace_id, span.parent_id) == (f"tr-{TRACE}", "0000000000000001")
        assert span.inputs == {"a": 1} and span.status == SpanStatus("ERROR", "boom")

    def test_reads_ids_in_hexadecimal_digits(self) -> None:
        """Some 3.x wrote them so, with the plain name of the status."""
        data = {**MLFLOW_SPAN, "trace_id": f"tr-{TRACE}", "span_id": "00000000000000ff", "status": {"code": "OK"}}
        assert Span.from_dict(data).span_id == "00000000000000ff"

    @pytest.mark.parametrize(
        "data", [{}, {**MLFLOW_SPAN, "trace_id": "?"}, {**MLFLOW_SPAN, "status": {"code": "X"}}]
    )
    def test_refuses_what_is_no_span(self, data: dict[str, Any]) -> None:
        """One error, with what is wrong."""
        with pytest.raises(EntityError, match="Failed to create a Span object from the given dictionary: "):
            Span.from_dict(data)

    @given(
        st.dictionaries(
            st.text(min_size=1),
            st.recursive(
                st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
                lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
                max_leaves=5,
            ),
        ),
        st.text(),
        st.integers(1, 2**128 - 1),
        st.integers(1, 2**64 - 1),
        st.none() | st.integers(1, 2**64 - 1),
    )
    def test_survives_its_dictionary(
        self, attributes: dict[str, Any], name: str, trace_id: int, span_id: int, parent: int | None
    ) -> None:
        """Any span comes back from its JSON as it was."""
        attributes = {"mlflow.traceRequestId": f"tr-{trace_id:032x}", **attributes}
        span = self.span(
            trace_id=f"tr-{trace_id:032x}", span_id=f"{span_id:016x}", attributes=attributes, name=name,
            parent_id=None if parent is None else f"{parent:016x}",
            original_name=name[:-1], end_time_ns=5, events=[SpanEvent("e", 1, {"a": 1})],
            links=[Link("tr-1", "2", {"a": 1}), Link("tr-1", "2")], status=SpanStatus("ERROR", "boom"),
        )  # fmt: skip
        assert Span.from_dict(json.loads(json.dumps(span.to_dict()))) == span

    def test_of_an_opentelemetry_span(self) -> None:
        """What OpenTelemetry recorded, with JSON decoded; OK once it has ended without an error."""
        tracer = TracerProvider(shutdown_on_exit=False).get_tracer("lib")
        other = tracer.start_span("other").get_span_context()
        live = tracer.start_span("x", kind=SpanKind.CLIENT, links=[OTelLink(other, {"a": 1})], start_time=5)
        live.set_attributes({"mlflow.spanInputs": '{"a": 1}', "list": ["a"], "text": "[1]"})
        live.add_event("e", {"n": 1}, 6)
        assert Span.from_otel(live).status.status_code == SpanStatusCode.UNSET
        live.end(7)
        span = Span.from_otel(live)
        assert span.trace_id == f"tr-{live.get_span_context().trace_id:032x}"
        assert (span.start_time_ns, span.end_time_ns, span.kind, span.scope) == (5, 7, "CLIENT", "lib")
        assert span.inputs == {"a": 1}
        assert span.attributes["list"] == ["a"] and span.attributes["text"] == "[1]"
        assert span.events == [SpanEvent("e", 6, {"n": 1})]
        assert span.links == [Link(f"tr-{other.trace_id:032x}", f"{other.span_id:016x}", {"a": 1})]
        assert span.status.status_code == SpanStatusCode.OK

    def test_of_a_failed_opentelemetry_span(self) -> None:
        """The description of the error stays."""
        with TracerProvider(shutdown_on_exit=False).get_tracer("lib").start_as_current_span("x") as live:
            live.set_status(Status(StatusCode.ERROR, "boom"))
        assert Span.from_otel(live).status == SpanStatus("ERROR", "boom")


class TestStored:
    def test_facts_of_the_trace(self) -> None:
        """Times in milliseconds; session, user and name where MLflow keeps them."""
        info = trace_of(
            span_row(1, None),
            client_request_id="c", session_id="s", user_id="u", request_preview="q", response_preview="a",
            metadata={"app_version": "1"}, tags={"t": "x"},
        ).info  # fmt: skip
        assert (info.trace_id, info.request_id) == (f"tr-{TRACE}",) * 2
        assert (info.request_time, info.timestamp_ms) == (START // 1_000_000,) * 2
        assert (info.execution_duration, info.execution_time_ms) == (12, 12)
        assert (info.state, info.status) == (TraceState.OK, TraceStatus.OK)
        assert (info.client_request_id, info.request_preview, info.response_preview) == ("c", "q", "a")
        assert info.trace_metadata == info.request_metadata
        assert info.trace_metadata == {"app_version": "1", "mlflow.trace.session": "s", "mlflow.trace.user": "u"}
        assert info.tags == {"t": "x", "mlflow.traceName": "GET /ask"}
        assert (info.experiment_id, info.assessments) == ("0", [])

    def test_what_the_application_said_wins(self) -> None:
        """Metadata and tags that were set under MLflow's own keys are not overwritten."""
        info = trace_of(
            span_row(1, None),
            session_id="header",
            metadata={"mlflow.trace.session": "own"},
            tags={"mlflow.traceName": "n"},
        ).info
        assert info.trace_metadata["mlflow.trace.session"] == "own" and info.tags["mlflow.traceName"] == "n"

    @pytest.mark.parametrize("state", ["OK", "ERROR", "IN_PROGRESS", "STATE_UNSPECIFIED"])
    def test_states(self, state: str) -> None:
        """Each state has its older status; a trace in progress has no duration."""
        info = trace_of(state=state, duration_ns=None).info
        assert str(info.state) == state and info.state == state
        assert info.status.to_state() is info.state
        assert info.execution_duration is None and "execution_duration_ms" not in info.to_dict()

    def test_root_first_then_by_start(self) -> None:
        """Even if a child began before the root's clock was read; parents before children of the same time."""
        rows = [
            span_row(3, 2, "c"),
            span_row(4, 1, "d", start_ns=START - 5),
            span_row(2, 1, "b"),
            span_row(1, None, "a"),
        ]
        assert [span.name for span in trace_of(*rows).data.spans] == ["a", "d", "b", "c"]
        same = [span_row(number, number - 1 or None, str(number), start_ns=START) for number in (4, 3, 2, 1)]
        assert [span.name for span in trace_of(*same).data.spans] == ["1", "2", "3", "4"]

    @pytest.mark.parametrize("root", [None, "00000000000000ee"])
    def test_a_root_that_is_not_there(self, root: str | None) -> None:
        """The span without a parent comes first, else the earliest whose parent is elsewhere."""
        with_top = [span_row(2, 9, "b"), span_row(3, None, "top"), span_row(4, 3, "c")]
        assert trace_of(*with_top, root_span_id=root).data.spans[0].name == "top"
        assert trace_of(span_row(5, 4, "c"), span_row(4, 9, "b"), root_span_id=root).data.spans[0].name == "b"

    def test_parents_in_a_circle(self) -> None:
        """Broken data is still shown."""
        assert len(trace_of(span_row(2, 3), span_row(3, 2), root_span_id=None).data.spans) == 2

    def test_a_trace_without_spans(self) -> None:
        """Search can leave them out."""
        trace = trace_of()
        assert trace.data.spans == [] and trace.data.request is None and trace.search_spans() == []

    def test_attributes_are_decoded(self) -> None:
        """MLflow's everywhere, objects and lists in our own spans, nothing else; the trace's id is added."""
        texts = {
            "mlflow.spanInputs": '{"a": "é"}',
            "mlflow.spanType": "raw",
            "own": '{"b": 1}',
            "text": "12",
            "bad": "{",
        }
        own, foreign = trace_of(
            span_row(1, None, attributes=texts), span_row(2, attributes={"own": "[1]", "n": 5}, scope="lib")
        ).data.spans
        assert own.attributes == {
            "mlflow.traceRequestId": f"tr-{TRACE}", "mlflow.spanInputs": {"a": "é"}, "mlflow.spanType": "raw",
            "own": {"b": 1}, "text": "12", "bad": "{",
        }  # fmt: skip
        assert foreign.attributes == {"mlflow.traceRequestId": f"tr-{TRACE}", "own": "[1]", "n": 5}

    def test_events_and_links(self) -> None:
        """Ids of links get their prefix; a link without attributes has None."""
        row = span_row(
            1, None,
            events=[{"name": "e", "time_ns": 5, "attributes": {"a": [1]}}],
            links=[{"trace_id": "ab" * 16, "span_id": "cd" * 8, "attributes": {}}],
        )  # fmt: skip
        (span,) = trace_of(row).data.spans
        assert span.events == [SpanEvent("e", 5, {"a": [1]})]
        assert span.links == [Link("tr-" + "ab" * 16, "cd" * 8)]

    @pytest.mark.parametrize(
        ("code", "outcome", "shown"),
        [
            ("UNSET", None, "OK"), ("UNSET", "completed", "OK"), ("OK", None, "OK"), ("ERROR", None, "ERROR"),
            ("UNSET", "cancelled", "UNSET"), ("UNSET", "interrupted", "UNSET"), ("UNSET", "disconnected", "UNSET"),
            ("ERROR", "cancelled", "ERROR"),
        ],
    )  # fmt: skip
    def test_status(self, code: str, outcome: str | None, shown: str) -> None:
        """Ended without an error is OK; cut short is neither OK nor an error."""
        row = span_row(1, None, status=code, attributes={"tracemw.outcome": outcome} if outcome else {})
        assert trace_of(row).data.spans[0].status.status_code == shown
        assert trace_of(span_row(1, None, status=code), outcome=outcome).data.spans[0].status.status_code == shown


class TestNames:
    ROWS = [span_row(1, None, "ask"), span_row(2, 1, "tool"), span_row(3, 1, "tool"), span_row(4, 3, "model")]

    def test_spans_of_one_name_are_numbered(self) -> None:
        """In order of their start; the name as it was recorded is kept."""
        spans = trace_of(*self.ROWS).data.spans
        assert [span.name for span in spans] == ["ask", "tool_1", "tool_2", "model"]
        assert [span.original_name for span in spans] == ["ask", "tool", "tool", "model"]

    def test_numbers_can_be_turned_off(self) -> None:
        """Then names are as they were recorded."""
        assert [span.name for span in trace_of(*self.ROWS, suffixes=False).data.spans] == [
            "ask",
            "tool",
            "tool",
            "model",
        ]

    @pytest.mark.parametrize(
        ("wanted", "found"),
        [
            ({"name": "tool"}, ["tool_1", "tool_2"]), ({"name": "tool_2"}, ["tool_2"]), ({"name": "too"}, []),
            ({"name": re.compile("too")}, ["tool_1", "tool_2"]),
            ({"name": re.compile("^tool$")}, ["tool_1", "tool_2"]),
            ({"name": re.compile("_2$")}, ["tool_2"]), ({"span_id": f"{4:016x}"}, ["model"]),
            ({"span_type": "UNKNOWN", "name": "ask"}, ["ask"]), ({"span_type": "LLM"}, []),
            ({}, ["ask", "tool_1", "tool_2", "model"]),
        ],
    )  # fmt: skip
    def test_search_knows_both_names(self, wanted: dict[str, Any], found: list[str]) -> None:
        """By name with or without number, by pattern, type and id; all that is given must fit."""
        assert [span.name for span in trace_of(*self.ROWS).search_spans(**wanted)] == found

    @pytest.mark.parametrize("wanted", [{"name": 5}, {"span_type": 5}])
    def test_search_refuses_other_types(self, wanted: dict[str, Any]) -> None:
        """The message says what is wanted."""
        with pytest.raises(EntityError, match="Invalid type for '(name|span_type)'. Expected str"):
            trace_of(*self.ROWS).search_spans(**wanted)

    def test_names_survive_the_dictionary(self) -> None:
        """Both of them; a span whose name was not changed has MLflow's keys and no more."""
        trace = trace_of(*self.ROWS)
        assert Trace.from_json(trace.to_json()) == trace
        assert "original_name" not in trace.data.spans[0].to_dict()


class TestTrace:
    ROWS = [
        span_row(
            1,
            None,
            "ask",
            attributes={"mlflow.spanInputs": '{"q": "é"}', "mlflow.spanOutputs": '"a"'},
            kind="SERVER",
        ),
        span_row(2, 1, "tool", attributes={"mlflow.spanOutputs": "[1]"}, scope="lib"),
        span_row(3, 1, "quiet"),
    ]

    def test_request_and_response_are_the_roots(self) -> None:
        """As JSON text, in MLflow's format; None where nothing was recorded."""
        data = trace_of(*self.ROWS).data
        assert (data.request, data.response) == ('{"q": "é"}', '"a"')
        assert trace_of(self.ROWS[2], root_span_id=None).data.request is None

    def test_intermediate_outputs(self) -> None:
        """What the spans below the root returned, by name."""
        assert trace_of(*self.ROWS).data.intermediate_outputs == {"tool": [1]}
        assert trace_of(self.ROWS[0]).data.intermediate_outputs is None

    def test_survives_json(self) -> None:
        """Pretty or not, a trace comes back as it was."""
        trace = trace_of(*self.ROWS, metadata={"a": "b"}, client_request_id="c")
        assert Trace.from_json(trace.to_json()) == Trace.from_json(trace.to_json(pretty=True)) == trace
        assert trace.to_json(pretty=True).startswith('{\n  "info"')
        again = Trace.from_json(trace.to_json()).data.spans
        assert (again[0].kind, again[1].scope) == ("SERVER", "lib")

    def test_info_is_mlflows_dictionary(self) -> None:
        """Version 3 is read and written unchanged; what is not known is left out."""
        info = TraceInfo.from_dict(MLFLOW_INFO)
        assert info.to_dict() == MLFLOW_INFO
        assert (info.request_time, info.experiment_id) == (1234567890123, "7")

    def test_info_of_mlflow_2(self) -> None:
        """Version 2 had other names."""
        info = TraceInfo.from_dict(
            {"request_id": "tr-x", "experiment_id": "3", "timestamp_ms": 1, "execution_time_ms": None,
             "status": "TRACE_STATUS_UNSPECIFIED", "request_metadata": {"a": "b"}, "tags": {"c": "d"}}
        )  # fmt: skip
        assert (info.trace_id, info.state, info.experiment_id) == ("tr-x", TraceState.STATE_UNSPECIFIED, "3")
        assert (info.trace_metadata, info.tags, info.execution_duration) == ({"a": "b"}, {"c": "d"}, None)

    @given(st.integers(0, 253_402_300_799_999))
    def test_times_survive(self, milliseconds: int) -> None:
        """To the millisecond, in the fewest digits."""
        info = TraceInfo("tr-1", TraceLocation.from_experiment_id("0"), milliseconds, TraceState.OK)
        assert TraceInfo.from_dict(info.to_dict()) == info

    @pytest.mark.parametrize("text", ["2009-02-13T23:31:30.123456789Z", "2009-02-14T01:31:30.123+02:00"])
    def test_times_of_others(self, text: str) -> None:
        """Any number of digits, any offset."""
        assert TraceInfo.from_dict({**MLFLOW_INFO, "request_time": text}).request_time == 1234567890123

    @pytest.mark.parametrize(
        "change", [{"request_time": "now"}, {"state": "FINE"}, {"trace_id": None, "state": 5}]
    )
    def test_refuses_what_is_no_info(self, change: dict[str, Any]) -> None:
        """One error, with what is wrong."""
        with pytest.raises(EntityError, match="Failed to create a TraceInfo"):
            TraceInfo.from_dict({**MLFLOW_INFO, **change})

    def test_refuses_what_is_no_trace(self) -> None:
        """Wrong keys, no JSON, no dictionary."""
        with pytest.raises(EntityError, match=r"Expected keys: 'info' and 'data'. Received keys: \['a'\]"):
            Trace.from_dict({"a": 1})
        with pytest.raises(EntityError, match="Unable to parse trace JSON"):
            Trace.from_json("{")
        with pytest.raises(TypeError, match="expects a dictionary"):
            TraceData.from_dict([])  # type: ignore[arg-type]

    def test_older_names_can_be_set(self) -> None:
        """They are the same facts."""
        info = TraceInfo.from_dict(MLFLOW_INFO)
        info.timestamp_ms, info.execution_time_ms, info.status, info.experiment_id = 5, 6, TraceStatus.ERROR, "9"
        assert (info.request_time, info.execution_duration, info.state) == (5, 6, TraceState.ERROR)
        assert info.to_dict()["trace_location"]["mlflow_experiment"] == {"experiment_id": "9"}

    def test_row_of_the_table(self) -> None:
        """One value for each column, with the request and response decoded."""
        trace = trace_of(*self.ROWS)
        row = trace.to_pandas_dataframe_row()
        assert list(row) == Trace.pandas_dataframe_columns()
        assert (row["request"], row["response"], row["trace_id"]) == ({"q": "é"}, "a", trace.trace_id)
        assert json.loads(row["trace"]) == trace.to_dict()
        assert trace_of().to_pandas_dataframe_row()["request"] is None

    def test_repr_is_short(self) -> None:
        """A trace in an assertion's message must not fill the screen."""
        assert repr(trace_of(*self.ROWS)) == f"Trace(trace_id='tr-{TRACE}')"


class TestTokens:
    USAGE = {"mlflow.chat.tokenUsage": '{"input_tokens": 5, "output_tokens": 2, "total_tokens": 7}'}
    COST = {"mlflow.llm.cost": '{"total_cost": 0.5}'}

    def test_are_added_up(self) -> None:
        """Over all calls of models; a span around a call that repeats its numbers counts instead of it."""
        rows = [span_row(1, None), span_row(2, 1, attributes=self.USAGE | self.COST)]
        rows += [span_row(3, 2, attributes=self.USAGE), span_row(4, 1, attributes=self.USAGE)]
        info = trace_of(*rows).info
        assert info.token_usage == {"input_tokens": 10, "output_tokens": 4, "total_tokens": 14}
        assert info.cost == {"total_cost": 0.5}

    def test_by_opentelemetrys_conventions(self) -> None:
        """Instrumentations write numbers of their own."""
        usage = {"gen_ai.usage.input_tokens": 3, "gen_ai.usage.completion_tokens": 4}
        assert trace_of(span_row(1, None, attributes=usage)).info.token_usage == {
            "input_tokens": 3, "output_tokens": 4, "total_tokens": 7,
        }  # fmt: skip

    def test_known_totals_stay(self) -> None:
        """What the metadata say is not counted again; without any there is nothing."""
        known = {"mlflow.trace.tokenUsage": '{"total_tokens": 1}'}
        assert trace_of(span_row(1, None, attributes=self.USAGE), metadata=known).info.token_usage == {
            "total_tokens": 1
        }
        assert trace_of(span_row(1, None)).info.token_usage is None
        assert trace_of(span_row(1, None)).info.cost is None
