"""The command `tracemw`: looks into a store, whatever process wrote it."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from importlib import metadata
from typing import Any, Final, NoReturn

import click

from tracemw import views
from tracemw.errors import FilterError, SettingError, StoreError, TracemwError
from tracemw.settings import DEFAULT_DESTINATION, Settings, from_environment, variable
from tracemw.store import Store, StoredTrace, open_store
from tracemw.store.errors import is_missing
from tracemw.store.filter import Where, compile_filter
from tracemw.store.values import bytes_of, seconds_of
from tracemw.terminal import Screen, safe, safe_lines, screen_of

FOUND, NOT_FOUND, USAGE = 0, 1, 2
_CANDIDATES: Final = 20  # traces listed where an id fits several
_GROUPS: Final = 50  # lines of a comparison for people
_BEGINS: Final = "SELECT trace_id FROM traces WHERE trace_id >= ? AND trace_id < ? ORDER BY trace_id LIMIT ?"


def _version() -> str:
    try:
        return metadata.version("tracemw")
    except metadata.PackageNotFoundError:
        return "unknown (not installed)"


class _Commands(click.Group):
    """Turns what may go wrong into a line on stderr and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (FilterError, SettingError) as error:
            _fail(str(error), USAGE)
        except TracemwError as error:
            _fail(str(error), NOT_FOUND)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(_version())
def cli() -> None:
    """Search, show and compare the traces of your application.

    \b
    The store is --store, else TRACEMW_STORE, else the sqlite destination of
    TRACEMW_DESTINATION, else ./tracemw.db.

    \b
    Exit codes: 0 found or done; 1 nothing found, the store cannot be used, or
    doctor or deliver met a problem; 2 the command, the filter or a setting is wrong.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that cannot show a character must not end the command
            stream.reconfigure(errors="backslashreplace")


def main() -> None:
    """Run the command line."""
    cli(prog_name="tracemw")


class _Seconds(click.FloatRange):
    """A number of seconds that a clock can count."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        seconds = super().convert(value, param, ctx)
        if not seconds < 1e9:
            self.fail(f"{value} is too long.", param, ctx)
        return float(seconds)


_store_option = click.option("--store", "store_url", metavar="URL|PATH", help="The store to read.")
_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")


@cli.command()
@click.argument("filter_string", metavar="[FILTER]", required=False)
@click.option("-n", "--max-results", "--limit", "limit", default=20, show_default=True, type=click.IntRange(min=1))
@click.option("--order-by", "order_by", multiple=True, metavar="ORDER", help='Such as "execution_time DESC".')
@click.option("--page-token", metavar="TOKEN", help="Go on where the last page ended.")
@_store_option
@_json_option
def search(
    filter_string: str | None,
    limit: int,
    order_by: Sequence[str],
    page_token: str | None,
    store_url: str | None,
    as_json: bool,
) -> None:
    """List traces, newest first.

    \b
    Examples:
      tracemw search
      tracemw search "status = 'ERROR' AND timestamp > now - 1h"
      tracemw search "metadata.app_version = '1.5.0' AND execution_time > 500ms"
      tracemw search "tags.team = 'search' OR user = 'jane'" --order-by "execution_time DESC"
      tracemw search "span.name = 'retrieve' AND span.status = 'ERROR'"
      tracemw search "text CONTAINS 'refund'" --json

    \b
    Fields: name status timestamp execution_time client_request_id session user route
    method status_code environment version region deployment outcome request response
    text trace_id, tags.KEY, metadata.KEY, and of one span: span.name span.type
    span.status span.execution_time span.content span.attributes.KEY.
    A KEY with other characters than letters, digits and _ stands in backticks.

    \b
    Operators: = != < <= > >= LIKE ILIKE RLIKE CONTAINS IN, IS NULL, with NOT, AND, OR
    and parentheses. Values: 'text', 5, 500ms, 1.5s, 2m, now - 1h, '2026-01-31'.
    """
    with _open(store_url) as store:
        page = store.search(filter_string, list(order_by), limit, page_token, include_spans=False)
    if as_json:
        _print_json({"traces": [views.as_dict(trace) for trace in page.traces], "next_page_token": page.token})
    else:
        _print(views.listing(screen_of(), page.traces) if page.traces else [])
    if not page.traces:
        _fail("no trace matches" if filter_string else "the store has no traces", NOT_FOUND)
    if page.token and not as_json and sys.stdout.isatty():
        click.echo(f"There are more: --page-token {page.token}", err=True)


