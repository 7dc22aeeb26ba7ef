"""The first request of a process waits for nothing that could have been done before."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.servers import ROOT, clean_environment

# Says what a first request imports, which threads run when, and where its trace goes.
COLD = """
import asyncio, json, sys, threading
there = set(sys.modules)  # coverage, where it measures, has some of them
import tracemw
light = [name for name in set(sys.modules) - there if name.startswith(("sqlite3", "opentelemetry.sdk"))]

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        await receive()
        set_up("lifespan")
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})
        return
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body"})

def wsgi(environ, start_response):
    start_response("200 OK", [("Content-Length", "1")])
    return [b"x"]

exported = []

def set_up(when):
    if when != sys.argv[2]:
        return
    if sys.argv[3] == "configure":
        tracemw.configure(destination=sys.argv[4])
    elif sys.argv[3] == "provider":
        from opentelemetry import trace
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import SimpleSpanProcessor
        from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
        provider, exporter = TracerProvider(), InMemorySpanExporter()
        provider.add_span_processor(SimpleSpanProcessor(exporter))
        trace.set_tracer_provider(provider)
        exported.append(exporter)

from tests.request.drive import ask, ask_wsgi
if sys.argv[1] == "wsgi":
    made = tracemw.WSGITraceMiddleware(wsgi)
    def request():
        ask_wsgi(made).read()
else:
    made = tracemw.TraceMiddleware(app)
    def request():
        ask(made)
threads = [threading.active_count()]
if sys.argv[1] == "asgi":
    ask(made, {"type": "lifespan"}, [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}])
threads.append(threading.active_count())
set_up("after")
before = set(sys.modules)
request()
new = sorted(name for name in set(sys.modules) - before if name.startswith(("tracemw", "sqlite3")))
tracemw.flush()
print(json.dumps({
    "light": light, "threads": threads, "new": new,
    "stored": [[span.name for span in trace.data.spans] for trace in tracemw.search_traces()],
    "exported": [span.name for exporter in exported for span in exporter.get_finished_spans()],
}))
"""


def cold(folder: Path, kind: str, when: str = "never", what: str = "nothing") -> Any:
    """Send the first request of a process, and return what it says of it."""
    env = clean_environment({"TRACEMW_DESTINATION": f"sqlite:///{folder}/t.db", "PYTHONPATH": str(ROOT)})
    command = [sys.executable, "-c", COLD, kind, when, what, f"sqlite:///{folder}/configured.db"]
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("kind", ["asgi", "no lifespan", "wsgi"])
def test_the_first_request_imports_nothing(kind: str, tmp_path: Path) -> None:
    """What spans need is imported with the middleware, which begins no thread: a server may fork yet."""
    told = cold(tmp_path, kind)
    assert told["light"] == []
    assert told["new"] == []
    assert told["threads"] == [1, 1]
    assert told["stored"] == [["GET"]]  # and no work after the response, which would be ours


@pytest.mark.parametrize("kind", ["asgi", "wsgi"])
@pytest.mark.parametrize("what", ["configure", "provider"])
@pytest.mark.parametrize("when", ["lifespan", "after"])
def test_what_the_application_sets_up_later(kind: str, when: str, what: str, tmp_path: Path) -> None:
    """`configure` and a provider of the application's count from then on, whatever is ready by then."""
    if (kind, when) == ("wsgi", "lifespan"):
        pytest.skip("there is none")
    told = cold(tmp_path, kind, when, what)
    assert told["stored"] == [["GET"]]
    assert (tmp_path / "configured.db").exists() == (what == "configure")
    assert (tmp_path / "t.db").exists() == (what != "configure")
    assert told["exported"] == (["GET"] if what == "provider" else [])
