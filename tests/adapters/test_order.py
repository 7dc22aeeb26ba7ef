"""Any order of decorators gives the same tree, in every framework, for every kind of handler."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.adapters.apps import (
    ATTRIBUTES,
    Site,
    fastapi_site,
    flask_site,
    starlette_site,
    werkzeug_site,
)
from tests.adapters.decorators import OTHERS
from tests.adapters.trees import tree
from tests.adapters.versions import FASTAPI, streams_generators
from tracemw.testing import capture_traces

SITES: dict[str, tuple[Callable[..., Site], tuple[str, ...]]] = {
    "fastapi": (fastapi_site, ("sync", "async", "generator", "async generator")),
    "fastapi routers": (partial(fastapi_site, place="router"), ("sync", "async")),
    "starlette": (starlette_site, ("sync", "async")),
    "flask": (flask_site, ("sync", "async", "generator", "async stream")),
    "flask blueprints": (partial(flask_site, place="blueprint"), ("sync", "async", "async stream")),
    "werkzeug": (werkzeug_site, ("sync", "generator")),
    "werkzeug functions": (partial(werkzeug_site, place="function"), ("sync", "generator")),
}

orders = st.lists(st.sampled_from(sorted(OTHERS)), max_size=3).flatmap(
    lambda others: st.permutations(["route", "trace", *others])
)


def check(site: Site, where: str, kind: str) -> None:
    """One request to the site is the tree that we want.

    A stream that a coroutine returns runs after the coroutine, so its spans are beside the handler's.
    """
    streamed = kind == "async stream"
    path = "/api/v1/items/7" if "/api/v1" in site.root else "/items/7"
    with capture_traces(span_name_suffixes=False) as traces:
        status, body = site.get(path)
    assert status == 200 and b"70" in body
    (trace,) = traces
    below: dict[str, Any] = {"handler": {}, "inside": {}} if streamed else {"handler": {"inside": {}}}
    assert tree(trace) == {site.root: below}
    (span,) = trace.search_spans(name="handler")
    assert span.span_type == "AGENT"
    assert ATTRIBUTES.items() <= span.attributes.items()
    if where != "starlette":
        assert span.inputs == {"number": 7}
        assert span.outputs is not None and ("70" in str(span.outputs) or streamed)
    assert trace.info.request_preview == json.dumps(span.inputs)


@pytest.mark.parametrize("where", sorted(SITES))
@given(data=st.data())
def test_any_order_gives_the_same_tree(where: str, data: st.DataObject) -> None:
    """Root, exactly one handler span as `@trace` describes it, and what the handler did below it."""
    pytest.importorskip(where.partition(" ")[0])
    make, kinds = SITES[where]
    kind = data.draw(st.sampled_from(kinds), label="kind")
    order = data.draw(orders, label="decorators, outermost first")
    if "fastapi" in where and "generator" in kind and not streams_generators(FASTAPI):
        return
    check(make(kind, order), where, kind)
