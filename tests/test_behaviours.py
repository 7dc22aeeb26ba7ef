"""The page of behaviours names tests that exist, in rows that are complete."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
PAGE = TESTS.parent / "docs" / "behaviours.md"
ROW = re.compile(r"^\| (\d+) \| (.+?) \| (.+?) \| (.+?) \|$", re.MULTILINE)
TEST = re.compile(r"`([\w/]+\.py)::((?:\w+::)?\w+)`")
ROWS = ROW.findall(PAGE.read_text())


@functools.cache
def names_in(path: str) -> set[str]:
    """Names of the tests in a file as pytest has them: of those in a class, with the class."""
    tree = ast.parse((TESTS / path).read_text())
    found = set(direct_tests(tree.body))
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name.startswith("Test"):
            found.update(f"{node.name}::{name}" for name in direct_tests(node.body))
    return found


def direct_tests(body: list[ast.stmt]) -> Iterator[str]:
    """Names of the tests that stand directly in a file or class."""
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name.startswith("test_"):
            yield node.name


def test_every_behaviour_has_its_row() -> None:
    """One row for each, in order."""
    assert [int(number) for number, *_ in ROWS] == list(range(1, 71))
    assert len({what for _, what, _, _ in ROWS}) == len(ROWS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_the_tests_that_hold_it_exist(row: tuple[str, str, str, str]) -> None:
    """Each row names a test at least, and nothing but tests."""
    named = TEST.findall(row[3])
    assert ", ".join(f"`{path}::{name}`" for path, name in named) == row[3]
    missing = [f"{path}::{name}" for path, name in named if name not in names_in(path)]
    assert named and missing == []