@cli.command(short_help="Show one trace as a tree.")
@click.argument("trace_id")
@click.option("-a", "--attributes", is_flag=True, help="Show all attributes of the spans.")
@click.option("--full", is_flag=True, help="Do not cut long values to the terminal's width.")
@_store_option
@_json_option
def show(trace_id: str, attributes: bool, full: bool, store_url: str | None, as_json: bool) -> None:
    """Show one trace as a tree: durations, inputs, outputs, events, exceptions.

    TRACE_ID is tr-... as the x-trace-id header has it, its first digits, or the id of the request.

    \b
    Examples:
      tracemw show tr-0af7651916cd43dd8448eb211c80319c
      tracemw show tr-0af76
      tracemw show req-abc-123
      tracemw show tr-0af76 --json | jq '.spans[].name'
    """
    with _open(store_url) as store:
        found = _find(store, trace_id)
        trace = store.get(found[0].row.trace_id) if len(found) == 1 else None
    if trace is None:
        _not_one(trace_id, found)
    if as_json:
        _print_json(views.as_dict(trace, spans=True))
    else:
        _print(views.tree(screen_of(), trace, attributes=attributes, full=full))


def _find(store: Store, wanted: str) -> list[StoredTrace]:
    """Return the traces of this id, else of this request id, else whose ids begin so."""
    wanted = wanted.strip().removesuffix("…")  # copied from a table that was cut
    digits = wanted.removeprefix("tr-").lower()
    is_hex = bool(digits) and all(digit in "0123456789abcdef" for digit in digits)
    if is_hex and len(digits) == 32 and (exact := store.get(digits, spans=False)):
        return [exact]
    if found := _of_request(store, wanted):
        return found
    if not is_hex or len(digits) >= 32:
        return []
    rows = store.read(_BEGINS, (digits, digits + "g", _CANDIDATES + 1))
    return [trace for (trace_id,) in rows if (trace := store.get(trace_id, spans=False))]


def _of_request(store: Store, request_id: str) -> list[StoredTrace]:
    if "\\" in request_id:  # which a quoted text cannot hold before a quote
        return []
    quoted = request_id.replace("'", "''")
    try:
        return store.search(f"client_request_id = '{quoted}'", None, _CANDIDATES + 1, include_spans=False).traces
    except FilterError:  # a character that no stored text has
        return []


def _not_one(wanted: str, found: Sequence[StoredTrace]) -> NoReturn:
    if not found:
        _fail(f"there is no trace with the id or request id {wanted!r} in this store", NOT_FOUND)
    more = "more than " if len(found) > _CANDIDATES else ""
    click.echo(f"tracemw: {more}{min(len(found), _CANDIDATES)} traces have this id; say which one:", err=True)
    for line in views.listing(screen_of(sys.stderr), found[:_CANDIDATES]):
        click.echo(line, err=True)
    sys.exit(NOT_FOUND)


@cli.command()
@click.argument("filter_string", metavar="[FILTER]", required=False)
@click.option("--last", default=10, show_default=True, type=click.IntRange(min=0), help="Traces to begin with.")
@click.option("--interval", default=1.0, show_default=True, type=_Seconds(min=0.05), metavar="SECONDS")
@click.option("--once", is_flag=True, help="Print what is there and end.")
@_store_option
@_json_option
def tail(
    filter_string: str | None, last: int, interval: float, once: bool, store_url: str | None, as_json: bool
) -> None:
    """Print traces as they end, until Ctrl-C.

    \b
    Examples:
      tracemw tail
      tracemw tail "status = 'ERROR'"
      tracemw tail --json | jq .name
    """
    screen = screen_of()
    where = compile_filter(filter_string) if filter_string and filter_string.strip() else None
    try:
        with _open(store_url) as store:
            _, cursor = store.changes()
            first = store.search(filter_string, None, last, include_spans=False).traces if last else []
            _print_each(screen, [trace for trace in first[::-1] if trace.row.state != "IN_PROGRESS"], as_json)
            while not once:
                time.sleep(interval)
                traces, cursor = store.changes(cursor, 1000)
                _print_each(screen, _matching(store, traces, where), as_json)
    except KeyboardInterrupt:
        click.echo()


