"""Which versions of the frameworks the tests run with."""

from __future__ import annotations

import importlib.metadata
import re


def version(name: str) -> tuple[int, ...]:
    """Return the installed version of a distribution; () where it is not installed."""
    try:
        return tuple(map(int, re.findall(r"\d+", importlib.metadata.version(name))[:3]))
    except importlib.metadata.PackageNotFoundError:
        return ()


FASTAPI = version("fastapi")
STARLETTE = version("starlette")
FLASK = version("flask")
WERKZEUG = version("werkzeug")


def streams_generators(fastapi: tuple[int, ...]) -> bool:
    """Say whether a handler of this FastAPI may be a generator, which is then streamed."""
    return fastapi >= (0, 134)
