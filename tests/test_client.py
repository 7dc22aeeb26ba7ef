"""The low-level client, tags of any trace, and reading traces back."""

from __future__ import annotations

import importlib.util
import logging
import multiprocessing
from pathlib import Path
from typing import Any

import pytest

import tracemw
from tracemw import Client, client, config, opened, pipeline
from tracemw.errors import FilterError, NotFoundError, TracemwError
from tracemw.testing import CapturedTraces, capture_traces

UNKNOWN = "tr-" + "0" * 31 + "1"


@pytest.fixture(autouse=True)
def _nothing_stays_open() -> Any:
    """Each test ends what it begins."""
    yield
    assert len(opened.TABLE) == 0


def test_a_trace_by_hand(captured_traces: CapturedTraces) -> None:
    """Traces and spans are begun and ended by their ids, with explicit parents; nothing is current."""
    low = Client()
    root = low.start_trace("root", inputs={"x": 1}, tags={"t": "1"}, span_type="CHAIN", attributes={"a": 1})
    assert tracemw.get_current_active_span() is None
    child = low.start_span("child", trace_id=root.trace_id, parent_id=root.span_id, span_type="TOOL")
    grandchild = low.start_span("grandchild", request_id=root.request_id, parent_id=child.span_id, inputs=[1])
    low.end_span(root.trace_id, grandchild.span_id, outputs={"y": 2}, attributes={"factor": 2})
    low.end_span(request_id=root.trace_id, span_id=child.span_id, status="ERROR")
    low.end_trace(root.trace_id, outputs={"z": 3}, status="OK")
    (trace,) = captured_traces
    assert [span.name for span in trace.data.spans] == ["root", "child", "grandchild"]
    assert [span.parent_id for span in trace.data.spans] == [None, root.span_id, child.span_id]
    assert [span.status.status_code.value for span in trace.data.spans] == ["OK", "ERROR", "OK"]
    assert trace.data.spans[2].attributes["factor"] == 2
    assert (trace.info.tags["t"], trace.info.request_preview, trace.info.response_preview) == (
        "1", '{"x": 1}', '{"z": 3}'
    )  # fmt: skip


def test_spans_end_in_any_order(captured_traces: CapturedTraces) -> None:
    """A parent may end before its child, the root before all; a child may begin below one that has ended."""
    low = Client()
    root = low.start_trace("root")
    parent = low.start_span("parent", root.trace_id, root.span_id)
    child = low.start_span("child", root.trace_id, parent.span_id)
    low.end_span(root.trace_id, parent.span_id)
    late = low.start_span("late", root.trace_id, parent.span_id)
    low.end_trace(root.trace_id)
    low.end_span(root.trace_id, child.span_id)
    low.end_span(root.trace_id, late.span_id)
    parents = {span.name: span.parent_id for span in captured_traces[0].data.spans}
    assert parents == {"root": None, "parent": root.span_id, "child": parent.span_id, "late": parent.span_id}


def test_a_child_of_a_block(captured_traces: CapturedTraces) -> None:
    """A span of `start_span` or `@trace` can be the parent, and its trace goes on as it was."""
    low = Client()
    with tracemw.start_span("root") as root:
        with tracemw.start_span("block") as block:
            child = low.start_span("child", root.trace_id, block.span_id)
        second = low.start_span("second", root.trace_id, child.span_id)
        low.end_span(root.trace_id, child.span_id)
        low.end_span(root.trace_id, second.span_id)
        with pytest.raises(TracemwError, match="not begun with start_trace"):
            low.end_trace(root.trace_id)
    assert len(captured_traces[0].data.spans) == 4


