"""A run's results as Markdown; each section's tables are made from its part of the JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

Results = Mapping[str, Any]

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; all columns but the first are right-aligned."""
    lines = ["| " + " | ".join(header) + " |", "|" + "|".join(["---", *["---:"] * (len(header) - 1)]) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def amount(number: float) -> str:
    """Return a number with three digits that count."""
    if abs(number) >= 100:
        return f"{number:,.0f}"
    return f"{number:.1f}" if abs(number) >= 10 else f"{number:.2f}"


def middle(value: Mapping[str, float] | None) -> str:
    """Return a median with the middle half around it."""
    if value is None:
        return "–"
    return f"{amount(value['median'])} ({amount(value['low'])}–{amount(value['high'])})"


def ratios(results: Results) -> str:
    """The table of what has to hold."""
    rows = [
        [
            row["what"], row["against"], f"**{row['ratio']:.2f}**", f"{row['goal']:.2f}", f"{row['gate']:.2f}",
            "goal" if row["reaches_goal"] else "gate" if row["holds"] else "**missed**",
        ]
        for row in results["ratios"]
    ]  # fmt: skip
    text = table(["overhead of", "against", "ratio", "goal", "gate", "reached"], rows)
    return text.replace("|---|---:|---:|", "|---|---|---:|", 1)


def requests(results: Results) -> str:
    """What each peer adds to a request."""
    parts = []
    for framework, title in (("fastapi", "FastAPI, `GET /users/{id}`"), ("flask", "Flask, `GET /users/<id>`")):
        found = results["requests"][framework]
        ours = found["peers"].get("tracemw", {}).get("us", {}).get("median")
        rows = []
        for peer in sorted(found["peers"].values(), key=lambda one: one.get("us", {}).get("median", 1e9)):
            if "failed" in peer:
                rows.append([peer["label"], "not measured", ""])
                continue
            factor = f"{peer['us']['median'] / ours:.2f}" if ours else ""
            rows.append([peer["label"], middle(peer["us"]), factor])
        bare = amount(found["bare"]["us"]["median"])
        parts.append(f"**{title}** (bare: {bare} µs)\n\n" + table(["", "µs added to a request", "× ours"], rows))
    return "\n\n".join(parts)


def calls(results: Results) -> str:
    """Small things."""
    found = results["calls"]
    rows = []
    for case, both in found["functions"].items():
        ours, theirs = both["tracemw"], both["mlflow"]
        ratio = f"{ours['median'] / theirs['median']:.2f}" if ours and theirs else ""
        name = case.removeprefix("below ") + (", inside a trace" if case.startswith("below ") else "")
        rows.append([name, middle(ours), middle(theirs), ratio])
    parts = [
        "**One traced call** (µs added; a trace of its own unless it says otherwise)\n\n"
        + table(["", "tracemw", "MLflow", "ratio"], rows),
        "**Capture** (µs for one value; beside it `json.dumps(value, default=repr)`, which has no bounds)"
        "\n\n"
        + table(["", "tracemw", "json.dumps"],
                [[case, amount(v["tracemw"]["median"]), amount(v["json"]["median"])]
                 for case, v in found["capture"].items()]),
        "**Identity** (µs for the headers of one request)\n\n"
        + table(["", "µs"], [[case, middle(value)] for case, value in found["identity"].items()]),
    ]  # fmt: skip
    if found["floor"] is not None:
        parts.append(
            f"One span of the SDK in a loop, where all of it stays in the processor's caches: "
            f"{middle(found['floor'])} µs."
        )
    return "\n\n".join(parts)


def imports(results: Results) -> str:
    """What imports take."""
    found = results["imports"]
    base = found["opentelemetry.sdk.trace"]["median"]
    rows = [[f"`{name}`", middle(value), f"{value['median'] / base:.2f}"] for name, value in found.items()]
    return table(["import", "ms", "× the SDK's"], rows)


def load(results: Results) -> str:
    """Real servers."""
    found = results["load"]
    rows = [
        [
            f"{server}, {peer}", amount(one["rate"]["median"]), amount(one["p50_ms"]["median"]),
            middle(one["p99_ms"]), amount(one["cpu_us"]["median"]), amount(one["megabytes"]),
            f"{one['throughput_ratio']:.2f}", f"{one['p99_ratio']:.2f}", f"{one['cpu_ratio']:.2f}",
            f"{one['stored']:.0%}",
        ]
        for server, peers in found["servers"].items()
        for peer, one in peers.items()
    ]  # fmt: skip
    head = [
        "", "requests/s", "p50 ms", "p99 ms", "CPU µs", "MB", "throughput ×", "p99 ×", "by CPU ×", "stored",
    ]  # fmt: skip
    return f"Load by {found['generator']}, {found['connections']} connections.\n\n" + table(head, rows)


def sustained(results: Results) -> str:
    """Many spans a second beside a server."""
    found = results["sustained"]
    head = ["spans/s", "stored", "dropped", "longest queue", "MB after a third of the time", "MB at the end"]
    row = [
        amount(found["made"]), f"{found['stored']:.0%}", str(found["dropped"]), f"{found['queued']:,}",
        amount(found["first_megabytes"]), amount(found["megabytes"]),
    ]  # fmt: skip
    return f"uvicorn, {found['asked']:,} spans a second asked for, 50 in a request.\n\n" + table(head, [row])


def growth(results: Results) -> str:
    """How cost grows."""
    found = results["growth"]
    rows = [
        [
            kind["unit"],
            ", ".join(f"{int(size):,}: {amount(time)}" for size, time in kind["sizes"].items()),
            f"{kind['slope']:.3g}",
            f"{kind['exponent']:.2f}",
        ]
        for kind in found["kinds"].values()
    ]
    store = [
        [f"{row['traces']:,}", *(amount(row[key]) for key in ("spans_per_s", "latest_ms", "filter_ms",
                                                              "bytes_per_trace"))]
        for row in found["store"]
    ]  # fmt: skip
    memory = found["streams"]
    return "\n\n".join(
        [
            table(["one more …", "how many: µs", "µs for one more", "exponent"], rows),
            f"An open stream holds {amount(memory['traced_kb'])} kB, {amount(memory['bare_kb'])} kB without us.",
            table(["traces stored", "spans/s written", "latest 50, ms", "by a key, ms", "bytes/trace"], store),
        ]
    )


TITLES: dict[str, tuple[str, Callable[[Results], str]]] = {
    "ratios": ("What has to hold", ratios),
    "requests": ("Requests", requests),
    "calls": ("Calls", calls),
    "imports": ("Imports", imports),
    "load": ("Under load", load),
    "sustained": ("Many spans beside a server", sustained),
    "growth": ("Growth", growth),
}


def markdown(results: Results, level: int = 3) -> str:
    """Return all that was measured."""
    return "\n\n".join(_parts(results, "#" * level))


def _parts(results: Results, hashes: str) -> Iterator[str]:
    for name, (title, tables) in TITLES.items():
        if results.get(name):
            yield f"{hashes} {title}"
            yield tables(results)
    taken = results["taken"]
    versions = ", ".join(f"{name} {version}" for name, version in taken["versions"].items())
    by = "the processor's time, of all threads" if taken["clock"] == "cpu" else "the time on the wall"
    yield f"{taken['date']}; {taken['machine']}; {versions}. Times are {by}: medians, the middle half in brackets."


def inserted(page: str, results: Results) -> str:
    """Return a page with the results between its two marks.

    Raises:
        ValueError: It has no marks.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"no place for the results: {BEGIN} ... {END}")
    return f"{before}{BEGIN}\n\n{markdown(results)}\n\n{END}{after}"
