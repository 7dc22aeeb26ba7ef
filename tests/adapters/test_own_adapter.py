"""An adapter of one's own: the page that tells how runs as it is printed."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import tracemw
from tests.adapters.trees import get, trees
from tests.request.drive import ask_wsgi, environ, http_scope
from tracemw.adapting import Adapter
from tracemw.errors import SettingError
from tracemw.testing import CapturedTraces

PAGE = Path(__file__).resolve().parents[2] / "docs" / "adapters.md"


@pytest.fixture
def page() -> dict[str, Any]:
    """The names that the code of the page defines."""
    code = "\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL))
    names: dict[str, Any] = {}
    exec(compile(code, str(PAGE), "exec"), names)
    return names


def test_the_page(captured_traces: CapturedTraces, page: dict[str, Any]) -> None:
    """The framework made up there is traced with names, users and handlers, in both orders of decorators."""
    for path in ("/greet/Ada", "/shout/Ada", "/nothing"):
        ask_wsgi(page["site"], environ(path, HTTP_AUTHORIZATION="ada")).read()
    assert trees(captured_traces) == [
        {"GET /greet/{argument}": {"greet": {}}},
        {"GET /shout/{argument}": {"shout": {}}},
        {"GET": {}},
    ]
    assert {trace.info.trace_metadata["mlflow.trace.user"] for trace in captured_traces} == {"ada"}


def test_a_handler_that_comes_later(captured_traces: CapturedTraces, page: dict[str, Any]) -> None:
    """`changed` makes the adapter look again."""
    ask_wsgi(page["site"], environ("/greet/Ada")).read()

    def late(name: str) -> str:
        return name

    traced = tracemw.trace(late)
    page["app"].handlers["late"] = late
    ask_wsgi(page["site"], environ("/late/Ada")).read()
    assert traced("Ada") == "Ada"
    assert trees(captured_traces)[1] == {"GET /late/{argument}": {"late": {}}}


def test_an_adapter_that_fails(captured_traces: CapturedTraces, page: dict[str, Any]) -> None:
    """Each failure is counted, and takes nothing but its own part away; the response is as it was."""

    class Failing(Adapter):
        def route(self, carrier: Mapping[str, Any]) -> str | None:
            raise RuntimeError

        user = changed = prepare = place = route  # type: ignore[assignment]

    before = tracemw.stats()["failures"]
    answer = ask_wsgi(tracemw.WSGITraceMiddleware(page["app"], adapter=Failing()), environ("/shout/Ada"))
    assert answer.read() == b"ADA"
    (trace,) = captured_traces
    assert (trace.info.state, trees([trace])) == ("OK", [{"GET": {"shout": {}}}])
    after = tracemw.stats()["failures"]
    failed = {place for place, number in after.items() if number > before.get(place, 0)}
    assert failed == {"Failing.route", "Failing.user", "Failing.prepare"}


def test_an_object_with_one_method_will_do(captured_traces: CapturedTraces) -> None:
    """An adapter need not be an `Adapter`, nor have every method; on ASGI as on WSGI."""

    class Names:
        def route(self, carrier: Mapping[str, Any]) -> str:
            return "/anything"

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body"})

    before = tracemw.stats()["failures"]
    get(tracemw.TraceMiddleware(app, adapter=Names()), "/x")
    assert trees(captured_traces) == [{"GET /anything": {}}]
    assert tracemw.stats()["failures"] == before


def test_an_adapter_that_installs(captured_traces: CapturedTraces) -> None:
    """`instrument` asks the adapter first, with the options."""

    class Site:
        def __init__(self) -> None:
            self.app = self.answer

        async def answer(self, scope: Any, receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body"})

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            await self.app(scope, receive, send)

    class Installing(Adapter):
        def __init__(self, site: Site) -> None:
            self.site = site

        def install(self, options: dict[str, Any]) -> bool:
            self.site.app = tracemw.TraceMiddleware(self.site.app, **options)
            return True

    site = Site()
    with pytest.raises(SettingError):
        tracemw.instrument(site, adapter=Installing(site), unknown=1)
    assert tracemw.instrument(site, adapter=Installing(site)) is site
    asyncio.run(site(http_scope(), None, _nowhere))
    assert len(captured_traces) == 1


async def _nowhere(message: Any) -> None:
    """Send to nobody."""
