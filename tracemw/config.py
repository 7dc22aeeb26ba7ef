"""What is in force in this process: the settings, the process metadata, the pipeline; and how it ends.

Everything is made when it is first needed, from the environment, so that importing tracemw does nothing.
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any, Final

from tracemw import guard, pipeline
from tracemw.forks import RenewedLock
from tracemw.settings import DEFAULT_DESTINATION, Settings, from_environment

if TYPE_CHECKING:
    from tracemw.pipeline.writer import Pipeline, Sink

logger = logging.getLogger("tracemw")

EXIT_FLUSH: Final = 5.0  # seconds that the end of the process may wait for the store
SWITCH_FLUSH: Final = 30.0  # seconds that `configure` may wait for what was traced before
READ_FLUSH: Final = 1.0  # seconds that a read in the writing process may wait for what ended before it


class _State:
    """The one mutable thing: replaced piece by piece by `configure`, read by everybody."""

    settings: Settings | None = None
    process_metadata: Mapping[str, str] | None = None
    generation = 0  # goes up with every change, so that what was compiled from the settings is made anew
    enabled = True
    hooks_installed = False


_state = _State()
_lock = RenewedLock()


def settings() -> Settings:
    """Return the settings in force.

    Raises:
        SettingError: An environment variable has a value that its setting does not allow.
    """
    if _state.settings is None:
        with _lock:
            if _state.settings is None:
                _state.settings = from_environment()
    return _state.settings


def generation() -> int:
    """Return a number that changes whenever the settings do."""
    return _state.generation


def process_metadata() -> Mapping[str, str]:
    """Return the metadata of this process: environment, version, deployment, region, source, git."""
    if _state.process_metadata is None:
        from tracemw.environment import process_metadata as find

        now = settings()
        _state.process_metadata = find(metadata=now.metadata, metadata_env=now.metadata_env)
    return _state.process_metadata


def configure(**options: Any) -> None:
    """Set where traces go and how they are made, for the whole process.

    What was traced before is stored first (at most 30 seconds), then the new settings are in force.
    Settings that are not named come from the environment or their defaults, not from an earlier call.

    Args:
        **options: Settings by name; see the settings page of the documentation.

    Raises:
        SettingError: A setting is unknown or has a value that it does not allow. Nothing was changed.
        TracemwError: The destination needs a package that is not installed. Nothing was changed.
    """
    new = from_environment().override(options)
    _check_remote(effective_destination(new))
    with _lock:
        previous, deadline = pipeline.installed(), time.monotonic() + SWITCH_FLUSH
        if previous is not None:
            previous.flush(SWITCH_FLUSH)
        _state.settings = new
        _state.process_metadata = None
        _state.generation += 1
        process_metadata()
        pipeline.use(make_pipeline(new))
        if previous is not None:
            _close(previous, max(0.0, deadline - time.monotonic()))
            previous.tell_unsaved()
    from tracemw import provider

    provider.reset(set_global=new.set_global)
    install_exit_hooks()


@contextmanager
def overridden(**options: Any) -> Iterator[Settings]:
    """Have some settings replaced inside a block, and what `enable` and `disable` did there undone after it.

    The pipeline stays as it is: who wants another one puts it in force. Meant for tests.

    Args:
        **options: Settings by name.

    Raises:
        SettingError: A setting is unknown or has a value that it does not allow. Nothing was changed.
    """
    before = _state.settings, _state.process_metadata, _state.enabled
    new = settings().override(options)
    if options:
        _state.settings = new
        _state.process_metadata = None
        _state.generation += 1
    try:
        yield new
    finally:
        _state.settings, _state.process_metadata, _state.enabled = before
        _state.generation += 1


def import_parts() -> None:
    """Import what the first span needs, so that no request has to wait for that.

    Nothing is made: a server may fork after this, and settings and provider may change.
    """
    try:
        from tracemw import lightspan  # noqa: F401
        from tracemw.pipeline import local, processor, writer  # noqa: F401
    except ImportError:  # a Python without SQLite, which not every destination needs
        pass


def make_pipeline(settings: Settings) -> Pipeline:
    """Make the pipeline that the settings ask for."""
    from tracemw.pipeline.writer import Pipeline  # with the store: not for those who only import us

    return Pipeline(make_sink(settings), settings)


def make_sink(settings: Settings) -> Sink | None:
    """Make what the writer hands its rows to; None where spans are to be dropped unencoded."""
    destination = effective_destination(settings)
    if destination == "none:":
        return None
    if destination == "console:":
        from tracemw.pipeline.console import ConsoleSink

        return ConsoleSink()
    from tracemw.pipeline.local import StoreSink

    return StoreSink(store_url(settings), destination if is_remote(destination) else None, settings)


def effective_destination(settings: Settings) -> str:
    """Return where traces go: what was set, else the standard variables of MLflow and OTLP, else a local file."""
    if settings.destination is not None:
        return settings.destination
    from tracemw import provider

    if not provider.is_joined():
        tracking_uri = os.environ.get("MLFLOW_TRACKING_URI", "")
        if tracking_uri.startswith(("http://", "https://")):
            return f"mlflow+{tracking_uri}"
        if endpoint := _otlp_endpoint():
            return f"otlp+{endpoint}"
    return DEFAULT_DESTINATION


def _otlp_endpoint() -> str | None:
    """Return the endpoint that OpenTelemetry's variables name; none where they ask for gRPC."""
    found = [
        os.environ.get(f"OTEL_EXPORTER_OTLP_TRACES_{name}") or os.environ.get(f"OTEL_EXPORTER_OTLP_{name}") or ""
        for name in ("ENDPOINT", "PROTOCOL")
    ]
    usable = found[0].startswith(("http://", "https://")) and found[1].strip().lower() != "grpc"
    return found[0] if usable else None


