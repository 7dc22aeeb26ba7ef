"""`tracemw.testing`: what users test their tracing with."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

import tracemw
from tracemw import config, pipeline
from tracemw.errors import SettingError
from tracemw.testing import CapturedTraces, capture_traces

pytest_plugins = ["pytester"]


@tracemw.trace
def work(number: int = 0) -> int:
    return number


def test_it_is_like_a_list_of_what_has_ended(captured_traces: CapturedTraces) -> None:
    """Length, index, slice, iteration, truth and equality are a list's; each look sees what ended before."""
    assert not captured_traces and captured_traces == []
    work(1)
    assert len(captured_traces) == 1 and captured_traces
    work(2)
    assert [trace.data.spans[0].outputs for trace in captured_traces] == [1, 2]
    assert captured_traces[-1].data.spans[0].outputs == 2
    assert len(captured_traces[:1]) == 1
    assert isinstance(captured_traces, Sequence)
    assert captured_traces == list(captured_traces)
    assert captured_traces[0] in captured_traces
    assert repr(captured_traces).startswith("[Trace(trace_id='tr-")


def test_the_order_is_that_of_their_ends(captured_traces: CapturedTraces) -> None:
    """A trace that began first and ended last is the last one; one that is open is not there."""
    first, second = tracemw.start_span_no_context("first"), tracemw.start_span_no_context("second")
    tracemw.start_span_no_context("child", parent_span=first).end()
    second.end()
    assert [trace.data.spans[0].name for trace in captured_traces] == ["second"]
    first.end()
    assert [trace.data.spans[0].name for trace in captured_traces] == ["second", "first"]


def test_it_stays_readable(tmp_path: Path) -> None:
    """After the block all of it is there, and nothing was written anywhere else."""
    with capture_traces() as traces:
        work(1)
    assert traces[0].data.spans[0].outputs == 1
    assert list(tmp_path.iterdir()) == []


def test_what_was_in_force_is_put_back() -> None:
    """Pipeline, settings and `disable` are as before, also where the block ends with an exception."""
    before = pipeline.installed(), config.settings()
    with pytest.raises(ValueError), capture_traces(sample_rate=0.5, redact=["x"]):
        assert config.settings().sample_rate == 0.5
        tracemw.disable()
        raise ValueError
    assert (pipeline.installed(), config.settings()) == before
    assert config.enabled()


def test_blocks_nest() -> None:
    """The inner one has what ends inside it, the outer one the rest."""
    with capture_traces() as outer:
        work(1)
        with capture_traces() as inner:
            work(2)
        work(3)
    assert [trace.data.spans[0].outputs for trace in outer] == [1, 3]
    assert [trace.data.spans[0].outputs for trace in inner] == [2]


def test_settings_hold_inside() -> None:
    """Any setting can be given, but not where the traces go."""
    with capture_traces(metadata={"team": "shop"}, span_name_suffixes=False) as traces:
        with tracemw.start_span("root"):
            work()
            work()
    assert traces[0].info.trace_metadata["team"] == "shop"
    assert [span.name for span in traces[0].data.spans] == ["root", "work", "work"]
    for settings in ({"destination": "memory:"}, {"sampel_rate": 1.0}):
        with pytest.raises(SettingError), capture_traces(**settings):
            pass


def test_names_are_told_apart_by_default(captured_traces: CapturedTraces) -> None:
    """Several spans of one name read `name_1`, `name_2`; a search by the name finds all."""
    with tracemw.start_span("root"):
        work()
        work()
    (trace,) = captured_traces
    assert [span.name for span in trace.data.spans] == ["root", "work_1", "work_2"]
    assert len(trace.search_spans(name="work")) == 2
    assert len(tracemw.search_traces("span.name = 'work'")) == 1


def test_threads_are_captured_too(captured_traces: CapturedTraces) -> None:
    """Traces of all threads of the process are in it."""
    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(trace.data.spans[0].outputs for trace in captured_traces) == list(range(8))


def test_the_plugin_is_light() -> None:
    """pytest runs of projects that only have tracemw installed do not pay for it."""
    code = "import pytest, sys, tracemw.testing; print([name for name in sys.modules if 'opentelemetry' in name])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_the_fixture_begins_anew_in_each_test(pytester: pytest.Pytester) -> None:
    """Registered with pytest by the package itself, also in the processes of xdist."""
    pytester.makepyfile(
        """
        import pytest, tracemw

        @pytest.mark.parametrize("number", range(6))
        def test_one(captured_traces, number):
            assert captured_traces == []
            with tracemw.start_span(f"span-{number}"):
                pass
            assert [trace.info.tags["mlflow.traceName"] for trace in captured_traces] == [f"span-{number}"]
            tracemw.disable()
        """
    )
    for options in (["-p", "no:randomly"], ["-n", "2"]):
        result = pytester.runpytest_subprocess("-p", "no:cacheprovider", *options)
        result.assert_outcomes(passed=6)
