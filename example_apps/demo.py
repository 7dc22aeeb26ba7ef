"""`make demo`: two applications, real servers, realistic traffic, and what was traced.

Each application runs twice, as version 1.4.0 in eu-west-1 and as version 1.5.0 in us-east-1: the FastAPI chat
under uvicorn, the Flask shop under `gunicorn -w 2`. All of them write into one file. Ends by itself; the exit
code says whether every request was found.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import tracemw
from tests import servers

FOLDER = servers.ROOT / "demo"
RELEASES = (("1.4.0", "eu-west-1"), ("1.5.0", "us-east-1"))
USERS = ("jane", "ali", "mei", "noor")
QUESTIONS = ("What is a span?", "What is a trace?", "How do I read a session?", "Why is latency high?")


@dataclass(frozen=True)
class Call:
    """One request of one user, and the answer that we expect."""

    app: str
    method: str
    path: str
    body: object = None
    status: int = 200


def visit(user: int, release: int) -> Iterator[Call]:
    """What one user does in one visit. The newer release fails more often: the comparison shall show it."""
    question = {"question": QUESTIONS[user % len(QUESTIONS)]}
    yield Call("chat", "POST", "/chat", question)
    yield Call("chat", "POST", "/ask", question)
    yield Call("chat", "POST", "/chat/stream", question)
    yield Call("chat", "GET", "/documents/span")
    yield Call("chat", "GET", "/documents/unknown", status=404)
    if user == 0:
        yield Call("chat", "GET", "/summary")
    if user <= release:
        yield Call("chat", "POST", "/index/rebuild", status=500)
    order = {"item": "desk", "quantity": user + 1, "card": "4111 1111"}
    yield Call("shop", "POST", "/orders", order, status=201)
    yield Call("shop", "GET", f"/orders/{1000 + user}")
    yield Call("shop", "GET", "/orders.csv?count=20")
    if user < 2 * release:
        yield Call("shop", "POST", f"/orders/{1000 + user}/refund", status=500)


def main() -> int:
    """Run the demo.

    Returns:
        0, or 1 with a message on stderr where something is not as it should be.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that it stops the servers, too
    url = fresh_store()
    try:
        sent = traffic(url)
    except KeyboardInterrupt:
        return fail("interrupted; the servers are stopped")
    except (servers.ServerError, OSError) as error:
        return fail(str(error))
    os.environ["TRACEMW_STORE"] = os.environ["TRACEMW_DESTINATION"] = url
    if problem := check(sent):
        return fail(problem)
    return report(sent)


def fresh_store() -> str:
    """An empty folder for the store; returns the destination to configure."""
    FOLDER.mkdir(exist_ok=True)
    for old in FOLDER.glob("tracemw.db*"):
        old.unlink()
    return f"sqlite:///{FOLDER / 'tracemw.db'}"


def traffic(url: str) -> int:
    """Start the servers, send every user's visits, stop the servers.

    Returns:
        The number of requests that were sent.
    """
    say("Starting two applications in two releases: uvicorn (FastAPI), gunicorn -w 2 (Flask)")
    with ExitStack() as running:
        releases = [start(running, url, version, region) for version, region in RELEASES]
        began = time.monotonic()
        with ThreadPoolExecutor(len(USERS)) as users:
            visits = [
                users.submit(run_visit, apps, user, release)
                for release, apps in enumerate(releases)
                for user in range(len(USERS))
            ]
            sent = sum(visit.result() for visit in visits)
        seconds = time.monotonic() - began
        say(f"{sent} requests of {len(USERS)} users answered in {seconds:.1f} s; stopping the servers")
        for server in (server for apps in releases for server in apps.values()):
            server.stop()
    return sent


def start(running: ExitStack, url: str, version: str, region: str) -> dict[str, servers.Server]:
    """Start both applications as one release; `running` stops them, whatever happens."""
    env = {
        "TRACEMW_DESTINATION": url,
        "APP_ENVIRONMENT": "production",
        "APP_VERSION": version,
        "REGION": region,
        "DEPLOYMENT_ID": f"{region}-{version}",
    }
    chat = servers.uvicorn("example_apps.fastapi_chat.app:app", env=env)
    shop = servers.gunicorn("example_apps.flask_shop.app:app", "-w", "2", env=env)
    return {"chat": running.enter_context(chat), "shop": running.enter_context(shop)}


def run_visit(apps: dict[str, servers.Server], user: int, release: int) -> int:
    """Send one visit's requests, one after the other; returns how many."""
    headers = {"X-User-ID": USERS[user], "X-Session-ID": f"{USERS[user]}-{release + 1}"}
    calls = list(visit(user, release))
    for call, number in zip(calls, count(1)):
        request_id = f"{headers['X-Session-ID']}-{number:02}"
        pairs = {**headers, "X-Request-ID": request_id}
        server = apps[call.app]
        answer = (
            server.get(call.path, pairs) if call.method == "GET" else server.post(call.path, call.body, pairs)
        )
        if answer.status != call.status:
            raise servers.ServerError(
                f"{call.method} {call.path} gave {answer.status} instead of {call.status}\n{server.output()}"
            )
    return len(calls)


def check(sent: int) -> str | None:
    """What is wrong with the stored traces, None if nothing is."""
    found = tracemw.search_traces(max_results=10 * sent, include_spans=False)
    ids = {trace.info.client_request_id for trace in found}
    if len(found) != sent or len(ids) != sent:
        return f"{sent} requests were sent; the store has {len(found)} traces with {len(ids)} request ids"
    return None


def report(sent: int) -> int:
    """Print what a user would look at, with the commands that show it."""
    say(f"All {sent} requests are in the store, one trace each.")
    streamed = tracemw.search_traces("attributes.name = 'POST /chat/stream'", max_results=1)[0]
    commands: Sequence[tuple[str, Sequence[str]]] = (
        ("What failed", ["search", "attributes.status = 'ERROR'", "--limit", "8"]),
        ("A streamed answer", ["show", streamed.info.trace_id]),
        ("Error rate and latency by version", ["compare", "--by", "app_version"]),
    )
    for title, arguments in commands:
        say(title)
        if code := tracemw_command(arguments):
            return fail(f"tracemw {arguments[0]} ended with code {code}")
    say("Look further:")
    print(f"  export TRACEMW_DESTINATION=sqlite:///{shown(FOLDER / 'tracemw.db')}")
    for query in ("metadata.region = 'us-east-1' AND attributes.execution_time_ms > 250", "user = 'jane'"):
        print(f'  {shown(command_path())} search "{query}"')
    return 0


def tracemw_command(arguments: Sequence[str]) -> int:
    """Show a command as one would type it, and run it."""
    quoted = " ".join(f'"{argument}"' if " " in argument else argument for argument in arguments)
    print(f"$ tracemw {quoted}", flush=True)
    return subprocess.run([command_path(), *arguments], check=False).returncode


def command_path() -> Path:
    """The `tracemw` command of this environment."""
    return Path(sys.executable).with_name("tracemw")


def shown(path: Path) -> str:
    """A path as one would type it."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def say(line: str) -> None:
    """Print a headline."""
    print(f"\n== {line}", flush=True)


def fail(why: str) -> int:
    """Print what went wrong; returns the exit code."""
    print(f"demo failed: {why}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
