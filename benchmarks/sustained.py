"""Many spans a second while a server serves: is every one stored, and does memory stay where it is?"""

from __future__ import annotations

import http.client
import json
import sys
import threading
import time
from typing import Any, Final, NamedTuple

from benchmarks.load import SERVERS, Server

SPANS: Final = 10_000  # a second
PER_REQUEST: Final = 50  # spans, with the root
CLIENTS: Final = 4


class Outcome(NamedTuple):
    """What one server did.

    Attributes:
        made: Spans made, in a second.
        stored: The share of them that is in the store.
        dropped: How many were counted as dropped.
        queued: The longest queue that was seen.
        first_megabytes: In memory after a third of the time.
        megabytes: In memory at the end.
    """

    made: float
    stored: float
    dropped: int
    queued: int
    first_megabytes: float
    megabytes: float


class Client:
    """Asks a server at fixed times, whatever its answers take; a connection that is late catches up.

    Args:
        port: The server's.
        rate: Requests in a second.
    """

    def __init__(self, port: int, rate: float) -> None:
        self.port = port
        self.rate = rate
        self.answered = [0] * CLIENTS

    def ask(self, seconds: float) -> None:
        """Ask for so long."""
        self._until = time.monotonic() + seconds
        threads = [threading.Thread(target=self._keep_asking, args=(number,)) for number in range(CLIENTS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _keep_asking(self, number: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        due = time.monotonic() + number / self.rate
        while due < self._until:
            time.sleep(max(0.0, due - time.monotonic()))
            answer(connection, f"/spans/{PER_REQUEST - 1}")
            self.answered[number] += 1
            due += CLIENTS / self.rate
        connection.close()


def answer(connection: http.client.HTTPConnection, path: str) -> Any:
    """Return what a server answers, as JSON gives it.

    Raises:
        RuntimeError: The answer is an error.
    """
    connection.request("GET", path)
    response = connection.getresponse()
    body = response.read()
    if response.status != 200:
        raise RuntimeError(f"the server answers with {response.status}: {body[:200]!r}")
    return json.loads(body)


def measure(*, python: str = sys.executable, seconds: float = 15, spans: int = SPANS) -> Outcome:
    """Have a server make so many spans a second.

    Args:
        python: The interpreter of the server.
        seconds: How long.
        spans: In a second.
    """
    server = Server(SERVERS["uvicorn"], "tracemw", 1, python)
    try:
        server.wait_ready()
        watching = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        client, queued, megabytes = Client(server.port, spans / PER_REQUEST), 0, list[float]()
        asking = threading.Thread(target=client.ask, args=(seconds,))
        began = time.monotonic()
        asking.start()
        while asking.is_alive():
            asking.join(seconds / 30)
            queued = max(queued, answer(watching, "/stats")["queued"])
            megabytes.append(server.megabytes())
        took = time.monotonic() - began
        dropped = answer(watching, "/stats")["dropped"]
        watching.close()
    finally:
        stored = server.stop()
    made = sum(client.answered) * PER_REQUEST
    others = stored.traces - sum(client.answered)  # asked for readiness and numbers, of one span each
    return Outcome(
        made / took, (stored.spans - others) / made, dropped, queued, megabytes[len(megabytes) // 3], megabytes[-1]
    )
