"""Any order of decorators: what `@trace` was put on, told to whoever calls the function underneath.

A route decorator registers the function that it is given. `@trace` above it wraps what the route decorator
returned, so the framework would never call the wrapper. Hence `@trace` also stamps the function it was given, and
what that one wraps, with its options; the adapter asks `traced_form` for every function that its framework has
registered.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from tracemw.decorator import Options, Plan

MARKER: Final = "__tracemw_traced__"
DEPTH: Final = 50  # decorators on one function

# Goes up when `@trace` has seen a new function: adapters look at what their framework has registered again.
generation = 0

_options: weakref.WeakKeyDictionary[Any, Options] = weakref.WeakKeyDictionary()
_seen: weakref.WeakSet[Any] = weakref.WeakSet()  # code of functions; of builtins, themselves


def stamp(fn: Any, options: Options) -> None:
    """Remember the options for a function and for all that it wraps; the innermost `@trace` counts."""
    if plan_in(fn) is not None:
        return  # whoever calls what is below has a span already
    for function in wrapped_by(fn):
        try:
            _options.setdefault(function, options)
        except TypeError:  # neither hashed nor referred to weakly: a framework cannot have registered it by name
            continue
    note_new(fn)


def traced_form(fn: Any, *, handler: bool = True) -> Any:
    """Return what a framework should call instead of the function that it has registered.

    Args:
        fn: What the framework has registered and calls for a request.
        handler: Whether it answers requests; False for what runs before and after that.

    Returns:
        None where `fn` opens its span by itself, or was never traced; else a callable of the same kind that opens
        the span around it.
    """
    plan = plan_in(fn)
    if plan is not None:
        plan.handler = plan.handler or handler
        return None
    options = _stamped(fn)
    if options is None:
        return next((found for lookup in lookups if (found := lookup(fn)) is not None), None)
    from tracemw.decorator import wrap

    wrapper = wrap(fn, options)
    getattr(wrapper, MARKER).handler = handler
    return wrapper


# Other decorators' ways to tell the traced form of a registered function (None: not one of theirs).
lookups: Final[list[Callable[[Any], Any]]] = []


def plan_in(fn: Any) -> Plan | None:
    """Return the plan of the outermost traced function that calling `fn` leads to, as far as that is certain."""
    for function in told_by(fn):
        plan: Plan | None = own(function, MARKER)
        if plan is not None:
            return plan
    return None


def wrapped_by(fn: Any) -> Iterator[Any]:
    """Give a function and what it wraps, outermost first.

    Decorators tell what they wrap in `__wrapped__`. What one wraps that does not is a function among the variables
    that its wrapper closes over, or among the attributes of the object that it made.
    """
    return _chain(fn, _wrapped)


def told_by(fn: Any) -> Iterator[Any]:
    """Give a function and what it says that it wraps, outermost first."""
    return _chain(fn, _told_by)


def _chain(fn: Any, follow: Callable[[Any], Sequence[Any]]) -> Iterator[Any]:
    seen: list[Any] = []
    waiting = [fn]
    while waiting and len(seen) < DEPTH:
        current = waiting.pop(0)
        if any(current is one for one in seen):
            continue
        seen.append(current)
        yield current
        waiting += follow(current)


def _told_by(fn: Any) -> Sequence[Any]:
    """Return what a function says that it wraps."""
    if isinstance(fn, types.MethodType):
        return (fn.__func__,)
    if isinstance(fn, functools.partial):
        return (fn.func,)
    wrapped = own(fn, "__wrapped__")
    return () if wrapped is None else (wrapped,)


def _wrapped(fn: Any) -> Sequence[Any]:
    told = _told_by(fn)
    if told or own(fn, MARKER) is not None:
        return told
    return list(_closed_over(fn)) if isinstance(fn, types.FunctionType) else list(_kept_by(fn))


def _closed_over(fn: types.FunctionType) -> Iterator[Any]:
    """Give the functions that were arguments of the decorator: closed over, or kept as default arguments.

    A function that a handler merely calls, defined around it in an application factory, is none.
    """
    for name, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=False):
        try:
            content = cell.cell_contents
        except ValueError:  # not assigned yet
            continue
        if _is_function(content) and not _defined_around(fn, name, content):
            yield content
    yield from filter(_is_function, (*(fn.__defaults__ or ()), *(fn.__kwdefaults__ or {}).values()))


def _defined_around(fn: types.FunctionType, name: str, content: Any) -> bool:
    """True for a function that stands under its own name in a scope around another one."""
    scope, _, own_name = getattr(content, "__qualname__", "").rpartition(".")
    if not own_name:  # a `partial`
        return True
    return own_name == name and scope.endswith("<locals>") and fn.__qualname__.startswith(f"{scope}.")


def _kept_by(decorated: Any) -> Iterator[Any]:
    """Give the functions among the attributes of an object, also of one that has slots."""
    try:
        yield from filter(_is_function, vars(decorated).values())
    except TypeError:  # no dictionary
        pass
    for kind in type(decorated).__mro__:
        for slot in vars(kind).values():
            if isinstance(slot, types.MemberDescriptorType):
                try:
                    value = slot.__get__(decorated)
                except AttributeError:  # not set
                    continue
                if _is_function(value):
                    yield value


def _is_function(value: Any) -> bool:
    return isinstance(value, (types.FunctionType, types.MethodType, functools.partial))


def _stamped(fn: Any) -> Options | None:
    for function in told_by(fn):
        try:
            options = _options.get(function)
        except TypeError:  # cannot be hashed
            continue
        if options is not None:
            return options
    return None


def own(fn: Any, name: str) -> Any:
    """Return an attribute that the object has itself; proxies that have every attribute do not count."""
    try:
        return vars(fn).get(name)
    except TypeError:  # no dictionary
        return None


def note_new(fn: Any) -> None:
    """Have the adapters look again, but not for a function that a handler defines anew with every request."""
    global generation
    while isinstance(fn, functools.partial):
        fn = fn.func
    code = getattr(fn, "__code__", None) or getattr(type(fn).__call__, "__code__", None) or fn
    try:
        if code in _seen:
            return
        _seen.add(code)
    except TypeError:  # neither hashed nor referred to weakly
        pass
    generation += 1
