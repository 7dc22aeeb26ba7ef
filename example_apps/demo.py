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
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import tracemw
from tests import servers

FOLDER = servers.ROOT / "demo"
RELEASES = (("1.4.0", "eu-west-1"), ("1.5.0", "us-east-1"))
USERS = ("jane", "ali", "mei", "noor")
VISITS = 4  # of each user to each release
QUESTIONS = ("What is a span?", "What is a trace?", "How do I read a session?", "Why is latency high?")


# Set by Ctrl-C, and looked at between two steps: an exception from a signal handler could come anywhere.
INTERRUPTED = threading.Event()


class Interrupted(Exception):
    """Somebody wants the demo to end."""


def go_on() -> None:
    """Raise `Interrupted` after Ctrl-C or SIGTERM."""
    if INTERRUPTED.is_set():
        raise Interrupted


@dataclass(frozen=True)
class Call:
    """One request of one user, and the answer that we expect."""

    app: str
    method: str
    path: str
    body: object = None
    status: int = 200


def calls(user: int, number: int, release: int) -> Iterator[Call]:
    """What one user does in one visit. The newer release fails more often: the comparison shall show it."""
    question = {"question": QUESTIONS[(user + number) % len(QUESTIONS)]}
    yield Call("chat", "POST", "/chat", question)
    yield Call("chat", "POST", "/ask", question)
    yield Call("chat", "POST", "/chat/stream", question)
    yield Call("chat", "GET", "/documents/span")
    yield Call("chat", "GET", "/documents/unknown", status=404)
    if number == user == 0:
        yield Call("chat", "GET", "/summary")
    if number <= release:
        yield Call("chat", "POST", "/index/rebuild", status=500)
    order = {"item": "desk", "quantity": user + 1, "card": "4111 1111"}
    yield Call("shop", "POST", "/orders", order, status=201)
    yield Call("shop", "GET", f"/orders/{1000 + user}")
    yield Call("shop", "GET", "/orders.csv?count=20")
    if number < 3 * release:
        yield Call("shop", "POST", f"/orders/{1000 + user}/refund", status=500)


def main(folder: Path = FOLDER) -> int:
    """Run the demo.

    Args:
        folder: Where the store is made; one from an earlier demo is replaced.

    Returns:
        0, or 1 with a message on stderr where something is not as it should be.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: INTERRUPTED.set())
    url = fresh_store(folder)
    try:
        sent = traffic(url)
        os.environ["TRACEMW_STORE"] = os.environ["TRACEMW_DESTINATION"] = url
        if problem := check(sent):
            return fail(problem)
        return report(len(sent), folder)
    except Interrupted:
        return fail("interrupted; the servers are stopped")
    except (servers.ServerError, OSError) as error:
        return fail(str(error))


def fresh_store(folder: Path) -> str:
    """An empty folder for the store; returns the destination to configure."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("tracemw.db*"):
        old.unlink()
    return f"sqlite:///{folder.resolve() / 'tracemw.db'}"


def traffic(url: str) -> dict[str, Call]:
    """Start the servers, send every user's visits, stop the servers.

    Returns:
        What was sent, by request id.
    """
    say("Starting two applications in two releases: uvicorn (FastAPI), gunicorn -w 2 (Flask)")
    with ExitStack() as running:
        releases = [start(running, url, version, region) for version, region in RELEASES]
        began = time.monotonic()
        with ThreadPoolExecutor(len(USERS)) as pool:
            users = [pool.submit(run_user, releases, user) for user in range(len(USERS))]
            sent = {request_id: call for user in users for request_id, call in user.result().items()}
        seconds = time.monotonic() - began
        say(f"{len(sent)} requests of {len(USERS)} users answered in {seconds:.1f} s; stopping the servers")
        for server in (server for apps in releases for server in apps.values()):
            server.stop()
    return sent


