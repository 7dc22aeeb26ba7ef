"""`@mlflow.trace` above a route decorator: found again by whoever calls the function underneath.

While MLflow is bridged, `mlflow.trace` takes note of what it is applied to, as `@tracemw.trace` does. A function
that was decorated before is found in its module by its name, else its decorators are read in the source. What is
called in the end is MLflow's own decorator, on what the framework has registered.
"""

from __future__ import annotations

import ast
import functools
import inspect
import linecache
import sys
import textwrap
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Final

from tracemw import stamps
from tracemw.guard import guarded, logger

MARKER: Final = "__mlflow_traced__"  # MLflow puts it onto its wrappers, and decorators above copy it
_HOME: Final = "mlflow.tracing.fluent"  # where MLflow's wrappers come from

Applied = tuple[tuple[Any, ...], dict[str, Any]]


class Unclear(Exception):
    """A decorator's source says more than can be read there."""


class Handlers:
    """Knows which functions `mlflow.trace` was applied to.

    Args:
        original: MLflow's decorator.
    """

    def __init__(self, original: Callable[..., Any]) -> None:
        self.original = original
        self.trace = self._noting()
        self._applied: weakref.WeakKeyDictionary[Any, Applied] = weakref.WeakKeyDictionary()
        self._read: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()

    def _noting(self) -> Callable[..., Any]:
        original, note = self.original, self._note

        @functools.wraps(original)
        def trace(func: Any = None, *args: Any, **options: Any) -> Any:
            made = original(func, *args, **options)
            if func:
                note(func, (args, options))
                return made

            def decorate(function: Any) -> Any:
                wrapped = made(function)
                note(function, (args, options))
                return wrapped

            return decorate

        return trace

    @guarded()
    def _note(self, fn: Any, applied: Applied) -> None:
        if isinstance(fn, (classmethod, staticmethod)):
            fn = fn.__func__
        if is_traced(fn):
            return  # whoever calls what is below has a span already
        for function in stamps.wrapped_by(fn):
            try:
                self._applied.setdefault(function, applied)
            except TypeError:  # neither hashed nor referred to weakly
                continue
        stamps.note_new(fn)

    @guarded()
    def lookup(self, fn: Any) -> Any:
        """Return MLflow's traced form of a function that a framework has registered, None if there is none."""
        if is_traced(fn):
            return None
        for function in stamps.told_by(fn):
            try:
                applied = self._applied.get(function)
            except TypeError:
                continue
            if applied is not None:
                return self.original(fn, *applied[0], **applied[1])
        return self._by_name(fn) or self._by_source(fn)

    def _by_name(self, fn: Any) -> Any:
        """Return MLflow's wrapper that the function's module has by its name, if it wraps just this function."""
        found: Any = sys.modules.get(getattr(fn, "__module__", None) or "")
        for part in getattr(fn, "__qualname__", "<unnamed>").split("."):
            found = getattr(found, part, None)
        for function in stamps.told_by(found):
            if is_wrapper(function) and getattr(function, "__wrapped__", None) is fn:
                return function
        return None

    def _by_source(self, fn: Any) -> Any:
        """Read in the source whether the function was decorated, and apply MLflow's decorator likewise."""
        function = inspect.unwrap(fn)
        code = getattr(function, "__code__", None)
        if code is None or self._read.get(code) is False or not _mentions_mlflow(code.co_filename):
            return None
        try:
            for decorator in reversed(_decorators(function)):
                called = decorator.func if isinstance(decorator, ast.Call) else decorator
                if self._is_trace(called, function):
                    return self.original(fn, **_options(decorator, function))
        except (OSError, SyntaxError, TypeError, Unclear) as exc:
            logger.warning(
                "@mlflow.trace above the route decorator of %s cannot be made out (%s): it records no span. "
                "Put it below the route decorator, or call tracemw.mlflow.bridge() before the function is "
                "defined.",
                getattr(fn, "__qualname__", fn),
                exc,
            )
        self._read[code] = False
        return None

    def _is_trace(self, node: ast.expr, function: Any) -> bool:
        try:
            found = _value(node, function)
        except Unclear:  # a name that only the enclosing function had
            return ast.unparse(node) == "mlflow.trace"
        return found is self.original or found is self.trace


def is_traced(fn: Any) -> bool:
    """True where calling the function goes through MLflow's wrapper, as far as that is told."""
    return any(stamps.own(function, MARKER) for function in stamps.told_by(fn))


def is_wrapper(function: Any) -> bool:
    """True for a function that MLflow's decorator has made."""
    return getattr(function, "__globals__", {}).get("__name__") == _HOME and MARKER in vars(function)


def _mentions_mlflow(filename: str) -> bool:
    return any("mlflow" in line for line in linecache.getlines(filename))


def _decorators(function: Any) -> list[ast.expr]:
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    found = tree.body[0] if tree.body else None
    return found.decorator_list if isinstance(found, (ast.FunctionDef, ast.AsyncFunctionDef)) else []


def _options(decorator: ast.expr, function: Any) -> dict[str, Any]:
    """Return what the decorator was given, as far as that is a matter of reading.

    Raises:
        Unclear: It would have to be computed again.
    """
    if not isinstance(decorator, ast.Call):
        return {}
    if decorator.args or any(keyword.arg is None for keyword in decorator.keywords):
        raise Unclear("it has arguments without names")
    return {str(keyword.arg): _value(keyword.value, function) for keyword in decorator.keywords}


def _value(node: ast.expr, function: Any) -> Any:
    """Return what an expression says: a literal, a name, an attribute of these."""
    try:
        return ast.literal_eval(node)
    except ValueError:
        pass
    if isinstance(node, ast.Attribute):
        found = getattr(_value(node.value, function), node.attr, Unclear)
    elif isinstance(node, ast.Name):
        found = next((names[node.id] for names in _names(function) if node.id in names), Unclear)
    else:
        raise Unclear(f"it has {ast.unparse(node)}")
    if found is Unclear:
        raise Unclear(f"{ast.unparse(node)} is not known")
    return found


def _names(function: Any) -> Iterator[Any]:
    yield inspect.getclosurevars(function).nonlocals
    yield function.__globals__