def is_remote(destination: str) -> bool:
    """True where the destination is reached over the network, through the local store."""
    return destination.startswith(("mlflow+", "otlp+"))


def _check_remote(destination: str) -> None:
    """Raise for a remote destination that nothing can be delivered to: now, not in a background thread's log."""
    if is_remote(destination):
        from tracemw.pipeline.courier import connect

        connect(destination).close()


def store_url(settings: Settings) -> str:
    """Return the store that is written first and read from."""
    if settings.store is not None:
        return settings.store
    destination = effective_destination(settings)
    return destination if destination.startswith(("sqlite:", "memory:")) else DEFAULT_DESTINATION


def flush(timeout: float = 30.0, delivered: bool = True) -> bool:
    """Wait until everything that ended before the call is stored, and delivered.

    Args:
        timeout: Seconds to wait at most.
        delivered: Also wait for the remote destination's acknowledgement, where there is one.

    Returns:
        True when all is stored (and, if `delivered`, acknowledged); False when time ran out.
    """
    current = pipeline.installed()
    if current is None:
        return True
    deadline = time.monotonic() + timeout
    stored = current.flush(timeout)
    wait_delivered = getattr(current.sink, "wait_delivered", None)
    if stored and delivered and wait_delivered is not None:
        return bool(wait_delivered(max(0.0, deadline - time.monotonic())))
    return stored


def shutdown(timeout: float = 30.0) -> bool:
    """Store what is left and stop the background threads.

    Tracing an application after that starts them again.

    Args:
        timeout: Seconds to wait at most.

    Returns:
        True when everything was stored.
    """
    current = pipeline.installed()
    return True if current is None else _close(current, timeout)


def _close(current: Pipeline, timeout: float = 30.0) -> bool:
    stored = current.close(timeout)
    close = getattr(current.sink, "close", None)
    if close is not None:
        close()
    return stored


def stats() -> dict[str, Any]:
    """Return what this process counted: spans written, dropped, waiting; failures of ours that were swallowed."""
    current = pipeline.installed()
    counts: dict[str, Any] = {} if current is None else dict(current.stats())
    sink_stats = getattr(current.sink, "stats", None) if current is not None else None
    if sink_stats is not None:
        counts.update(sink_stats())
    counts["failures"] = guard.failures()
    return counts


def enable() -> None:
    """Trace again after `disable()`."""
    _state.enabled = True
    _state.generation += 1


def disable() -> None:
    """Trace nothing from now on; spans that are open are finished as they are."""
    _state.enabled = False
    _state.generation += 1


def enabled() -> bool:
    """True unless `disable()` was called or OTEL_SDK_DISABLED turns OpenTelemetry off."""
    return _state.enabled and not _SDK_DISABLED


_SDK_DISABLED: Final = os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"


def install_exit_hooks() -> None:
    """Have the end of the process store what is queued: `atexit`, and SIGTERM where nobody else handles it.

    Servers that end on SIGTERM themselves either reach `atexit` (gunicorn) or raise the signal once more under
    the handler that was there before them (uvicorn), which is ours then.
    """
    if _state.hooks_installed:
        return
    _state.hooks_installed = True
    atexit.register(_flush_at_exit)
    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _flush_at_sigterm)


def _flush_at_exit() -> None:
    current = pipeline.installed()
    if current is not None:
        current.flush_at_exit(EXIT_FLUSH)


def _flush_at_sigterm(signum: int, frame: FrameType | None) -> None:
    try:
        _flush_at_exit()
    finally:
        signal.signal(signum, signal.SIG_DFL)
        os.kill(os.getpid(), signum)


def _default_pipeline() -> Pipeline:
    now = settings()
    if effective_destination(now) == DEFAULT_DESTINATION and now.destination is None:
        path = os.path.abspath(DEFAULT_DESTINATION.removeprefix("sqlite:///"))
        logger.warning("traces are stored in %s; set TRACEMW_DESTINATION to change that", path)
    process_metadata()
    install_exit_hooks()
    return make_pipeline(now)


pipeline.set_default(_default_pipeline)
