"""What the command line prints: text made harmless, tables, colours where there is a terminal."""

from __future__ import annotations

import os
import shutil
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, TextIO

COLOURS: Final = {"red": 31, "green": 32, "yellow": 33, "cyan": 36, "dim": 2, "bold": 1}

# Joiners are part of emoji and of several scripts, and move nothing.
_HARMLESS: Final = "\u200c\u200d"
_SPACES: Final = {"\u00a0": " ", "\u202f": " ", "\u3000": "  "}
_NAMED: Final = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


def safe(text: str) -> str:
    """Return traced text as one line in which nothing acts upon a terminal.

    Control characters, escape sequences, marks that reverse the direction of text and what else is not printable
    are written as escapes (`\\x1b`): who sends requests must not be able to rewrite an operator's screen.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in _HARMLESS else _escaped(c) for c in text)


def safe_lines(text: str) -> list[str]:
    """Return the lines of a traced text, each made harmless."""
    return [safe(line.expandtabs(4)) for line in text.split("\n")]


def _escaped(character: str) -> str:
    if character in _SPACES:
        return _SPACES[character]
    code = ord(character)
    return _NAMED.get(character) or (f"\\x{code:02x}" if code < 0x100 else f"\\u{{{code:x}}}")


def width(text: str) -> int:
    """Return how many cells a text takes on a terminal."""
    if text.isascii():
        return len(text)
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.combining(c) > 0 or c in _HARMLESS for c in text)


def cut(text: str, cells: int) -> str:
    """Return the text, or what of it fits with an ellipsis behind it."""
    if width(text) <= cells:
        return text
    kept = text[: max(cells - 1, 0)]
    while kept and width(kept) > cells - 1:
        kept = kept[:-1]
    return kept + "…"


@dataclass(frozen=True)
class Screen:
    """Where output goes.

    Attributes:
        columns: Its width; None where lines may have any length (a pipe, a file).
        colour: Whether to use colours.
        unicode: Whether it can show the lines of a tree.
    """

    columns: int | None = None
    colour: bool = False
    unicode: bool = True

    def paint(self, text: str, *styles: str) -> str:
        """Return the text in these styles, names of `COLOURS`."""
        codes = [str(COLOURS[style]) for style in styles if style]
        return f"\x1b[{';'.join(codes)}m{text}\x1b[0m" if self.colour and codes and text else text

    def fit(self, text: str, used: int = 0) -> str:
        """Return what of a text fits into a line in which so many cells are taken."""
        return text if self.columns is None else cut(text, max(self.columns - used, 10))


def screen_of(stream: TextIO | None = None) -> Screen:
    """Return what is known about a stream: colours are for terminals, unless NO_COLOR is set (no-color.org)."""
    stream = sys.stdout if stream is None else stream
    terminal = stream.isatty()
    plain = bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"
    encoding = (getattr(stream, "encoding", None) or "ascii").lower().replace("-", "")
    columns = shutil.get_terminal_size().columns if terminal else None
    return Screen(columns, terminal and not plain, encoding.startswith("utf"))


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        right: Numbers stand to the right.
        least: Cells that it keeps when the terminal is narrow; 0 for all.
        weight: Columns of a higher weight are made narrower first.
        spare: Left out where that is not enough, those of a higher number first; 0 never.
    """

    title: str
    right: bool = False
    least: int = 0
    weight: int = 0
    spare: int = 0


def table(
    screen: Screen, columns: Sequence[Column], rows: Iterable[Sequence[str]], styles: Sequence[Sequence[str]] = ()
) -> list[str]:
    """Return the lines of a table, cut to the terminal's width; columns without any value are left out.

    Args:
        styles: For each row the styles of its cells, in order.
    """
    cells = [[safe(cell) for cell in row] for row in rows]
    shown = [index for index, _ in enumerate(columns) if any(row[index] for row in cells)]
    full = {index: max(width(columns[index].title), *(width(row[index]) for row in cells)) for index in shown}
    widths = _narrowed(screen, columns, full)
    lines = [_line(screen, columns, widths, [column.title for column in columns], ["dim"] * len(columns))]
    for number, row in enumerate(cells):
        lines.append(_line(screen, columns, widths, row, styles[number] if styles else ()))
    return lines


def _narrowed(screen: Screen, columns: Sequence[Column], full: dict[int, int]) -> dict[int, int]:
    """Return the widths of the columns that fit, in which those that can spare cells have given some."""
    if screen.columns is None:
        return full
    widths = dict(full)
    excess = sum(widths.values()) + 2 * (len(widths) - 1) - screen.columns
    for index in sorted(widths, key=lambda index: -columns[index].weight):
        least = columns[index].least
        if excess > 0 and least and widths[index] > least:
            taken = min(excess, widths[index] - least)
            widths[index] -= taken
            excess -= taken
    least_needed = max(full, key=lambda index: columns[index].spare)
    if excess > 0 and columns[least_needed].spare:
        return _narrowed(screen, columns, {index: cells for index, cells in full.items() if index != least_needed})
    return widths


def _line(
    screen: Screen, columns: Sequence[Column], widths: dict[int, int], row: Sequence[str], styles: Sequence[str]
) -> str:
    parts = []
    for index, cells in widths.items():
        text = cut(row[index], cells)
        blank = " " * (cells - width(text))
        painted = screen.paint(text, styles[index]) if styles and styles[index] else text
        parts.append(blank + painted if columns[index].right else painted + blank)
    return "  ".join(parts).rstrip()
