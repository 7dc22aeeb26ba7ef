"""Where the running code comes from: which application it is, and which commit of which repository.

The application is what the server was told to serve, not the server. The repository is read from the files in
`.git`, so that neither git nor a subprocess is needed.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

# Programs that are given the application as an argument; the modules that they look for without one.
_SERVERS: Final[Mapping[str, tuple[str, ...]]] = {
    "uvicorn": (),
    "gunicorn": (),
    "hypercorn": (),
    "daphne": (),
    "granian": (),
    "waitress-serve": (),
    "celery": (),
    "flask": ("wsgi", "app"),
    "fastapi": ("main", "app", "api", "app.main", "app.app", "app.api"),
}
_IMPORT_STRING: Final = re.compile(
    r"[A-Za-z_]\w*(\.\w+)*(:[A-Za-z_][\w.]*(\(.*\))?)?|[\w./\\][\w./\\-]*\.py(:\w+)?"
)
_APP_OPTIONS: Final = ("--app", "-A")  # of flask and celery; fastapi's --app names the variable
_SUBCOMMANDS: Final = frozenset({"run", "dev", "shell", "routes", "worker", "beat"})
_STANDING_FOR: Final = {"": "<console>", "-": "<stdin>", "-c": "python -c"}


def application(env: Mapping[str, str], app: object = None) -> tuple[str, str | None]:
    """Say which application this process runs, where MLflow would name the server's script.

    Args:
        env: Environment variables.
        app: The application, or its import string, where the caller knows it.

    Returns:
        Its name (an import string, a module run with `-m`, a script, a notebook), and the folder that its
        code lies in, None where that cannot be told.
    """
    program = sys.argv[0] if sys.argv else ""
    tool = _tool(program)
    if isinstance(app, str):
        return app, _folder(app)
    if in_notebook():
        name = _notebook_name(env)
        return name, os.path.dirname(os.path.abspath(name))
    if tool in _SERVERS:
        name = _target(tool, sys.argv[1:], env) or _name_of(app) or tool
        return name, _folder(name)
    if tool in ("pytest", "py.test"):
        return _name_of(app) or "pytest", None
    if program in _STANDING_FOR or tool == "ipython":
        return _name_of(app) or _STANDING_FOR.get(program, "<console>"), None
    return _script(program)


def in_notebook() -> bool:
    """True in a Jupyter kernel (or one of its kind), whose shell has a `kernel`."""
    try:
        shell = getattr(sys.modules.get("__main__"), "get_ipython", None)
        return callable(shell) and getattr(shell(), "kernel", None) is not None
    except Exception:
        return False


def _script(program: str) -> tuple[str, str | None]:
    if program == "-m":  # the package of the module is being imported; it is not running yet
        arguments = iter(sys.orig_argv)
        module = next((next(arguments, "") for argument in arguments if argument == "-m"), "")
        return module or "<console>", _folder(module)
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    if spec is not None and spec.name != "__main__":  # python -m module
        return spec.name.removesuffix(".__main__"), os.path.dirname(os.path.abspath(program))
    return program, os.path.dirname(os.path.abspath(program))


def _tool(program: str) -> str:
    r"""`/venv/bin/uvicorn`, `C:\venv\uvicorn.exe` and `/site-packages/uvicorn/__main__.py` -> `uvicorn`."""
    parts = re.split(r"[/\\]", program)
    name = parts[-2] if parts[-1] == "__main__.py" and len(parts) > 1 else parts[-1]
    return re.sub(r"(\.exe|-script\.pyw?|\.pyw?)$", "", name).lower()


def _target(tool: str, arguments: Sequence[str], env: Mapping[str, str]) -> str | None:
    """Return the application that a server's arguments, variables or configuration name."""
    likely = max(_candidates(tool, arguments), key=lambda found: found[0], default=None)
    if likely is not None and any(likely[0]):
        return likely[1]
    if tool == "gunicorn":
        return _gunicorn_file(arguments)
    default = next((name for name in _SERVERS[tool] if name in sys.modules), None)
    return env.get(f"{tool.upper()}_APP") or default


def _candidates(tool: str, arguments: Sequence[str]) -> Iterator[tuple[tuple[bool, ...], str]]:
    """Yield the arguments that may be the application, with how likely each is.

    Which options take a value is not known here. The value of `--app` is it; else what has a colon, does not
    follow an option, and names a module that is loaded (the one that is asking), in this order.
    """
    before = ""
    for argument in arguments:
        option, equals, value = argument.partition("=") if argument.startswith("-") else ("", "", "")
        if not equals:
            option, value = before, argument
        before = "" if equals else argument
        named = option in _APP_OPTIONS and tool != "fastapi"
        if (equals and not named) or not _IMPORT_STRING.fullmatch(value):
            continue
        if named or value not in _SUBCOMMANDS:
            loaded = _module_part(value) in sys.modules
            yield (named, ":" in value, not option.startswith("-"), loaded), value


def _gunicorn_file(arguments: Sequence[str]) -> str | None:
    """Return `wsgi_app` of gunicorn's configuration file, without running the file."""
    given = (b for a, b in zip(arguments, arguments[1:], strict=False) if a in ("-c", "--config"))
    text = _read(next(given, "gunicorn.conf.py").removeprefix("file:"))
    found = re.search(r"""^wsgi_app\s*=\s*["']([^"']+)""", text, re.MULTILINE)
    return found.group(1) if found else None


def _name_of(app: object) -> str | None:
    """Return a name that the application itself has: Flask's import name, or where a function is defined."""
    name: Any = getattr(app, "import_name", None)
    if not isinstance(name, str):
        module, qualname = getattr(app, "__module__", None), getattr(app, "__qualname__", None)
        name = f"{module}:{qualname}" if isinstance(module, str) and isinstance(qualname, str) else ""
    return name if name and not name.startswith("__main__") else None