def start(running: ExitStack, url: str, version: str, region: str) -> dict[str, servers.Server]:
    """Start both applications as one release; `running` stops them, whatever happens."""
    go_on()
    env = {
        "TRACEMW_DESTINATION": url,
        "APP_ENVIRONMENT": "production",
        "APP_VERSION": version,
        "REGION": region,
        "DEPLOYMENT_ID": f"{region}-{version}",
    }
    chat = running.enter_context(servers.uvicorn("example_apps.fastapi_chat.app:app", env=env))
    shop = running.enter_context(servers.gunicorn("example_apps.flask_shop.app:app", "-w", "2", env=env))
    print(f"   {version} in {region}: chat {chat.url}, shop {shop.url}", flush=True)
    return {"chat": chat, "shop": shop}


def run_user(releases: Sequence[dict[str, servers.Server]], user: int) -> dict[str, Call]:
    """Send all visits of one user, one request after the other; returns them by request id."""
    sent = {}
    for release, apps in enumerate(releases):
        for number in range(VISITS):
            session = f"{USERS[user]}-{release + 1}{number + 1}"
            for step, call in enumerate(calls(user, number, release), 1):
                request_id = f"{session}-{step:02}"
                send(apps[call.app], call, request_id, session, USERS[user])
                sent[request_id] = call
    return sent


def send(server: servers.Server, call: Call, request_id: str, session: str, user: str) -> None:
    """Send one request, as a gateway would that knows who is asking."""
    go_on()
    headers = {"X-Request-ID": request_id, "X-Session-ID": session, "X-User-ID": user}
    if call.method == "GET":
        answer = server.get(call.path, headers)
    else:
        answer = server.post(call.path, call.body, headers)
    if answer.status != call.status:
        raise servers.ServerError(
            f"{call.method} {call.path} gave {answer.status} instead of {call.status}\n{server.output()}"
        )


def check(sent: dict[str, Call]) -> str | None:
    """What is wrong with the stored traces, None if nothing is."""
    found = tracemw.search_traces(max_results=10 * len(sent), include_spans=False)
    states = {trace.info.client_request_id: trace.info.state for trace in found}
    if len(found) != len(sent) or states.keys() != sent.keys():
        return f"{len(sent)} requests were sent; the store has {len(found)} traces of {len(states)} requests"
    for request_id, call in sent.items():
        if states[request_id] != ("ERROR" if call.status == 500 else "OK"):
            return f"{call.method} {call.path} gave {call.status}, its trace says {states[request_id]}"
    return None


def report(sent: int, folder: Path) -> int:
    """Print what a user would look at, with the commands that show it."""
    say(f"All {sent} requests are in the store, one trace each.")
    failed = tracemw.search_traces("name = 'POST /orders/<int:number>/refund'", max_results=1)[0]
    chat = tracemw.search_traces("name = 'POST /chat'", max_results=1)[0]
    commands: Sequence[tuple[str, Sequence[str]]] = (
        ("The latest of them", ["search", "--limit", "8"]),
        ("What failed for jane", ["search", "status = 'ERROR' AND user = 'jane'", "--limit", "5"]),
        ("Why", ["show", str(failed.info.client_request_id)]),
        ("An answer, step by step", ["show", chat.info.trace_id]),
        ("Error rate and latency by version", ["compare", "--by", "version", "--baseline", RELEASES[0][0]]),
    )
    for title, arguments in commands:
        go_on()
        say(title)
        if code := tracemw_command(arguments):
            return fail(f"tracemw {arguments[0]} ended with code {code}")
    say("Look further:")
    print(f"  export TRACEMW_STORE={shown(folder.resolve() / 'tracemw.db')}")
    for query in ("region = 'us-east-1' AND execution_time > 250ms", "name = 'POST /chat/stream'"):
        print(f'  {shown(command_path())} search "{query}"')
    print(f"  {shown(command_path())} --help")
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
    sys.exit(main(*map(Path, sys.argv[1:2])))
