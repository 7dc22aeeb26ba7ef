"""What is known about this process: environment, version, deployment, region, the application and its source.

Found once, when tracing is configured, and stored with every trace. What is not set adds nothing. For one key
the first of these that knows it counts: `metadata` given in code, variables named by `metadata_env`,
`TRACEMW_METADATA_<KEY>`, the four variables `APP_ENVIRONMENT`, `APP_VERSION`, `DEPLOYMENT_ID` and `REGION`,
OpenTelemetry's `OTEL_SERVICE_NAME` and `OTEL_RESOURCE_ATTRIBUTES`, the repository that the application lies
in, and the variables that the platform sets.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final
from urllib.parse import unquote

from tracemw import source

logger = logging.getLogger("tracemw")

MAX_KEY: Final = 250  # characters; what MLflow's store takes
MAX_VALUE: Final = 8000

METADATA_PREFIX: Final = "TRACEMW_METADATA_"
SOURCE_NAME: Final = "mlflow.source.name"
SOURCE_TYPE: Final = "mlflow.source.type"
COMMIT: Final = "mlflow.source.git.commit"
BRANCH: Final = "mlflow.source.git.branch"
REPO_URL: Final = "mlflow.source.git.repoURL"

# metadata key -> the semantic conventions' names, the one in force first
_SEMCONV: Final[Mapping[str, tuple[str, ...]]] = {
    "environment": ("deployment.environment.name", "deployment.environment"),
    "app_version": ("service.version",),
    "deployment_id": ("deployment.id",),
    "region": ("cloud.region",),
    "service_name": ("service.name",),
    COMMIT: ("vcs.ref.head.revision",),
    BRANCH: ("vcs.ref.head.name",),
    REPO_URL: ("vcs.repository.url.full",),
}

_OWN: Final = (
    ("environment", "APP_ENVIRONMENT"),
    ("app_version", "APP_VERSION"),
    ("deployment_id", "DEPLOYMENT_ID"),
    ("region", "REGION"),
    ("mlflow.modelId", "MLFLOW_ACTIVE_MODEL_ID"),
    ("mlflow.modelId", "_MLFLOW_ACTIVE_MODEL_ID"),  # the name that older MLflow wrote
)


def process_metadata(
    environ: Mapping[str, str] | None = None,
    *,
    metadata: Mapping[str, Any] | None = None,
    metadata_env: Mapping[str, str] | Iterable[str] | None = None,
    app: object = None,
) -> dict[str, str]:
    """Find the metadata of this process.

    Args:
        environ: Environment variables, those of the process by default.
        metadata: Values that come before everything else; an empty one removes its key.
        metadata_env: Names of environment variables by metadata key (or a list of names: the key is the name
            in lower case).
        app: The application, or its import string, where the caller knows it.

    Returns:
        Metadata by key, keys up to 250 and values up to 8,000 characters. Never raises.
    """
    env = os.environ if environ is None else environ
    places: tuple[Callable[[], Iterable[tuple[str, Any]]], ...] = (
        lambda: (metadata or {}).items(),
        lambda: _named(metadata_env or {}, env),
        lambda: _prefixed(env),
        lambda: [(key, env.get(name)) for key, name in _OWN],
        lambda: _opentelemetry(env),
        lambda: _source(env, app),
        lambda: _platform(env),
    )
    found: dict[str, str] = {}
    for place in places:
        try:
            for key, value in place():
                if value or place is places[0]:
                    found.setdefault(str(key), _bounded(value))
        except Exception:
            logger.debug("process metadata: one place could not be read", exc_info=True)
    # MLflow's guide stores the environment here; without one, what MLflow itself says.
    found.setdefault(SOURCE_TYPE, found.get("environment") or ("NOTEBOOK" if source.in_notebook() else "LOCAL"))
    return {key: value for key, value in found.items() if value and len(key) <= MAX_KEY}


def resource_attributes(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return process metadata as attributes of an OpenTelemetry Resource.

    Args:
        metadata: What `process_metadata` returned.

    Returns:
        The semantic conventions' names where they have one, MLflow's names as they are, and
        `tracemw.metadata.<key>` for the rest.
    """
    attributes = {}
    for key, value in metadata.items():
        if key in _SEMCONV:
            attributes[_SEMCONV[key][0]] = value
        else:
            attributes[key if key.startswith("mlflow.") else f"tracemw.metadata.{key}"] = value
    return attributes


