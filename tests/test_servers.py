"""The helper that other tests rely on: servers start, answer, stop, and are gone."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests import servers

APP = """
async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        raise NotImplementedError
    await send({"type": "http.response.start", "status": 200, "headers": [(b"x-pid", b"1")]})
    await send({"type": "http.response.body", "body": b"asgi"})


def wsgi(environ, start_response):
    start_response("200 OK", [("X-Given", environ.get("HTTP_X_GIVEN", ""))])
    return [environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0)) or b"wsgi"]
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder with a module that has both applications."""
    (tmp_path / "site_app.py").write_text(APP)
    return tmp_path


def alive(pid: int) -> bool:
    """Whether there is such a process (and not only its remains)."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize("workers", [1, 2])
def test_uvicorn_answers_and_stops(site: Path, workers: int) -> None:
    """The server is there when the block begins, and a graceful stop is one."""
    with servers.uvicorn("site_app:app", "--workers", str(workers), cwd=site) as server:
        assert server.get("/").text == "asgi"
        pids = [server.pid, *server.workers()]
        assert server.stop() in (0, -signal.SIGTERM)
    assert servers.wait_for(lambda: not any(alive(pid) for pid in pids))


def test_gunicorn_passes_headers_and_bodies(site: Path) -> None:
    """What a test sends arrives as it is, including bytes that no client library would send."""
    with servers.gunicorn("site_app:wsgi", cwd=site) as server:
        answer = server.request("POST", "/", [("X-Given", b"\xe4")], b"\x00body")
        assert (answer.body, answer.header("x-given")) == (b"\x00body", "\xe4")
        assert len(servers.wait_for(server.workers)) == 1


def test_workers_die_with_the_block(site: Path) -> None:
    """Killing gunicorn's arbiter leaves its worker behind; leaving the block does not."""
    with servers.gunicorn("site_app:wsgi", cwd=site) as server:
        worker = servers.wait_for(server.workers)[0]
        os.kill(server.pid, signal.SIGKILL)
        server.process.wait(5)
    assert servers.wait_for(lambda: not alive(worker))


def test_a_server_that_does_not_start_says_why(site: Path) -> None:
    """The error has the server's own words."""
    with pytest.raises(servers.ServerError, match="Could not import module"):
        with servers.uvicorn("nowhere:app", cwd=site):
            raise AssertionError("not reached")


def test_wait_for_shows_what_it_saw() -> None:
    """A wait that ends in vain names the last result."""
    with pytest.raises(AssertionError, match=r"still \[\] after"):
        servers.wait_for(lambda: [], timeout=0.05)
