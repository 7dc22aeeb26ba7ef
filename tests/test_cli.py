"""The command line: what it prints for people and for programs, and how it ends."""

from __future__ import annotations

import inspect
import json
import os
import pty
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click.testing
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.delivery.backends import Collector
from tests.filter_data import MS, NOW, make_span, make_trace, sample_rows
from tracemw.cli import cli
from tracemw.pipeline.courier import connect
from tracemw.pipeline.lease import Lease
from tracemw.store import open_store
from tracemw.terminal import Column, Screen, cut, safe, table, width
from tracemw.views import duration

Run = Callable[..., click.testing.Result]

HOSTILE = "\x1b[2J\x1b]0;title\x07\x9b31m\r\n\u202eevil\u2066\u200f\x00\x7f\ttext"
COMMANDS = ["search", "show", "tail", "compare", "purge", "deliver", "doctor", "demo"]


def command_runner(env: dict[str, str] | None = None) -> click.testing.CliRunner:
    """Runs commands in this process and keeps stdout and stderr apart; click before 8.2 has to be told."""
    mixes = "mix_stderr" in inspect.signature(click.testing.CliRunner).parameters
    return click.testing.CliRunner(env=env, **{"mix_stderr": False} if mixes else {})  # type: ignore[arg-type]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A store with the sample traces: a is fine, b failed, c was left, d is in progress."""
    path = tmp_path / "traces.db"
    with open_store(f"sqlite:///{path}") as store:
        store.write(*sample_rows())
    return path


@pytest.fixture
def run(path: Path) -> Run:
    """Runs a command on the store, in this process."""

    def invoke(*arguments: str, input: str | None = None) -> click.testing.Result:
        runner = command_runner({"TRACEMW_STORE": str(path)})
        result = runner.invoke(cli, list(arguments), input=input, prog_name="tracemw")
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return invoke


