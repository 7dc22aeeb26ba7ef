"""Plots as SVG, written by hand: bars of what each peer adds, lines of how cost grows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any
from xml.sax.saxutils import escape

Results = Mapping[str, Any]

OURS, OTHERS, INK, FAINT, PAPER = "#0b6e4f", "#9db4c0", "#22313a", "#d8dee2", "#ffffff"
COLOURS = ("#0b6e4f", "#c8553d", "#2d5d9f", "#8a6d00", "#6b4c9a")
WIDTH, ROW, LABELS = 860, 22, 350


def _text(x: float, y: float, what: str, *, anchor: str = "start", weight: str = "normal", size: int = 12) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}" font-size="{size}">'
        f"{escape(what)}</text>"
    )


def _drawing(height: float, parts: Sequence[str], title: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" role="img" '
        f'aria-label="{escape(title)}" font-family="system-ui, sans-serif" fill="{INK}">\n'
        f'<rect width="100%" height="100%" fill="{PAPER}"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def bars(results: Results) -> str:
    """Return what each peer adds to a request: one group of bars for each framework."""
    parts: list[str] = []
    y = 10.0
    for framework, title in (("fastapi", "FastAPI"), ("flask", "Flask")):
        peers = [peer for peer in results["requests"][framework]["peers"].values() if "us" in peer]
        peers.sort(key=lambda peer: peer["us"]["median"])
        parts.append(_text(10, y + 16, f"{title}: µs added to one request", weight="bold", size=14))
        y += 28
        longest = max((peer["us"]["high"] for peer in peers), default=1.0)
        for peer in peers:
            parts += _bar(peer, y, longest)
            y += ROW
        y += 14
    return _drawing(y, parts, "Microseconds that each way of tracing adds to one request")


def _bar(peer: Mapping[str, Any], y: float, longest: float) -> list[str]:
    scale = (WIDTH - LABELS - 70) / longest
    us, label = peer["us"], peer["label"].replace("`", "")
    ours = label.startswith("tracemw")
    width = max(1.0, us["median"] * scale)
    low, high = LABELS + max(0.0, us["low"]) * scale, LABELS + us["high"] * scale
    middle = y + ROW / 2 - 2
    return [
        _text(LABELS - 8, y + 13, label, anchor="end", weight="bold" if ours else "normal"),
        f'<rect x="{LABELS}" y="{y + 1:.1f}" width="{width:.1f}" height="{ROW - 6}" '
        f'fill="{OURS if ours else OTHERS}"/>',
        f'<path d="M{low:.1f} {middle:.1f}H{high:.1f}" stroke="{INK}" stroke-width="1.5"/>',
        _text(max(LABELS + width, high) + 6, y + 13, f"{us['median']:.0f}"),
    ]


def lines(results: Results) -> str:
    """Return how cost grows, both axes logarithmic: a line with slope 1 is linear growth."""
    kinds = results["growth"]["kinds"]
    left, top, right, bottom = 100, 20, 560, 360
    points = {
        kind["unit"]: [(float(size), float(time)) for size, time in kind["sizes"].items()]
        for kind in kinds.values()
    }
    xs = [math.log10(x) for series in points.values() for x, _ in series]
    ys = [math.log10(y) for series in points.values() for _, y in series]
    decades_x = range(math.floor(min(xs)), math.ceil(max(xs)) + 1)
    decades_y = range(math.floor(min(ys)), math.ceil(max(ys)) + 1)

    def at(x: float, y: float) -> tuple[float, float]:
        across = (math.log10(x) - decades_x[0]) / (decades_x[-1] - decades_x[0])
        up = (math.log10(y) - decades_y[0]) / (decades_y[-1] - decades_y[0])
        return left + across * (right - left), bottom - up * (bottom - top)

    parts = []
    for decade in decades_x:
        x, _ = at(10.0**decade, 10.0 ** decades_y[0])
        parts.append(f'<path d="M{x:.1f} {top}V{bottom}" stroke="{FAINT}"/>')
        parts.append(_text(x, bottom + 18, f"{10**decade:,}", anchor="middle"))
    for decade in decades_y:
        _, y = at(10.0 ** decades_x[0], 10.0**decade)
        parts.append(f'<path d="M{left} {y:.1f}H{right}" stroke="{FAINT}"/>')
        parts.append(_text(left - 8, y + 4, f"{10.0**decade:,.0f} µs", anchor="end"))
    for number, (name, series) in enumerate(points.items()):
        colour = COLOURS[number % len(COLOURS)]
        placed = [at(x, y) for x, y in series]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in placed]
        y = top + 14 + 34 * number
        parts.append(f'<rect x="{right + 20}" y="{y - 9}" width="10" height="10" fill="{colour}"/>')
        first, _, rest = name.partition(", ") if len(name) > 34 else (name, "", "")
        parts.append(_text(right + 36, y, first))
        if rest:
            parts.append(_text(right + 36, y + 14, rest))
    return _drawing(bottom + 34, parts, "How the time for a request grows")
