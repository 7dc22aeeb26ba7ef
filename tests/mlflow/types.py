"""MLflow as far as the types of tests go: it need not be installed where they are checked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar, overload

F = TypeVar("F", bound=Callable[..., Any])


class MLflow(Protocol):
    """The module."""

    @overload
    def trace(self, func: F) -> F: ...
    @overload
    def trace(self, **options: Any) -> Callable[[F], F]: ...
    @overload
    def trace(self, func: F, **options: Any) -> F: ...

    def __getattr__(self, name: str) -> Any: ...