def test_misuse_is_a_clear_error(captured_traces: CapturedTraces) -> None:
    """Unknown ids, a second end, a missing parent, a trace inside a trace."""
    low = Client()
    root = low.start_trace("root")
    child = low.start_span("child", root.trace_id, root.span_id)
    low.end_span(root.trace_id, child.span_id)
    with pytest.raises(TracemwError, match=f"Span with ID {child.span_id} already finished"):
        low.end_span(root.trace_id, child.span_id)
    with pytest.raises(NotFoundError, match="Span with ID 00000000000000ab not found"):
        low.end_span(root.trace_id, "00000000000000ab")
    with pytest.raises(NotFoundError, match="Parent span with ID '00000000000000ab' not found"):
        low.start_span("x", root.trace_id, "00000000000000ab")
    with pytest.raises(NotFoundError, match="Parent span with ID 'nonsense' not found"):
        low.start_span("x", root.trace_id, "nonsense")
    with pytest.raises(TracemwError, match="needs the parent_id"):
        low.start_span("x", root.trace_id)
    with pytest.raises(TypeError, match="needs a trace_id"):
        low.start_span("x")
    with pytest.raises(TypeError, match="unexpected keyword argument 'trace'"):
        low.end_trace(trace=root.trace_id)
    with pytest.raises(NotFoundError, match=f"Trace with ID {UNKNOWN} not found"):
        low.end_trace(UNKNOWN)
    low.end_trace(root.trace_id)
    with pytest.raises(TracemwError, match=f"Trace with ID {root.trace_id} already finished"):
        low.end_trace(root.trace_id)
    with tracemw.start_span("current"), pytest.raises(TracemwError, match="Another trace is already set"):
        low.start_trace("second")


def test_where_nothing_is_recorded() -> None:
    """Calls with the id of a span that does nothing do nothing."""
    low = Client()
    with capture_traces(sample_rate=0.0) as traces:
        root = low.start_trace("root")
        child = low.start_span("child", root.trace_id, root.span_id)
        low.end_span(child.trace_id, child.span_id)
        low.end_trace(root.trace_id)
    assert len(traces) == 0


def test_what_is_open_is_bounded(
    captured_traces: CapturedTraces, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Beyond the limit the oldest open trace is ended and said so; memory does not grow with forgotten traces."""
    monkeypatch.setattr(opened, "LIMIT", 3)
    low = Client()
    roots = [low.start_trace(f"root-{number}") for number in range(5)]
    assert [trace.data.spans[0].name for trace in captured_traces] == ["root-0", "root-1"]
    assert "more than 3 traces are open" in caplog.text
    for root in roots[2:]:
        low.end_trace(root.trace_id)


def _child(pipe: Any, trace_id: str) -> None:
    try:
        Client().end_trace(trace_id)
        pipe.send("ended")
    except TracemwError as exc:
        pipe.send(f"{type(exc).__name__} {len(opened.TABLE)}")


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_starts_with_nothing_open(captured_traces: CapturedTraces) -> None:
    """What the parent has begun is the parent's to end."""
    low = Client()
    root = low.start_trace("root")
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=_child, args=(theirs, root.trace_id))
    process.start()
    assert ours.poll(20)
    assert ours.recv().endswith(" 0")
    process.join(20)
    low.end_trace(root.trace_id)
    assert len(captured_traces) == 1


# Tags


def test_tags_of_an_open_trace(captured_traces: CapturedTraces) -> None:
    """They are set and deleted at once, without looking at the store."""
    with tracemw.start_span("root") as span:
        tracemw.set_trace_tag(span.trace_id, "a", "1")
        tracemw.set_trace_tag(request_id=span.trace_id, key="b", value=2)
        Client().set_trace_tag(span.trace_id, "c", "3")
        tracemw.delete_trace_tag(span.trace_id, "a")
        with pytest.raises(NotFoundError, match="Tag with key a not found"):
            tracemw.delete_trace_tag(span.trace_id, "a")
    tags = captured_traces[0].info.tags
    assert (tags["b"], tags["c"], "a" in tags) == ("2", "3", False)


@pytest.mark.parametrize("held", [True, False], ids=["held", "forgotten"])
def test_tags_of_a_stored_trace(captured_traces: CapturedTraces, held: bool) -> None:
    """They are changed in the store, right after the trace has ended; a later change does not bring them back."""
    span: Any = tracemw.start_span_no_context("root", tags={"old": "0"})
    span.end()
    trace_id = span.trace_id
    if not held:
        del span
    tracemw.set_trace_tag(trace_id, "a", "1")
    assert captured_traces[0].info.tags["a"] == "1"
    tracemw.delete_trace_tag(trace_id, "a")
    Client().delete_trace_tag(request_id=trace_id, key="old")
    tracemw.set_trace_tag(trace_id, "b", "2")
    tags = captured_traces[0].info.tags
    assert ("a" in tags, "old" in tags, tags["b"]) == (False, False, "2")