def _bounded(value: object) -> str:
    """Return text that any store can encode: variables may hold bytes that are no UTF-8 (as surrogates)."""
    text = value if isinstance(value, str) else "" if value is None else str(value)
    return text[:MAX_VALUE].encode("utf-8", "replace").decode()


# Variables


def _named(
    metadata_env: Mapping[str, str] | Iterable[str], env: Mapping[str, str]
) -> list[tuple[str, str | None]]:
    if isinstance(metadata_env, Mapping):
        return [(key, env.get(name)) for key, name in metadata_env.items()]
    return [(name.lower(), env.get(name)) for name in metadata_env]


def _prefixed(env: Mapping[str, str]) -> list[tuple[str, str]]:
    cut = len(METADATA_PREFIX)
    return [
        (key[cut:].lower(), value) for key, value in env.items() if key.startswith(METADATA_PREFIX) and key[cut:]
    ]


def _opentelemetry(env: Mapping[str, str]) -> list[tuple[str, str | None]]:
    pairs = (pair.partition("=") for pair in env.get("OTEL_RESOURCE_ATTRIBUTES", "").split(","))
    attributes = {key.strip(): unquote(value.strip()) for key, _, value in pairs}
    known = [(key, attributes.get(name)) for key, names in _SEMCONV.items() for name in names]
    return [("service_name", env.get("OTEL_SERVICE_NAME")), *known]


def _source(env: Mapping[str, str], app: object) -> list[tuple[str, str | None]]:
    name, folder = source.application(env, app)
    working = os.getcwd()
    facts = source.repository(folder or working) or source.repository(working)
    return [(SOURCE_NAME, name), (COMMIT, facts.commit), (BRANCH, facts.branch), (REPO_URL, facts.url)]


_Variable = str | tuple[str, Callable[[str], str | None]]


def _image_tag(reference: str) -> str:
    """`registry.fly.io/app:deployment-01H9` -> `deployment-01H9`: Fly makes one for each deployment."""
    return reference.rpartition("/")[2].partition(":")[2]


def _replica_set(pod: str) -> str | None:
    """`web-7d4b9c6f5d-x2x9p` -> `web-7d4b9c6f5d`: one rollout of a Kubernetes Deployment."""
    found = re.fullmatch(r"(.+-[bcdf-hj-np-tv-xz2456789]{5,10})-[bcdf-hj-np-tv-xz2456789]{5}", pod)
    return found.group(1) if found else None


def _container_apps_region(suffix: str) -> str | None:
    """`ashyplant-12ab.westeurope.azurecontainerapps.io` -> `westeurope`."""
    parts = suffix.split(".")
    return parts[-3] if parts[-2:] == ["azurecontainerapps", "io"] and len(parts) > 3 else None


def _aws_region(value: str) -> str | None:
    """Other makers of S3-like storage have one write `auto` there."""
    return value if re.fullmatch(r"[a-z]{2}(-[a-z]+)+-\d+", value) else None


def _lambda_version(value: str) -> str | None:
    return None if value == "$LATEST" else value


