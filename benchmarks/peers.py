"""The peers: each function makes the same small application, traced by one of them, its exporter dropping all.

Everything else is on its defaults. A peer runs in a process of its own, since most of them change global state.
Annotations are values here: FastAPI reads those of handlers, whose types are imported inside of functions.
"""

import logging
import os
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, Final

Maker = Callable[[], Any]


def _fastapi(**options: Any) -> Any:
    from fastapi import FastAPI

    app = FastAPI(**options)

    @app.get("/users/{user_id}")
    async def user(user_id: int) -> dict[str, int]:
        return {"id": user_id}

    return app


def _flask() -> Any:
    from flask import Flask

    app = Flask("bench")

    @app.get("/users/<int:user_id>")
    def user(user_id: int) -> dict[str, int]:
        return {"id": user_id}

    return app


def set_provider() -> None:
    """Register a provider with a batch processor whose exporter drops."""
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

    class Dropping(SpanExporter):
        def export(self, spans: Any) -> SpanExportResult:
            return SpanExportResult.SUCCESS

        def shutdown(self) -> None:
            return None

    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(Dropping()))
    trace.set_tracer_provider(provider)


def configured(**settings: Any) -> Any:
    """Return tracemw, its destination set: `none:`, unless what is measured is the writing."""
    import tracemw

    tracemw.configure(**{"destination": "none:", **settings})
    return tracemw


ATTRIBUTES: Final[Mapping[str, str | int]] = {
    "http.request.method": "GET",
    "url.scheme": "http",
    "url.path": "/users/42",
    "network.protocol.version": "1.1",
    "client.address": "127.0.0.1",
    "server.address": "127.0.0.1",
    "server.port": 8000,
    "http.response.status_code": 200,
}

# ASGI


def fastapi_bare() -> Any:
    return _fastapi()


def fastapi_floor() -> Any:
    """The floor: one span of the SDK with eight attributes, made current, ended, batched; nothing else."""
    from opentelemetry import context, trace
    from opentelemetry.trace import SpanKind

    set_provider()
    tracer = trace.get_tracer("bench")

    class OneSpan:
        def __init__(self, app: Any) -> None:
            self.app = app

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            span = tracer.start_span("GET /users/{user_id}", kind=SpanKind.SERVER, attributes=ATTRIBUTES)
            token = context.attach(trace.set_span_in_context(span))
            try:
                await self.app(scope, receive, send)
            finally:
                context.detach(token)
                span.end()

    app = _fastapi(telemetry={"tracing": False})
    app.add_middleware(OneSpan)
    return app


def fastapi_tracemw() -> Any:
    app = _fastapi()
    app.add_middleware(configured().TraceMiddleware)
    return app


def fastapi_tracemw_stored() -> Any:
    app = _fastapi()
    app.add_middleware(configured(destination="sqlite:///bench.db").TraceMiddleware)
    return app


def fastapi_tracemw_below() -> Any:
    """The handler is traced, too: the decorators in the order that everybody would write."""
    from fastapi import FastAPI

    import tracemw

    app = FastAPI()
    app.add_middleware(configured().TraceMiddleware)

    @app.get("/users/{user_id}")
    @tracemw.trace
    async def user(user_id: int) -> dict[str, int]:
        return {"id": user_id}

    return app


def fastapi_tracemw_above() -> Any:
    """The same, in the other order: the route is given a function that is not traced yet."""
    from fastapi import FastAPI

    import tracemw

    app = FastAPI()
    app.add_middleware(configured().TraceMiddleware)

    @tracemw.trace
    @app.get("/users/{user_id}")
    async def user(user_id: int) -> dict[str, int]:
        return {"id": user_id}

    return app


def fastapi_tracemw_unsampled() -> Any:
    app = _fastapi()
    app.add_middleware(configured(sample_rate=0.0).TraceMiddleware)
    return app


