"""The documentation says what the code does."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest

from tests.servers import ROOT
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
def test_links_lead_somewhere(path: Any) -> None:
    """A link to a file of the repository has its file."""
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text())
    assert [target for target in targets if not (path.parent / target).exists()] == []
