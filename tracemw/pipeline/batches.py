"""Many traces in one request, and who is at fault when it is refused.

A back end takes or refuses a request as a whole. A refused one is split in halves, again and again, so that one
bad trace costs only itself, in about 2 log2(n) requests.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Container, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from tracemw.pipeline.transport import Refused, Unavailable
from tracemw.store.rows import StoredTrace

MAX_TRACES: Final = 256  # in one request
MAX_BYTES: Final = 4 << 20  # of one request, before compression
PATIENCE: Final = 20  # refusals in a row, with nothing accepted, after which the back end is the one at fault
BASE_PAUSE: Final = 0.5  # seconds
LONGEST_PAUSE: Final = 60.0


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one trace.

    Attributes:
        reason: Why it was not taken; None: it was.
        final: It would not be taken the next time either.
    """

    trace: StoredTrace
    reason: str | None = None
    final: bool = False


class Destination(Protocol):
    """A back end that traces are delivered to. Used by one thread."""

    def check(self) -> str:
        """Find out who is there and whether it will do; return a line about it.

        Raises:
            Unavailable: There is no answer.
            Unfit: It cannot take our traces until somebody changes something.
        """
        ...

    def send(self, traces: Sequence[StoredTrace], suspects: Container[int]) -> Generator[Result, None, None]:
        """Send traces, whole; sending one again replaces it.

        Args:
            traces: The traces.
            suspects: Numbers of those that were refused before: they go alone.

        Raises:
            Unavailable: The traces without a result were not tried, or not to the end.
            Unfit: Likewise, and it will be so until somebody changes something.
        """
        ...

    def close(self) -> None:
        """Close the connections."""
        ...


@dataclass(frozen=True, slots=True)
class Encoded:
    """A trace and its protobuf."""

    trace: StoredTrace
    body: bytes


class Batches:
    """Posts encoded traces in few requests.

    Args:
        post: Sends one body; raises Refused, Unavailable or Unfit.
        plainer: Encodes a trace that was refused for its content once more, without what may be at fault.
    """

    def __init__(
        self, post: Callable[[bytes], None], plainer: Callable[[StoredTrace], bytes] | None = None
    ) -> None:
        self._post = post
        self._plainer = plainer
        self._max_bytes = MAX_BYTES
        self._refusals = 0  # in a row

    def send(
        self, items: Iterable[Encoded], suspects: Container[int]
    ) -> Iterator[tuple[list[Encoded], Refused | None]]:
        """Post items and yield them as they are taken (with None), or refused (one by one)."""
        alone = []
        batch: list[Encoded] = []
        weight = 0
        for item in items:
            if item.trace.id in suspects:
                alone.append(item)
                continue
            if batch and (len(batch) >= MAX_TRACES or weight + len(item.body) > self._max_bytes):
                yield from self._send(batch)
                batch, weight = [], 0
            batch.append(item)
            weight += len(item.body)
        if batch:
            yield from self._send(batch)
        for item in alone:
            yield from self._send([item], suspect=True)

    def _send(self, batch: list[Encoded], suspect: bool = False) -> Iterator[tuple[list[Encoded], Refused | None]]:
        try:
            self._post(b"".join(item.body for item in batch))
        except Refused as exc:
            self._refusals += 1
            if self._refusals > PATIENCE:
                self._refusals = 0
                raise Unavailable(f"everything is refused, lastly: {exc}") from exc
            if exc.too_large:
                self._max_bytes = max(64 << 10, sum(len(item.body) for item in batch) // 2)
            if len(batch) == 1:
                yield batch, self._send_plainer(batch[0], exc, suspect)
                return
        else:
            self._refusals = 0
            yield batch, None
            return
        middle = len(batch) // 2
        yield from self._send(batch[:middle])
        yield from self._send(batch[middle:])

    def _send_plainer(self, item: Encoded, refusal: Refused, suspect: bool) -> Refused | None:
        """Return None if the trace was taken when it was plainer, else why it was not as it is."""
        blamed = refusal.content or (suspect and not refusal.final)  # a 500 twice: MLflow 3.10 has it for content
        if self._plainer is None or not blamed:
            return refusal
        body = self._plainer(item.trace)
        if body == item.body:
            return refusal
        try:
            self._post(body)
        except Refused:
            return refusal
        self._refusals = 0
        return None


def pause(failures: int, longest: float = LONGEST_PAUSE) -> float:
    """Return the seconds to wait after so many failures: twice as long each time, less up to a half at random."""
    return min(longest, BASE_PAUSE * 2.0 ** min(failures, 20)) * (1.0 - random.random() / 2)