def fastapi_tracemw_excluded() -> Any:
    app = _fastapi()
    app.add_middleware(configured(exclude=["/users/*"]).TraceMiddleware)
    return app


def fastapi_tracemw_joined() -> Any:
    set_provider()
    app = _fastapi(telemetry={"tracing": False})
    app.add_middleware(configured().TraceMiddleware)
    return app


def fastapi_native() -> Any:
    set_provider()
    return _fastapi(telemetry={"operation_spans": False})


def fastapi_native_operations() -> Any:
    set_provider()
    return _fastapi()


def fastapi_starlette_otel() -> Any:
    from starlette.middleware.opentelemetry import OpenTelemetryMiddleware

    set_provider()
    app = _fastapi(telemetry={"tracing": False})
    app.add_middleware(OpenTelemetryMiddleware)
    return app


def fastapi_otel_contrib() -> Any:
    from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor

    set_provider()
    app = _fastapi(telemetry={"tracing": False})
    FastAPIInstrumentor.instrument_app(app)
    return app


def fastapi_otel_contrib_lean() -> Any:
    from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor

    set_provider()
    app = _fastapi(telemetry={"tracing": False})
    FastAPIInstrumentor.instrument_app(app, exclude_spans=["send", "receive"])
    return app


def _elastic_config() -> dict[str, Any]:
    return {"SERVICE_NAME": "bench", "DISABLE_SEND": True, "CLOUD_PROVIDER": "none", "CENTRAL_CONFIG": False}


def fastapi_elastic() -> Any:
    elastic, app = import_module("elasticapm.contrib.starlette"), _fastapi()
    app.add_middleware(elastic.ElasticAPM, client=elastic.make_apm_client(_elastic_config()))
    return app


def _sentry() -> None:
    sentry_sdk = import_module("sentry_sdk")

    class Dropping(import_module("sentry_sdk.transport").Transport):  # type: ignore[misc]
        def capture_envelope(self, envelope: Any) -> None:
            return None

    sentry_sdk.init(dsn="http://key@127.0.0.1:9/1", transport=Dropping, traces_sample_rate=1.0)


def fastapi_sentry() -> Any:
    _sentry()
    return _fastapi()


def _ddtrace(**what: bool) -> None:
    os.environ.setdefault("DD_INSTRUMENTATION_TELEMETRY_ENABLED", "false")
    os.environ.setdefault("DD_REMOTE_CONFIGURATION_ENABLED", "false")
    import_module("ddtrace.internal.writer").NativeWriter.write = lambda self, spans=None: None
    import_module("ddtrace").patch(**what)


def fastapi_ddtrace() -> Any:
    _ddtrace(fastapi=True, starlette=True)
    return _fastapi()


def fastapi_logfire() -> Any:
    logfire = import_module("logfire")
    logfire.configure(send_to_logfire=False, console=False, inspect_arguments=False)
    app = _fastapi()
    logfire.instrument_fastapi(app)
    return app


def fastapi_correlation_id() -> Any:
    app = _fastapi()
    app.add_middleware(import_module("asgi_correlation_id").CorrelationIdMiddleware, validator=None)
    return app


def configured_mlflow() -> Any:
    """Return MLflow, its exporter dropping."""
    mlflow = import_module("mlflow")
    mlflow.set_tracking_uri("http://127.0.0.1:9")
    mlflow.tracking.fluent._active_experiment_id = "0"  # as set_experiment() does, without asking a server
    exporter = import_module("mlflow.tracing.export.mlflow_v3").MlflowV3SpanExporter
    exporter._log_spans = lambda self, *args, **kwargs: None
    exporter._log_trace = lambda self, *args, **kwargs: None
    return mlflow


