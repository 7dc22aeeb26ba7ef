"""What every test may rely on: nothing of the machine's environment, a working directory of its own."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from tests.servers import clean_environment

# Examples follow from the test's code alone: a run can be repeated. HYPOTHESIS_PROFILE=search looks further.
hypothesis.settings.register_profile("default", derandomize=True, deadline=None)
hypothesis.settings.register_profile("search", derandomize=False, deadline=None, max_examples=2000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


# What is started in the background has Ctrl-C ignored, and hands that on to what it starts. Tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tracing and platform variables of the machine are gone, for the tests and for what they start.

    The working directory is not the repository, for fixtures and threads that outlast a test.
    """
    kept = clean_environment()
    for name in set(os.environ) - set(kept):
        del os.environ[name]
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("outside"))
    yield
    os.chdir(before)


@pytest.fixture(autouse=True)
def _working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A default store (`./tracemw.db`) ends up in the test's own folder."""
    monkeypatch.chdir(tmp_path)
