"""Facts of a trace, told from anywhere inside it; and of the request that is being handled."""

from __future__ import annotations

import asyncio
import logging
import threading
import uuid
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

import tracemw
from tests.request import drive
from tracemw import current_request, guard
from tracemw.errors import TracemwError
from tracemw.testing import CapturedTraces, capture_traces


@tracemw.trace
def work(**facts: Any) -> None:
    tracemw.update_current_trace(**facts)


def test_threads_tell_at_the_same_time(captured_traces: CapturedTraces) -> None:
    """The first facts of a trace, told by several threads at once, are all kept."""
    barrier = threading.Barrier(4)

    def tell(trace_id: str, number: int) -> None:
        barrier.wait()
        tracemw.set_trace_tag(trace_id, f"tag{number}", "1")

    for _ in range(20):
        with tracemw.start_span("root") as span:
            threads = [threading.Thread(target=tell, args=(span.trace_id, number)) for number in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    told = {f"tag{number}" for number in range(4)}
    assert [told <= trace.info.tags.keys() for trace in captured_traces] == [True] * 20


def test_everything_that_can_be_told(captured_traces: CapturedTraces) -> None:
    """Tags, metadata, ids, previews, state and model are the trace's, wherever in it they are told."""
    with tracemw.start_span("root"):
        with tracemw.start_span("child"):
            work(
                tags={"t": "1"},
                metadata={"m": "2"},
                client_request_id="req-1",
                session_id="s-1",
                user="ada",
                request_preview="asked",
                response_preview="answered",
                state="ERROR",
                model_id="model-1",
            )
    info = captured_traces[0].info
    assert info.tags["t"] == "1"
    assert info.trace_metadata["m"] == "2"
    assert info.client_request_id == "req-1"
    assert info.trace_metadata["mlflow.trace.session"] == "s-1"
    assert info.trace_metadata["mlflow.trace.user"] == "ada"
    assert info.trace_metadata["mlflow.modelId"] == "model-1"
    assert (info.request_preview, info.response_preview) == ("asked", "answered")
    assert info.state == "ERROR"
    assert all(span.status.status_code == "OK" for span in captured_traces[0].data.spans)


def test_later_words_are_added(captured_traces: CapturedTraces) -> None:
    """Tags and metadata are merged, the last word on each counts, and what is not said stays."""
    with tracemw.start_span("root"):
        work(tags={"a": "1", "b": "1"}, user="ada", client_request_id="req-1")
        work(tags={"b": "2"}, metadata={"mlflow.trace.session": "s-1"})
    info = captured_traces[0].info
    assert (info.tags["a"], info.tags["b"]) == ("1", "2")
    assert info.trace_metadata["mlflow.trace.user"] == "ada"
    assert info.trace_metadata["mlflow.trace.session"] == "s-1"
    assert info.client_request_id == "req-1"


def test_values_that_are_no_strings(captured_traces: CapturedTraces, caplog: pytest.LogCaptureFixture) -> None:
    """Numbers become text, with a warning, as in MLflow."""
    work(tags={"n": 1}, metadata={"f": 1.5}, client_request_id=42)
    info = captured_traces[0].info
    assert (info.tags["n"], info.trace_metadata["f"], info.client_request_id) == ("1", "1.5", "42")
    assert "should be strings" in caplog.text


class Odd:
    """What has no text."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


@pytest.mark.parametrize("odd", [["s-1"], {"id": 1}, ("a",), {"a"}, True, object(), Odd(), b"\xff"], ids=type)
def test_what_is_no_id(captured_traces: CapturedTraces, caplog: pytest.LogCaptureFixture, odd: Any) -> None:
    """A list, a user object and the like are left out with a warning; what was known before stays."""
    with tracemw.start_span("root"), tracemw.context(session_id=odd, user=odd):
        work(user="ada", session_id="s-1", client_request_id="req-1")
        work(user=odd, session_id=odd, client_request_id=odd)
        work(metadata={"mlflow.trace.user": odd, "mlflow.trace.session": odd})
    info = captured_traces[0].info
    assert info.client_request_id == "req-1"
    assert info.trace_metadata["mlflow.trace.user"] == "ada"
    assert info.trace_metadata["mlflow.trace.session"] == "s-1"
    assert f"user_id of type {type(odd).__name__} has no text form that is an id; it is left out" in caplog.text


def test_what_counts_as_its_text(captured_traces: CapturedTraces) -> None:
    """Numbers, UUIDs, bytes and an application's own id class are ids."""

    class Key:
        def __str__(self) -> str:
            return "key-1"

    for value in (7, uuid.UUID(int=1), b"x", Key()):
        work(user=value)
    users = [trace.info.trace_metadata["mlflow.trace.user"] for trace in captured_traces]
    assert users == ["7", "00000000-0000-0000-0000-000000000001", "x", "key-1"]


@pytest.mark.parametrize("returned", [{"id": 1}, object(), ["jane"]], ids=type)
def test_what_the_user_option_returns_is_no_id(
    returned: Any,
    captured_traces: CapturedTraces,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The log says so, and the trace has no user made of it."""
    monkeypatch.setattr(guard, "_last_logged", {})
    app = FastAPI()
    app.add_middleware(tracemw.TraceMiddleware, user=lambda scope: returned)
    drive.ask(app)
    assert "mlflow.trace.user" not in captured_traces[0].info.trace_metadata
    assert "`user` option" in caplog.text


def test_a_value_without_a_text(captured_traces: CapturedTraces, caplog: pytest.LogCaptureFixture) -> None:
    """It is left out, the others are kept, and the application goes on."""
    work(tags={"odd": Odd(), "t": "1"}, metadata={"odd": Odd(), "m": "1"}, model_id=Odd())
    info = captured_traces[0].info
    assert (info.tags["t"], info.trace_metadata["m"]) == ("1", "1")
    assert "odd" not in info.tags and not {"odd", "mlflow.modelId"} & info.trace_metadata.keys()
    assert "has no text form and is left out (Odd)" in caplog.text


def test_a_refusal_changes_nothing(captured_traces: CapturedTraces) -> None:
    """Whatever else was told in the same call."""

    @tracemw.trace
    def refused() -> None:
        with pytest.raises(TracemwError, match="`metadata` parameter must be a dictionary, but got list"):
            tracemw.update_current_trace(state="ERROR", tags={"t": "1"}, user="ada", metadata=["m"])  # type: ignore[arg-type]

    refused()
    info = captured_traces[0].info
    assert (info.state, "t" in info.tags, "mlflow.trace.user" in info.trace_metadata) == ("OK", False, False)


@pytest.mark.parametrize(
    "facts",
    [
        {"state": "FINE"}, {"request_preview": 1}, {"response_preview": ["a"]}, {"tags": ["a"]}, {"tags": 5},
        {"metadata": "text"},
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(captured_traces: CapturedTraces, facts: dict[str, Any]) -> None:
    """A state other than OK and ERROR, or a preview that is no text, raises, as in MLflow."""
    with pytest.raises(TracemwError, match="must be"):
        work(**facts)


@pytest.mark.parametrize("value", ["x" * 251, "a\nb", "a\x00b", "\ud800"])
def test_ids_that_cannot_be_used_are_left_out(
    captured_traces: CapturedTraces, caplog: pytest.LogCaptureFixture, value: str
) -> None:
    """A session or user that is too long or has control characters is refused, never shortened into another's."""
    work(session_id=value, user=value, metadata={"mlflow.trace.user": value})
    metadata = captured_traces[0].info.trace_metadata
    assert not {"mlflow.trace.session", "mlflow.trace.user"} & set(metadata)
    assert "it is left out" in caplog.text


def test_outside_a_trace(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing happens and nothing is raised; one warning says what to do."""
    monkeypatch.setattr(guard, "_last_logged", {})
    with caplog.at_level(logging.WARNING, "tracemw"):
        for _ in range(3):
            tracemw.update_current_trace(tags={"a": "1"}, state="nonsense")
    (record,) = caplog.records
    assert "tracemw.start_span" in record.getMessage() or "start_span block" in record.getMessage()


def test_in_a_trace_that_is_not_sampled(caplog: pytest.LogCaptureFixture) -> None:
    """There is a trace, but it is not recorded: nothing happens, without a warning."""
    with capture_traces(sample_rate=0.0) as traces:
        work(tags={"a": "1"})
    assert len(traces) == 0 and caplog.records == []


def test_from_a_thread_that_carries_the_context(captured_traces: CapturedTraces) -> None:
    """A worker reaches the trace of whoever carried the context to it."""
    with tracemw.start_span("root"):
        thread = threading.Thread(target=tracemw.propagate(tracemw.update_current_trace), kwargs={"user": "ada"})
        thread.start()
        thread.join()
    assert captured_traces[0].info.trace_metadata["mlflow.trace.user"] == "ada"


def test_after_the_root_has_ended(captured_traces: CapturedTraces) -> None:
    """A task that outlives the trace changes the stored trace."""

    async def main() -> None:
        gate = asyncio.Event()

        async def background() -> None:
            await gate.wait()
            tracemw.update_current_trace(tags={"late": "1"}, state="ERROR")

        with tracemw.start_span("root"):
            task = asyncio.create_task(background())
        assert len(captured_traces) == 1  # it is stored by now
        gate.set()
        await task

    asyncio.run(main())
    (trace,) = captured_traces
    assert (trace.info.tags["late"], trace.info.state) == ("1", "ERROR")


# context


def test_context_is_for_the_traces_that_begin_inside(captured_traces: CapturedTraces) -> None:
    """Blocks merge, the inner one wins, code in the trace wins over both; the trace around is not touched."""
    with tracemw.start_span("around"):
        with tracemw.context(tags={"a": "1", "b": "1"}, metadata={"m": "1"}, user="ada"):
            with tracemw.context(tags={"b": "2"}, session_id="s-1"), tracemw.detached():
                pass
            with tracemw.start_span("child"):
                pass
    with tracemw.context(tags={"a": "1", "b": "1"}, metadata={"m": "1"}, user="ada"):
        with tracemw.context(tags={"b": "2"}, session_id="s-1"):
            work(tags={"c": "3"})
        work()
    around, inner, outer = (trace.info for trace in captured_traces)
    assert "a" not in around.tags
    assert [inner.tags[key] for key in "abc"] == ["1", "2", "3"]
    assert inner.trace_metadata.items() >= {
        "m": "1", "mlflow.trace.user": "ada", "mlflow.trace.session": "s-1"
    }.items()  # fmt: skip
    assert (outer.tags["b"], "mlflow.trace.session" in outer.trace_metadata) == ("1", False)


def test_detached_work_is_a_linked_trace_of_its_own(captured_traces: CapturedTraces) -> None:
    """What begins in `detached()` has no parent and none of the facts, and links to where it was begun."""
    with tracemw.start_span("request") as request:
        tracemw.update_current_trace(user="ada")
        with tracemw.detached():
            work()
    detached, request_trace = captured_traces
    (span,) = detached.data.spans
    assert span.parent_id is None and detached.trace_id != request_trace.trace_id
    assert [(link.trace_id, link.span_id) for link in span.links] == [(request.trace_id, request.span_id)]
    assert "mlflow.trace.user" not in detached.info.trace_metadata


# Requests


def ask(path: str, headers: dict[str, str] | None = None, **options: Any) -> dict[str, Any]:
    """What an application answers that tells what `current_request` knows."""
    app = FastAPI()

    @app.get("/me")
    @tracemw.trace
    def me(login: str = "") -> dict[str, Any]:
        if login:
            tracemw.update_current_trace(user=login, session_id="from code")
        return {
            name: getattr(current_request, name)
            for name in ("client_request_id", "session_id", "user_id", "trace_id")
        }

    async def get() -> Any:
        transport = httpx.ASGITransport(tracemw.instrument(app, **options))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return (await client.get(path, headers=headers)).json()

    answer: dict[str, Any] = asyncio.run(get())
    return answer


HEADERS = {"X-Request-ID": "req-1", "X-Session-ID": "s-1", "X-User-ID": "ada"}


def test_the_current_request_is_known(captured_traces: CapturedTraces) -> None:
    """The ids of the headers, and the trace's; what code sets wins; outside a request all are None."""
    before = ask("/me", HEADERS)
    after = ask("/me?login=bob", HEADERS)
    trace_id = captured_traces[0].trace_id
    assert before == {"client_request_id": "req-1", "session_id": "s-1", "user_id": "ada", "trace_id": trace_id}
    assert (after["session_id"], after["user_id"]) == ("from code", "bob")
    assert captured_traces[1].info.trace_metadata["mlflow.trace.user"] == "bob"
    assert not current_request and current_request.session_id is None and current_request.trace_id is None


def test_the_request_is_known_although_not_sampled() -> None:
    """Its ids are, its trace is not."""
    with capture_traces() as traces:
        answer = ask("/me", HEADERS, sample_rate=0.0)
    assert (answer["session_id"], answer["trace_id"]) == ("s-1", None)
    assert len(traces) == 0


def test_the_traced_handler_makes_the_previews(captured_traces: CapturedTraces) -> None:
    """Inputs and outputs of the handler are what the request's trace shows."""
    ask("/me?login=bob")
    info = captured_traces[0].info
    assert info.request_preview == '{"login": "bob"}'
    assert info.response_preview is not None and '"user_id": "bob"' in info.response_preview
    handler = captured_traces[0].search_spans(name="me")[0]
    assert handler.parent_id == captured_traces[0].data.spans[0].span_id
