"""Process metadata: which variables say what, which application this is, which commit it comes from."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.resources import Resource

from tests import servers
from tracemw import source
from tracemw.environment import process_metadata, resource_attributes
from tracemw.source import Repository, repository, without_credentials

FOUR = ("environment", "app_version", "deployment_id", "region")
needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


def found(environ: dict[str, str], **options: Any) -> dict[str, str]:
    """The metadata that variables and options give, without what is known about the source."""
    known = process_metadata(environ, **options)
    return {key: value for key, value in known.items() if not key.startswith("mlflow.source")}


class TestVariables:
    def test_what_is_unset_adds_nothing(self) -> None:
        """No variable, no key: values are never made up; an empty variable counts as unset."""
        assert found({}) == {}
        assert found({"APP_ENVIRONMENT": "", "REGION": "", "OTEL_RESOURCE_ATTRIBUTES": ""}) == {}

    def test_the_four_variables(self) -> None:
        """Environment, version, deployment and region come from their variables."""
        environ = {
            "APP_ENVIRONMENT": "production",
            "APP_VERSION": "1.4.2",
            "DEPLOYMENT_ID": "deploy-7",
            "REGION": "eu-west-1",
        }
        assert found(environ) == dict(zip(FOUR, environ.values(), strict=True))

    def test_the_environment_is_the_source_type_too(self) -> None:
        """MLflow's guide stores APP_ENVIRONMENT as `mlflow.source.type`; without one it is LOCAL, as in MLflow."""
        assert process_metadata({"APP_ENVIRONMENT": "staging"})["mlflow.source.type"] == "staging"
        assert process_metadata({})["mlflow.source.type"] == "LOCAL"

    def test_the_active_model(self) -> None:
        """MLFLOW_ACTIVE_MODEL_ID, or the name that older MLflow wrote, is the model of every trace."""
        both = {"MLFLOW_ACTIVE_MODEL_ID": "m-1", "_MLFLOW_ACTIVE_MODEL_ID": "m-0"}
        assert found(both) == {"mlflow.modelId": "m-1"}
        assert found({"_MLFLOW_ACTIVE_MODEL_ID": "m-0"}) == {"mlflow.modelId": "m-0"}

    def test_prefixed_variables(self) -> None:
        """TRACEMW_METADATA_<KEY> adds the key in lower case; the bare prefix is nothing."""
        assert found({"TRACEMW_METADATA_TEAM": "search", "TRACEMW_METADATA_": "x"}) == {"team": "search"}

    def test_named_variables(self) -> None:
        """`metadata_env` names variables by key, or as a list whose keys are the names in lower case."""
        environ = {"CI_BUILD": "77"}
        assert found(environ, metadata_env={"build": "CI_BUILD", "gone": "UNSET"}) == {"build": "77"}
        assert found(environ, metadata_env=["CI_BUILD", "UNSET"]) == {"ci_build": "77"}

    def test_opentelemetry_variables_fill_in(self) -> None:
        """OTEL_RESOURCE_ATTRIBUTES and OTEL_SERVICE_NAME say what our own variables do not; %XX is decoded."""
        attributes = (
            "service.version=2.0, deployment.environment=old,deployment.environment.name=pr%C3%B6d,"
            "cloud.region=eu%2Cx,service.name=in-attributes,odd,=,vcs.ref.head.revision=abc"
        )
        known = process_metadata({"OTEL_RESOURCE_ATTRIBUTES": attributes, "REGION": "here"})
        assert [known[key] for key in ("app_version", "environment", "region")] == ["2.0", "pröd", "here"]
        assert known["service_name"] == "in-attributes"
        assert known["mlflow.source.git.commit"] == "abc"
        both = {"OTEL_RESOURCE_ATTRIBUTES": attributes, "OTEL_SERVICE_NAME": "shop"}
        assert found(both)["service_name"] == "shop"

    def test_precedence(self) -> None:
        """Code before named, prefixed, own, OpenTelemetry's and the platform's variables."""
        environ = {
            "FLY_REGION": "fra",
            "OTEL_RESOURCE_ATTRIBUTES": "cloud.region=otel",
            "REGION": "own",
            "TRACEMW_METADATA_REGION": "prefixed",
            "MINE": "named",
        }
        seen = [found(environ, metadata={"region": "code"}, metadata_env={"region": "MINE"})["region"]]
        seen.append(found(environ, metadata_env={"region": "MINE"})["region"])
        for name in ("TRACEMW_METADATA_REGION", "REGION", "OTEL_RESOURCE_ATTRIBUTES"):
            seen.append(found(environ)["region"])
            del environ[name]
        assert [*seen, found(environ)["region"]] == ["code", "named", "prefixed", "own", "otel", "fra"]

    def test_an_empty_value_from_code_removes_a_key(self) -> None:
        """`metadata={"region": ""}`: this process tells no region, whatever its variables say."""
        assert found({"REGION": "x"}, metadata={"region": ""}) == {}

    def test_other_values_are_stored_as_text(self) -> None:
        """Metadata is text: numbers given in code become text."""
        assert found({}, metadata={"shard": 3, "gone": None}) == {"shard": "3"}


