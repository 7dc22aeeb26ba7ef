"""Reading traces back: search, get, compare. In the process that writes them, what ended before is found."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal, overload

from tracemw import config, pipeline
from tracemw.entities import Trace
from tracemw.errors import NotFoundError, TracemwError

if TYPE_CHECKING:
    import pandas  # type: ignore[import-untyped,import-not-found,unused-ignore]

    from tracemw.store import Store
    from tracemw.store.compare import Comparison

logger = logging.getLogger("tracemw")

PAGE: Final = 500  # traces asked of the store at once where all are wanted


class TraceList(list[Trace]):
    """A page of traces.

    Attributes:
        token: Give it to the next call as `page_token`; None on the last page.
    """

    def __init__(self, traces: Iterable[Trace] = (), token: str | None = None) -> None:
        super().__init__(traces)
        self.token = token


def store_to_read() -> Store:
    """Return the store that traces are read from; what ended before in this process is stored first."""
    installed = pipeline.installed()
    store: Store | None = None
    if installed is not None:
        installed.flush(config.READ_FLUSH)
        store = getattr(installed.sink, "store", None)
    return store if store is not None else _other_store(config.store_url(config.settings()))


def is_delivered() -> bool:
    """True where traces go on from the store to a remote destination, and so do later changes of them."""
    installed = pipeline.installed()
    if installed is not None:
        return getattr(installed.sink, "destination", None) is not None
    return config.is_remote(config.effective_destination(config.settings()))


_opened: dict[str, Store] = {}


def _other_store(url: str) -> Store:
    """Open a store that no pipeline of this process writes to, once."""
    from tracemw.store import open_store

    store = _opened.get(url)
    if store is None:
        _opened.clear()
        store = _opened[url] = open_store(url)
    return store


@overload
def search_traces(
    filter_string: str | None = None,
    order_by: Sequence[str] | None = None,
    max_results: int | None = 100,
    page_token: str | None = None,
    return_type: Literal["list"] | None = "list",
    include_spans: bool = True,
    **mlflow: Any,
) -> TraceList: ...
@overload
def search_traces(
    filter_string: str | None = None,
    order_by: Sequence[str] | None = None,
    max_results: int | None = 100,
    page_token: str | None = None,
    *,
    return_type: Literal["pandas"],
    include_spans: bool = True,
    **mlflow: Any,
) -> pandas.DataFrame: ...
def search_traces(
    filter_string: str | None = None,
    order_by: Sequence[str] | None = None,
    max_results: int | None = 100,
    page_token: str | None = None,
    return_type: str | None = "list",
    include_spans: bool = True,
    **mlflow: Any,
) -> Any:
    """Search the store.

        tracemw.search_traces("metadata.app_version = '1.5.0' AND attributes.status = 'ERROR'")

    Args:
        filter_string: MLflow's filter language, with OR, NOT and parentheses; see the documentation.
        order_by: Such as `["timestamp_ms DESC"]`; newest first without it.
        max_results: Traces to return at most; None returns all.
        page_token: The `token` of the page before.
        return_type: "list", or "pandas" for a DataFrame with MLflow's columns.
        include_spans: False returns the traces without their spans, which is faster.
        **mlflow: What else MLflow's function takes: `run_id` and `model_id` narrow the search, `extract_fields`
            adds columns to a DataFrame; `experiment_ids`, `locations`, `flush` and `sql_warehouse_id` have no
            meaning here and are accepted.

    Returns:
        The traces, with the attribute `token` for the next page.

    Raises:
        FilterError: The filter, the order or the token cannot be understood.
        StoreError: The store cannot be read.
        TracemwError: `return_type` is something else, or pandas is not installed.
    """
    extract_fields = mlflow.get("extract_fields")
    _check_search(filter_string, return_type, mlflow)
    if return_type == "pandas":
        _pandas()
    traces = _search(_narrowed(filter_string, mlflow), order_by, max_results, page_token, include_spans)
    return _frame(traces, extract_fields) if return_type == "pandas" else traces


def get_trace(trace_id: str | None = None, silent: bool = False, flush: bool = True, **alias: Any) -> Trace | None:
    """Return a trace by its id, or None.

    Args:
        trace_id: `tr-` and 32 hexadecimal digits; `request_id` is MLflow's older name for it.
        silent: Do not log a warning where there is none.
        flush: Accepted for MLflow's sake; what ended before in this process is always found.

    Raises:
        StoreError: The store cannot be read.
    """
    wanted = aliased(trace_id, alias)
    found = find(wanted)
    if found is None and not silent:
        logger.warning("there is no trace with ID %s in the store", wanted)
    return found


def compare(by: str, filter_string: str | None = None, baseline: str | None = None) -> list[Comparison]:
    """Return counts, error rates and latencies for each value of a key, such as the version or the route.

    Args:
        by: What to group by: `version`, `region`, `route`, `metadata.<key>` …
        filter_string: The traces that count.
        baseline: The value that the others are compared with.

    Raises:
        FilterError: The filter or the key cannot be understood.
        StoreError: The store cannot be read.
    """
    return store_to_read().compare(by, filter_string, baseline)


def find(trace_id: str) -> Trace | None:
    """Return a trace of the store, None where there is none of this id."""
    wanted = hex_id(trace_id)
    stored = None if wanted is None else store_to_read().get(wanted)
    return None if stored is None else Trace.from_stored(stored, config.settings().span_name_suffixes)


def hex_id(trace_id: str) -> str | None:
    """Return the digits of a trace id as the store has them; None where it cannot be one."""
    digits = str(trace_id).strip().removeprefix("tr-").lower()
    return digits if len(digits) == 32 and all(digit in "0123456789abcdef" for digit in digits) else None


def aliased(trace_id: str | None, alias: dict[str, Any], function: str = "this function") -> str:
    """Return the trace id, given under its name or MLflow's older one.

    Raises:
        TypeError: Neither was given, or something else.
    """
    given = alias.pop("request_id", None) if trace_id is None else trace_id
    if alias:
        raise TypeError(f"{function} got an unexpected keyword argument {next(iter(alias))!r}")
    if given is None:
        raise TypeError(f"{function} needs a trace_id")
    return str(given)


def not_found(trace_id: str) -> NotFoundError:
    """Return the error for a trace that is not there."""
    return NotFoundError(f"Trace with ID {trace_id} not found. Is it in another store, or was it deleted?")


def _search(
    filter_string: str | None,
    order_by: Sequence[str] | None,
    max_results: int | None,
    page_token: str | None,
    include_spans: bool,
) -> TraceList:
    store, suffixes = store_to_read(), config.settings().span_name_suffixes
    found = TraceList(token=page_token)
    while True:
        wanted = PAGE if max_results is None else max_results
        page = store.search(filter_string, order_by, wanted, found.token, include_spans)
        found.extend(Trace.from_stored(stored, suffixes) for stored in page.traces)
        found.token = page.token
        if max_results is not None or page.token is None:
            return found


_MLFLOW: Final = frozenset(
    {"experiment_ids", "locations", "run_id", "model_id", "extract_fields", "flush", "sql_warehouse_id"}
)


def _check_search(filter_string: Any, return_type: str | None, mlflow: dict[str, Any]) -> None:
    unknown = mlflow.keys() - _MLFLOW
    if unknown:
        raise TypeError(f"search_traces() got an unexpected keyword argument {sorted(unknown)[0]!r}")
    if return_type not in ("list", "pandas", None):
        raise TracemwError(f"Invalid return type: {return_type}. Return type must be either 'pandas' or 'list'.")
    if mlflow.get("extract_fields") and return_type != "pandas":
        raise TracemwError("extract_fields needs return_type='pandas'")
    if filter_string is not None and not isinstance(filter_string, str):
        raise TracemwError(
            "the first argument of search_traces is the filter string; there are no experiments here, "
            "leave them out or give them as experiment_ids="
        )


def _narrowed(filter_string: str | None, mlflow: dict[str, Any]) -> str | None:
    if mlflow.get("run_id") is None and mlflow.get("model_id") is None:
        return filter_string
    conditions = [f"({filter_string})"] if filter_string and filter_string.strip() else []
    for option, key in (("run_id", "mlflow.sourceRun"), ("model_id", "mlflow.modelId")):
        if mlflow.get(option) is not None:
            value = str(mlflow[option]).replace("'", "''")
            conditions.append(f"metadata.`{key}` = '{value}'")
    return " AND ".join(conditions)


def _pandas() -> Any:
    try:
        import pandas
    except ImportError:
        raise TracemwError(
            "return_type='pandas' needs pandas: `pip install pandas`, or leave it out for a list"
        ) from None
    return pandas


def _frame(traces: list[Trace], extract_fields: Sequence[str] | None) -> Any:
    columns = Trace.pandas_dataframe_columns()
    frame = _pandas().DataFrame([trace.to_pandas_dataframe_row() for trace in traces], columns=columns)
    for field in extract_fields or ():
        frame[field] = [_extracted(trace, field) for trace in traces]
    return frame


def _extracted(trace: Trace, field: str) -> Any:
    """Return what `span.inputs.key` names (names with dots in back-ticks), None where there is no such thing."""
    import re

    parts = [part.strip("`") for part in re.findall(r"`[^`]*`|[^.`]+", field)]
    if len(parts) not in (2, 3) or parts[1] not in ("inputs", "outputs"):
        return None
    spans = trace.search_spans(name=parts[0])
    value = getattr(spans[0], parts[1]) if spans else None
    if len(parts) == 2:
        return value
    return value.get(parts[2]) if isinstance(value, dict) else None
