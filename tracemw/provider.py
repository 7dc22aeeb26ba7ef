"""Which OpenTelemetry provider makes our spans: the application's where it has one, else a private one.

*Joined*: an SDK provider is registered globally, before or after us; our processor is added to it and our spans
are made with it, so the application's exporters get them too. *Owned*: there is none; we make a provider of our
own and keep it to ourselves unless `configure(set_global=True)`. A provider that we did not make is never
replaced, reset or shut down.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Final

from opentelemetry import trace as trace_api
from opentelemetry.context import Context
from opentelemetry.sdk.environment_variables import OTEL_TRACES_SAMPLER
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.sdk.trace.sampling import Decision, Sampler, SamplingResult
from opentelemetry.trace import Link, SpanKind, TraceFlags, Tracer, TraceState
from opentelemetry.util.types import Attributes

from tracemw import config
from tracemw.chance import chance
from tracemw.forks import RenewedLock
from tracemw.guard import guarded

SCOPE: Final = "tracemw"


class _IdGenerator(IdGenerator):
    """Ids from a generator of our own: an application that seeds `random` does not make them repeat."""

    def __init__(self) -> None:
        self._bits = chance.getrandbits

    def generate_span_id(self) -> int:
        """Return 64 random bits, not all zero."""
        return self._bits(64) or self.generate_span_id()

    def generate_trace_id(self) -> int:
        """Return 128 random bits, not all zero."""
        return self._bits(128) or self.generate_trace_id()

    def is_trace_id_random(self) -> bool:
        """True: W3C's random-trace-id flag may be set (newer SDKs ask)."""
        return True


_SAMPLED_ROOT: Final = SamplingResult(Decision.RECORD_AND_SAMPLE)  # of a request, which begins with neither


class _FollowParent(Sampler):
    """Samples what has no parent, or a sampled one: OpenTelemetry's default, without its detours."""

    def should_sample(
        self,
        parent_context: Context | None,
        trace_id: int,
        name: str,
        kind: SpanKind | None = None,
        attributes: Attributes = None,
        links: Sequence[Link] | None = None,
        trace_state: TraceState | None = None,
    ) -> SamplingResult:
        """Decide by the parent in the context."""
        if not attributes and not parent_context and parent_context is not None:
            return _SAMPLED_ROOT
        parent = trace_api.get_current_span(parent_context).get_span_context()
        if not parent.is_valid:
            return SamplingResult(Decision.RECORD_AND_SAMPLE, attributes)
        sampled = parent.trace_flags & TraceFlags.SAMPLED
        decision = Decision.RECORD_AND_SAMPLE if sampled else Decision.DROP
        return SamplingResult(decision, attributes if sampled else None, parent.trace_state)

    def get_description(self) -> str:
        """Return the name of the sampler that it stands for."""
        return "ParentBased{root:AlwaysOnSampler}"


class _Providers:
    """The providers we know, and what is in force: the tracer, and whether it is an application's provider's."""

    def __init__(self) -> None:
        self.seen: Any = None  # the global provider when we last looked
        self.chosen: tuple[Tracer, bool] | None = None
        self.made_by: Any = None  # the provider that made the tracer
        self.private: TracerProvider | None = None
        self.lock = RenewedLock()
        self.processed: weakref.WeakSet[Any] = weakref.WeakSet()


_providers = _Providers()


def tracer() -> Tracer:
    """Return the tracer in force. Notices when the application has registered a provider since."""
    return chosen()[0]


def chosen() -> tuple[Tracer, bool]:
    """Return the tracer in force, and whether the application's own provider has made it."""
    if _registered() is not _providers.seen or _providers.chosen is None:
        _look(trace_api.get_tracer_provider())
    return _providers.chosen  # type: ignore[return-value]


def _registered_attribute() -> Any:
    return trace_api._TRACER_PROVIDER


# Where none is registered, `get_tracer_provider` looks into the environment with every call. Whether one has been
# registered since, the API's own variable tells at once; without it, the function does.
_registered: Callable[[], Any] = (
    _registered_attribute if hasattr(trace_api, "_TRACER_PROVIDER") else trace_api.get_tracer_provider
)


def in_force() -> Any:
    """Return the provider whose tracer is in force, for spans that go by the name of another instrumentation."""
    tracer()
    return _providers.made_by


def is_joined() -> bool:
    """True where the application's own provider makes our spans (and its exporters get them)."""
    tracer_provider = trace_api.get_tracer_provider()
    return tracer_provider is not _providers.private and hasattr(tracer_provider, "add_span_processor")


def is_joined_now() -> bool:
    """Like `is_joined`, for the request's way."""
    return chosen()[1]


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
        _providers.chosen = None
        _providers.seen = None
    if set_global and not is_joined():
        trace_api.set_tracer_provider(_private())


def _look(current: Any) -> None:
    joined = is_joined()
    if joined:
        add_processor(current)
    made_by: Any = current if joined else _private()
    tracer = made_by.get_tracer(SCOPE)
    if not joined and isinstance(getattr(tracer, "sampler", None), _FollowParent):
        from tracemw.lightspan import light
        from tracemw.pipeline.processor import PROCESSOR

        tracer = light(tracer, chance.getrandbits, PROCESSOR)
    with _providers.lock:
        _providers.made_by = made_by
        _providers.chosen = tracer, joined
        _providers.seen = _registered()


def _private() -> TracerProvider:
    if _providers.private is None:
        from tracemw.environment import resource_attributes

        settings = config.settings()
        # Where a rate is set, the root's maker decides and children follow; else OTEL_TRACES_SAMPLER does.
        decided = settings.sample_rate is not None or OTEL_TRACES_SAMPLER not in os.environ
        sampler = _FollowParent() if decided else None
        made = TracerProvider(
            sampler=sampler,
            id_generator=_IdGenerator(),
            resource=_resource(resource_attributes(config.process_metadata())),
            shutdown_on_exit=False,
        )
        add_processor(made)
        _providers.private = made
    return _providers.private


def _resource(attributes: dict[str, Any]) -> Resource:
    """Return the resource of our own provider.

    The SDK asks its detectors in threads of a pool. There are none once the main thread has ended: then the
    environment has to do.
    """
    try:
        return Resource.create(attributes)
    except RuntimeError:
        return OTELResourceDetector().detect().merge(Resource(attributes))


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