# What a platform sets: the variables that it is known by, then for each key what to read, first wins. Instance
# ids stand in for a deployment only where the platform names none. Vercel runs on Lambda, and AWS_REGION is also
# set by those who only use AWS's storage: the first platform that is recognised counts, AWS is the last.
_CLOUDS: Final[tuple[tuple[tuple[str, ...], Mapping[str, tuple[_Variable, ...]]], ...]] = (
    (
        ("VERCEL", "VERCEL_ENV"),
        {
            "environment": ("VERCEL_TARGET_ENV", "VERCEL_ENV"),
            "deployment_id": ("VERCEL_DEPLOYMENT_ID", "VERCEL_URL"),
            "region": ("VERCEL_REGION",),
            COMMIT: ("VERCEL_GIT_COMMIT_SHA",),
            BRANCH: ("VERCEL_GIT_COMMIT_REF",),
        },
    ),
    (
        ("FLY_APP_NAME", "FLY_REGION", "FLY_ALLOC_ID", "FLY_MACHINE_ID"),
        {
            "deployment_id": (("FLY_IMAGE_REF", _image_tag), "FLY_ALLOC_ID", "FLY_MACHINE_ID"),
            "region": ("FLY_REGION",),
            "service_name": ("FLY_APP_NAME",),
        },
    ),
    (
        ("RENDER", "RENDER_SERVICE_ID"),
        {
            "deployment_id": ("RENDER_DEPLOY_ID", "RENDER_INSTANCE_ID"),
            "service_name": ("RENDER_SERVICE_NAME",),
            COMMIT: ("RENDER_GIT_COMMIT",),
            BRANCH: ("RENDER_GIT_BRANCH",),
        },
    ),
    (
        ("DYNO", "HEROKU_APP_ID", "HEROKU_RELEASE_VERSION"),
        {
            "app_version": ("HEROKU_RELEASE_VERSION",),
            "deployment_id": ("HEROKU_RELEASE_VERSION",),
            "service_name": ("HEROKU_APP_NAME",),
            COMMIT: ("HEROKU_BUILD_COMMIT", "HEROKU_SLUG_COMMIT"),
        },
    ),
    (
        ("K_SERVICE", "K_REVISION", "CLOUD_RUN_JOB", "GAE_SERVICE", "FUNCTION_TARGET"),
        {
            "app_version": ("GAE_VERSION",),
            "deployment_id": ("K_REVISION", "GAE_DEPLOYMENT_ID", "CLOUD_RUN_EXECUTION"),
            "region": ("GOOGLE_CLOUD_REGION", "CLOUD_RUN_REGION", "FUNCTION_REGION"),
            "service_name": ("K_SERVICE", "CLOUD_RUN_JOB", "GAE_SERVICE"),
        },
    ),
    (
        ("CONTAINER_APP_NAME", "CONTAINER_APP_REVISION"),
        {
            "deployment_id": ("CONTAINER_APP_REVISION",),
            "region": ("REGION_NAME", ("CONTAINER_APP_ENV_DNS_SUFFIX", _container_apps_region)),
            "service_name": ("CONTAINER_APP_NAME",),
        },
    ),
    (
        ("WEBSITE_SITE_NAME", "WEBSITE_INSTANCE_ID"),
        {
            "environment": ("AZURE_FUNCTIONS_ENVIRONMENT", "WEBSITE_SLOT_NAME"),
            "deployment_id": ("WEBSITE_DEPLOYMENT_ID",),
            "region": ("REGION_NAME",),
            "service_name": ("WEBSITE_SITE_NAME",),
        },
    ),
    (
        ("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_EXECUTION_ENV", "AWS_LAMBDA_FUNCTION_NAME"),
        {
            "app_version": (("AWS_LAMBDA_FUNCTION_VERSION", _lambda_version),),
            "region": (("AWS_REGION", _aws_region), ("AWS_DEFAULT_REGION", _aws_region)),
            "service_name": ("AWS_LAMBDA_FUNCTION_NAME",),
        },
    ),
)

# Kubernetes runs on any cloud. The names are those that manifests commonly give to downward API fields.
_KUBERNETES: Final[Mapping[str, tuple[_Variable, ...]]] = {
    "deployment_id": (
        ("POD_NAME", _replica_set),
        ("K8S_POD_NAME", _replica_set),
        ("HOSTNAME", _replica_set),
        "POD_NAME",
        "K8S_POD_NAME",
    ),
}


def _platform(env: Mapping[str, str]) -> list[tuple[str, str | None]]:
    cloud = next((keys for marks, keys in _CLOUDS if any(env.get(mark) for mark in marks)), {})
    found = [(key, _value(variable, env)) for key, variables in cloud.items() for variable in variables]
    if env.get("KUBERNETES_SERVICE_HOST"):
        found += [(key, _value(variable, env)) for key, variables in _KUBERNETES.items() for variable in variables]
    return found


def _value(variable: _Variable, env: Mapping[str, str]) -> str | None:
    if isinstance(variable, str):
        return env.get(variable)
    name, meaning = variable
    value = env.get(name)
    return meaning(value) if value else None
