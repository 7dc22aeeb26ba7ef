"""What is shipped: wheel, sdist and editable install hold the same package, and it runs on its own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib.metadata import entry_points, metadata, requires
from pathlib import Path

import pytest

import tracemw
from tests import servers
from tests.servers import ROOT, clean_environment

ADAPTERS = {"starlette.py", "fastapi.py", "flask.py", "werkzeug.py", "__init__.py"}
EXTRAS = {"starlette", "fastapi", "werkzeug", "flask", "otlp", "mlflow", "all", "demo", "dev"}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The sdist, the wheel made from it, and the wheel made from the checkout."""
    if not (ROOT / "pyproject.toml").exists():
        pytest.skip("needs a checkout")
    out = tmp_path_factory.mktemp("built")
    build("--outdir", str(out / "via-sdist"))
    build("--wheel", "--outdir", str(out / "direct"))
    return {
        "sdist": next((out / "via-sdist").glob("*.tar.gz")),
        "wheel of the sdist": next((out / "via-sdist").glob("*.whl")),
        "wheel": next((out / "direct").glob("*.whl")),
    }


def test_both_wheels_hold_the_whole_package(built: dict[str, Path]) -> None:
    """A wheel holds every module of the package, the adapters as `tracemw.adapters`, and nothing else."""
    package = Path(tracemw.__file__).parent
    expected = {
        f"tracemw/{path.relative_to(package).as_posix()}"
        for path in [*package.rglob("*.py"), *(package / "adapters").glob("*.py"), package / "py.typed"]
    }
    for kind in ("wheel", "wheel of the sdist"):
        names = {name for name in zipfile.ZipFile(built[kind]).namelist() if ".dist-info/" not in name}
        assert {name for name in names if name.endswith((".py", ".typed"))} == expected, kind
        assert all(name.startswith("tracemw/") for name in names), kind
        assert {Path(name).name for name in names if name.startswith("tracemw/adapters/")} >= ADAPTERS, kind


def test_the_sdist_holds_ordinary_files(built: dict[str, Path]) -> None:
    """The link to the adapters becomes a folder with files: an sdist can be unpacked anywhere."""
    with tarfile.open(built["sdist"]) as sdist:
        members = {member.name.partition("/")[2]: member for member in sdist.getmembers()}
    assert all(members[f"tracemw/adapters/{name}"].isreg() for name in ADAPTERS)
    assert {"LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml"} <= set(members)


def test_this_environment_imports_the_adapters() -> None:
    """An editable install finds the adapters under the name that users import."""
    from tracemw.adapters import flask, starlette

    assert {flask.__name__, starlette.__name__} == {"tracemw.adapters.flask", "tracemw.adapters.starlette"}


def test_metadata_names_extras_and_entry_points() -> None:
    """The extras of the documentation exist; the command and the pytest plugin are registered."""
    assert set(metadata("tracemw").get_all("Provides-Extra") or []) == EXTRAS
    scripts = {point.name: point.value for point in entry_points(group="console_scripts")}
    plugins = {point.name: point.value for point in entry_points(group="pytest11")}
    assert scripts["tracemw"] == "tracemw.cli:main"
    assert plugins["tracemw"] == "tracemw.testing"
    base = [line for line in requires("tracemw") or [] if "extra ==" not in line]
    assert {line.partition(">")[0] for line in base} == {
        "opentelemetry-api",
        "opentelemetry-sdk",
        "contextvars-extras",
        "click",
        "lark",
        "regex",
    }


def test_the_wheel_runs_where_nothing_else_is(
    built: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a fresh environment: the bare package imports; with extras both example applications are traced."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    python = fresh_environment(tmp_path / "venv")
    install(python, str(built["wheel"]))
    check_bare_package(python, tmp_path)

    install(python, f"{built['wheel']}[fastapi,flask]", "uvicorn")
    shutil.copytree(ROOT / "example_apps", tmp_path / "site" / "example_apps")
    url = f"sqlite:///{tmp_path / 'traces.db'}"
    serve_chat(python, tmp_path / "site", url)
    call_shop(python, tmp_path / "site", url)

    command = [str(python.with_name("tracemw")), "search", "--json"]
    env = clean_environment({"TRACEMW_DESTINATION": url})
    found = json.loads(subprocess.run(command, env=env, capture_output=True, check=True, timeout=60).stdout)
    assert len(found["traces"]) == 2


def check_bare_package(python: Path, elsewhere: Path) -> None:
    """Without extras the package imports from its own site-packages, and its command answers."""
    code = "import tracemw; from tracemw import *; print(tracemw.__file__)"
    where = subprocess.run([python, "-c", code], cwd=elsewhere, capture_output=True, text=True, timeout=60)
    assert where.returncode == 0, where.stderr
    assert Path(where.stdout.strip()).is_relative_to(python.parent.parent)
    subprocess.run([python.with_name("tracemw"), "--help"], check=True, capture_output=True, timeout=60)


def serve_chat(python: Path, site: Path, url: str) -> None:
    """One request to the FastAPI example under uvicorn."""
    command = [str(python), "-m", "uvicorn", "example_apps.fastapi_chat.app:app", "--port", "0"]
    with servers.serve(command, cwd=site, env={"TRACEMW_DESTINATION": url}) as server:
        answer = server.post("/chat", {"question": "What is a span?"})
    assert answer.status == 200, answer.text


def call_shop(python: Path, site: Path, url: str) -> None:
    """One request to the Flask example, with Flask's own client."""
    code = "from example_apps.flask_shop.app import app; print(app.test_client().get('/orders/1007').status)"
    env = clean_environment({"TRACEMW_DESTINATION": url})
    done = subprocess.run([python, "-c", code], cwd=site, env=env, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "200 OK", done.stderr


def fresh_environment(folder: Path) -> Path:
    """A virtual environment that sees nothing of this one; returns its interpreter."""
    venv.create(folder, with_pip=False, symlinks=True)
    return folder / "bin" / "python"


def install(python: Path, *what: str) -> None:
    """Install with this environment's pip, which is faster than giving each environment its own."""
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", *what]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr


def build(*options: str) -> None:
    """Build from the checkout with the installed hatchling."""
    command = [sys.executable, "-m", "build", "--no-isolation", *options, str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=clean_environment())
    assert done.returncode == 0, done.stdout + done.stderr
