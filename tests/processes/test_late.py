"""Traces that begin when the main thread has ended already, and a thread of the application goes on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.request.look import stored
from tests.servers import ROOT, clean_environment

LATE = """
import sys, threading
import tracemw

@tracemw.trace
def call():
    return 1

def block():
    with tracemw.start_span("block"):
        pass

def asgi():
    import asyncio
    from tests.request.drive import ask
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body"})
    ask(tracemw.TraceMiddleware(app))

def wsgi():
    from tests.request.drive import ask_wsgi
    def app(environ, start_response):
        start_response("200 OK", [("Content-Length", "1")])
        return [b"x"]
    ask_wsgi(tracemw.WSGITraceMiddleware(app)).read()

def late():
    threading.main_thread().join()
    globals()[sys.argv[1]]()

threading.Thread(target=late).start()
"""


@pytest.mark.parametrize("what", ["call", "block", "asgi", "wsgi"])
def test_the_first_trace_after_the_main_thread(what: str, tmp_path: Path) -> None:
    """It is recorded like any other, and stored when the process ends: Python refuses some imports by then."""
    env = clean_environment({"TRACEMW_DESTINATION": f"sqlite:///{tmp_path}/t.db", "PYTHONPATH": str(ROOT)})
    done = subprocess.run(
        [sys.executable, "-c", LATE, what], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    (trace,) = stored(tmp_path / "t.db")
    assert trace.info.state == "OK"
