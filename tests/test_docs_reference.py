"""The examples of the reference pages run, in the order of the page, and what they assert is so."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.servers import ROOT, clean_environment

PAGES = ["tracing-api", "requests", "threads", "searching", "store", "testing"]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"# (\w+\.py)\n")  # such a block is a file of its own
NEEDS = re.compile(r"^# needs (\w+)", re.MULTILINE)

# What frameworks use and others call deprecated: Starlette's test client of httpx (newest) and anyio (0.37); Flask
# and Werkzeug 2.3 of Python 3.12 and newer.
THEIR_OWN = ["Using `httpx`", "The anyio.abc.BlockingPortal alias", "'pkgutil.", "ast.Str is", "Attribute s is"]
THEIR_OWN += ["Constant.__init__ "]


def script(page: str) -> tuple[str, dict[str, str]]:
    """Return the page's blocks as one script whose lines have the page's numbers, and the files it shows."""
    lines = [""] * page.count("\n")
    files: dict[str, str] = {}
    for block in BLOCK.finditer(page):
        code = block[1]
        named, needed = FILE.match(code), NEEDS.search(code)
        if named:
            files[named[1]] = code
        elif not needed or find_spec(needed[1]):
            first = page.count("\n", 0, block.start(1))
            lines[first : first + code.count("\n")] = code.splitlines()
    return "\n".join(lines), files


@pytest.mark.parametrize("name", PAGES)
def test_examples_run(name: str, tmp_path: Path) -> None:
    """Python blocks run without a warning, files that are tests pass, commands find what was traced."""
    page = (ROOT / f"docs/{name}.md").read_text()
    code, files = script(page)
    for file, content in files.items():
        (tmp_path / file).write_text(content)
    (tmp_path / "page.py").write_text(code)
    run([sys.executable, "-W", "error", *(f"-Wignore:{message}" for message in THEIR_OWN), "page.py"], tmp_path)
    tests = sorted(file for file in files if file.startswith("test_"))
    if tests:
        run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests], tmp_path)
    for line in re.findall(r"^\$ (tracemw .+)$", page, re.MULTILINE):
        words = shlex.split(line, comments=True)
        run([str(Path(sys.executable).with_name("tracemw")), *words[1:]], tmp_path)


def run(words: list[str], folder: Path) -> None:
    """Run a command; it must succeed."""
    done = subprocess.run(words, cwd=folder, env=clean_environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{words}\n{done.stdout}{done.stderr}"
