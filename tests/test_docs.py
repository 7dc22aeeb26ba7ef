"""The documentation says what the code does."""

from __future__ import annotations

import dataclasses
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import servers
from tests.servers import ROOT, clean_environment
from tracemw import settings
from tracemw.settings import Settings

ROW = re.compile(r"^\| `(\w+)` \| (?:`([\w<>]+)`|–) \| `(.+?)` \| \S", re.MULTILINE)
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("example_apps/*/*.md")]


def documented() -> dict[str, tuple[str | None, str]]:
    """Variable and default of each setting, as the settings page has them."""
    page = (ROOT / "docs/settings.md").read_text()
    return {name: (variable or None, default) for name, variable, default in ROW.findall(page)}


def shown(value: Any) -> str:
    """A default as the settings page writes it."""
    if isinstance(value, tuple):
        return ", ".join(value) or "[]"
    return value if isinstance(value, str) else str(value)


def test_every_setting_is_documented() -> None:
    """The settings page has a row for each setting, with its variable and its default; and no other row."""
    defaults = Settings()
    expected = {}
    for field in dataclasses.fields(Settings):
        variable = settings.variable(field.name) if field.name in settings._FROM_TEXT else None
        if field.name == "metadata":
            variable = f"{settings.METADATA_PREFIX}<KEY>"
        expected[field.name] = (variable, shown(getattr(defaults, field.name)))
    assert documented() == expected


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    """A link to a file of the repository has its file."""
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text())
    assert [target for target in targets if not (path.parent / target).exists()] == []


def test_the_tutorial_runs(tmp_path: Path) -> None:
    """Whoever types what the tutorial says gets what it says: requests, searches, the script, the test."""
    page = (ROOT / "docs/tutorial.md").read_text()
    for block in re.findall(r"```python\n(.+?)```", page, re.DOTALL):
        (tmp_path / block.split(maxsplit=2)[1]).write_text(block)
    typed = [shlex.split(line) for line in re.findall(r"^\$ (.+)$", page, re.MULTILINE)]

    with servers.uvicorn("hello:app", cwd=tmp_path, env={"APP_VERSION": "1.4.0"}) as server:
        statuses = [curl(server, words) for words in typed if words[0] == "curl"]
    assert statuses == [200, 500]
    searches = [run_typed([*words, "--json"], tmp_path) for words in typed if words[:2] == ["tracemw", "search"]]
    assert [text.count("req-abc-12") > 0 for text in searches] == [True] * 4
    tree = run_typed(next(words for words in typed if words[:2] == ["tracemw", "show"]), tmp_path)
    assert all(name in tree for name in ("GET /greet/{name}", "greet", "compose", "look_up"))
    assert "1.4.0" in run_typed(["tracemw", "compare", "--by", "version"], tmp_path)
    assert run_typed([sys.executable, "look.py"], tmp_path).startswith("req-abc-124 1.4.0\n")
    run_typed([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "test_hello.py"], tmp_path)


def curl(server: servers.Server, words: list[str]) -> int:
    """Send the request that a `curl` line describes; returns the status."""
    path = re.sub(r"^http://[^/]+", "", next(word for word in words if word.startswith("http")))
    headers = [words[at + 1].split(": ") for at, word in enumerate(words) if word == "-H"]
    return server.get(path, [(name, value) for name, value in headers]).status


def run_typed(words: list[str], folder: Path) -> str:
    """Output of a command that was typed in the tutorial's folder; it must succeed."""
    if words[0] == "tracemw":
        words = [str(Path(sys.executable).with_name("tracemw")), *words[1:]]
    done = subprocess.run(words, cwd=folder, env=clean_environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