def fastapi_mlflow_pattern() -> Any:
    """The pattern of MLflow's guide on environments and versions, by hand in each handler."""
    from fastapi import FastAPI, Request

    mlflow = configured_mlflow()
    app = FastAPI()

    async def user(request: Request, user_id: int) -> dict[str, int]:
        mlflow.update_current_trace(
            client_request_id=request.headers.get("X-Request-ID"),
            metadata={
                "mlflow.trace.session": request.headers.get("X-Session-ID"),
                "mlflow.trace.user": request.headers.get("X-User-ID"),
                "mlflow.source.type": os.getenv("APP_ENVIRONMENT", "development"),
                "app_version": os.getenv("APP_VERSION", "1.0.0"),
                "deployment_id": os.getenv("DEPLOYMENT_ID", "unknown"),
                "region": os.getenv("REGION", "local"),
            },
        )
        return {"id": user_id}

    app.get("/users/{user_id}")(mlflow.trace(user))  # with decorators, were MLflow typed
    return app


# WSGI


def flask_bare() -> Any:
    return _flask()


def flask_tracemw() -> Any:
    app = _flask()
    app.wsgi_app = configured().WSGITraceMiddleware(app.wsgi_app)
    return app


def flask_otel_contrib() -> Any:
    from opentelemetry.instrumentation.flask import FlaskInstrumentor

    set_provider()
    app = _flask()
    instrumentor: Any = FlaskInstrumentor()
    instrumentor.instrument_app(app)
    return app


def flask_elastic() -> Any:
    app = _flask()
    app.config["ELASTIC_APM"] = _elastic_config()
    import_module("elasticapm.contrib.flask").ElasticAPM(app)
    return app


def flask_sentry() -> Any:
    _sentry()
    return _flask()


def flask_ddtrace() -> Any:
    _ddtrace(flask=True)
    return _flask()


PEERS: dict[str, dict[str, tuple[str, Maker]]] = {
    "fastapi": {
        "bare": ("no tracing", fastapi_bare),
        "floor": ("one span of the OpenTelemetry SDK, nothing else", fastapi_floor),
        "tracemw": ("tracemw", fastapi_tracemw),
        "tracemw-stored": ("tracemw, encoded and stored too (all threads)", fastapi_tracemw_stored),
        "tracemw-below": ("tracemw, handler under `@trace` too", fastapi_tracemw_below),
        "tracemw-above": ("tracemw, `@trace` above the route's decorator", fastapi_tracemw_above),
        "tracemw-joined": ("tracemw, on the application's provider", fastapi_tracemw_joined),
        "tracemw-unsampled": ("tracemw, sample_rate=0", fastapi_tracemw_unsampled),
        "tracemw-excluded": ("tracemw, excluded path", fastapi_tracemw_excluded),
        "native": ("FastAPI native telemetry, no operation spans", fastapi_native),
        "native-operations": ("FastAPI native telemetry", fastapi_native_operations),
        "starlette": ("Starlette OpenTelemetryMiddleware", fastapi_starlette_otel),
        "contrib": ("OpenTelemetry contrib", fastapi_otel_contrib),
        "contrib-lean": ("OpenTelemetry contrib, no send/receive spans", fastapi_otel_contrib_lean),
        "elastic": ("Elastic APM", fastapi_elastic),
        "sentry": ("Sentry", fastapi_sentry),
        "ddtrace": ("ddtrace", fastapi_ddtrace),
        "logfire": ("Logfire", fastapi_logfire),
        "correlation-id": ("asgi-correlation-id (ids only)", fastapi_correlation_id),
        "mlflow": ("MLflow by hand (decorator, trace update)", fastapi_mlflow_pattern),
    },
    "flask": {
        "bare": ("no tracing", flask_bare),
        "tracemw": ("tracemw", flask_tracemw),
        "contrib": ("OpenTelemetry contrib", flask_otel_contrib),
        "elastic": ("Elastic APM", flask_elastic),
        "sentry": ("Sentry", flask_sentry),
        "ddtrace": ("ddtrace", flask_ddtrace),
    },
}


def silence() -> None:
    """Keep the peers' own messages out of the measurement."""
    logging.disable(logging.CRITICAL)
