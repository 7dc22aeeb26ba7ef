"""Destination URLs: what they mean, and what is wrong with them."""

from __future__ import annotations

import pytest

from tracemw.errors import SettingError
from tracemw.pipeline.target import Target, masked, parse


@pytest.mark.parametrize(
    ("destination", "target"),
    [
        ("otlp+http://host:4318", Target("otlp", "http://host:4318")),
        ("otlp+https://host/prefix/", Target("otlp", "https://host/prefix")),
        (
            "mlflow+http://host:5000?experiment=a%20b",
            Target("mlflow", "http://host:5000", options={"experiment": "a b"}),
        ),
        (
            "mlflow+https://me:p%40ss@host/x?fidelity=fast",
            Target("mlflow", "https://host/x", "me", "p@ss", {"fidelity": "fast"}),
        ),
        ("mlflow+http://[::1]:5000", Target("mlflow", "http://[::1]:5000")),
    ],
)
def test_what_a_url_means(destination: str, target: Target) -> None:
    """Kind, base URL, credentials and options are told apart."""
    assert parse(destination) == target


@pytest.mark.parametrize(
    ("destination", "message"),
    [
        ("mlflow+http://host?experimnt=x", "unknown option .experimnt.; did you mean .experiment."),
        ("mlflow+http://host?zzz=x", "unknown option .zzz.; known are: experiment, fidelity"),
        ("mlflow+http://host?fidelity=best", "fidelity must be full or fast"),
        ("mlflow+http://host?experiment=", "experiment must be a name, or be left out"),
        ("otlp+http://host?experiment=x", "this destination has none"),
        ("otlp+http://", "and a host"),
        ("otlp+grpc://host", "begins with"),
        ("mlflow+http://host:port", "Port"),
        ("jaeger+http://host", "not allowed"),
    ],
)
def test_what_is_wrong_is_said(destination: str, message: str) -> None:
    """The message names the part and what it may be."""
    with pytest.raises(SettingError, match=message):
        parse(destination)


def test_passwords_are_never_shown() -> None:
    """Neither in messages nor in what is printed of a target."""
    assert masked("mlflow+http://me:secret@host/p?x=1") == "mlflow+http://me:***@host/p?x=1"
    assert masked("otlp+http://host:4318") == "otlp+http://host:4318"
    assert "secret" not in repr(parse("mlflow+http://me:secret@host"))
    with pytest.raises(SettingError) as caught:
        parse("mlflow+http://me:secret@host?x=1")
    assert "secret" not in str(caught.value)
