"""`tracemw demo`: a small application in this process, some users, and the commands that show what was traced."""

from __future__ import annotations

import asyncio
import importlib.util
import random
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any, Final

import tracemw
from tracemw.adapting import Adapter

Message = MutableMapping[str, Any]

RELEASES: Final = (("1.4.0", "eu-west-1"), ("1.5.0", "us-east-1"))
USERS: Final = ("jane", "ali", "mei")
VISITS: Final = 20  # of each user to each release
_NEEDED: Final = ("fastapi", "flask", "uvicorn", "gunicorn")


def run() -> int:
    """Run the demo and return the exit code."""
    root = Path(__file__).resolve().parent.parent
    examples = root / "example_apps" / "demo.py"
    if (
        examples.exists()
        and (root / "tests" / "servers.py").exists()
        and all(map(importlib.util.find_spec, _NEEDED))
    ):
        return subprocess.run([sys.executable, "-m", "example_apps.demo"], cwd=root, check=False).returncode
    path = Path(tempfile.mkdtemp(prefix="tracemw-demo-")) / "tracemw.db"
    return in_process(f"sqlite:///{path}")


def in_process(url: str) -> int:
    """Trace requests of a few users to two releases of a small application, and show them.

    Args:
        url: The store to write.

    Returns:
        The exit code: that of the first command that fails, else 0.
    """
    chance = random.Random(1)
    for number, (version, region) in enumerate(RELEASES):
        tracemw.configure(destination=url, metadata={"app_version": version, "region": region})
        asyncio.run(_traffic(_Shop(number * 0.2, chance), number))
    tracemw.shutdown()
    failed = tracemw.search_traces("status = 'ERROR'", max_results=1)
    commands: list[list[str]] = [["search", "status = 'ERROR'", "--limit", "5"]]
    commands += [["show", trace.info.trace_id] for trace in failed]
    commands += [["compare", "--by", "app_version", "--baseline", RELEASES[0][0]]]
    for arguments in commands:
        if code := _command([*arguments, "--store", url]):
            return code
    print(f'\nLook further: tracemw search "execution_time > 5ms" --store {url}')
    return 0


def _command(arguments: Sequence[str]) -> int:
    quoted = " ".join(f'"{argument}"' if " " in argument else argument for argument in arguments[:-2])
    print(f"\n$ tracemw {quoted}", flush=True)
    return subprocess.run([sys.executable, "-m", "tracemw", *arguments], check=False).returncode


async def _traffic(shop: _Shop, release: int) -> None:
    app = tracemw.TraceMiddleware(shop, adapter=_Routes())
    for visit in range(VISITS):
        for user in USERS:
            headers = {
                "x-request-id": f"{user}-{release}-{visit:02}",
                "x-session-id": f"{user}-{release}",
                "x-user-id": user,
            }
            await _request(app, "/checkout" if visit % 3 else "/search", headers)


async def _request(app: Any, path: str, headers: dict[str, str]) -> None:
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "GET", "scheme": "http",
        "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "", "server": ("shop", 80),
        "client": ("127.0.0.1", 1), "headers": [(name.encode(), text.encode()) for name, text in headers.items()],
    }  # fmt: skip

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        pass

    try:
        await app(scope, receive, send)
    except PaymentError:
        pass  # a server would log it and answer 500


class _Routes(Adapter):
    """Tells the middleware the route of a request, as the adapter of a framework does."""

    def route(self, carrier: Mapping[str, Any]) -> str | None:
        return str(carrier["path"])


class PaymentError(Exception):
    """The bank said no."""


class _Shop:
    """An ASGI application without a framework."""

    def __init__(self, failing: float, chance: random.Random) -> None:
        self._failing, self._chance = failing, chance

    async def __call__(
        self,
        scope: Message,
        receive: Callable[[], Awaitable[Message]],
        send: Callable[[Message], Awaitable[None]],
    ) -> None:
        items = await self.find("desk lamp")
        if scope["path"] == "/checkout":
            await self.pay(items[0], api_key="sk-4711")
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok", "more_body": False})

    @tracemw.trace(span_type="RETRIEVER")
    async def find(self, query: str) -> list[str]:
        await asyncio.sleep(self._chance.uniform(0.0005, 0.002))
        return [f"{query} {number}" for number in (1, 2)]

    @tracemw.trace(span_type="TOOL")
    async def pay(self, item: str, api_key: str) -> str:
        tracemw.update_current_trace(tags={"item": item})
        await asyncio.sleep(self._chance.uniform(0.001, 0.004))
        if self._chance.random() < self._failing:
            raise PaymentError(f"no answer of the bank for {item}")
        return "paid"