@pytest.mark.parametrize("trace_id", [UNKNOWN, "tr-nonsense", ""])
def test_tags_of_no_trace(captured_traces: CapturedTraces, trace_id: str) -> None:
    """An id that no trace has is a clear error."""
    for call in (client.set_trace_tag, client.delete_trace_tag):
        with pytest.raises(NotFoundError, match=f"Trace with ID {trace_id} not found"):
            call(trace_id, "a")


# Reading


@tracemw.trace
def answer(question: str) -> str:
    tracemw.update_current_trace(tags={"question": question}, metadata={"app_version": f"1.{len(question)}.0"})
    return question.upper()


def test_what_has_ended_is_found_at_once(captured_traces: CapturedTraces) -> None:
    """`get_trace`, `search_traces` and the client see what ended before the call."""
    answer("why")
    trace_id = tracemw.get_last_active_trace_id()
    assert trace_id is not None
    found = tracemw.get_trace(trace_id)
    assert found is not None and found.data.spans[0].outputs == "WHY"
    assert Client().get_trace(request_id=trace_id) == found
    assert tracemw.search_traces("tags.question = 'why'") == [found]
    assert captured_traces == [found]


def test_a_trace_that_is_not_there(captured_traces: CapturedTraces, caplog: pytest.LogCaptureFixture) -> None:
    """`get_trace` returns None with a warning, silently if asked; the client raises."""
    with caplog.at_level(logging.WARNING, "tracemw"):
        assert tracemw.get_trace(UNKNOWN, silent=True) is None
        assert caplog.records == []
        assert tracemw.get_trace(request_id=UNKNOWN) is None
    assert UNKNOWN in caplog.text
    with pytest.raises(NotFoundError, match=f"Trace with ID {UNKNOWN} not found"):
        Client().get_trace(UNKNOWN)


def test_searching(captured_traces: CapturedTraces) -> None:
    """Filter, order, pages, without spans; all results where no limit is given."""
    for number in range(5):
        answer("x" * (number + 1))
    assert len(tracemw.search_traces("metadata.app_version IN ('1.2.0', '1.3.0')")) == 2
    first = tracemw.search_traces(order_by=["timestamp_ms ASC"], max_results=2)
    assert [trace.info.tags["question"] for trace in first] == ["x", "xx"]
    second = tracemw.search_traces(order_by=["timestamp_ms ASC"], max_results=2, page_token=first.token)
    assert [trace.info.tags["question"] for trace in second] == ["xxx", "xxxx"]
    assert len(tracemw.search_traces(max_results=None)) == 5
    assert tracemw.search_traces(include_spans=False)[0].data.spans == []
    with pytest.raises(FilterError):
        tracemw.search_traces("metadata.app_version == 1")


def test_searching_as_with_mlflow(captured_traces: CapturedTraces) -> None:
    """What MLflow's function takes besides is accepted: a run or a model narrows the search."""
    with tracemw.start_span("with run", run_id="run-1"):
        tracemw.update_current_trace(model_id="model's")
    answer("x")
    assert len(tracemw.search_traces(experiment_ids=["0"], flush=True, locations=["0"])) == 2
    assert len(tracemw.search_traces(run_id="run-1")) == 1
    assert len(tracemw.search_traces("name = 'answer' OR name = 'with run'", model_id="model's")) == 1
    assert len(Client().search_traces(["0"], "name = 'answer'", 10)) == 1
    with pytest.raises(TypeError, match="unexpected keyword argument 'run'"):
        tracemw.search_traces(run="run-1")
    with pytest.raises(TracemwError, match="the first argument of search_traces is the filter"):
        tracemw.search_traces(["0"])  # type: ignore[call-overload]


