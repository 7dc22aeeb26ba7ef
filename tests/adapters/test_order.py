"""Any order of decorators gives the same tree, in every framework, for every kind of handler."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tracemw
from tests.adapters.apps import (
    ATTRIBUTES,
    Site,
    fastapi_site,
    flask_site,
    starlette_site,
    werkzeug_site,
)
from tests.adapters.decorators import OTHERS
from tests.adapters.versions import FASTAPI, streams_generators
from tracemw.testing import capture_traces

SITES: dict[str, tuple[Callable[..., Site], tuple[str, ...]]] = {
    "fastapi": (fastapi_site, ("sync", "async", "generator", "async generator")),
    "fastapi routers": (lambda *case: fastapi_site(*case, place="router"), ("sync", "async")),
    "starlette": (starlette_site, ("sync", "async")),
    "flask": (flask_site, ("sync", "async", "generator")),
    "flask blueprints": (lambda *case: flask_site(*case, place="blueprint"), ("sync", "async")),
    "werkzeug": (werkzeug_site, ("sync", "generator")),
    "werkzeug functions": (lambda *case: werkzeug_site(*case, place="function"), ("sync", "generator")),
}

orders = st.lists(st.sampled_from(sorted(OTHERS)), max_size=3).flatmap(
    lambda others: st.permutations(["route", "trace", *others])
)


def tree(trace: tracemw.Trace) -> dict[str, Any]:
    """Names of spans in one another."""
    spans = trace.data.spans
    ids = {span.span_id for span in spans}
    assert all(span.parent_id is None or span.parent_id in ids for span in spans), "an orphan"

    def below(parent: str | None) -> dict[str, Any]:
        return {span.name: below(span.span_id) for span in spans if span.parent_id == parent}

    return below(None)


def check(site: Site, where: str) -> None:
    """One request to the site is the tree that we want."""
    path = "/api/v1/items/7" if "/api/v1" in site.root else "/items/7"
    with capture_traces(span_name_suffixes=False) as traces:
        status, body = site.get(path)
    assert status == 200 and b"70" in body
    (trace,) = traces
    assert tree(trace) == {site.root: {"handler": {"inside": {}}}}
    (span,) = trace.search_spans(name="handler")
    assert span.span_type == "AGENT"
    assert ATTRIBUTES.items() <= span.attributes.items()
    if where != "starlette":
        assert span.inputs == {"number": 7}
        assert span.outputs is not None and "70" in str(span.outputs)
    assert trace.info.request_preview == json.dumps(span.inputs)


@pytest.mark.parametrize("where", sorted(SITES))
@given(data=st.data())
def test_any_order_gives_the_same_tree(where: str, data: st.DataObject) -> None:
    """Root, exactly one handler span as `@trace` describes it, and what the handler did below it."""
    make, kinds = SITES[where]
    kind = data.draw(st.sampled_from(kinds), label="kind")
    order = data.draw(orders, label="decorators, outermost first")
    if "fastapi" in where and "generator" in kind and not streams_generators(FASTAPI):
        return
    check(make(kind, order), where)
