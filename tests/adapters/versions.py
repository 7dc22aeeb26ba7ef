"""Which versions of the frameworks the tests run with."""

from __future__ import annotations

import importlib.metadata


def version(name: str) -> tuple[int, ...]:
    """Return the installed version of a distribution; () where it is not installed."""
    try:
        return tuple(int(part) for part in importlib.metadata.version(name).split(".")[:3] if part.isdigit())
    except importlib.metadata.PackageNotFoundError:
        return ()


FASTAPI = version("fastapi")
STARLETTE = version("starlette")
FLASK = version("flask")
WERKZEUG = version("werkzeug")


def streams_generators(fastapi: tuple[int, ...]) -> bool:
    """Say whether a handler of this FastAPI may be a generator, which is then streamed."""
    return fastapi >= (0, 134)
