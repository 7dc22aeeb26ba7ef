"""The URLs of destinations and stores: which are allowed, and what is wrong with the others."""

from __future__ import annotations

import difflib
import re
from typing import Any, Final

_REMOTE: Final = ("mlflow+http://", "mlflow+https://", "otlp+http://", "otlp+https://")
_WHOLE: Final = ("console:", "memory:", "none:")
SCHEMES: Final = ("sqlite:///", *_REMOTE, *_WHOLE)
_SCHEME: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")  # one letter is a drive
_STORES: Final = "sqlite:///relative.db, sqlite:////absolute/path.db, memory: or a path"


def destination(value: Any) -> str:
    """Return the URL of a destination.

    Raises:
        ValueError: It is none; the message says what is allowed.
    """
    if not isinstance(value, str):
        raise ValueError(f"it must be a URL that starts with one of {', '.join(SCHEMES)}")
    if value.startswith("sqlite://"):
        _check_file(value)
    elif value.startswith(_REMOTE):
        from tracemw.pipeline.target import parse

        parse(value)
    elif value not in _WHOLE:
        raise ValueError(_unknown(value))
    return value


def store(value: Any) -> str:
    """Return the URL of a store, also for a path.

    Raises:
        ValueError: It is none; the message says what is allowed.
    """
    if not isinstance(value, str) or not value:
        raise ValueError(f"it must be {_STORES}")
    if value == "memory:":
        return value
    if value.startswith("sqlite://"):
        _check_file(value)
        return value
    if value.startswith(_REMOTE) or value in _WHOLE:
        raise ValueError(f"that is a destination; a store is a file: {_STORES}. Give it as `destination` instead")
    if _SCHEME.match(value):
        raise ValueError(f"a store must be {_STORES}{_nearest(value, ('sqlite:///', 'memory:'))}")
    return f"sqlite:///{value}"


def _check_file(url: str) -> None:
    path = url.removeprefix("sqlite://")
    if not path.strip("/"):
        raise ValueError("name the file: sqlite:///relative.db or sqlite:////absolute/path.db")
    if not path.startswith("/"):
        raise ValueError(f"three slashes stand before a file: sqlite:///{path}")


def _unknown(value: str) -> str:
    if re.match(r"https?://", value):
        return "say what is there: mlflow+http://... for an MLflow server, otlp+http://... for an OTLP collector"
    if not _SCHEME.match(value) and re.search(r"[./\\]", value):
        return f"a file is written sqlite:///{value}"
    return f"it must be a URL that starts with one of {', '.join(SCHEMES)}{_nearest(value, SCHEMES)}"


def _nearest(value: str, known: tuple[str, ...]) -> str:
    """Return `; did you mean 'x'?` for the beginning of a URL, or nothing."""
    begin = re.match(r"[^:/]*:?/*", value[:40])
    near = difflib.get_close_matches(begin.group().lower() if begin else "", known, n=1, cutoff=0.7)
    return f"; did you mean {near[0]!r}?" if near else ""
