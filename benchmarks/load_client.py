"""A small load generator for where wrk is not installed: each connection asks again as soon as it has its answer.

    python -m benchmarks.load_client HOST PORT PATH CONNECTIONS SECONDS HEADER...
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import time


async def connection(host: str, port: int, request: bytes, until: float, times: list[float]) -> None:
    """Ask until time is up, and once at least; servers that close the connection are connected to again."""
    reader, writer = await asyncio.open_connection(host, port)
    answered = False
    while (began := time.perf_counter()) < until or not answered:
        try:
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:] if b": " in line)
            await reader.readexactly(int(fields[b"content-length"]))
        except (asyncio.IncompleteReadError, ConnectionError):
            reader, writer = await asyncio.open_connection(host, port)
            continue
        if not head.startswith(b"HTTP/1.1 200"):
            raise SystemExit(f"unexpected answer: {head[:50]!r}")
        times.append(time.perf_counter() - began)
        answered = True
        if fields.get(b"connection") == b"close":
            writer.close()
            reader, writer = await asyncio.open_connection(host, port)
    writer.close()


async def main(host: str, port: int, path: str, connections: int, seconds: float, headers: list[str]) -> None:
    """Print requests in a second and latencies in milliseconds, as JSON."""
    lines = [f"GET {path} HTTP/1.1", f"Host: {host}:{port}", *headers, "", ""]
    request, times = "\r\n".join(lines).encode(), list[float]()
    began = time.perf_counter()
    await asyncio.gather(
        *(connection(host, port, request, began + seconds, times) for _ in range(connections))
    )
    cuts = statistics.quantiles(times, n=100, method="inclusive")
    rate = len(times) / (time.perf_counter() - began)
    print(json.dumps({"rate": rate, "p50_ms": cuts[49] * 1000, "p99_ms": cuts[98] * 1000, "requests": len(times)}))


if __name__ == "__main__":
    to, number, what, at_once, long, *more = sys.argv[1:]
    asyncio.run(main(to, int(number), what, int(at_once), float(long), more))