def process(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs a command in a process of its own."""
    env = {**os.environ, **options.pop("env", {})}
    return subprocess.run(
        [sys.executable, "-m", "tracemw", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env=env,
        **options,
    )


# search


def test_search_lists_newest_first(run: Run) -> None:
    """A table with a headline; a column that nobody has a value for is left out."""
    result = run("search")
    head, *lines = result.stdout.splitlines()
    assert result.exit_code == 0
    assert head.split()[:4] == ["STARTED", "STATUS", "TOOK", "NAME"]
    assert [re.split("  +", line)[3] for line in lines] == ["a", "b", "c", "d"]
    assert "OK 200" in lines[0] and "12.9 ms" in lines[0] and "1.0.0" in lines[0] and f"tr-{1:032x}" in lines[0]
    assert "ERROR 503" in lines[1] and "1.50 s" in lines[1]
    assert "disconnected" in lines[2] and "running" in lines[3]
    assert "USER" not in run("search", "name = 'c'").stdout


def test_search_filter_order_and_pages(run: Run) -> None:
    """Filter and order are those of `search_traces`; pages follow each other by their token."""
    found = json.loads(run("search", "status IN ('OK', 'ERROR')", "--order-by", "name DESC", "--json").stdout)
    assert [trace["name"] for trace in found["traces"]] == ["b", "a"] and found["next_page_token"] is None
    names, token = [], None
    for _ in range(4):
        more: list[str] = ["--page-token", token] if token else []
        page = json.loads(run("search", "-n", "1", "--json", *more).stdout)
        names += [trace["name"] for trace in page["traces"]]
        token = page["next_page_token"]
    assert names == ["a", "b", "c", "d"] and token is None


def test_search_json(run: Run) -> None:
    """JSON has what is known about a trace."""
    (trace,) = json.loads(run("search", "name = 'a'", "--json").stdout)["traces"]
    assert trace["trace_id"] == f"tr-{1:032x}"
    assert (trace["state"], trace["status_code"], trace["duration_ms"]) == ("OK", 200, 12.9)
    assert (trace["client_request_id"], trace["session_id"], trace["user_id"]) == ("req-1", "s-1", "jané")
    assert trace["metadata"]["ключ"] == "значение" and trace["tags"]["flag"] == "on"
    assert trace["start_time"] == "2026-05-28T20:25:40.000Z"


def test_nothing_found(run: Run, tmp_path: Path) -> None:
    """Nothing found is exit code 1, with an empty result for programs."""
    result = run("search", "name = 'nobody'")
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", "tracemw: no trace matches\n")
    result = run("search", "name = 'nobody'", "--json")
    assert result.exit_code == 1 and json.loads(result.stdout)["traces"] == []
    open_store(f"sqlite:///{tmp_path / 'empty.db'}").close()
    assert "the store has no traces" in run("search", "--store", str(tmp_path / "empty.db")).stderr
    assert run("compare", "--by", "version", "--store", str(tmp_path / "empty.db")).exit_code == 1


def test_wrong_filter(run: Run) -> None:
    """A wrong filter is exit code 2, with the place and a suggestion."""
    for arguments in (["search", "stauts = 'OK'"], ["tail", "--once", "stauts = 'OK'"]):
        result = run(*arguments)
        assert result.exit_code == 2
        assert result.stderr == (
            "tracemw: unknown field 'stauts'; did you mean 'status'?\n  stauts = 'OK'\n  ^^^^^^\n"
        )
    assert run("compare", "--by", "version", "--where", "stauts = 'OK'").exit_code == 2
    assert run("purge", "--where", "stauts = 'OK'", "--yes").exit_code == 2
    assert run("search", "--order-by", "nmae").exit_code == 2
    assert run("search", "--page-token", "x").exit_code == 2
    assert run("search", "--no-such-option").exit_code == 2


# show


@pytest.mark.parametrize(
    "wanted",
    [
        f"tr-{1:032x}",
        f"{1:032x}",
        f"TR-{1:032X}".replace("TR", "tr"),
        "tr-" + "0" * 31 + "1",
        f"tr-{1:032x}…",
        "req-1",
    ],
)
def test_show_by_id(run: Run, wanted: str) -> None:
    """A trace is found by its id with and without prefix, and by the id of its request."""
    result = run("show", wanted)
    assert result.exit_code == 0
    assert result.stdout.startswith("a  OK 200  12.9 ms  ")


def test_show_by_prefix(run: Run, path: Path) -> None:
    """The first digits are enough where one trace has them; else those that have them are listed."""
    with open_store(f"sqlite:///{path}") as store:
        store.write([make_trace(5, trace_id="abc1" + "0" * 28), make_trace(6, trace_id="abc2" + "0" * 28)], [])
    assert run("show", "tr-abc1").exit_code == run("show", "abc2").exit_code == 0
    result = run("show", "tr-abc")
    assert result.exit_code == 1 and result.stdout == ""
    assert "2 traces have this id; say which one" in result.stderr
    assert "tr-abc1" in result.stderr and "tr-abc2" in result.stderr


def test_show_says_when_requests_share_an_id(run: Run, path: Path) -> None:
    """A request id that came several times (a retry) lists its traces, at most twenty."""
    with open_store(f"sqlite:///{path}") as store:
        store.write([make_trace(n, client_request_id="it's") for n in range(10, 12)], [])
        store.write([make_trace(n, client_request_id="many") for n in range(20, 50)], [])
    result = run("show", "it's")
    assert result.exit_code == 1 and "2 traces have this id" in result.stderr
    result = run("show", "many")
    assert "more than 20 traces" in result.stderr and result.stderr.count("tr-") == 20


@pytest.mark.parametrize(
    "wanted", ["tr-ffff", "no-such", "\\", "' OR '1'='1", "\x1b[31m", f"{9:032x}", "g" * 32, " "]
)
def test_show_unknown(run: Run, wanted: str) -> None:
    """An id that nothing has is exit code 1, whatever is in it."""
    result = run("show", wanted)
    assert (
        result.exit_code == 1 and "there is no trace with the id" in result.stderr and "\x1b" not in result.stderr
    )


def test_show_tree(run: Run, path: Path) -> None:
    """The tree has durations, inputs, outputs, events and exceptions, under facts of the trace."""
    trace = make_trace(7, name="POST /chat", state="ERROR", duration_ns=2000 * MS, tags={"team": "x"})
    start = trace.start_ns
    error = {
        "exception.type": "ValueError",
        "exception.message": "boom",
        "exception.stacktrace": "Traceback:\n  line",
    }
    raised = {"name": "exception", "time_ns": start, "attributes": error}
    chunk = {"name": "chunk", "time_ns": start + 5 * MS, "attributes": {"n": 1}}

    def span(span_id: str, parent_id: str | None, name: str, **facts: Any) -> Any:
        return make_span(
            trace.trace_id, span_id=span_id, parent_id=parent_id, name=name, start_ns=start,
            end_ns=start + 1000 * MS, **facts,
        )  # fmt: skip

    with open_store(f"sqlite:///{path}") as store:
        store.write([trace], [
            span("1", None, "POST /chat", status="ERROR", events=[raised], kind="SERVER"),
            span("2", "1", "answer", status="ERROR", events=[raised], span_type="CHAIN", attributes={
                "mlflow.spanInputs": '{"q": "hi"}', "mlflow.spanOutputs": '"ok"', "model": "m-1"}),
            span("3", "2", "stream", events=[chunk], kind="CLIENT"),
            span("4", "1", "late", status="ERROR", status_message="gave up"),
            span("5", "unknown", "orphan"),
        ])  # fmt: skip
    lines = run("show", f"{7:032x}").stdout.splitlines()
    assert lines[0].startswith("POST /chat  ERROR  2.00 s  ")
    assert "  tag team  x" in lines
    assert lines[lines.index("") + 1 :] == [
        "POST /chat  1.00 s  ERROR",
        "│  ValueError: boom",
        "├─ answer  CHAIN  1.00 s  ERROR",
        '│  │  in   {"q": "hi"}',
        '│  │  out  "ok"',
        "│  │  ValueError: boom",
        "│  │    Traceback:",
        "│  │      line",
        "│  └─ stream  1.00 s  client",
        '│        chunk +5.0 ms  {"n": 1}',
        "└─ late  1.00 s  ERROR",
        "      gave up",
        "orphan  1.00 s",
    ]
    assert "│  │  model  m-1" in run("show", f"{7:032x}", "--attributes").stdout.splitlines()
    assert run("show", f"{7:032x}", "--full").stdout.count("Traceback") == 2


def test_show_json(run: Run) -> None:
    """JSON has the spans with their inputs decoded."""
    found = json.loads(run("show", "req-1", "--json").stdout)
    assert [span["name"] for span in found["spans"]] == ["search", "GET /items/{id}", "generate"]
    assert found["spans"][0]["inputs"]["quote"] == 'say "hi"'
    assert found["spans"][2]["attributes"]["tokens"] == 120


def test_show_odd_trees(run: Run, path: Path) -> None:
    """Parents in a circle, a trace without spans and a chain of thousands are shown."""
    circle, empty, deep = (make_trace(n, name=f"t{n}") for n in (11, 12, 13))
    with open_store(f"sqlite:///{path}") as store:
        store.write([circle, empty, deep], [
            make_span(circle.trace_id, span_id="1", parent_id="2", name="one"),
            make_span(circle.trace_id, span_id="2", parent_id="1", name="two"),
            make_span(circle.trace_id, span_id="3", parent_id="3", name="three", attributes="[]", events="none"),
            *(make_span(deep.trace_id, span_id=f"{n}", parent_id=f"{n - 1}", name=f"s{n}") for n in range(1500)),
        ])  # fmt: skip
    lines = run("show", circle.trace_id).stdout
    assert all(name in lines for name in ("one", "two", "three"))
    assert "(no spans)" in run("show", empty.trace_id).stdout
    assert "(no span of it has ended yet)" in run("show", f"{4:032x}").stdout
    assert run("show", deep.trace_id).stdout.count("└─") == 1499


# Nothing that was traced acts upon the terminal.


def is_harmless(text: str) -> bool:
    """Whether a text has no control characters but line ends, and no marks of direction."""
    return all(c == "\n" or c.isprintable() or c in "\u200c\u200d" for c in text)


def test_hostile_text(run: Run, path: Path) -> None:
    """Escape sequences, C0 and C1 characters and marks of direction in any field come out as escapes."""
    row = make_trace(
        8, name=HOSTILE, state="ERROR", duration_ns=MS, method=HOSTILE, route=HOSTILE, client_request_id=HOSTILE,
        session_id=HOSTILE, user_id=HOSTILE, request_preview=HOSTILE, response_preview=HOSTILE, outcome=HOSTILE,
        metadata={HOSTILE: HOSTILE, "app_version": HOSTILE}, tags={HOSTILE: HOSTILE},
    )  # fmt: skip
    event = {"name": HOSTILE, "time_ns": 0, "attributes": {HOSTILE: HOSTILE}}
    error = {f"exception.{part}": HOSTILE for part in ("type", "message", "stacktrace")}
    span = make_span(
        row.trace_id, name=HOSTILE, span_type=HOSTILE, status="ERROR", status_message=HOSTILE, kind="CLIENT",
        attributes={HOSTILE: HOSTILE, "mlflow.spanInputs": HOSTILE, "mlflow.spanOutputs": json.dumps(HOSTILE)},
        events=[event, {"name": "exception", "time_ns": 0, "attributes": error}], scope=HOSTILE,
    )  # fmt: skip
    with open_store(f"sqlite:///{path}") as store:
        store.write([row], [span])
    outputs = [run("show", f"{8:032x}", "--attributes"), run("show", f"{8:032x}", "--json"), run("search")]
    outputs += [run("search", "--json"), run("tail", "--once"), run("tail", "--once", "--json"), run("doctor")]
    outputs += [run("compare", "--by", "version"), run("compare", "--by", "version", "--json")]
    outputs += [run("search", HOSTILE), run("show", HOSTILE), run("compare", "--by", HOSTILE)]
    outputs += [run("compare", "--by", "version", "--baseline", HOSTILE), run("search", "--store", HOSTILE)]
    for result in outputs:
        assert is_harmless(result.output), result.output
    assert "\\x1b[2J" in outputs[0].stdout and "\\u{202e}evil" in outputs[0].stdout
    assert json.loads(outputs[1].stdout)["spans"][0]["name"] == HOSTILE.replace("\x00", "\ufffd")


@given(st.text())
def test_safe_text_is_harmless(text: str) -> None:
    """What is printable stays as it is, the rest becomes escapes; one line comes out of any text."""
    assert is_harmless(safe(text)) and "\n" not in safe(text)
    if text.isprintable():
        assert safe(text) == text


@given(st.text(), st.integers(1, 30))
def test_cut_fits(text: str, cells: int) -> None:
    """A text is cut to the cells that it may take, also where letters are two cells wide."""
    assert width(cut(safe(text), cells)) <= cells


def test_wide_letters() -> None:
    """East Asian letters count twice, combining marks not at all."""
    assert (width("東京"), width("e\u0301"), width("abc")) == (4, 1, 3)
    assert cut("東京タワー", 5) == "東京…"


def test_tables_fit_the_terminal() -> None:
    """On a narrow terminal columns that can spare cells are cut, on a pipe none is."""
    columns = [Column("A", least=4, weight=1), Column("B", right=True), Column("EMPTY")]
    rows = [["x" * 30, "1", ""], ["東" * 10, "22", ""]]
    assert table(Screen(), columns, rows) == ["A" + " " * 32 + "B", "x" * 30 + "   1", "東" * 10 + " " * 12 + "22"]
    assert max(map(width, table(Screen(columns=20), columns, rows))) == 20


@pytest.mark.parametrize(
    ("nanoseconds", "text"),
    [(None, "-"), (0, "0 µs"), (350_000, "350 µs"), (12_340_000, "12.3 ms"), (123_400_000, "123 ms")]
    + [(1_240_000_000, "1.24 s"), (125_000_000_000, "2 m 05 s"), (7_500_000_000_000, "2 h 05 m")]
    + [(999_900, "1.0 ms"), (999_960_000, "1.00 s"), (-5_000_000, "-5.0 ms")],
)
def test_durations(nanoseconds: int | None, text: str) -> None:
    """Durations have a unit that fits them."""
    assert duration(nanoseconds) == text


# Terminals.


def in_terminal(arguments: list[str], columns: int = 80, **env: str) -> str:
    """What a command writes to a terminal."""
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "tracemw", *arguments], stdout=follower, stderr=follower, stdin=subprocess.DEVNULL,
        env={**os.environ, "TERM": "xterm", "COLUMNS": str(columns), "PYTHONIOENCODING": "utf-8", **env},
    )  # fmt: skip
    os.close(follower)
    output = b""
    try:
        while select.select([leader], [], [], 60)[0]:
            try:
                piece = os.read(leader, 65536)
            except OSError:
                break
            if not piece:
                break
            output += piece
        process.wait(60)
    finally:
        process.kill()
        os.close(leader)
    return output.decode().replace("\r\n", "\n")


def test_colour_only_on_a_terminal(path: Path) -> None:
    """Colours appear on a terminal, unless NO_COLOR is set or it is dumb; never in a pipe."""
    arguments = ["search", "--store", str(path)]
    assert "\x1b[" in in_terminal(arguments)
    assert "\x1b[" not in in_terminal(arguments, NO_COLOR="1")
    assert "\x1b[" not in in_terminal(arguments, TERM="dumb")
    assert "\x1b[" not in process(*arguments).stdout


def test_lines_fit_the_terminal(path: Path) -> None:
    """Long values are cut to the terminal's width, but not with --full."""
    row = make_trace(9, request_preview="x" * 500, client_request_id="long")
    with open_store(f"sqlite:///{path}") as store:
        store.write([row], [make_span(row.trace_id, attributes={"mlflow.spanInputs": "y" * 500})])
    arguments = ["show", "long", "--store", str(path)]
    lines = in_terminal(arguments, columns=60, NO_COLOR="1").splitlines()
    assert max(map(len, lines)) <= 60 and any("…" in line for line in lines)
    assert "y" * 500 in in_terminal([*arguments, "--full"], columns=60, NO_COLOR="1")
    assert "y" * 500 in process(*arguments).stdout
    lines = in_terminal(["search", "--store", str(path)], columns=80, NO_COLOR="1").splitlines()
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_odd_texts_fit_the_terminal(path: Path, columns: int) -> None:
    """Long, wide and hostile texts anywhere in a trace widen no line; a headline keeps what is behind the name."""
    for number, text in enumerate([HOSTILE * 9, "東京" * 200, "x" * 9000], 700):
        row = make_trace(
            number, name=text, user_id=text, session_id=text, client_request_id=f"id-{number}", duration_ns=5 * MS,
            request_preview=text, tags={text: text}, metadata={text: text, "app_version": text}, state="ERROR",
        )  # fmt: skip
        event = {"name": text, "time_ns": NOW, "attributes": {text: text}}
        span = make_span(row.trace_id, name=text, span_type="TOOL", attributes={text: text}, events=[event])
        with open_store(f"sqlite:///{path}") as store:
            store.write([row], [span])
    commands = [["search"], ["tail", "--once"], ["compare", "--by", "version"], ["show", "-a", "id-701"]]
    for command in [*commands, ["show", "-a", "id-700"], ["show", "id-702"]]:
        lines = in_terminal([*command, "--store", str(path)], columns=columns, NO_COLOR="1").splitlines()
        assert max(map(width, lines)) <= (columns if command[0] != "tail" else 150), command
    assert "ERROR  5.0 ms" in in_terminal(["show", "id-702", "--store", str(path)], columns=columns, NO_COLOR="1")


def test_narrow_tables(path: Path) -> None:
    """On a narrow terminal the columns that tell least are left out."""
    lines = in_terminal(["search", "--store", str(path)], columns=40, NO_COLOR="1").splitlines()
    assert max(map(width, lines)) <= 50 and lines[0].split() == ["STATUS", "TOOK", "NAME", "TRACE", "ID"]
    lines = in_terminal(["compare", "--by", "name", "--store", str(path)], columns=40, NO_COLOR="1").splitlines()
    assert max(map(width, lines)) <= 40 and lines[0].split()[:2] == ["NAME", "TRACES"]


def test_output_that_cannot_show_everything(path: Path) -> None:
    """An output that knows few letters gets escapes and a tree of ASCII, not an error."""
    arguments = ["show", "req-2", "--attributes", "--store", str(path)]
    done = process(*arguments, env={"PYTHONIOENCODING": "latin-1"}, encoding="latin-1")
    assert done.returncode == 0 and "place  \\u6771\\u4eac" in done.stdout
    done = process("show", "req-1", "--store", str(path), env={"PYTHONIOENCODING": "latin-1"}, encoding="latin-1")
    assert done.returncode == 0 and "user                      jané" in done.stdout


def test_closed_pipe(path: Path) -> None:
    """A reader that leaves early (`| head`) is no error worth a traceback."""
    with open_store(f"sqlite:///{path}") as store:
        store.write([make_trace(n, request_preview="x" * 900) for n in range(100, 600)], [])
    command = f"{sys.executable} -m tracemw search -n 1000 --json --store {path} | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60)
    assert done.stdout == "{\n" and "Traceback" not in done.stderr


# tail


def test_tail_once(run: Run) -> None:
    """The last traces that ended, oldest first, a line for each."""
    lines = run("tail", "--once").stdout.splitlines()
    assert [re.split("  +", line)[3] for line in lines] == ["c", "b", "a"]
    assert run("tail", "--once", "--last", "1").stdout.count("\n") == 1
    assert run("tail", "--once", "--last", "0").stdout == ""
    assert json.loads(run("tail", "--once", "--json", "status = 'ERROR'").stdout)["name"] == "b"


def test_tail_is_live_and_ends_with_ctrl_c(path: Path) -> None:
    """Traces are printed when they end, also those that were in progress; Ctrl-C is a good end."""
    tail = subprocess.Popen(
        [sys.executable, "-m", "tracemw", "tail", "--last", "1", "--interval", "0.05", "--json"]
        + ["--store", str(path), "name LIKE 'n%' OR name IN ('a', 'd')"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    try:
        assert tail.stdout is not None
        assert json.loads(tail.stdout.readline())["name"] == "a"
        with open_store(f"sqlite:///{path}") as store:
            store.write(
                [make_trace(50, name="other", duration_ns=MS), make_trace(51, name="new", duration_ns=MS)], []
            )
            assert json.loads(tail.stdout.readline())["name"] == "new"
            store.write([make_trace(240, trace_id=f"{4:032x}", name="d", duration_ns=MS)], [])
            assert json.loads(tail.stdout.readline())["name"] == "d"
        tail.send_signal(signal.SIGINT)
        out, err = tail.communicate(timeout=30)
    finally:
        tail.kill()
    assert tail.returncode == 0 and out.strip() == "" and err == ""


# compare


def test_compare(run: Run, path: Path) -> None:
    """A table of groups, the baseline first, differences beyond chance marked; JSON has all numbers."""
    with open_store(f"sqlite:///{path}") as store:
        rows = [
            make_trace(
                n, name="x", metadata={"app_version": f"{n % 2}"}, duration_ns=(10 + n % 7) * MS,
                state="ERROR" if n % 2 and n % 5 == 0 else "OK",
            )
            for n in range(1000, 1400)
        ]  # fmt: skip
        store.write(rows, [])
    arguments = ["compare", "--by", "app_version", "--where", "name = 'x'", "--baseline", "0"]
    head, base, other = run(*arguments).stdout.splitlines()
    assert head.startswith("APP_VERSION")
    assert base.split()[:5] == ["0", "(baseline)", "200", "0", "0.00"]
    assert other.split()[:4] == ["1", "200", "40", "20.00"] and "+20.00 pp *" in other
    found = json.loads(run(*arguments, "--json").stdout)
    assert found["by"] == "app_version"
    assert [group["value"] for group in found["groups"]] == ["0", "1"]
    assert found["groups"][1]["significant"] is True and found["groups"][1]["latency_significant"] is False
    assert run("compare", "--by", "version").stdout.count("(none)") == 1
    result = run("compare", "--by", "version", "--baseline", "9")
    assert result.exit_code == 2 and "there is '" in result.stderr


@pytest.mark.skipif(os.name != "posix", reason="arguments are bytes")
@pytest.mark.parametrize("option", ["--by", "--baseline", "--where"])
def test_compare_by_what_is_no_text(path: Path, option: str) -> None:
    """Bytes of the shell that are no UTF-8 are an error of the command, not a traceback."""
    command = [sys.executable, "-m", "tracemw", "compare", "--by", "name", "--store", str(path), option]
    done = subprocess.run([*command, os.fsdecode(b"tags.\xff")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("tracemw: no ") and "Traceback" not in done.stderr


def test_compare_many_groups(run: Run, path: Path) -> None:
    """People get the largest groups, programs all of them."""
    with open_store(f"sqlite:///{path}") as store:
        store.write([make_trace(n, user_id=f"u{n}") for n in range(100, 180)], [])
    result = run("compare", "--by", "user")
    assert result.stdout.count("\n") == 52 and "smaller groups" in result.stdout
    assert len(json.loads(run("compare", "--by", "user", "--json").stdout)["groups"]) == 83


# purge


def test_purge(run: Run, path: Path) -> None:
    """Traces are removed by filter after a question, by age, and by the configured retention."""
    assert run("purge", "--where", "name = 'a'", input="n\n").exit_code == 1
    assert "removed 1 traces" in run("purge", "--where", "name = 'a'", input="y\n").stdout
    assert run("purge", "--where", "name = 'a'", "--yes").stdout == "removed 0 traces\n"
    now = make_trace(1, name="now", start_ns=time.time_ns())
    with open_store(f"sqlite:///{path}") as store:
        store.write([now, make_trace(2, trace_id="b" * 32, start_ns=1, name="ancient")], [])
    assert run("purge").stdout.startswith("removed ")
    assert "ancient" not in run("search").stdout and "now" in run("search").stdout
    assert run("purge", "--max-size", "1kB").exit_code == 0
    assert run("search").exit_code == 1


@pytest.mark.parametrize(
    "arguments",
    [["--older-than", "5"], ["--older-than", "x"], ["--max-size", "big"]]
    + [["--older-than", "9" * 400 + "w"], ["--max-size", "9" * 400 + "TB"]],
)
def test_purge_wrong_option(run: Run, arguments: list[str]) -> None:
    """A duration needs a unit, a size a number."""
    assert run("purge", *arguments).exit_code == 2


@pytest.mark.parametrize("number", ["9" * 18, "9" * 19, "9" * 40])
def test_huge_numbers(run: Run, number: str) -> None:
    """More than there can be is all there is; a length of time that no clock counts is refused."""
    assert run("search", "-n", number).stdout.count("\n") == 5
    assert run("tail", "--once", "--last", number).stdout.count("\n") == 3
    assert run("purge", "--older-than", f"{number}w", "--max-size", f"{number}TB").stdout == "removed 0 traces\n"
    assert run("tail", "--once", "--interval", number).exit_code == 2
    assert run("deliver", "--once", "--timeout", number).exit_code == 2


@pytest.mark.parametrize("option", ["-n", "--limit", "--max-results"])
@pytest.mark.parametrize("number", ["0", "-1", "x", "1.5", "nan"])
def test_no_such_number_of_traces(run: Run, option: str, number: str) -> None:
    """What is no number of traces is refused by name."""
    result = run("search", option, number)
    assert result.exit_code == 2 and number in result.stderr
    assert run("tail", "--once", "--interval", "nan").exit_code == 2


# doctor and deliver


def test_doctor(run: Run) -> None:
    """What is configured and what is in the store; nothing is wrong."""
    result = run("doctor")
    assert result.exit_code == 0 and "no problem found" in result.stdout
    found = json.loads(run("doctor", "--json").stdout)
    assert found["ok"] is True and found["problems"] == []
    assert (found["store"]["traces"], found["store"]["spans"], found["store"]["in progress"]) == (4, 7, 1)
    assert found["store"]["writable"] is True and found["store"]["mode"] == "600"
    assert found["destination"]["said by"] == "nobody: the default"


def test_doctor_finds_problems(path: Path, tmp_path: Path) -> None:
    """A wrong setting, a destination that nobody answers at, refused traces and a broken file are problems."""
    with open_store(f"sqlite:///{path}") as store:
        store.write([make_trace(1, duration_ns=1)], [], outbox=True)
        (claimed,) = store.outbox_claim(10)
        store.outbox_failed([(claimed.id, claimed.revision)], "400 no such experiment", 0, dead=True)
    env = {"TRACEMW_DESTINATION": "otlp+http://joe:secret@127.0.0.1:9", "TRACEMW_STORE": str(path)}
    done = process("doctor", env=env)
    assert done.returncode == 1 and "secret" not in done.stdout
    assert done.stdout.count("problem: ") == 2
    assert "400 no such experiment" in done.stdout and "joe:***@127.0.0.1:9" in done.stdout
    (tmp_path / "broken.db").write_bytes(b"no database" * 1000)
    cases: list[tuple[dict[str, str], str]] = [
        ({"TRACEMW_STORE": "broken.db"}, "is not an SQLite database"),
        ({"TRACEMW_SAMPLE_RATE": "9"}, "TRACEMW_SAMPLE_RATE"),
        ({"TRACEMW_DESTINATION": "none:"}, "spans are dropped"),
        ({"OTEL_SDK_DISABLED": "true"}, "nothing is traced"),
    ]
    for more, said in cases:
        done = process("doctor", env=more)
        assert done.returncode == 1 and said in done.stdout and "Traceback" not in done.stderr
    missing = json.loads(process("doctor", "--json", env={"TRACEMW_STORE": "later.db"}).stdout)
    assert missing["ok"] is True and missing["store"]["exists"] is False
    assert not (tmp_path / "later.db").exists()


def test_doctor_tells_of_other_processes(run: Run, path: Path) -> None:
    """What another process lost is a warning with where to look; doctor ends well all the same."""
    with open_store(f"sqlite:///{path}") as store:
        store.note_trouble("web-1/4711/x", {"dropped_spans": 12, "failures": {"RequestTracer.open": 3}})
    result = run("doctor")
    assert result.exit_code == 0 and "web-1, process 4711" in result.stdout
    assert "dropped spans: 12; failures: RequestTracer.open 3" in result.stdout
    assert "warning: 1 processes lost spans" in result.stdout
    found = json.loads(run("doctor", "--json").stdout)
    assert len(found["warnings"]) == 1 and list(found["troubles"].values()) != []


def test_doctor_says_who_delivers(path: Path) -> None:
    """Traces that wait are a problem where nobody delivers them, or where delivery falls behind."""
    old = time.time_ns() - 300 * 10**9
    with open_store(f"sqlite:///{path}") as store:
        store.write([make_trace(600, start_ns=old, duration_ns=MS)], [], outbox=True)
        done = process("doctor", "--store", str(path))
        assert done.returncode == 0 and "warning: 1 traces wait for a remote destination" in done.stdout
        collector = Collector()
        try:
            env = {"TRACEMW_DESTINATION": f"otlp+http://127.0.0.1:{collector.port}", "TRACEMW_STORE": str(path)}
            done = process("doctor", env=env)
            assert done.returncode == 1 and "no process delivers them: start the application" in done.stdout
            lease = Lease(lambda: store, "delivery")
            assert lease.hold()
            done = process("doctor", env=env)
            assert done.returncode == 1 and f"process {os.getpid()}" in done.stdout
            assert "falls behind: 1 traces wait" in done.stdout and "lower sample_rate" in done.stdout
            store.delete(filter_string="name = 'x'")
            done = process("doctor", env=env)
            assert done.returncode == 0 and "no problem found" in done.stdout
        finally:
            collector.off()


def test_deliver(path: Path) -> None:
    """Without a remote destination it is a usage error; what cannot be delivered stays, with exit code 1."""
    done = process("deliver", "--once", "--store", str(path))
    assert done.returncode == 2 and "give --to" in done.stderr
    with open_store(f"sqlite:///{path}") as store:
        store.write([make_trace(1, duration_ns=1)], [], outbox=True)
    to = ["--to", "otlp+http://127.0.0.1:9", "--store", str(path)]
    done = process("deliver", "--once", "--timeout", "0.5", "--retry", *to)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "delivered 0 traces; 1 wait" in done.stdout


def test_deliver_once_leaves_what_has_not_ended(path: Path) -> None:
    """All that has ended is delivered: a good end, which says how many traces are still open."""
    collector = Collector()
    with open_store(f"sqlite:///{path}") as store:
        store.write([make_trace(501, duration_ns=1), make_trace(502, state="IN_PROGRESS")], [], outbox=True)
    try:
        to = f"otlp+http://127.0.0.1:{collector.port}"
        done = process("deliver", "--once", "--to", to, "--store", str(path))
    finally:
        collector.off()
    assert done.returncode == 0, done.stderr
    assert done.stdout == "delivered 1 traces; 1 wait (1 of them have not ended), 0 were given up\n"


# Which store, and what is wrong with it.


def test_which_store(tmp_path: Path) -> None:
    """The option wins over TRACEMW_STORE, that over the file of TRACEMW_DESTINATION, that over ./tracemw.db."""
    for name in ("option", "store", "destination", "tracemw"):
        with open_store(f"sqlite:///{tmp_path / name}.db") as store:
            store.write([make_trace(1, name=name)], [])
    env = {"TRACEMW_STORE": "store.db", "TRACEMW_DESTINATION": f"sqlite:///{tmp_path}/destination.db"}
    expected = [
        (["--store", "option.db"], env, "option"),
        (["--store", f"sqlite:///{tmp_path}/option.db"], env, "option"),
        ([], env, "store"),
        ([], {**env, "TRACEMW_STORE": ""}, "destination"),
        ([], {"TRACEMW_DESTINATION": "mlflow+http://localhost:1"}, "tracemw"),
        ([], {}, "tracemw"),
    ]
    for arguments, variables, name in expected:
        result = command_runner(variables).invoke(cli, ["search", "--json", *arguments])
        assert json.loads(result.stdout)["traces"][0]["name"] == name


@pytest.mark.parametrize(
    "command", [["search"], ["show", "x"], ["tail", "--once"], ["compare", "--by", "x"], ["purge"]]
)
def test_unusable_store(command: list[str], tmp_path: Path) -> None:
    """A store that is not there or cannot be read is said so, with what to do and exit code 1."""
    (tmp_path / "broken.db").write_bytes(b"no database" * 1000)
    (tmp_path / "folder.db").mkdir()
    stores = {
        "missing.db": "there is no store at",
        "broken.db": "is not an SQLite database",
        "folder.db": "is no regular file",
        "memory:": "only that process can read it",
        "no/such/folder/x.db": "there is no store at",
    }
    for name, said in stores.items():
        result = command_runner({"TRACEMW_STORE": name}).invoke(cli, command)
        assert result.exit_code == 1 and said in result.stderr and result.stdout == ""
    assert not (tmp_path / "missing.db").exists()
    assert command_runner().invoke(cli, [*command, "--store", "http://x"]).exit_code in (1, 2)


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="needs files of another user")
@pytest.mark.parametrize("command", ["search", "show x", "doctor", "deliver --to otlp+http://127.0.0.1:9"])
def test_store_in_a_closed_directory(command: str) -> None:
    """A store that this user is not let to is not said to be missing, nor waited for."""
    folder = Path(tempfile.mkdtemp())
    path = folder / "store.db"
    with open_store(f"sqlite:///{path}"):
        pass
    connect("otlp+http://127.0.0.1:9").close()  # what is imported later may be closed to an ordinary user
    click.testing.CliRunner().invoke(cli, ["doctor", "--store", str(path)])
    os.setresuid(65534, 65534, 0)
    try:
        result = click.testing.CliRunner().invoke(cli, [*command.split(), "--store", str(path)])
    finally:
        os.setresuid(0, 0, 0)
        shutil.rmtree(folder)
    assert result.exit_code == 1
    assert f"{folder} belongs to root (mode 700), and this process runs as nobody" in result.output


# Help, and the program as such.


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command: str) -> None:
    """Every command has a help text, with examples where it takes arguments."""
    result = command_runner().invoke(cli, [command, "--help"])
    assert result.exit_code == 0
    assert command in ("doctor", "demo") or "Examples:" in result.stdout


@pytest.mark.parametrize("command", ["search", "show", "tail", "compare", "purge"])
def test_examples_of_the_help(run: Run, path: Path, command: str) -> None:
    """Each example can be run as it stands."""
    with open_store(f"sqlite:///{path}") as store:
        facts = {"metadata": {"app_version": "1.4.0", "feature_flag": "off"}, "route": "/chat"}
        store.write([make_trace(900, start_ns=time.time_ns(), duration_ns=MS, **facts)], [])
    text = run(command, "--help").stdout
    examples = re.findall(r"^ +tracemw (.+?)(?: \| jq .*)?$", text, re.MULTILINE)
    assert len(examples) >= 3
    for example in examples:
        result = run(*shlex.split(example), *(["--once"] if command == "tail" else []))
        assert result.exit_code in (0, 1), result.stderr


def test_program() -> None:
    """`python -m tracemw` is the command; without arguments it says what there is."""
    done = process("--help")
    assert done.returncode == 0 and all(f"\n  {command} " in done.stdout for command in COMMANDS)
    assert process("--version").stdout.startswith("tracemw, version ")
    assert process("no-such-command").returncode == 2


def test_demo(tmp_path: Path) -> None:
    """The demo traces two releases in this process and shows search, tree and comparison."""
    code = f"import sys; from tracemw.demo import in_process; sys.exit(in_process('sqlite:///{tmp_path}/demo.db'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for said in (
        "$ tracemw search",
        "$ tracemw show tr-",
        "$ tracemw compare",
        "GET /checkout",
        "PaymentError",
        "1.5.0",
    ):
        assert said in done.stdout
    assert "sk-4711" not in done.stdout