PLATFORMS: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "kubernetes": (
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "HOSTNAME": "shop-web-7d4b9c6f5d-x2x9p"},
        {"deployment_id": "shop-web-7d4b9c6f5d"},
    ),
    "kubernetes, stateful": ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "HOSTNAME": "db-0"}, {}),
    "kubernetes, downward": (
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "POD_NAME": "db-0", "AWS_REGION": "eu-west-1"},
        {"deployment_id": "db-0", "region": "eu-west-1"},
    ),
    "no kubernetes": ({"POD_NAME": "db-0", "HOSTNAME": "web-7d4b9c6f5d-x2x9p"}, {}),
    "lambda": (
        {
            "AWS_REGION": "us-east-1",
            "AWS_LAMBDA_FUNCTION_NAME": "f",
            "AWS_LAMBDA_FUNCTION_VERSION": "12",
        },
        {"region": "us-east-1", "app_version": "12", "service_name": "f"},
    ),
    "lambda, unversioned": (
        {"AWS_LAMBDA_FUNCTION_NAME": "f", "AWS_LAMBDA_FUNCTION_VERSION": "$LATEST"},
        {"service_name": "f"},
    ),
    "storage of another maker": ({"AWS_REGION": "auto"}, {}),
    "cloud run": (
        {"K_SERVICE": "shop", "K_REVISION": "shop-00012-abc", "AWS_REGION": "us-east-1"},
        {"deployment_id": "shop-00012-abc", "service_name": "shop"},
    ),
    "app engine": (
        {"GAE_SERVICE": "default", "GAE_VERSION": "v3", "GAE_DEPLOYMENT_ID": "4411"},
        {"app_version": "v3", "deployment_id": "4411", "service_name": "default"},
    ),
    "azure app service": (
        {"WEBSITE_SITE_NAME": "shop", "REGION_NAME": "West Europe", "WEBSITE_SLOT_NAME": "staging"},
        {"region": "West Europe", "environment": "staging", "service_name": "shop"},
    ),
    "azure container apps": (
        {
            "CONTAINER_APP_NAME": "shop",
            "CONTAINER_APP_REVISION": "shop--20q",
            "CONTAINER_APP_ENV_DNS_SUFFIX": "ashyplant-12ab.westeurope.azurecontainerapps.io",
        },
        {"deployment_id": "shop--20q", "region": "westeurope", "service_name": "shop"},
    ),
    "fly": (
        {
            "FLY_REGION": "fra",
            "FLY_MACHINE_ID": "148e",
            "FLY_IMAGE_REF": "registry.fly.io/shop:deployment-01H9",
        },
        {"region": "fra", "deployment_id": "deployment-01H9"},
    ),
    "fly, no image": ({"FLY_REGION": "fra", "FLY_ALLOC_ID": "148e"}, {"region": "fra", "deployment_id": "148e"}),
    "render": (
        {"RENDER": "true", "RENDER_INSTANCE_ID": "srv-1-x", "RENDER_SERVICE_NAME": "shop"},
        {"deployment_id": "srv-1-x", "service_name": "shop"},
    ),
    "heroku": (
        {"DYNO": "web.1", "HEROKU_RELEASE_VERSION": "v42", "HEROKU_APP_NAME": "shop"},
        {"app_version": "v42", "deployment_id": "v42", "service_name": "shop"},
    ),
    "vercel, on lambda": (
        {
            "VERCEL": "1",
            "VERCEL_ENV": "preview",
            "VERCEL_REGION": "iad1",
            "VERCEL_DEPLOYMENT_ID": "dpl_1",
            "AWS_REGION": "us-east-1",
            "AWS_LAMBDA_FUNCTION_VERSION": "9",
        },
        {"environment": "preview", "region": "iad1", "deployment_id": "dpl_1"},
    ),
}