def _notebook_name(env: Mapping[str, str]) -> str:
    in_vscode: str | None = getattr(sys.modules.get("__main__"), "__vsc_ipynb_file__", None)
    return env.get("JPY_SESSION_NAME") or in_vscode or "<notebook>"


def _module_part(name: str) -> str:
    return re.sub(r":[A-Za-z_].*", "", name)


def _folder(name: str) -> str | None:
    """Return the folder of an import string's module, or of a file."""
    module = _module_part(name)
    file = getattr(sys.modules.get(module), "__file__", None) or module
    return os.path.dirname(os.path.abspath(file)) if os.path.exists(file) else None


# The repository


class Repository(NamedTuple):
    """What is known of the repository that a folder lies in; false where there is none."""

    commit: str | None = None
    branch: str | None = None
    url: str | None = None

    def __bool__(self) -> bool:
        return any(self)


_HASH: Final = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?")
_SECTION: Final = re.compile(r'\[\s*remote\s+"((?:[^"\\]|\\.)*)"\s*\]', re.IGNORECASE)
_URL_LINE: Final = re.compile(r"url\s*=\s*(.*)", re.IGNORECASE)
_HOST: Final = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\s:@\[\]]*)(:\d*)?")
_MAX_FILE: Final = 1 << 24


def repository(folder: str) -> Repository:
    """Read which commit is checked out in a folder.

    Worktrees and submodules (whose `.git` is a file) are followed. What cannot be read is None: the branch of
    a detached HEAD, the commit of a repository without one or one that keeps its refs in a reftable.

    Args:
        folder: A folder of the working tree, at any depth.

    Returns:
        Commit, branch and URL of the remote (`origin`, else the first one) without credentials.
    """
    git = _git_directory(folder)
    if git is None:
        return Repository()
    common = os.path.join(git, _read(os.path.join(git, "commondir")).strip() or ".")
    commit, branch = _head(git, common)
    url = _remote_url(_read(os.path.join(common, "config")))
    return Repository(commit, branch, without_credentials(url) if url else None)


def _git_directory(folder: str) -> str | None:
    folder = os.path.abspath(folder)
    while True:
        path = os.path.join(folder, ".git")
        if os.path.isfile(path):  # a worktree or a submodule
            link = _read(path)
            path = (
                os.path.join(folder, link.removeprefix("gitdir:").strip()) if link.startswith("gitdir:") else path
            )
        if os.path.exists(os.path.join(path, "HEAD")):
            return path
        parent = os.path.dirname(folder)
        if parent == folder:
            return None
        folder = parent


def _head(git: str, common: str) -> tuple[str | None, str | None]:
    value = _read(os.path.join(git, "HEAD")).strip()
    branch = None
    for _ in range(5):  # a ref may name another one
        if not value.startswith("ref:"):
            break
        ref = value.removeprefix("ref:").strip()
        if ref == "refs/heads/.invalid":  # stands in HEAD of a repository with a reftable
            break
        branch = ref.removeprefix("refs/heads/") if ref.startswith("refs/heads/") else None
        value = _ref(ref, git, common)
    return (value if _HASH.fullmatch(value) else None), branch


def _ref(ref: str, git: str, common: str) -> str:
    if ".." in ref:  # no valid name of a ref, and none that is to be followed out of the repository
        return ""
    loose = _read(os.path.join(git, ref)).strip() or _read(os.path.join(common, ref)).strip()
    if loose:
        return loose
    packed = "\n" + _read(os.path.join(common, "packed-refs"))
    end = packed.find(f" {ref}\n")
    return packed[packed.rfind("\n", 0, end) + 1 : end] if end >= 0 else ""


def _remote_url(config: str) -> str | None:
    urls: dict[str, str] = {}
    remote = None
    for line in map(str.strip, config.splitlines()):
        if line.startswith("["):
            section = _SECTION.match(line)
            remote = section.group(1) if section else None
            line = line[section.end() :].strip() if section else ""
        found = _URL_LINE.match(line)
        if remote is not None and found:
            urls.setdefault(remote, _config_value(found.group(1)))
    return urls.get("origin") or next(iter(urls.values()), None)


def _config_value(text: str) -> str:
    """Return a value of git's configuration: without a comment, quotes and escapes resolved."""
    parts = re.findall(r'"((?:[^"\\]|\\.)*)"|([^"#;]+)|([#;])', text)
    value = ""
    for quoted, plain, comment in parts:
        if comment:
            break
        value += re.sub(r"\\(.)", r"\1", quoted or plain)
    return value.strip()


def without_credentials(url: str) -> str | None:
    """Return a repository's URL without user, password, token, query and fragment.

    The user of an ssh address (`git@host:path`) is part of the address, and stays.

    Returns:
        The URL; None where it cannot be told what of it may be a secret.
    """
    scheme, separator, rest = url.partition("://")
    if not separator:
        user, at, address = url.rpartition("@")
        is_path = url.startswith(("/", ".", "~"))
        return url if not at or is_path or re.fullmatch(r"[\w.-]+", user) else address or None
    authority, slash, path = rest.partition("/")
    user, at, host = authority.rpartition("@")
    if not _HOST.fullmatch(host) or "@" in path:  # it may be a password with a slash in it
        return None
    keep = f"{user.partition(':')[0]}@" if at and scheme.endswith("ssh") else ""
    return f"{scheme}://{keep}{host}{slash}{re.split('[?#]', path)[0]}"


def _read(path: str) -> str:
    """Return a file's text, empty where it cannot be read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(_MAX_FILE)
    except (OSError, ValueError):
        return ""
