"""For tests of applications that tracemw traces: what was traced, in memory.

    with tracemw.testing.capture_traces() as traces:
        client.get("/items/1")
    assert traces[0].info.tags == {"plan": "pro"}

With pytest, the fixture `captured_traces` is the same for one test. pytest loads this module with every run of
every project that has tracemw installed, so the rest of tracemw is imported by what uses it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, overload

if TYPE_CHECKING:
    from tracemw.entities import Trace
    from tracemw.pipeline.writer import Pipeline
    from tracemw.store import Store

_FLUSH = 10.0  # seconds that a look at the traces may wait for the writer; it takes milliseconds
_ALL = 1_000_000
_FOREVER = 1e10  # seconds: a trace of long ago, told by hand, is kept too


class CapturedTraces(Sequence["Trace"]):
    """The traces that have ended so far, in the order in which they ended; equal to a list of the same traces.

    Whatever ended before a look at it is in it.
    """

    def __init__(self, pipeline: Pipeline, store: Store, suffixes: bool) -> None:
        self._pipeline = pipeline
        self._store = store
        self._suffixes = suffixes
        self._version: list[Any] = []
        self._traces: list[Trace] = []
        self._frozen = False

    @overload
    def __getitem__(self, index: int) -> Trace: ...
    @overload
    def __getitem__(self, index: slice) -> list[Trace]: ...
    def __getitem__(self, index: int | slice) -> Trace | list[Trace]:
        return self._read()[index]

    def __len__(self) -> int:
        return len(self._read())

    def __iter__(self) -> Iterator[Trace]:
        return iter(list(self._read()))

    def __eq__(self, other: object) -> bool:
        return self._read() == (other._read() if isinstance(other, CapturedTraces) else other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(self._read())

    def _read(self) -> list[Trace]:
        if self._frozen:
            return self._traces
        self._pipeline.flush(_FLUSH)
        version = self._store.read("SELECT count(*), sum(revision) FROM traces")
        if version != self._version:
            from tracemw.entities import Trace

            self._version = version
            ended = self._store.search("status != 'IN_PROGRESS'", max_results=_ALL).traces
            ended.sort(key=lambda stored: stored.row.start_ns + (stored.row.duration_ns or 0))
            self._traces = [Trace.from_stored(stored, self._suffixes) for stored in ended]
        return self._traces

    def _freeze(self) -> None:
        self._read()
        self._frozen = True


@contextmanager
def capture_traces(**settings: Any) -> Iterator[CapturedTraces]:
    """Keep what is traced inside the block in memory, apart from everything else, whatever is configured.

    The reading functions (`search_traces`, `get_trace`) see the same traces while the block lasts. Blocks may be
    nested; the settings outside are in force again after the block, also where it ends with an exception. There is
    one pipeline in a process, so tests that run at the same time need processes of their own (as pytest-xdist
    gives them).

    Args:
        **settings: Settings that hold inside the block, such as `sample_rate=0.5`.

    Yields:
        The traces that have ended so far; after the block, all of them.

    Raises:
        SettingError: A setting is unknown or has a value that it does not allow.
    """
    from tracemw import config, pipeline
    from tracemw.errors import SettingError
    from tracemw.pipeline.local import StoreSink
    from tracemw.pipeline.writer import Pipeline

    if settings.keys() & {"destination", "store"}:
        raise SettingError("capture_traces keeps traces in memory: leave out destination and store")
    with config.overridden(**settings) as now, _sampled_as(settings):
        sink = StoreSink("memory:", None, now.override({"max_age": _FOREVER}))
        own = Pipeline(sink, now)
        captured = CapturedTraces(own, sink.store, now.span_name_suffixes)
        before = pipeline.use(own)
        try:
            yield captured
        finally:
            pipeline.use(before)
            captured._freeze()
            own.close(_FLUSH)
            sink.close()


@contextmanager
def _sampled_as(settings: dict[str, Any]) -> Iterator[None]:
    """Have a provider of our own made anew where the settings change how it samples."""
    from tracemw import provider

    if "sample_rate" not in settings:
        yield
        return
    provider.reset()
    try:
        yield
    finally:
        provider.reset()


if "pytest" in sys.modules:  # as its plugin; without pytest the rest is of use, too
    import pytest

    @pytest.fixture
    def captured_traces() -> Iterator[CapturedTraces]:
        """The traces that have ended in this test so far; see `tracemw.testing.capture_traces`."""
        with capture_traces() as traces:
            yield traces