def _matching(store: Store, traces: Sequence[StoredTrace], where: Where | None) -> Sequence[StoredTrace]:
    if where is None or not traces:
        return traces
    ids = json.dumps([trace.id for trace in traces])
    sql = f"SELECT t.id FROM traces AS t WHERE t.id IN (SELECT value FROM json_each(?)) AND ({where.sql})"
    kept = {id for (id,) in store.read(sql, (ids, *where.params))}
    return [trace for trace in traces if trace.id in kept]


def _print_each(screen: Screen, traces: Sequence[StoredTrace], as_json: bool) -> None:
    for trace in traces:
        text = json.dumps(views.as_dict(trace)) if as_json else views.one_line(screen, trace.row)
        click.echo(text, color=screen.colour)


@cli.command(short_help="Compare error rates and latencies of versions, regions, flags.")
@click.option(
    "--by", required=True, metavar="KEY", help="version, region, route, user, tags.KEY, a metadata key ..."
)
@click.option("--where", "filter_string", metavar="FILTER", help="Only these traces.")
@click.option("--baseline", metavar="VALUE", help="Compare the other groups with this one.")
@_store_option
@_json_option
def compare(
    by: str, filter_string: str | None, baseline: str | None, store_url: str | None, as_json: bool
) -> None:
    """Compare error rates and latencies of versions, regions, flags, users ...

    Requests in progress, and those that the client left, are in no error rate. A difference from the baseline is
    marked with * where it is more than chance (5 %, over all groups together).

    \b
    Examples:
      tracemw compare --by version
      tracemw compare --by app_version --where "timestamp > now - 1d" --baseline 1.4.0
      tracemw compare --by metadata.feature_flag --where "route = '/chat'" --baseline off
    """
    with _open(store_url) as store:
        groups = store.compare(by, filter_string, baseline)
    if as_json:
        _print_json({"by": by, "groups": [dataclasses.asdict(group) for group in groups]})
    elif groups:
        screen = screen_of()
        _print(views.comparison(screen, by, groups[:_GROUPS]))
        if len(groups) > _GROUPS:
            _print([screen.paint(f"and {len(groups) - _GROUPS} smaller groups (--json has all)", "dim")])
    if not groups:
        _fail("no trace matches" if filter_string else "the store has no traces", NOT_FOUND)


