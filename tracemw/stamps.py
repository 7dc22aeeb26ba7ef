"""Any order of decorators: what `@trace` was put on, told to whoever calls the function underneath.

A route decorator registers the function that it is given. `@trace` above it wraps what the route decorator returned,
so the framework would never call the wrapper. Hence `@trace` also stamps the function it was given, and what that one
wraps, with its options; the adapter asks `traced_form` for every function that its framework has registered.
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from tracemw.decorator import Options, Plan

MARKER: Final = "__tracemw_traced__"
DEPTH: Final = 50  # decorators on one function

# Goes up when `@trace` has seen a new function: adapters look at what their framework has registered again.
generation = 0

_options: weakref.WeakKeyDictionary[Any, Options] = weakref.WeakKeyDictionary()
_seen_code: weakref.WeakSet[types.CodeType] = weakref.WeakSet()


def stamp(fn: Any, options: Options) -> None:
    """Remember the options for a function and for all that it wraps; the innermost `@trace` counts."""
    if plan_in(fn) is not None:
        return  # whoever calls what is below has a span already
    for function in wrapped_by(fn):
        try:
            _options.setdefault(function, options)
        except TypeError:  # neither hashed nor referred to weakly: a framework cannot have registered it by name
            continue
    _count(fn)


def traced_form(fn: Any) -> Any:
    """Return what a framework should call instead of the function that it has registered.

    Args:
        fn: What the framework has registered and calls for a request.

    Returns:
        None where `fn` opens its span by itself, or was never traced; else a callable of the same kind that opens
        the span around it.
    """
    plan = plan_in(fn)
    if plan is not None:
        plan.handler = True
        return None
    options = _stamped(fn)
    if options is None:
        return None
    from tracemw.decorator import wrap

    wrapper = wrap(fn, options)
    getattr(wrapper, MARKER).handler = True
    return wrapper


def plan_in(fn: Any) -> Plan | None:
    """Return the plan of the outermost traced function that calling `fn` leads to, if there is one."""
    for function in wrapped_by(fn):
        plan: Plan | None = _own(function, MARKER)
        if plan is not None:
            return plan
    return None


def wrapped_by(fn: Any) -> Iterator[Any]:
    """Give a function and what it wraps, outermost first.

    Decorators tell what they wrap in `__wrapped__`; of one that does not, what it wraps is the only function
    among the variables that its wrapper closes over.
    """
    seen: list[Any] = []
    while fn is not None and len(seen) < DEPTH and not any(fn is one for one in seen):
        seen.append(fn)
        yield fn
        fn = _next(fn)


def _next(fn: Any) -> Any:
    if isinstance(fn, types.MethodType):
        return fn.__func__
    partial = getattr(fn, "func", None)
    if partial is not None and type(fn).__module__ == "functools":
        return partial
    wrapped = _own(fn, "__wrapped__")
    if wrapped is not None:
        return wrapped
    if not isinstance(fn, types.FunctionType) or _own(fn, MARKER) is not None:
        return None
    return _only_function(fn)


def _only_function(fn: types.FunctionType) -> Callable[..., Any] | None:
    functions = []
    for cell in fn.__closure__ or ():
        try:
            content = cell.cell_contents
        except ValueError:  # not assigned yet
            continue
        if isinstance(content, types.FunctionType) and content is not fn:
            functions.append(content)
    return functions[0] if len(functions) == 1 else None


def _stamped(fn: Any) -> Options | None:
    try:
        return _options.get(fn.__func__ if isinstance(fn, types.MethodType) else fn)
    except TypeError:
        return None


def _own(fn: Any, name: str) -> Any:
    """Return an attribute that the object has itself; proxies that have every attribute do not count."""
    try:
        return vars(fn).get(name)
    except TypeError:  # no dictionary
        return None


def _count(fn: Any) -> None:
    """Bump the generation, but not for each function that a handler defines anew with every request."""
    global generation
    code = getattr(fn, "__code__", None)
    if code is not None:
        if code in _seen_code:
            return
        _seen_code.add(code)
    generation += 1