class TestPlatforms:
    @pytest.mark.parametrize("name", PLATFORMS)
    def test_platform_variables_fill_in(self, name: str) -> None:
        """Where ours are unset, the platform's own variables say what they can, and only that."""
        environ, expected = PLATFORMS[name]
        assert found(environ) == expected

    @pytest.mark.parametrize("name", PLATFORMS)
    def test_own_variables_win(self, name: str) -> None:
        """Our own four variables come before any platform's."""
        own = {"APP_ENVIRONMENT": "e", "APP_VERSION": "v", "DEPLOYMENT_ID": "d", "REGION": "r"}
        known = found({**PLATFORMS[name][0], **own})
        assert [known[key] for key in FOUR] == ["e", "v", "d", "r"]

    @pytest.mark.parametrize(
        ("environ", "commit", "branch"),
        [
            ({"DYNO": "web.1", "HEROKU_SLUG_COMMIT": "c0ffee"}, "c0ffee", None),
            ({"RENDER": "1", "RENDER_GIT_COMMIT": "c0ffee", "RENDER_GIT_BRANCH": "main"}, "c0ffee", "main"),
            ({"VERCEL": "1", "VERCEL_GIT_COMMIT_SHA": "c", "VERCEL_GIT_COMMIT_REF": "b"}, "c", "b"),
        ],
    )
    def test_the_commit_where_no_repository_is_deployed(
        self, environ: dict[str, str], commit: str, branch: str | None
    ) -> None:
        """Platforms that build from git and deploy without `.git` name the commit."""
        known = process_metadata(environ)
        assert known["mlflow.source.git.commit"] == commit
        assert known.get("mlflow.source.git.branch") == branch


class TestLimits:
    @given(st.dictionaries(st.text(min_size=1, max_size=20), st.text(max_size=50), max_size=5))
    def test_any_metadata_is_bounded_text(self, metadata: dict[str, str]) -> None:
        """Whatever is given: keys up to 250 characters, values up to 8,000, all of it encodable."""
        known = process_metadata({}, metadata={**metadata, "long": "x" * 9000, "k" * 251: "v"})
        assert len(known["long"]) == 8000
        assert all(len(key) <= 250 and len(value) <= 8000 for key, value in known.items())
        assert all(value.encode() for value in known.values())

    @given(
        st.dictionaries(
            st.sampled_from(["OTEL_RESOURCE_ATTRIBUTES", "APP_VERSION", "HOSTNAME", "KUBERNETES_SERVICE_HOST"]),
            st.text(st.characters(exclude_characters="\0"), max_size=60),
        )
    )
    def test_any_environment_is_read(self, environ: dict[str, str]) -> None:
        """No value of a variable makes it fail; bytes that are no UTF-8 arrive as surrogates and are replaced."""
        known = process_metadata({**environ, "REGION": "eu\udcff"})
        assert known["region"] == "eu?"
        assert all(value.encode() for value in known.values())

    def test_a_place_that_fails_costs_only_itself(self) -> None:
        """What cannot be read is left out; the rest is found."""

        class Odd:
            def __str__(self) -> str:
                raise RuntimeError

        assert found({"REGION": "r"}, metadata={"odd": Odd()}) == {"region": "r"}
        assert found({"REGION": "r"}, metadata_env=5) == {"region": "r"}


class TestResource:
    def test_semantic_conventions(self) -> None:
        """On a Resource, what the semantic conventions know has their name; the rest keeps its own."""
        metadata = {
            "environment": "prod",
            "app_version": "1",
            "deployment_id": "d",
            "region": "r",
            "service_name": "shop",
            "team": "search",
            "mlflow.source.git.commit": "c",
            "mlflow.source.name": "app:app",
        }
        expected = {
            "deployment.environment.name": "prod",
            "service.version": "1",
            "deployment.id": "d",
            "cloud.region": "r",
            "service.name": "shop",
            "tracemw.metadata.team": "search",
            "vcs.ref.head.revision": "c",
            "mlflow.source.name": "app:app",
        }
        attributes = resource_attributes(metadata)
        assert attributes == expected
        assert expected.items() <= dict(Resource.create(dict(attributes)).attributes).items()


# Repositories


