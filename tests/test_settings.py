"""Settings are checked where they are given, and the message says which one and what it allows."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracemw.errors import SettingError
from tracemw.settings import _CHECKS, Settings, from_environment, variable


def test_unknown_names_are_refused_with_the_nearest_one() -> None:
    """A typo fails at once and is told what was probably meant."""
    with pytest.raises(SettingError, match="did you mean 'sample_rate'"):
        Settings().override({"sampel_rate": 0.1})
    with pytest.raises(SettingError, match="known are: .*sample_rate"):
        Settings().override({"zzz": 1})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("destination", "postgres://x"),
        ("destination", 5),
        ("destination", "sqlite:///"),
        ("store", ""),
        ("sample_rate", 1.5),
        ("sample_rate", True),
        ("sample_rate", float("nan")),
        ("keep_errors", "yes"),
        ("keep_slower_than", 0),
        ("exclude", "/health"),
        ("exclude", ["health"]),
        ("request_id_header", "X Request"),
        ("request_id_header", ["X-Ok", "é"]),
        ("user", "jane"),
        ("trust_traceparent", ["10.0.0.0/99"]),
        ("span_processors", [1]),
        ("metadata", ["a"]),
        ("max_age", -1),
        ("max_size", "big"),
    ],
)
def test_values_that_are_not_allowed(name: str, value: Any) -> None:
    """The message names the setting."""
    with pytest.raises(SettingError, match=f"setting {name}="):
        Settings().override({name: value})


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("destination", "none:", "none:"),
        ("store", "traces.db", "sqlite:///traces.db"),
        ("sample_rate", "0.25", 0.25),
        ("keep_errors", "yes", True),
        ("exclude", "/a, /b/*", ("/a", "/b/*")),
        ("request_id_header", "X-A, X-B", ("X-A", "X-B")),
        ("user_id_header", "none", None),
        ("trust_traceparent", "10.0.0.0/8,::1", ("10.0.0.0/8", "::1")),
        ("trust_traceparent", "true", True),
        ("max_size", "1000", 1000),
    ],
)
def test_environment_variables(name: str, text: str, value: Any) -> None:
    """Every variable is read once, as text, into what its setting allows."""
    assert getattr(from_environment({variable(name): text}), name) == value
    assert getattr(from_environment({variable(name): "  "}), name) == getattr(Settings(), name)


@pytest.mark.parametrize("name", ["sample_rate", "keep_errors", "max_age", "exclude", "destination"])
def test_environment_variables_that_are_not_allowed(name: str) -> None:
    """The message names the variable, or the setting it stands for."""
    with pytest.raises(SettingError, match=f"{variable(name)}|setting {name}"):
        from_environment({variable(name): "?!"})


@given(st.sampled_from(sorted(_CHECKS)), st.none() | st.booleans() | st.integers() | st.floats() | st.text())
def test_any_value_is_taken_or_refused(name: str, value: Any) -> None:
    """Whatever is given: the settings take it, or say why not; nothing else is raised."""
    try:
        Settings().override({name: value})
    except SettingError as exc:
        assert name in str(exc)
