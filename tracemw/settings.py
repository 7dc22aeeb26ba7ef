"""The settings: one frozen value, from `configure()` and the environment, checked before it is used.

Where they come from, first wins: middleware option, `configure()`, environment variable, default.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from tracemw import places
from tracemw.errors import SettingError

DEFAULT_DESTINATION: Final = "sqlite:///tracemw.db"
DEFAULT_EXCLUDE: Final = ("/health", "/healthz", "/livez", "/readyz", "/ping", "/metrics")
METADATA_PREFIX: Final = "TRACEMW_METADATA_"
# One application of a process cannot have its own of these.
PROCESS_WIDE: Final = frozenset(
    {"destination", "store", "max_age", "max_size", "store_all", "set_global", "span_name_suffixes"}
)
# What the spans inside a request ask for; the rest is asked by the middleware alone.
OF_SPANS: Final = (
    "capture_inputs",
    "capture_outputs",
    "redact",
    "span_processors",
    "keep_errors",
    "keep_slower_than",
    "operation_spans",
)

Header = str | tuple[str, ...] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything that can be set; DESIGN's defaults. Make one with `from_environment`."""

    destination: str | None = None
    store: str | None = None
    sample_rate: float | None = None
    keep_errors: bool = False
    keep_slower_than: float | None = None
    exclude: tuple[str, ...] = DEFAULT_EXCLUDE
    request_id_header: Header = "X-Request-ID"
    session_id_header: Header = "X-Session-ID"
    user_id_header: Header = "X-User-ID"
    user: Callable[[Any], Any] | None = None
    generate_request_id: bool = True
    response_headers: bool = True
    trust_traceparent: bool | tuple[str, ...] | Callable[[Any], bool] = False
    capture_inputs: bool = True
    capture_outputs: bool = True
    capture_request_body: bool = False
    capture_response_body: bool = False
    redact: tuple[str, ...] | None = None  # None: the published list
    span_processors: tuple[Callable[[Any], Any], ...] = ()
    span_name_suffixes: bool = True
    operation_spans: bool = False
    store_all: bool = False
    metadata: Mapping[str, str] = field(default_factory=dict)
    metadata_env: Mapping[str, str] = field(default_factory=dict)
    max_age: float = 7 * 86400.0  # seconds
    max_size: int = 1 << 30  # bytes
    adapter: Any = None
    set_global: bool = False

    def override(self, options: Mapping[str, Any]) -> Settings:
        """Return these settings with some replaced.

        Raises:
            SettingError: A name is unknown or a value is not allowed; the message names it.
        """
        if not options:
            return self
        return dataclasses.replace(self, **{name: _checked(name, value) for name, value in options.items()})

    def for_application(self, options: Mapping[str, Any]) -> Settings:
        """Return these settings with some replaced for one application.

        Raises:
            SettingError: As for `override`, and for a setting that holds for the whole process.
        """
        for name in options:
            if name in PROCESS_WIDE:
                raise SettingError(f"setting {name} holds for the whole process: give it to tracemw.configure()")
        return self.override(options)


def from_environment(environ: Mapping[str, str] | None = None) -> Settings:
    """Read the `TRACEMW_*` variables.

    Raises:
        SettingError: A variable has a value that its setting does not allow.
    """
    environ = os.environ if environ is None else environ
    options: dict[str, Any] = {}
    for name in _FROM_TEXT:
        text = environ.get(variable(name))
        if text is not None and text.strip():
            options[name] = _parsed(name, text.strip())
    return dataclasses.replace(Settings(), **options)


def variable(name: str) -> str:
    """Return the environment variable of a setting."""
    return f"TRACEMW_{name.upper()}"


def _parsed(name: str, text: str) -> Any:
    return _taken(variable(name), text, lambda value: _CHECKS[name](_FROM_TEXT[name](value)))


