"""Which OpenTelemetry provider makes our spans: the application's where it has one, else a private one.

*Joined*: an SDK provider is registered globally, before or after us; our processor is added to it and our spans
are made with it, so the application's exporters get them too. *Owned*: there is none; we make a provider of our
own and keep it to ourselves unless `configure(set_global=True)`. A provider that we did not make is never
replaced, reset or shut down.
"""

from __future__ import annotations

import os
import random
import threading
import weakref
from typing import Any, Final

from opentelemetry import trace as trace_api
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, ParentBased
from opentelemetry.trace import Tracer

from tracemw import config
from tracemw.guard import guarded

SCOPE: Final = "tracemw"


class _IdGenerator(IdGenerator):
    """Ids from a generator of our own: an application that seeds `random` does not make them repeat."""

    def __init__(self) -> None:
        self._bits = _random.getrandbits

    def generate_span_id(self) -> int:
        """Return 64 random bits, not all zero."""
        return self._bits(64) or self.generate_span_id()

    def generate_trace_id(self) -> int:
        """Return 128 random bits, not all zero."""
        return self._bits(128) or self.generate_trace_id()

    def is_trace_id_random(self) -> bool:
        """True: W3C's random-trace-id flag may be set (newer SDKs ask)."""
        return True


_random = random.Random()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_random.seed)


class _Providers:
    """The providers we know, and the tracer in force."""

    def __init__(self) -> None:
        self.seen: Any = None  # the global provider when we last looked
        self.tracer: Tracer | None = None
        self.made_by: Any = None  # the provider that made the tracer
        self.joined = False
        self.private: TracerProvider | None = None
        self.lock = threading.Lock()
        self.processed: weakref.WeakSet[Any] = weakref.WeakSet()


_providers = _Providers()


def tracer() -> Tracer:
    """Return the tracer in force. Notices when the application has registered a provider since."""
    current = trace_api.get_tracer_provider()
    if current is not _providers.seen or _providers.tracer is None:
        _look(current)
    return _providers.tracer  # type: ignore[return-value]


def in_force() -> Any:
    """Return the provider whose tracer is in force, for spans that go by the name of another instrumentation."""
    tracer()
    return _providers.made_by


def is_joined() -> bool:
    """True where the application's own provider makes our spans (and its exporters get them)."""
    tracer_provider = trace_api.get_tracer_provider()
    return tracer_provider is not _providers.private and hasattr(tracer_provider, "add_span_processor")


def is_joined_now() -> bool:
    """Like `is_joined`, as of the last call of `tracer`; for the request's way."""
    if _providers.tracer is None:
        tracer()
    return _providers.joined


def add_processor(tracer_provider: Any) -> None:
    """Add our processor to an SDK provider (or a span's own multi-processor), once."""
    from tracemw.pipeline.processor import PROCESSOR

    with _providers.lock:
        if tracer_provider in _providers.processed:
            return
        tracer_provider.add_span_processor(PROCESSOR)
        _providers.processed.add(tracer_provider)


def reset(*, set_global: bool = False) -> None:
    """Have the next tracer made from the settings in force now.

    Args:
        set_global: Register our own provider for the whole process, if no other is registered.
    """
    with _providers.lock:
        _providers.private = None
        _providers.tracer = None
        _providers.seen = None
    if set_global and not is_joined():
        trace_api.set_tracer_provider(_private())


def _look(current: Any) -> None:
    joined = is_joined()
    if joined:
        add_processor(current)
    made_by: Any = current if joined else _private()
    with _providers.lock:
        _providers.joined = joined
        _providers.made_by = made_by
        _providers.tracer = made_by.get_tracer(SCOPE)
        _providers.seen = current


def _private() -> TracerProvider:
    if _providers.private is None:
        from tracemw.environment import resource_attributes

        settings = config.settings()
        # Where a rate is set, the root's maker decides and children follow; else OTEL_TRACES_SAMPLER does.
        sampler = None if settings.sample_rate is None else ParentBased(ALWAYS_ON)
        made = TracerProvider(
            sampler=sampler,
            id_generator=_IdGenerator(),
            resource=Resource.create(resource_attributes(config.process_metadata())),
            shutdown_on_exit=False,
        )
        add_processor(made)
        _providers.private = made
    return _providers.private


@guarded()
def follow_span(span: Any) -> None:
    """See to it that our processor gets the end of a span that a provider unknown to us made.

    A framework may be given a provider of its own that is not the global one, and has no public way to
    reach it; the SDK's span knows the multi-processor it reports to.
    """
    multi = getattr(span, "_span_processor", None)
    if multi is None or multi in _providers.processed:
        return
    from tracemw.pipeline.processor import PROCESSOR

    if PROCESSOR not in getattr(multi, "_span_processors", ()):
        add_processor(multi)
    else:
        _providers.processed.add(multi)
