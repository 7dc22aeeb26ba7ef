"""Whatever runs where: the recorded tree is the tree of the calls."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

import tracemw
from tracemw.livespan import LiveSpan
from tracemw.testing import CapturedTraces, capture_traces

KINDS = ("block", "function", "coroutine", "task", "thread", "to_thread", "generator", "async generator", "client")


@dataclass
class Call:
    """One call: how it is made, and what it calls."""

    kind: str
    children: list[Call] = field(default_factory=list)
    name: str = ""

    def numbered(self, name: str = "0") -> Call:
        """Give each call a name of its own."""
        self.name = name
        for number, child in enumerate(self.children):
            child.numbered(f"{name}.{number}")
        return self

    def edges(self, parent: str | None = None) -> dict[str, str | None]:
        """Names of all calls below, each with its caller's."""
        found = {self.name: parent}
        for child in self.children:
            found.update(child.edges(self.name))
        return found


calls = st.recursive(
    st.builds(Call, st.sampled_from(KINDS)),
    lambda below: st.builds(Call, st.sampled_from(KINDS), st.lists(below, max_size=4)),
    max_leaves=12,
)


async def run(call: Call) -> None:
    """Make a call from a coroutine, and have it make its own."""
    name = call.name
    if call.kind == "function":
        tracemw.trace(run_sync, name=name)(call)
    elif call.kind == "coroutine":
        await tracemw.trace(run_children, name=name)(call)
    elif call.kind == "task":
        await asyncio.create_task(tracemw.trace(run_children, name=name)(call))
    elif call.kind == "thread":
        in_thread(tracemw.trace(run_sync, name=name), call)
    elif call.kind == "to_thread":
        await asyncio.to_thread(tracemw.trace(run_sync, name=name), call)
    elif call.kind == "generator":
        take_turns([tracemw.trace(generate, name=name)(call)])
    elif call.kind == "async generator":
        async for _ in tracemw.trace(agenerate, name=name)(call):
            await asyncio.sleep(0)
    elif call.kind == "client":
        without_context(call)
    else:
        with tracemw.start_span(name):
            await run_children(call)


def without_context(call: Call, parent: LiveSpan | None = None) -> None:
    """Make a call and all below it with spans that are never current."""
    span = tracemw.start_span_no_context(call.name, parent_span=parent)
    for child in call.children:
        without_context(child, span)
    span.end()


async def run_children(call: Call) -> None:
    """Run what a call calls: tasks side by side, the rest one by one."""
    tasks = [asyncio.create_task(run(child)) for child in call.children if child.kind == "task"]
    for child in call.children:
        if child.kind != "task":
            await run(child)
    await asyncio.gather(*tasks)


def run_sync(call: Call) -> None:
    """The same from a plain function: what needs an event loop runs as a function instead."""
    generators = []
    for child in call.children:
        if child.kind == "thread":
            in_thread(tracemw.trace(run_sync, name=child.name), child)
        elif child.kind in ("generator", "async generator"):
            generators.append(tracemw.trace(generate, name=child.name)(child))
        elif child.kind == "client":
            without_context(child)
        elif child.kind == "block":
            with tracemw.start_span(child.name):
                run_sync(child)
        else:
            tracemw.trace(run_sync, name=child.name)(child)
    take_turns(generators)


def generate(call: Call) -> Iterator[int]:
    """A generator that makes its calls between its steps, and holds a block open across a step."""
    yield 0
    for number, child in enumerate(call.children):
        if child.kind in ("block", "task"):
            with tracemw.start_span(child.name):
                yield number
                run_sync(child)
                yield number
        else:
            run_sync(Call("function", [child]))
            yield number


async def agenerate(call: Call) -> AsyncIterator[int]:
    """The same, asynchronous."""
    yield 0
    for number, child in enumerate(call.children):
        if child.kind == "block":
            with tracemw.start_span(child.name):
                yield number
                await run_children(child)
                yield number
        else:
            await run(child)
            yield number


def take_turns(generators: list[Iterator[int]]) -> None:
    """Step the generators in turns, every second time in a thread of its own."""
    turn = 0
    while generators:
        for generator in list(generators):
            turn += 1
            step = next_in_thread(generator) if turn % 2 else next(generator, None)
            if step is None:
                generators.remove(generator)


def next_in_thread(generator: Iterator[int]) -> int | None:
    """Take a step in another thread, in a copy of the context."""
    got: list[int | None] = []
    in_thread(lambda: got.append(next(generator, None)))
    return got[0]


def in_thread(function: object, *args: object) -> None:
    """Run a function in a thread of its own, in a copy of the context."""
    thread = threading.Thread(target=contextvars.copy_context().run, args=(function, *args))
    thread.start()
    thread.join()


def recorded(traces: CapturedTraces) -> dict[str, str | None]:
    """Names of all spans of the one trace, each with its parent's."""
    (trace,) = traces
    names = {span.span_id: span.name for span in trace.data.spans}
    return {span.name: names.get(span.parent_id or "") for span in trace.data.spans}


@settings(max_examples=60)
@given(calls)
def test_the_tree_of_spans_is_the_tree_of_calls(root: Call) -> None:
    """Functions, tasks, threads and generators at any depth nest as they call; nothing stays current."""
    root.numbered()
    with capture_traces() as traces:
        tracemw.trace(run_sync, name="0")(root)
        assert tracemw.get_current_active_span() is None
        assert recorded(traces) == root.edges()

    async def main() -> None:
        with tracemw.start_span("0"):
            await run_children(root)
        assert tracemw.get_current_active_span() is None

    with capture_traces() as traces:
        asyncio.run(main())
        found = recorded(traces)
    expected = root.edges()
    assert set(found) == set(expected)
    assert {name: found[name] for name in expected} == expected