def _checked(name: str, value: Any) -> Any:
    check = _CHECKS.get(name)
    if check is None:
        near = difflib.get_close_matches(name, _CHECKS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; known are: {', '.join(sorted(_CHECKS))}"
        raise SettingError(f"unknown setting {name!r}{hint}")
    return _taken(f"setting {name}", value, check)


def _taken(said_by: str, value: Any, check: Callable[[Any], Any]) -> Any:
    try:
        return check(value)
    except SettingError as exc:  # which shows the value, without its password
        raise SettingError(f"{said_by}: {exc}") from None
    except (ValueError, TypeError) as exc:
        shown = value
        if isinstance(value, str) and "@" in value:
            from tracemw.pipeline.target import masked

            shown = masked(value)
        raise SettingError(f"{said_by}={shown!r} is not allowed: {exc}") from None


# What a value must be: each returns the value as it is kept, or raises ValueError that says what is allowed.


def _boolean(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    raise ValueError("it must be True or False")


def _boolean_text(text: str) -> bool:
    lowered = text.lower()
    if lowered in ("1", "true", "yes", "on"):
        return True
    if lowered in ("0", "false", "no", "off"):
        return False
    raise ValueError("it must be true or false")


def _rate(value: Any) -> float | None:
    if value is None:
        return None
    rate = _number(value)
    if not 0.0 <= rate <= 1.0:
        raise ValueError("it must lie between 0 and 1")
    return rate


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError("it must be a number")
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise ValueError("it must be a number") from None
    if number != number or number in (float("inf"), float("-inf")):
        raise ValueError("it must be a finite number")
    return number


def _seconds(value: Any) -> float:
    return _positive(value, "a number of seconds (3600, 0.5)")


def _optional_seconds(value: Any) -> float | None:
    return None if value is None else _seconds(value)


def _bytes(value: Any) -> int:
    return int(_positive(value, "a number of bytes (1073741824)"))


def _positive(value: Any, what: str) -> float:
    try:
        number = _number(value)
    except ValueError:
        raise ValueError(f"it must be {what}") from None
    if number <= 0:
        raise ValueError("it must be greater than 0")
    return number


def _destination(value: Any) -> str | None:
    return None if value is None else places.destination(value)


def _store(value: Any) -> str | None:
    return None if value is None else places.store(value)


def _strings(value: Any) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise ValueError("it must be a list of strings")
    items = tuple(value)
    if not all(isinstance(item, str) for item in items):
        raise ValueError("it must be a list of strings")
    return items


def _paths(value: Any) -> tuple[str, ...]:
    patterns = () if value is None else _strings(value)
    for pattern in patterns:
        if not pattern.startswith(("/", "*")):
            raise ValueError(f"the path pattern {pattern!r} must start with / or *")
    return patterns


def _comma_list(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _header(value: Any) -> Header:
    if value is None:
        return None
    names = (value,) if isinstance(value, str) else _strings(value)
    for name in names:
        if not name or not all(c.isalnum() or c in "!#$%&'*+-.^_`|~" for c in name) or not name.isascii():
            raise ValueError(f"{name!r} is no header name")
    return value if isinstance(value, str) else names


def _header_text(text: str) -> Header:
    names = _comma_list(text)
    return None if text.lower() == "none" else names[0] if len(names) == 1 else names


def _callable_or_none(value: Any) -> Any:
    if value is None or callable(value):
        return _not_async(value)
    raise ValueError("it must be callable")


def _not_async(value: Any) -> Any:
    """Refuse what is asked while a request goes on and answers with a coroutine, which counts as true."""
    for function in (value, type(value).__call__):
        if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
            raise ValueError(
                "it must not be async, since nobody awaits its answer: use a plain `def`, and what takes "
                "awaiting in a middleware that leaves its result in the scope"
            )
    return value


def _callables(value: Any) -> tuple[Callable[[Any], Any], ...]:
    items = tuple(value or ())
    if not all(callable(item) for item in items):
        raise ValueError("it must be a list of callables")
    return tuple(_not_async(item) for item in items)


def _trust(value: Any) -> Any:
    if isinstance(value, bool):
        return value
    if callable(value):
        return _not_async(value)
    import ipaddress

    networks = (value,) if isinstance(value, str) else _strings(value)
    for network in networks:
        try:
            ipaddress.ip_network(network, strict=False)
        except ValueError:
            raise ValueError(
                f"{network!r} is no network; it must be True, False, networks like 10.0.0.0/8, or a callable"
            ) from None
    return networks


def _trust_text(text: str) -> Any:
    try:
        return _boolean_text(text)
    except ValueError:
        return _comma_list(text)


def _redact(value: Any) -> tuple[str, ...] | None:
    return None if value is None else _strings(value)


def _text_mapping(value: Any) -> Mapping[str, str]:
    if not isinstance(value, Mapping):
        raise ValueError("it must be a mapping of strings")
    return {str(key): str(item) for key, item in value.items()}


def _anything(value: Any) -> Any:
    return value


_CHECKS: Final[dict[str, Callable[[Any], Any]]] = {
    "destination": _destination,
    "store": _store,
    "sample_rate": _rate,
    "keep_errors": _boolean,
    "keep_slower_than": _optional_seconds,
    "exclude": _paths,
    "request_id_header": _header,
    "session_id_header": _header,
    "user_id_header": _header,
    "user": _callable_or_none,
    "generate_request_id": _boolean,
    "response_headers": _boolean,
    "trust_traceparent": _trust,
    "capture_inputs": _boolean,
    "capture_outputs": _boolean,
    "capture_request_body": _boolean,
    "capture_response_body": _boolean,
    "redact": _redact,
    "span_processors": _callables,
    "span_name_suffixes": _boolean,
    "operation_spans": _boolean,
    "store_all": _boolean,
    "metadata": _text_mapping,
    "metadata_env": _text_mapping,
    "max_age": _seconds,
    "max_size": _bytes,
    "adapter": _anything,
    "set_global": _boolean,
}

_FROM_TEXT: Final[dict[str, Callable[[str], Any]]] = {
    "destination": str,
    "store": str,
    "sample_rate": str,
    "keep_errors": _boolean_text,
    "keep_slower_than": str,
    "exclude": _comma_list,
    "request_id_header": _header_text,
    "session_id_header": _header_text,
    "user_id_header": _header_text,
    "generate_request_id": _boolean_text,
    "response_headers": _boolean_text,
    "trust_traceparent": _trust_text,
    "capture_inputs": _boolean_text,
    "capture_outputs": _boolean_text,
    "capture_request_body": _boolean_text,
    "capture_response_body": _boolean_text,
    "redact": _comma_list,
    "span_name_suffixes": _boolean_text,
    "operation_spans": _boolean_text,
    "store_all": _boolean_text,
    "max_age": str,
    "max_size": str,
}