def git(folder: Path, *arguments: str) -> str:
    """Run git, with nothing of the user's configuration."""
    env = {
        **os.environ,
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_NOSYSTEM": "1",
        **{f"GIT_{who}_{what}": "t@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
    }
    command = ["git", "-c", "init.defaultBranch=main", "-c", "protocol.file.allow=always", *arguments]
    run = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    """A repository made by git, with one commit on `main`."""
    folder = tmp_path / "repo"
    folder.mkdir()
    git(folder, "init", "-q")
    git(folder, "commit", "-q", "--allow-empty", "-m", "first")
    return folder


@needs_git
class TestRepository:
    def test_branch_and_commit(self, repo: Path) -> None:
        """From any folder of the working tree: the commit, the branch, no URL without a remote."""
        (repo / "a" / "b").mkdir(parents=True)
        head = git(repo, "rev-parse", "HEAD")
        assert repository(str(repo / "a" / "b")) == Repository(head, "main", None)

    def test_branch_with_slashes_and_packed_refs(self, repo: Path) -> None:
        """Refs that git has packed into one file are found, among others of similar names."""
        for branch in ("feature", "team/feature/x", "x"):
            git(repo, "branch", "other-" + branch)
        git(repo, "checkout", "-q", "-b", "feature/x")
        git(repo, "commit", "-q", "--allow-empty", "-m", "second")
        git(repo, "pack-refs", "--all")
        assert not (repo / ".git/refs/heads/feature/x").exists()
        assert repository(str(repo)) == Repository(git(repo, "rev-parse", "HEAD"), "feature/x")

    def test_detached_head(self, repo: Path) -> None:
        """A detached HEAD has a commit and no branch."""
        git(repo, "checkout", "-q", "--detach")
        assert repository(str(repo)) == Repository(git(repo, "rev-parse", "HEAD"), None)

    def test_no_commit_yet(self, tmp_path: Path) -> None:
        """A fresh repository has a branch and no commit."""
        git(tmp_path, "init", "-q")
        assert repository(str(tmp_path)) == Repository(None, "main")

    def test_worktree(self, repo: Path, tmp_path: Path) -> None:
        """A linked worktree has its own HEAD, and the refs and remotes of the main repository."""
        git(repo, "remote", "add", "origin", "https://example.org/shop.git")
        git(repo, "pack-refs", "--all")
        git(repo, "worktree", "add", "-q", "-b", "hotfix", "../tree")
        git(tmp_path / "tree", "commit", "-q", "--allow-empty", "-m", "fix")
        head = git(tmp_path / "tree", "rev-parse", "HEAD")
        assert head != git(repo, "rev-parse", "HEAD")
        assert repository(str(tmp_path / "tree")) == Repository(head, "hotfix", "https://example.org/shop.git")

    def test_submodule(self, repo: Path, tmp_path: Path) -> None:
        """Inside a submodule it is the submodule's commit that runs."""
        outer = tmp_path / "outer"
        outer.mkdir()
        git(outer, "init", "-q")
        git(outer, "submodule", "add", "-q", str(repo), "lib")
        assert repository(str(outer / "lib")).commit == git(repo, "rev-parse", "HEAD")

    def test_remotes(self, repo: Path) -> None:
        """The URL is that of `origin`, else of the first remote, without credentials."""
        git(repo, "remote", "add", "fork", "https://me:s3cret@example.org/fork.git")
        assert repository(str(repo)).url == "https://example.org/fork.git"
        git(repo, "remote", "add", "origin", "git@example.org:team/shop.git")
        git(repo, "config", "remote.fork.pushurl", "https://push.example.org")
        assert repository(str(repo)).url == "git@example.org:team/shop.git"

    def test_quoted_and_commented_configuration(self, repo: Path) -> None:
        """Comments and quotes of git's configuration file are read as git reads them."""
        config = repo / ".git/config"
        config.write_text(
            '[Remote "origin"] ; ours\n\t# url = https://wrong\n\tURL = "https://example.org/a#b" # c\n'
        )
        assert git(repo, "config", "remote.origin.url") == "https://example.org/a#b"
        assert repository(str(repo)).url == "https://example.org/a"

    def test_found_without_git(self, repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Neither git nor a subprocess is needed: it is found with an empty PATH and no way to start one."""
        head = git(repo, "rev-parse", "HEAD")
        monkeypatch.setenv("PATH", "")
        monkeypatch.setattr(subprocess, "Popen", None)
        monkeypatch.chdir(repo)
        assert process_metadata({})["mlflow.source.git.commit"] == head

    def test_the_application_s_repository_counts(
        self, repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The application's folder comes before the working directory; that one helps where it is in none."""
        script = repo / "serve.py"
        script.touch()
        monkeypatch.setattr(sys, "argv", [str(script)])
        monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
        monkeypatch.chdir(tmp_path)
        known = process_metadata({})
        assert known["mlflow.source.git.branch"] == "main"
        assert known["mlflow.source.name"] == str(script)
        monkeypatch.setattr(sys, "argv", [str(tmp_path / "elsewhere.py")])
        monkeypatch.chdir(repo)
        assert process_metadata({})["mlflow.source.git.branch"] == "main"


class TestBrokenRepository:
    @pytest.mark.parametrize(
        ("files", "expected"),
        [
            ({}, Repository()),
            ({"HEAD": b"a" * 40}, Repository("a" * 40)),
            ({"HEAD": b"a" * 64 + b"\n"}, Repository("a" * 64)),
            ({"HEAD": b"a" * 41}, Repository()),
            ({"HEAD": b"\xff\x00junk"}, Repository()),
            ({"HEAD": b"ref: refs/heads/.invalid"}, Repository()),
            ({"HEAD": b"ref: ../../secret", "../secret": b"b" * 40}, Repository()),
            ({"HEAD": b"ref: refs/heads/a", "refs/heads/a": b"ref: refs/heads/a"}, Repository(None, "a")),
            (
                {"HEAD": b"ref: refs/heads/a", "packed-refs": b"c" * 40 + b" refs/heads/a\n"},
                Repository("c" * 40, "a"),
            ),
            ({"HEAD": b"ref: refs/heads/a", "packed-refs": b" refs/heads/a\n"}, Repository(None, "a")),
            ({"HEAD": b"ref: refs/x", "config": b'[remote "origin"\nurl=x\n[remote "'}, Repository()),
            ({"HEAD": b"ref: refs/x", "commondir": b"/nowhere"}, Repository()),
        ],
    )
    def test_what_cannot_be_read_is_absent(
        self, tmp_path: Path, files: dict[str, bytes], expected: Repository
    ) -> None:
        """A damaged or strange `.git` gives what can be read of it, and never an error."""
        for name, content in files.items():
            path = tmp_path / ".git" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        assert repository(str(tmp_path)) == expected

    @pytest.mark.parametrize("content", [b"", b"gitdir: /nowhere", b"\xff", b"gitdir: ."])
    def test_a_git_file_that_leads_nowhere(self, tmp_path: Path, content: bytes) -> None:
        """A `.git` file whose repository is gone is no repository."""
        (tmp_path / ".git").write_bytes(content)
        assert repository(str(tmp_path)) == Repository()

    def test_no_folder(self) -> None:
        """A folder that does not exist lies in no repository."""
        assert not repository("/nowhere/at/all")


class TestCredentials:
    @pytest.mark.parametrize(
        ("url", "expected"),
        [
            ("https://github.com/o/r.git", "https://github.com/o/r.git"),
            ("https://user:token@github.com/o/r", "https://github.com/o/r"),
            ("https://ghp_token@github.com:8443/o/r", "https://github.com:8443/o/r"),
            ("https://a@b:c@host/o/r", "https://host/o/r"),
            ("https://host/o/r?private_token=x#y", "https://host/o/r"),
            ("https://user:pa/ss@host/o/r", None),
            ("https://pa/ss@host/o/r", None),
            ("https://[::1]:80/r", "https://[::1]:80/r"),
            ("ssh://git:pw@host:22/o/r", "ssh://git@host:22/o/r"),
            ("git+ssh://git@host/r", "git+ssh://git@host/r"),
            ("git@github.com:o/r.git", "git@github.com:o/r.git"),
            ("user:token@github.com/o/r", "github.com/o/r"),
            ("/srv/git/a@b/r", "/srv/git/a@b/r"),
            ("../r", "../r"),
            ("file:///srv/r", "file:///srv/r"),
        ],
    )
    def test_urls(self, url: str, expected: str | None) -> None:
        """Users, passwords and tokens are taken out; where it cannot be told, there is no URL at all."""
        assert without_credentials(url) == expected

    @given(
        st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1),
        st.sampled_from(["https://me:{}@host/r", "https://{}@host/r", "me:{}@host:o/r"]),
    )
    def test_no_secret_survives(self, noise: str, form: str) -> None:
        """Whatever characters a secret in the user part has, it is not in what is stored."""
        assert "SECRET" not in (without_credentials(form.format(f"SECRET{noise}SECRET")) or "")


# The application


def application(argv: list[str], monkeypatch: pytest.MonkeyPatch, env: dict[str, str] | None = None) -> str:
    monkeypatch.setattr(sys, "argv", argv)
    return source.application(env or {})[0]


class TestApplication:
    @pytest.mark.parametrize(
        ("command", "expected"),
        [
            ("/venv/bin/uvicorn shop.web:app", "shop.web:app"),
            ("/venv/bin/uvicorn --host 0.0.0.0 --port 80 shop.web:app --reload", "shop.web:app"),
            ("uvicorn --header Server:none shop.web:make --factory", "shop.web:make"),
            ("uvicorn --header=Server:none shop:app", "shop:app"),
            ("/x/uvicorn/__main__.py shop:app.inner", "shop:app.inner"),
            (r"C:\venv\Scripts\uvicorn.exe shop:app", "shop:app"),
            ("/venv/bin/gunicorn -w 4 -k uvicorn.workers.UvicornWorker shop:app", "shop:app"),
            ("gunicorn shop.wsgi --bind 0.0.0.0:80 -w4", "shop.wsgi"),
            ("gunicorn shop:create_app('x')", "shop:create_app('x')"),
            ("gunicorn -b localhost:80 --preload email.message", "email.message"),
            ("hypercorn -b 127.0.0.1:80 shop:app", "shop:app"),
            ("daphne -b 0.0.0.0 -p 80 shop.asgi:application", "shop.asgi:application"),
            ("granian --interface asgi shop:app", "shop:app"),
            ("waitress-serve --port=80 shop:app", "shop:app"),
            ("celery -A shop.tasks worker -l info", "shop.tasks"),
            ("flask --app hello run --debug", "hello"),
            ("flask --app=hello:create_app run", "hello:create_app"),
            ("fastapi run src/main.py --app api", "src/main.py"),
            ("fastapi dev", "fastapi"),
            ("gunicorn", "gunicorn"),
            ("/venv/bin/pytest -q", "pytest"),
            ("/x/pytest/__main__.py -q", "pytest"),
        ],
    )
    def test_the_argument_of_a_server(self, command: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Under a server it is what the server was told to serve."""
        assert application(command.split(" "), monkeypatch) == expected

    def test_variables_and_defaults_of_servers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where no argument names it: FLASK_APP, UVICORN_APP, flask's default modules."""
        assert application(["flask", "run"], monkeypatch, {"FLASK_APP": "shop"}) == "shop"
        assert application(["uvicorn"], monkeypatch, {"UVICORN_APP": "shop:app"}) == "shop:app"
        monkeypatch.setitem(sys.modules, "wsgi", sys)
        assert application(["flask", "run"], monkeypatch) == "wsgi"

    def test_gunicorn_s_configuration_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """`wsgi_app` may stand in gunicorn's configuration, which is read, not run."""
        (tmp_path / "gunicorn.conf.py").write_text("raise SystemExit\nwsgi_app = 'shop:app'\n")
        (tmp_path / "other.py").write_text('wsgi_app="other:app"')
        assert application(["gunicorn"], monkeypatch) == "shop:app"
        assert application(["gunicorn", "-c", "other.py"], monkeypatch) == "other:app"

    def test_the_loaded_module_is_likelier(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of two arguments that could be it, the one whose module is asking is the application."""
        monkeypatch.setitem(sys.modules, "shop", sys)
        assert application(["gunicorn", "--preload", "shop", "-k", "gthread"], monkeypatch) == "shop"

    @pytest.mark.parametrize("argv", [["-c"], [""], ["gunicorn"], ["pytest"]])
    def test_the_application_s_own_name(self, argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        """Where the command line does not say it: Flask's import name, or the module of a function."""
        monkeypatch.setattr(sys, "argv", argv)
        assert source.application({}, SimpleNamespace(import_name="shop"))[0] == "shop"
        assert source.application({}, application)[0] == f"{__name__}:application"
        assert source.application({}, "given.here:app")[0] == "given.here:app"
        assert source.application({}, SimpleNamespace(import_name="__main__"))[0] != "__main__"

    @pytest.mark.parametrize(
        ("env", "name"),
        [({"JPY_SESSION_NAME": "/home/jane/analysis.ipynb"}, "/home/jane/analysis.ipynb"), ({}, "<notebook>")],
    )
    def test_a_notebook(self, env: dict[str, str], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """In a notebook it is the notebook, not ipykernel's launcher; the source type is NOTEBOOK."""
        shell = SimpleNamespace(kernel=object())
        monkeypatch.setattr(sys.modules["__main__"], "get_ipython", lambda: shell, raising=False)
        monkeypatch.setattr(sys, "argv", ["/x/ipykernel_launcher.py", "-f", "kernel.json"])
        known = process_metadata(env)
        assert (known["mlflow.source.name"], known["mlflow.source.type"]) == (name, "NOTEBOOK")

    def test_a_terminal_shell_is_no_notebook(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """IPython in a terminal has no kernel: it is a console."""
        monkeypatch.setattr(sys.modules["__main__"], "get_ipython", SimpleNamespace, raising=False)
        monkeypatch.setattr(sys, "argv", ["/venv/bin/ipython"])
        known = process_metadata({})
        assert (known["mlflow.source.name"], known["mlflow.source.type"]) == ("<console>", "LOCAL")


REPORT = "import json, tracemw.environment as e; print(json.dumps(e.process_metadata()))\n"


class TestProcesses:
    """The same in real processes, started as users start them."""

    def run(self, folder: Path, *arguments: str, stdin: str = "") -> str:
        command = [sys.executable, *arguments]
        env = servers.clean_environment({"PYTHONPATH": os.pathsep.join(sys.path)})
        run = subprocess.run(command, cwd=folder, env=env, input=stdin, capture_output=True, text=True, check=True)
        return str(json.loads(run.stdout)["mlflow.source.name"])

    def test_script_module_command_and_stdin(self, tmp_path: Path) -> None:
        """A script is its path as given, `-m` the module, `-c` and stdin are named as such."""
        package = tmp_path / "shop"
        package.mkdir()
        (package / "__init__.py").touch()
        for name in ("__main__", "job"):
            (package / f"{name}.py").write_text(REPORT)
        assert self.run(tmp_path, "shop/job.py") == "shop/job.py"
        assert self.run(tmp_path, "-m", "shop.job") == "shop.job"
        assert self.run(tmp_path, "-m", "shop") == "shop"
        assert self.run(tmp_path, "-c", REPORT) == "python -c"
        assert self.run(tmp_path, "-", stdin=REPORT) == "<stdin>"
        assert self.run(tmp_path, stdin=REPORT) == "<console>"

    def test_a_package_that_is_being_imported(self, tmp_path: Path) -> None:
        """Asked while `python -m` is still importing the module's package, it is the module already."""
        package = tmp_path / "shop"
        package.mkdir()
        (package / "__init__.py").write_text(REPORT)
        (package / "job.py").touch()
        assert self.run(tmp_path, "-m", "shop.job") == "shop.job"

    @pytest.mark.parametrize(
        ("serve", "target", "options"),
        [
            (servers.uvicorn, "web:asgi", ()),
            (servers.uvicorn, "web:asgi", ("--workers", "2")),
            (servers.gunicorn, "web:wsgi", ()),
            (servers.gunicorn, "web:wsgi", ("--preload", "--threads", "2")),
        ],
    )
    def test_servers(
        self, serve: Callable[..., Any], target: str, options: tuple[str, ...], tmp_path: Path
    ) -> None:
        """Under real servers it is the application, also in worker processes that are spawned or forked."""
        (tmp_path / "web.py").write_text(
            "import json\nfrom tracemw.environment import process_metadata\n"
            "def body(): return json.dumps(process_metadata()).encode()\n"
            "def wsgi(environ, start_response):\n"
            "    start_response('200 OK', [])\n"
            "    return [body()]\n"
            "async def asgi(scope, receive, send):\n"
            "    if scope['type'] == 'http':\n"
            "        await send({'type': 'http.response.start', 'status': 200, 'headers': []})\n"
            "        await send({'type': 'http.response.body', 'body': body()})\n"
        )
        with serve(target, *options, cwd=tmp_path) as server:
            assert server.get("/").json()["mlflow.source.name"] == target