@cli.command(short_help="Remove old traces, or those of a filter.")
@click.option("--older-than", metavar="DURATION", help="Such as 12h, 7d, 2w.")
@click.option("--max-size", metavar="SIZE", help="Remove the oldest until the rows fit: 500MB, 2GiB.")
@click.option("--where", "filter_string", metavar="FILTER", help="Remove exactly these traces.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@_store_option
def purge(
    older_than: str | None, max_size: str | None, filter_string: str | None, yes: bool, store_url: str | None
) -> None:
    """Remove traces; without options those beyond TRACEMW_MAX_AGE (7 days) and TRACEMW_MAX_SIZE (1 GiB).

    \b
    Examples:
      tracemw purge
      tracemw purge --older-than 2d
      tracemw purge --where "route = '/health'" --yes
    """
    limits = from_environment()
    try:
        age = seconds_of(older_than) if older_than else None
        size = bytes_of(max_size) if max_size else None
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    if age is None and size is None and filter_string is None:
        age, size = limits.max_age, limits.max_size
    with _open(store_url) as store:
        removed = 0
        if filter_string is not None:
            if not yes:
                click.confirm(f"Remove the traces where {safe(filter_string)}?", abort=True)
            removed += store.delete(filter_string=filter_string)
        if age is not None or size is not None:
            removed += store.purge(age, size)
    click.echo(f"removed {removed} traces")


@cli.command()
@click.option("--to", "destination", metavar="URL", help="Where to, if not TRACEMW_DESTINATION.")
@click.option("--once", is_flag=True, help="End when nothing is left that can be delivered now.")
@click.option("--timeout", type=_Seconds(min=0), metavar="SECONDS", help="End after so long at most.")
@click.option("--retry", is_flag=True, help="Also try again the traces that were given up.")
@_store_option
@_json_option
def deliver(
    destination: str | None, once: bool, timeout: float | None, retry: bool, store_url: str | None, as_json: bool
) -> None:
    """Deliver what waits in the store to MLflow or an OTLP collector.

    Applications do this themselves while they run; this is for what they left behind, or to run beside them.
    With --once it ends with 1 if a trace that has ended could not be delivered.

    \b
    Examples:
      tracemw deliver --once
      tracemw deliver --to "mlflow+http://localhost:5000?experiment=shop" --once --retry
    """
    from tracemw.config import effective_destination, is_remote
    from tracemw.pipeline.delivery import run_deliverer

    to = destination or effective_destination(from_environment())
    if not is_remote(to):
        raise click.UsageError(
            "there is no remote destination: give --to mlflow+http://host:5000 or otlp+http://..."
        )
    url = _url(store_url)
    if retry:
        with _open(store_url) as store:
            click.echo(f"trying {store.outbox_redeliver()} traces again", err=True)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    result = run_deliverer(url, to, once=once, timeout=timeout, stop=stop)
    if as_json:
        _print_json(dataclasses.asdict(result))
    else:
        later = f" ({result.unfinished} of them have not ended)" if result.unfinished else ""
        click.echo(
            f"delivered {result.delivered} traces; {result.waiting} wait{later}, {result.dead} were given up"
        )
    if result.problem or (once and result.waiting > result.unfinished):
        _fail(result.problem or "not everything could be delivered", NOT_FOUND)


@cli.command(short_help="Say what is configured, where traces go and whether it works.")
@_store_option
@_json_option
def doctor(store_url: str | None, as_json: bool) -> None:
    """Say what is configured, where traces go, whether they get there, and what is in the store.

    Ends with 1 where something keeps traces from being stored or delivered.
    """
    from tracemw.doctor import examine

    report = examine(_url(store_url) if store_url else None)
    if as_json:
        _print_json(report.as_dict())
    else:
        _print(report.lines(screen_of()))
    if report.problems:
        sys.exit(NOT_FOUND)


@cli.command()
def demo() -> None:
    """Trace some traffic, and show what can be seen of it.

    In a checkout with its development packages the two example applications run under real servers; elsewhere a
    small application runs in this process, and its traces go to a temporary file.
    """
    from tracemw.demo import run

    sys.exit(run())


def _url(given: str | None) -> str:
    """Return the URL of the store: the option, TRACEMW_STORE, the file of TRACEMW_DESTINATION, the default."""
    if given:
        return _checked(given)
    store, destination = (os.environ.get(variable(name), "").strip() for name in ("store", "destination"))
    if store:
        return _checked(store)
    return destination if destination.startswith(("sqlite:", "memory:")) else DEFAULT_DESTINATION


def _checked(text: str) -> str:
    return Settings().override({"store": text}).store or DEFAULT_DESTINATION


def _open(given: str | None) -> Store:
    """Open the store for reading.

    Raises:
        StoreError: It is not there or cannot be read; the message says what to do.
    """
    url = _url(given)
    if url == "memory:":
        raise StoreError("the store is in the memory of the application (memory:): only that process can read it")
    path = os.path.abspath(url.removeprefix("sqlite:///"))
    if is_missing(path) and not os.path.islink(path):
        raise StoreError(
            f"there is no store at {path}. Trace something first, run this where the application runs, "
            "or say where it is: --store FILE, or TRACEMW_STORE"
        )
    return open_store(url, create=False)


def _print(lines: Iterable[str]) -> None:
    colour = screen_of().colour
    for line in lines:
        click.echo(line, color=colour)


def _print_json(value: Any) -> None:
    """Print JSON in ASCII: no character of a trace can act upon a terminal."""
    click.echo(json.dumps(value, indent=2))


def _fail(message: str, code: int) -> NoReturn:
    """Print what is wrong on stderr and end."""
    lines = safe_lines(message)
    click.echo(f"tracemw: {lines[0]}", err=True)
    for line in lines[1:]:
        click.echo(line, err=True)
    sys.exit(code)
