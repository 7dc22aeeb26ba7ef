"""Arguments of a call by the names of the parameters, as `inspect.Signature.bind` finds them, faster."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

_EMPTY = inspect.Parameter.empty


class ArgumentNames:
    """Knows the parameters of one callable.

    Args:
        fn: The callable, or None for arguments without names.
    """

    __slots__ = ("_parameters", "_positional", "_simple", "_args", "_hidden", "_known")

    def __init__(self, fn: Callable[..., Any] | None) -> None:
        parameters = _parameters(fn)
        self._known = parameters is not None
        found = parameters or ()
        self._parameters = tuple((p.name, p.kind, p.default) for p in found)
        self._positional = tuple(p.name for p in found if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))
        self._args = next((p.name for p in found if p.kind is p.VAR_POSITIONAL), None)
        # Only names that a call may give in order: the common case needs a zip and no more.
        self._simple = len(self._positional) == len(self._parameters)
        first = self._positional[0] if self._positional else None
        self._hidden = first if first in ("self", "cls") else None

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the arguments by name, with defaults, without `self` and `cls`.

        Returns:
            The arguments; `*args` and `**kwargs` under their own names, as the function sees them. None where
            the call does not fit, which the call itself will say.
        """
        if self._simple and not kwargs and len(args) == len(self._parameters):
            values = dict(zip(self._positional, args, strict=False))
        elif not self._known:
            return _without_names(args, kwargs)
        else:
            fitting = self._fit(args, kwargs)
            if fitting is None:
                return None
            values = fitting
        hidden = self._hidden
        if hidden is not None and (hidden == "self" or isinstance(values.get(hidden), type)):
            values.pop(hidden, None)
        return values

    def _fit(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
        values = dict(zip(self._positional, args, strict=False))
        surplus = args[len(self._positional) :]
        if surplus and self._args is None:
            return None
        left = dict(kwargs)
        bound: dict[str, Any] = {}
        for name, kind, default in self._parameters:
            if kind is inspect.Parameter.VAR_POSITIONAL:
                bound[name] = surplus
            elif kind is inspect.Parameter.VAR_KEYWORD:
                bound[name] = left
            elif name in values:
                if name in left and kind is not inspect.Parameter.POSITIONAL_ONLY:
                    return None
                bound[name] = values[name]
            elif name in left and kind is not inspect.Parameter.POSITIONAL_ONLY:
                bound[name] = left.pop(name)
            elif default is not _EMPTY:
                bound[name] = default
            else:
                return None
        takes_any = any(kind is inspect.Parameter.VAR_KEYWORD for _, kind, _ in self._parameters)
        return bound if takes_any or not left else None


def _parameters(fn: Callable[..., Any] | None) -> tuple[inspect.Parameter, ...] | None:
    if fn is None:
        return None
    try:
        return tuple(inspect.signature(fn).parameters.values())
    except Exception:  # builtins without one; objects whose `__signature__` is a surprise
        return None


def _without_names(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    if args:
        values["args"] = list(args)
    if kwargs:
        values["kwargs"] = dict(kwargs)
    return values