def test_pandas_is_said_to_be_missing(captured_traces: CapturedTraces, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without pandas the error says what to install."""
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    with pytest.raises(TracemwError, match="pip install pandas"):
        tracemw.search_traces(return_type="pandas")
    with pytest.raises(TracemwError, match="either 'pandas' or 'list'"):
        tracemw.search_traces(return_type="frame")  # type: ignore[call-overload]
    with pytest.raises(TracemwError, match="extract_fields needs return_type='pandas'"):
        tracemw.search_traces(extract_fields=["a.inputs"])


@pytest.mark.skipif(importlib.util.find_spec("pandas") is None, reason="pandas is not installed")
def test_a_frame_has_mlflows_columns(captured_traces: CapturedTraces) -> None:
    """One row per trace, MLflow's columns, and one for each field that is asked for."""
    answer("why")
    frame = tracemw.search_traces(
        return_type="pandas", extract_fields=["answer.inputs.question", "answer.outputs"]
    )
    assert list(frame.columns) == [
        *tracemw.Trace.pandas_dataframe_columns(), "answer.inputs.question", "answer.outputs"
    ]  # fmt: skip
    assert frame.iloc[0]["answer.inputs.question"] == "why"
    assert list(tracemw.search_traces("name = 'nothing'", return_type="pandas").columns)[0] == "trace_id"


def test_deleting(captured_traces: CapturedTraces) -> None:
    """By ids, or by time with a limit; one of them has to be said."""
    for number in range(4):
        answer(str(number))
    low = Client()
    newest = tracemw.search_traces()[0]
    assert low.delete_traces("0", trace_ids=[newest.trace_id, UNKNOWN]) == 1
    assert low.delete_traces("0", max_timestamp_millis=newest.info.request_time + 10_000, max_traces=2) == 2
    assert len(tracemw.search_traces()) == 1
    with pytest.raises(TracemwError, match="either max_timestamp_millis or trace_ids"):
        low.delete_traces("0")
    with pytest.raises(TracemwError, match="max_traces goes with max_timestamp_millis"):
        low.delete_traces("0", trace_ids=[UNKNOWN], max_traces=1)


def test_versions_are_compared(captured_traces: CapturedTraces) -> None:
    """`compare` groups what is stored."""
    for question in ("a", "b", "cc"):
        answer(question)
    groups = {group.value: group.count for group in tracemw.compare("metadata.app_version")}
    assert groups == {"1.1.0": 2, "1.2.0": 1}


def test_reading_what_another_process_wrote(tmp_path: Path) -> None:
    """A process that only reads opens the configured store, and makes no pipeline of its own before that."""
    url = f"sqlite:///{tmp_path / 'traces.db'}"
    with config.overridden(store=url, destination=url):
        before = pipeline.use(None)
        try:
            answer("why")
            assert tracemw.flush()
            current = pipeline.use(None)
            assert current is not None
            current.close()
            assert [trace.data.spans[0].outputs for trace in tracemw.search_traces()] == ["WHY"]
        finally:
            last = pipeline.use(before)
            if last is not None:
                last.close()


def test_times_with_a_fraction(captured_traces: CapturedTraces) -> None:
    """A time given as a float counts as whole nanoseconds, and can be read, searched and printed as JSON."""
    low, began = Client(), 1_750_000_000_000_000_000.0
    root = low.start_trace("root", start_time_ns=began)  # type: ignore[arg-type]
    child = low.start_span("child", trace_id=root.trace_id, parent_id=root.span_id, start_time_ns=began)  # type: ignore[arg-type]
    low.end_span(root.trace_id, child.span_id, end_time_ns=began + 1e6)  # type: ignore[arg-type]
    low.end_trace(root.trace_id, end_time_ns=began + 2e6)  # type: ignore[arg-type]
    (trace,) = captured_traces
    times = [(span.start_time_ns, span.end_time_ns) for span in trace.data.spans]
    assert times == [(int(began), int(began + 2e6)), (int(began), int(began + 1e6))]
    assert all(type(time) is int for pair in times for time in pair)
    assert type(trace.info.execution_duration) is int and '"root"' in trace.to_json()
    assert len(tracemw.search_traces("execution_time < 3ms AND timestamp > 1")) == 1
