"""Settings are checked where they are given, and the message says which one and what it allows."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
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


async def a_coroutine(scope: Any) -> Any:
    """Answers when it is awaited."""
    return True


async def an_async_generator(scope: Any) -> Any:
    """Answers when it is iterated."""
    yield True


class AsyncCall:
    """Called like a coroutine function."""

    async def __call__(self, scope: Any) -> Any:
        """Answer when it is awaited."""
        return True


@pytest.mark.parametrize("value", [a_coroutine, an_async_generator, AsyncCall(), functools.partial(a_coroutine)])
@pytest.mark.parametrize("name", ["trust_traceparent", "user", "span_processors"])
def test_callables_that_are_async(name: str, value: Any) -> None:
    """Nobody awaits what they return, and a coroutine counts as true: they are refused, with what to do."""
    with pytest.raises(SettingError, match=f"setting {name}=.*must not be async.*use a plain `def`"):
        Settings().override({name: [value] if name == "span_processors" else value})


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("destination", "otlp+http://", "and a host"),
        ("destination", "mlflow+http://", "and a host"),
        ("destination", "mlflow+http://host:99999", "Port out of range"),
        ("destination", "mlflow+http://host:x", "Port could not be"),
        ("destination", "otlp+http://host:0", "no such host or port"),
        ("destination", "mlflow+http://host?experimnt=a", "unknown option 'experimnt'; did you mean 'experiment'"),
        ("destination", "mlflw+http://host", "did you mean 'mlflow[+]http://'"),
        ("destination", "otlp+grpc://host", "did you mean 'otlp[+]http://'"),
        ("destination", "sqllite:///x.db", "did you mean 'sqlite:///'"),
        ("destination", "console", "did you mean 'console:'"),
        ("destination", "console:x", "did you mean 'console:'"),
        ("destination", "http://host:5000", "mlflow[+]http://... for an MLflow server"),
        ("destination", "x.db", "a file is written sqlite:///x.db"),
        ("destination", "sqlite://x.db", "three slashes"),
        ("store", "mlflow+http://host", "that is a destination"),
        ("store", "console:", "that is a destination"),
        ("store", "http://host", "a store must be sqlite:///"),
        ("store", "sqlite:x.db", "did you mean 'sqlite:///'"),
    ],
)
def test_urls_that_are_not_allowed(name: str, value: str, said: str) -> None:
    """A wrong URL is refused where it is given, with what was probably meant; no store is made of its text."""
    with pytest.raises(SettingError, match=said) as caught:
        Settings().override({name: value})
    assert f"setting {name}" in str(caught.value) and value in str(caught.value)
    with pytest.raises(SettingError, match=said) as caught:
        from_environment({variable(name): value})
    assert variable(name) in str(caught.value) and value in str(caught.value)


@pytest.mark.parametrize("value", ["mlflw+http://me:secret@h", "mlflow+http://me:secret@h?x=1"])
def test_a_refused_url_hides_its_password(value: str) -> None:
    """What is logged about a wrong URL holds no secret."""
    for name in ("destination", "store"):
        with pytest.raises(SettingError, match=r"me:\*\*\*@h") as caught:
            Settings().override({name: value})
        assert "secret" not in str(caught.value)


@pytest.mark.parametrize("value", ["traces.db", "./x", "C:\\x.db", "a b.db", "/var/x.db"])
def test_paths_are_stores(value: str) -> None:
    """Whatever does not look like a URL is a path."""
    assert Settings().override({"store": value}).store == f"sqlite:///{value}"


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


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("sample_rate", "a number"),
        ("keep_errors", "true or false"),
        ("keep_slower_than", "a number of seconds"),
        ("max_age", "a number of seconds"),
        ("max_size", "a number of bytes"),
        ("exclude", "must start with"),
        ("trust_traceparent", "networks like"),
        ("destination", "a URL that starts with"),
    ],
)
def test_environment_variables_that_are_not_allowed(name: str, said: str) -> None:
    """The message names the variable and what it may be, in words of ours."""
    with pytest.raises(SettingError, match=rf"{variable(name)}='\?!' is not allowed: .*{said}"):
        from_environment({variable(name): "?!"})


def test_a_wrong_variable_is_one_line() -> None:
    """Wherever a wrong variable is met, the application goes on; it is said once, in one line."""
    code = (
        "import tracemw\n"
        "traced = tracemw.trace(lambda: 1)\n"
        "for _ in range(3):\n"
        "    with tracemw.start_span('x'): assert traced() == 1\n"
        "assert sum(tracemw.stats()['failures'].values()) > 3\n"
    )
    env = {**os.environ, "TRACEMW_SAMPLE_RATE": "high"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=env)
    assert done.returncode == 0
    assert done.stderr == "tracing is off: TRACEMW_SAMPLE_RATE='high' is not allowed: it must be a number\n"


@given(st.sampled_from(sorted(_CHECKS)), st.none() | st.booleans() | st.integers() | st.floats() | st.text())
def test_any_value_is_taken_or_refused(name: str, value: Any) -> None:
    """Whatever is given: the settings take it, or say why not; nothing else is raised."""
    try:
        Settings().override({name: value})
    except SettingError as exc:
        assert name in str(exc)
