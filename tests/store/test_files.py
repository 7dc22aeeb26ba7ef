"""The file: private, named in every error, migrated in place, and what is done where it cannot be used."""

from __future__ import annotations

import os
import shutil
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from tests.store.rows import START, span, trace, trace_id
from tracemw.errors import FilterError, StoreError
from tracemw.store import Store, layout, open_store, patience, reindex, tokens, words
from tracemw.store.errors import explained

posix = pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")


def mode(path: str) -> int:
    """Return the permission bits of a file."""
    return stat.S_IMODE(os.stat(path).st_mode)


@contextmanager
def ordinary_user() -> Iterator[None]:
    """Run the block without the rights of root, to whom every file is open."""
    if os.name != "posix" or os.getuid() != 0:
        yield
        return
    os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


@pytest.fixture
def shared() -> Iterator[Path]:
    """A directory that an ordinary user may reach."""
    path = Path(tempfile.mkdtemp())
    path.chmod(0o777)
    yield path
    shutil.rmtree(path)


@posix
def test_only_the_owner_can_read_it() -> None:
    """Database, log and index have mode 0600 from the moment they exist, whatever the umask is."""
    before = os.umask(0)
    try:
        with open_store("sqlite:///store.db") as store:
            store.write([trace(1)], [span(1)])
            assert [mode(f"store.db{end}") for end in ("", "-wal", "-shm")] == [0o600] * 3
    finally:
        os.umask(before)


def test_a_relative_path_is_of_the_directory_at_opening(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that changes its directory goes on writing to the same file."""
    (tmp_path / "elsewhere").mkdir()
    with open_store("sqlite:///store.db") as store:
        monkeypatch.chdir(tmp_path / "elsewhere")
        store.write([trace(1)], [])
        assert store.path == str(tmp_path / "store.db")
    assert not (tmp_path / "elsewhere" / "store.db").exists()


@pytest.mark.parametrize("name", ["with space.db", "per%20cent?.db", "umlaut-ü#.db", "-dash;.db"])
def test_any_file_name(name: str, tmp_path: Path) -> None:
    """A path is taken as it is: nothing in it is an escape or an option."""
    with open_store(f"sqlite:///{tmp_path}/{name}") as store:
        store.write([trace(1)], [])
    assert (tmp_path / name).stat().st_size > 0
    with open_store(f"sqlite:///{name}", create=False) as store:
        assert store.get(trace_id(1)) is not None


@pytest.mark.parametrize(
    "url", ["", "store.db", "sqlite:", "sqlite://", "sqlite:///", "mysql://x", "sqlite:///a\0b"]
)
def test_what_is_no_url(url: str) -> None:
    """A url of another form is refused, and the message shows the right ones."""
    with pytest.raises(StoreError, match="no store: "):
        open_store(url)


def refusal(url: str, *, create: bool = True) -> StoreError:
    """Return the error with which a store is refused."""
    with pytest.raises(StoreError) as caught:
        open_store(url, create=create)
    return caught.value


def test_missing_directory(tmp_path: Path) -> None:
    """The message names the directory that is to be made."""
    error = refusal("sqlite:///not/there/store.db")
    assert f"create the directory {tmp_path}/not/there" in str(error)
    assert not error.retry


def test_a_file_in_the_path() -> None:
    """A file where a directory should be is said to be one."""
    Path("file").touch()
    assert "is a file, not a directory" in str(refusal("sqlite:///file/store.db"))


def test_a_directory() -> None:
    """A directory is no store."""
    Path("folder").mkdir()
    assert "no regular file" in str(refusal("sqlite:///folder"))


def test_no_file_where_none_may_be_made() -> None:
    """Reading makes no file; the message says what to do first."""
    error = refusal("sqlite:///store.db", create=False)
    assert "there is no store at" in str(error)
    assert not os.path.exists("store.db")


@posix
def test_a_link_to_nothing() -> None:
    """A file is never made through a link, which somebody else may have laid."""
    os.symlink("target.db", "store.db")
    assert "is a link to a file that is not there" in str(refusal("sqlite:///store.db"))
    assert not os.path.exists("target.db")


@posix
def test_a_link_to_a_store() -> None:
    """A link to a file that is there is followed."""
    open_store("sqlite:///target.db").close()
    os.symlink("target.db", "store.db")
    with open_store("sqlite:///store.db") as store:
        store.write([trace(1)], [])
    with open_store("sqlite:///target.db") as store:
        assert store.get(trace_id(1)) is not None


@posix
def test_a_directory_that_cannot_be_written(shared: Path) -> None:
    """The message says what to make writable."""
    shared.chmod(0o555)
    with ordinary_user():
        error = refusal(f"sqlite:///{shared}/store.db")
    assert "make the file and its directory writable" in str(error)
    assert not error.retry


@posix
def test_a_file_that_may_only_be_read(shared: Path) -> None:
    """It cannot be written to, but it can be searched."""
    with open_store(f"sqlite:///{shared}/store.db") as store:
        store.write([trace(1)], [span(1)])
    (shared / "store.db").chmod(0o444)
    shared.chmod(0o555)
    with ordinary_user():
        assert "cannot be written" in str(refusal(f"sqlite:///{shared}/store.db"))
        with open_store(f"sqlite:///{shared}/store.db", create=False) as store:
            assert [t.row for t in store.search().traces] == [trace(1)]
            with pytest.raises(StoreError, match="cannot be written"):
                store.write([trace(2)], [])


@posix
@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="needs files of another user")
@pytest.mark.parametrize(
    ("closed", "mode", "create", "said"),
    [
        ("store.db", 0o600, False, "cannot be read: it belongs to root (mode 600)"),
        ("store.db", 0o600, True, "cannot be written: it belongs to root (mode 600)"),
        ("store.db", 0o644, True, "cannot be written: it belongs to root (mode 644)"),
        ("store.db-wal", 0o600, False, "store.db-wal belongs to root (mode 600)"),
        ("store.db-wal", 0o600, True, "store.db-wal belongs to root (mode 600)"),
        (".", 0o700, False, "belongs to root (mode 700)"),
        (".", 0o700, True, "belongs to root (mode 700)"),
    ],
)
def test_a_store_of_another_user(shared: Path, closed: str, mode: int, create: bool, said: str) -> None:
    """The message says which file is closed, whose it is, who asks and what to do, not that nothing is there."""
    with open_store(f"sqlite:///{shared}/store.db") as store:
        store.write([trace(1)], [span(1)])
        for name in ("store.db", "store.db-wal", "store.db-shm"):
            (shared / name).chmod(0o666)
        (shared / closed).chmod(mode)
        with ordinary_user(), pytest.raises(StoreError) as caught:
            open_store(f"sqlite:///{shared}/store.db", create=create)
    assert said in str(caught.value) and "runs as nobody. Run it as root" in str(caught.value)
    assert not caught.value.retry


@posix
def test_a_store_that_its_owner_closed(shared: Path) -> None:
    """To run as the owner is no advice for the owner."""
    with ordinary_user():
        with open_store(f"sqlite:///{shared}/store.db") as store:
            store.write([trace(1)], [])
        (shared / "store.db").chmod(0o400)
        said = str(refusal(f"sqlite:///{shared}/store.db"))
    assert "runs as this very user. Choose another path" in said and "Run it as" not in said


_ON_A_READONLY_DISK = """
mount -t tmpfs none "$1" && cp store.db "$1" && mount -o remount,ro "$1" || exit 77
"$2" -c '
import sys
from tracemw.errors import StoreError
from tracemw.store import open_store
for name in "store.db", "new.db":
    try:
        open_store(f"sqlite:///{sys.argv[1]}/{name}")
    except StoreError as error:
        print(error)
' "$1"
"""


@pytest.mark.skipif(not shutil.which("unshare"), reason="needs mounts of its own")
def test_a_disk_that_is_mounted_readonly(shared: Path) -> None:
    """The message says so, also to root, instead of whose the file is."""
    open_store("sqlite:///store.db").close()
    arguments = ["unshare", "-m", "sh", "-c", _ON_A_READONLY_DISK, "sh", str(shared), sys.executable]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60)
    if done.returncode in (1, 77):
        pytest.skip(f"cannot mount here: {done.stderr}")
    written, made = done.stdout.splitlines()
    assert "store.db cannot be written: its file system is mounted read-only. Choose a path" in written
    assert "new.db cannot be made: Read-only file system" in made


def test_a_file_that_is_no_database() -> None:
    """It is left alone, and the message says so."""
    Path("store.db").write_bytes(b"these are notes, not pages\n" * 100)
    error = refusal("sqlite:///store.db")
    assert "is not an SQLite database: move it away" in str(error)
    assert not error.retry
    assert Path("store.db").read_bytes().startswith(b"these are notes")


def test_the_database_of_another_program() -> None:
    """It is left alone: no table of ours appears in it."""
    with closing(sqlite3.connect("store.db")) as connection:
        connection.execute("CREATE TABLE notes (text)")
    assert "another program" in str(refusal("sqlite:///store.db"))
    with closing(sqlite3.connect("store.db")) as connection:
        assert connection.execute("SELECT name FROM sqlite_master").fetchall() == [("notes",)]


def test_an_empty_file_is_filled() -> None:
    """A file of no bytes (`touch`, a temporary file) becomes a store."""
    Path("store.db").touch()
    with open_store("sqlite:///store.db") as store:
        store.write([trace(1)], [])


def test_a_damaged_file() -> None:
    """Pages overwritten with nonsense are an error with advice, when they are met."""
    with open_store("sqlite:///store.db") as store:
        store.write([trace(n) for n in range(500)], [span(n) for n in range(500)])
    data = bytearray(Path("store.db").read_bytes())
    data[4096 * 2 :] = os.urandom(len(data) - 4096 * 2)
    Path("store.db").write_bytes(data)
    with pytest.raises(StoreError, match="is damaged|not an SQLite database") as caught:
        with open_store("sqlite:///store.db") as store:
            store.search()
    assert not caught.value.retry


def test_a_file_of_a_newer_version() -> None:
    """It is not touched; the message says which version it has."""
    open_store("sqlite:///store.db").close()
    with closing(sqlite3.connect("store.db")) as connection:
        connection.execute("PRAGMA user_version=99")
    error = refusal("sqlite:///store.db")
    assert "newer tracemw (layout 99" in str(error) and "update tracemw" in str(error)
    assert not error.retry


def test_locked_by_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who finds the file locked waits, then is told to try again; reading goes on meanwhile."""
    monkeypatch.setattr(patience, "BUSY_TIMEOUT", 0.1)
    with open_store("sqlite:///store.db") as store, closing(sqlite3.connect("store.db")) as other:
        store.write([trace(1)], [])
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match="locked by another process") as caught:
            store.write([trace(2)], [])
        assert caught.value.retry
        assert len(store.search().traces) == 1
        other.rollback()
        store.write([trace(2)], [])
        assert len(store.search().traces) == 2


def test_a_full_disk() -> None:
    """What does not fit is refused whole, worth trying again, and the file stays whole."""
    with open_store("sqlite:///store.db") as store:
        store.write([trace(1)], [span(1)])
        with store._pool.connection() as connection:  # the limit is one that SQLite knows; the error is its own
            pages = connection.execute("PRAGMA page_count").fetchone()[0]
            connection.execute(f"PRAGMA max_page_count={pages + 3}")
        big = [span(1, n, attributes='{"a": "%s"}' % ("x" * 5000)) for n in range(1, 50)]
        with pytest.raises(StoreError, match="is full: free some space") as caught:
            store.write([trace(2)], big)
        assert caught.value.retry
        with store._pool.connection() as connection:
            connection.execute("PRAGMA max_page_count=100000")
        assert len(store.search().traces) == 1
        store.write([trace(2)], big)
        assert store.read("PRAGMA integrity_check") == [("ok",)]


def test_a_store_that_was_closed() -> None:
    """It says so, rather than open the file again behind the caller's back."""
    store = open_store("sqlite:///store.db")
    store.close()
    store.close()
    with pytest.raises(StoreError, match="was closed"):
        store.search()


def test_a_file_removed_meanwhile() -> None:
    """`rm tracemw.db*` while the program runs starts a new file, as it is meant to."""
    with open_store("sqlite:///store.db") as store:
        store.write([trace(1)], [])
        for name in ("store.db", "store.db-wal", "store.db-shm"):
            os.unlink(name)
        store.write([trace(2)], [])
        assert [t.row for t in store.search().traces] == [trace(2)]
    with open_store("sqlite:///store.db") as store:
        assert [t.row for t in store.search().traces] == [trace(2)]


def test_a_file_removed_without_its_log() -> None:
    """A log that was left behind does not get into the new file."""
    with open_store("sqlite:///store.db") as store:
        store.write([trace(n) for n in range(300)], [])
        os.unlink("store.db")
        store.write([trace(1000)], [])
        assert [t.row for t in store.search().traces] == [trace(1000)]
    with open_store("sqlite:///store.db") as store:
        assert [t.row for t in store.search().traces] == [trace(1000)]
        assert store.read("PRAGMA integrity_check") == [("ok",)]


def test_memory_is_not_shared() -> None:
    """Each store in memory is one of its own; its threads share it."""
    with open_store("memory:") as first, open_store("memory:") as second:
        threads = [threading.Thread(target=first.write, args=([trace(n)], [span(n)])) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(first.search().traces) == 8
        assert second.search().traces == []


# Layout 1, the first one, as it was made.
FIRST_LAYOUT = """
CREATE TABLE traces (
    id INTEGER PRIMARY KEY, trace_id TEXT UNIQUE NOT NULL, root_span_id TEXT, has_parent INTEGER NOT NULL,
    name TEXT NOT NULL, start_ns INTEGER NOT NULL, duration_ns INTEGER, state TEXT NOT NULL, outcome TEXT,
    method TEXT, route TEXT, status_code INTEGER, client_request_id TEXT, session_id TEXT, user_id TEXT,
    environment TEXT, version TEXT, deployment TEXT, region TEXT, request_preview TEXT, response_preview TEXT,
    metadata TEXT NOT NULL, tags TEXT NOT NULL, revision INTEGER NOT NULL
);
CREATE INDEX traces_start ON traces (start_ns);
CREATE TABLE spans (
    id INTEGER PRIMARY KEY, trace INTEGER NOT NULL REFERENCES traces (id), span_id TEXT NOT NULL, parent_id TEXT,
    name TEXT NOT NULL, span_type TEXT, kind TEXT NOT NULL, start_ns INTEGER NOT NULL, end_ns INTEGER NOT NULL,
    status TEXT NOT NULL, status_message TEXT, attributes TEXT NOT NULL, events TEXT NOT NULL, links TEXT NOT NULL,
    scope TEXT, UNIQUE (trace, span_id)
);
CREATE TABLE outbox (
    trace INTEGER PRIMARY KEY, revision INTEGER, attempts INTEGER, due_ns INTEGER, reason TEXT, dead INTEGER
);
CREATE TABLE lease (name TEXT PRIMARY KEY, owner TEXT NOT NULL, expires_ns INTEGER NOT NULL);
INSERT INTO traces VALUES
    (1, '00000000000000000000000000000001', 'f000000000000001', 0, 'GET /a', 1750000000000000000, 5, 'OK',
     'completed', 'GET', '/a', 200, 'r-1', 's-1', 'jane', NULL, '1.0.0', NULL, 'eu', 'q', 'a',
     '{"app_version":"1.0.0","region":"eu"}', '{"k":"v"}', 3),
    (4, '00000000000000000000000000000002', NULL, 0, 'step', 1750000000000000000, NULL, 'IN_PROGRESS',
     NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, '{}', '{}', 1);
INSERT INTO spans VALUES
    (1, 1, 'f000000000000001', NULL, 'GET /a', NULL, 'SERVER', 1750000000000000000, 1750000000000000005, 'UNSET',
     NULL, '{}', '[]', '[]', 'tracemw'),
    (2, 4, '0000000000000001', 'f000000000000002', 'step', 'LLM', 'INTERNAL', 1750000000000000000,
     1750000000000000001, 'UNSET', NULL, '{}', '[]', '[]', 'tracemw');
INSERT INTO outbox VALUES (1, 3, 2, 0, 'refused', 1);
INSERT INTO lease VALUES ('delivery', 'me', 1);
PRAGMA application_id=1953656183;
PRAGMA user_version=1;
"""


@pytest.fixture
def old_file() -> None:
    """A store as the first version made it."""
    with closing(sqlite3.connect("store.db")) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.executescript(FIRST_LAYOUT)


def check_migrated(store: Store) -> None:
    """Everything of the old file is there, found in the new ways too."""
    assert {t.row.trace_id for t in store.search().traces} == {trace_id(1), trace_id(2)}
    for text in ("metadata.region = 'eu'", "tags.k = 'v'", "user = 'jane'", "span.name = 'GET /a'"):
        found = store.search(text).traces
        assert [(t.id, t.revision, t.row.start_ns, len(t.spans)) for t in found] == [(1, 3, START, 1)], text
    assert [t.id for t in store.search("span.type = 'LLM'").traces] == [4]
    assert [(letter.id, letter.attempts, letter.reason) for letter in store.outbox_dead()] == [(1, 2, "refused")]
    assert store.read("SELECT owner FROM lease") == [("me",)]
    assert store.read("SELECT count(DISTINCT start_key) FROM traces") == [(2,)]
    assert store.read("PRAGMA user_version") == [(3,)]
    assert store.read("PRAGMA integrity_check") == [("ok",)]


@pytest.mark.usefixtures("old_file")
def test_an_older_file_is_migrated_in_place() -> None:
    """A file of the first layout is brought up to date when it is opened, and used like any other."""
    with open_store("sqlite:///store.db") as store:
        check_migrated(store)
        store.write([trace(2)], [span(2)])
        found = store.get(trace_id(2))
        assert found is not None and found.id == 4 and found.row == trace(2) and len(found.spans) == 2
        store.write([trace(3)], [])
        assert [t.id for t in store.search("client_request_id = 'req-3'").traces] == [5]
        assert store.delete(trace_ids=[trace_id(n) for n in (1, 2, 3)]) == 3
    with open_store("sqlite:///store.db") as store:
        assert store.search().traces == []


# Layout 2, with the words and documents that it had.
SECOND_LAYOUT = """
CREATE TABLE traces (
    id INTEGER PRIMARY KEY AUTOINCREMENT, trace_id TEXT NOT NULL UNIQUE, start_key INTEGER NOT NULL,
    root_span_id TEXT, has_parent INTEGER NOT NULL, name TEXT NOT NULL, start_ns INTEGER NOT NULL,
    duration_ns INTEGER, state TEXT NOT NULL, outcome TEXT, method TEXT, route TEXT, status_code INTEGER,
    client_request_id TEXT, session_id TEXT, user_id TEXT, environment TEXT, version TEXT, deployment TEXT,
    region TEXT, request_preview TEXT, response_preview TEXT, metadata TEXT NOT NULL, tags TEXT NOT NULL,
    words TEXT NOT NULL, other_error INTEGER NOT NULL, revision INTEGER NOT NULL
);
CREATE INDEX traces_by_time ON traces (
    start_key, state, duration_ns, version, region, deployment, environment, route
);
CREATE TABLE spans (
    id INTEGER PRIMARY KEY, trace INTEGER NOT NULL REFERENCES traces (id), span_id TEXT NOT NULL, parent_id TEXT,
    name TEXT NOT NULL, span_type TEXT, kind TEXT NOT NULL, start_ns INTEGER NOT NULL, end_ns INTEGER NOT NULL,
    status TEXT NOT NULL, status_message TEXT, attributes TEXT NOT NULL, events TEXT NOT NULL, links TEXT NOT NULL,
    scope TEXT, UNIQUE (trace, span_id)
);
CREATE TABLE outbox (
    trace INTEGER PRIMARY KEY REFERENCES traces (id), attempts INTEGER NOT NULL, due_ns INTEGER NOT NULL,
    reason TEXT, dead INTEGER NOT NULL
);
CREATE TABLE lease (name TEXT PRIMARY KEY, owner TEXT NOT NULL, expires_ns INTEGER NOT NULL);
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
INSERT INTO traces VALUES
    (1, '00000000000000000000000000000001', 1750000000001000000, 'f000000000000001', 0, 'GET /items/{id}',
     1750000000001000000, 5000000, 'OK', 'completed', 'GET', '/items/{id}', 200, 'req-1', 's-1', 'jane', NULL,
     '1.0.0', NULL, NULL, 'question', 'answer', '{"app_version":"1.0.0"}', '{"k":"v"}',
     'sname=^g^e^t%20/items/%7bid%7d sname=step ytype=^t^o^o^l', 0, 1),
    (2, '00000000000000000000000000000002', 1750000000002000000, 'f000000000000002', 0, 'GET /items/{id}',
     1750000000002000000, 12900000, 'ERROR', 'completed', 'GET', '/items/{id}', 200, 'req-2', 's-1', 'jane', NULL,
     '1.0.0', NULL, NULL, 'question', 'answer', '{"app_version":"1.0.0"}', '{}',
     'sname=^g^e^t%20/items/%7bid%7d', 0, 1),
    (3, '00000000000000000000000000000003', 1750000000003000001, NULL, 0, 'step', 1750000000003000001, NULL,
     'IN_PROGRESS', NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, '{}', '{}',
     'sname=step ytype=^t^o^o^l', 0, 1);
INSERT INTO spans VALUES
    (1, 1, 'f000000000000001', NULL, 'GET /items/{id}', NULL, 'SERVER', 1750000000001000000, 1750000000001001000,
     'UNSET', NULL, '{"model":"local","tokens":120}', '[]', '[]', 'tracemw'),
    (2, 1, '0000000000000001', 'f000000000000001', 'step', 'TOOL', 'INTERNAL', 1750000000001000001,
     1750000000008000001, 'UNSET', NULL, '{"k":3}', '[]', '[]', 'tracemw'),
    (3, 2, 'f000000000000002', NULL, 'GET /items/{id}', NULL, 'SERVER', 1750000000002000000, 1750000000002001000,
     'ERROR', NULL, '{}', '[]', '[]', 'tracemw'),
    (4, 3, '0000000000000001', 'f000000000000003', 'step', 'TOOL', 'INTERNAL', 1750000000003000001,
     1750000000003001001, 'UNSET', NULL, '{}', '[]', '[]', 'tracemw');
PRAGMA application_id=1953656183;
PRAGMA user_version=2;
"""
SECOND_INDEX = """
CREATE VIRTUAL TABLE tokens USING fts5(
    words, content='', detail=none, columnsize=0, tokenize="ascii tokenchars '._-/:=^%#'"
);
INSERT INTO tokens (rowid, words) VALUES
    (1750000000001000000, 'mapp_version=1.0.0 tk=v cname=^g^e^t%20/items/%7bid%7d cstate=^o^k coutcome=completed '
     || 'cmethod=^g^e^t croute=/items/%7bid%7d cstatus_code=200 cclient_request_id=req-1 csession_id=s-1 '
     || 'cuser_id=jane sname=^g^e^t%20/items/%7bid%7d sname=step ytype=^t^o^o^l'),
    (1750000000002000000, 'mapp_version=1.0.0 cname=^g^e^t%20/items/%7bid%7d cstate=^e^r^r^o^r coutcome=completed '
     || 'cmethod=^g^e^t croute=/items/%7bid%7d cstatus_code=200 cclient_request_id=req-2 csession_id=s-1 '
     || 'cuser_id=jane sname=^g^e^t%20/items/%7bid%7d'),
    (1750000000003000001, 'cname=step cstate=^i^n_^p^r^o^g^r^e^s^s sname=step ytype=^t^o^o^l');
INSERT INTO facts VALUES ('tokens', 'current');
"""
OF_SECOND = {
    "span.name = 'step'": [3, 1], "span.type = 'TOOL'": [3, 1], "span.type = 'UNKNOWN'": [2, 1],
    "span.attributes.model = 'local'": [1], "span.attributes.tokens = 120": [1], "span.attributes.k = '3'": [1],
    "span.status = 'OK'": [3, 1], "span.status = 'ERROR'": [2], "span.execution_time = 7": [1],
    "execution_time = 12": [2], "request = 'question'": [2, 1], "end_time = 1750000000006": [1],
    "user = 'jane' AND span.name = 'step'": [1], "tags.k = 'v'": [1], "state = 'ERROR'": [2],
    "span.attributes.model = 'remote'": [], "span.name = 'none'": [],
}  # fmt: skip


@pytest.fixture
def second_file() -> None:
    """A store as version 2 of the layout had it."""
    with closing(sqlite3.connect("store.db")) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.executescript(SECOND_LAYOUT + (SECOND_INDEX if tokens.supported() else ""))


def check_second(store: Store) -> None:
    """Everything of that file is found by everything that is told of it."""
    for text, ids in OF_SECOND.items():
        assert [t.id for t in store.search(text).traces] == ids, text


def left_to_index(store: Store) -> int:
    """Return how many traces have the words of layout 2."""
    return int(store.read(f"SELECT count(*) FROM traces WHERE {layout.OLD_WORDS}")[0][0])


@pytest.mark.usefixtures("second_file")
def test_the_second_layout_is_migrated_in_place() -> None:
    """A small file has its new words when it is open, and can be used like any other."""
    with open_store("sqlite:///store.db") as store:
        assert left_to_index(store) == 0
        check_second(store)
        store.write([trace(3)], [span(3, attributes='{"model":"remote"}')])
        assert [t.id for t in store.search("span.attributes.model = 'remote'").traces] == [3]
        assert store.delete(trace_ids=[trace_id(n) for n in (1, 2, 3)]) == 3
        assert store.read("PRAGMA integrity_check") == [("ok",)]


@pytest.mark.usefixtures("second_file")
def test_a_large_file_is_indexed_by_and_by(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, between and after the parts of it everything is found; writing, patching and deleting go on."""
    monkeypatch.setattr(reindex, "MOMENT", -1.0)
    monkeypatch.setattr(reindex, "TRACES", 1)
    with open_store("sqlite:///store.db") as store:
        for left in (3, 2, 1, 0):
            assert left_to_index(store) == left
            check_second(store)
            with store._writing() as connection:
                assert reindex.step(connection) == bool(left)
        assert {t.revision for t in store.search().traces} == {1}


@pytest.mark.usefixtures("second_file")
def test_old_words_are_replaced_with_what_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trace that gets a span gets its words; one that is patched or deleted keeps the old ones until then."""
    monkeypatch.setattr(reindex, "MOMENT", -1.0)
    with open_store("sqlite:///store.db") as store:
        store.write([], [span(1, 2, name="more", attributes='{"n":1}')])
        store.patch(trace_id(2), tags={"a": "b"})
        store.write([trace(4)], [span(4)])
        assert left_to_index(store) == 2
        assert store.delete(trace_ids=[trace_id(3)]) == 1
        store.reindex()
        assert left_to_index(store) == 0
        for text, ids in {
            "span.name = 'more'": [1], "span.attributes.n = 1": [1], "span.attributes.model = 'local'": [1],
            "tags.a = 'b' AND span.status = 'ERROR'": [2], "span.name = 'step'": [1], "execution_time = 5": [4, 1],
        }.items():  # fmt: skip
            assert [t.id for t in store.search(text).traces] == ids, text
        store.delete(trace_ids=[trace_id(n) for n in (1, 2, 4)])
        if tokens.supported():
            with store._pool.connection() as connection:
                connection.execute("CREATE VIRTUAL TABLE temp.left USING fts5vocab(main, tokens, row)")
                assert connection.execute("SELECT term FROM temp.left").fetchall() == []


def test_a_process_of_an_older_version_goes_on() -> None:
    """What it adds to a trace, in words of layout 2, is found like everything else."""
    with open_store("sqlite:///store.db") as store:
        store.write([trace(1, duration_ns=None, state="IN_PROGRESS")], [span(1)])
        with store._writing() as connection:
            connection.execute("UPDATE traces SET words = words || ' sname=late', duration_ns = 9000000")
            connection.execute(
                "INSERT INTO spans SELECT 7, trace, '1', NULL, 'late', NULL, kind, start_ns, end_ns, status, NULL,"
                " '{\"k\":1}', events, links, scope FROM spans"
            )
        for _ in range(2):
            for text in ("span.name = 'late'", "span.attributes.k = 1", "execution_time = 9"):
                assert [t.id for t in store.search(text).traces] == [1], text
            store.reindex()
        assert left_to_index(store) == 0


@pytest.mark.skipif(not tokens.supported(), reason="needs FTS5")
def test_what_an_older_version_adds_can_be_deleted() -> None:
    """Only words that were indexed go: FTS5 calls a file damaged of which more went than came."""
    with open_store("sqlite:///store.db") as store:
        unfinished = trace(1, duration_ns=None, state="IN_PROGRESS", request_preview=None, response_preview=None)
        store.write([unfinished], [span(1)])
        own = words.of_trace(unfinished)
        with store._writing() as connection:  # as layout 2 did it
            (key, known), = connection.execute("SELECT start_key, words FROM traces")
            document = tokens.document(unfinished, known).split(" ")
            tokens.remove(connection, [(key, " ".join(word for word in document if word not in own))])
            connection.execute(
                "UPDATE traces SET words = words || ' sname=late', duration_ns = 9000000, request_preview = 'q'"
            )
            tokens.add(connection, [(key, " ".join(word for word in document if word not in own) + " sname=late")])
        assert store.delete(trace_ids=[trace_id(1)]) == 1


@pytest.mark.usefixtures("second_file")
def test_times_without_an_end_are_indexed() -> None:
    """Infinite times, which an older version stored as they came, keep no file from being opened and indexed."""
    with closing(sqlite3.connect("store.db")) as connection, connection:
        connection.execute("UPDATE spans SET end_ns = 9e999 WHERE id = 2")
        connection.execute("UPDATE traces SET duration_ns = 9e999 WHERE id = 2")
    with open_store("sqlite:///store.db") as store:
        assert left_to_index(store) == 0
        assert [t.id for t in store.search("span.name = 'step'").traces] == [3, 1]


@pytest.mark.skipif(not tokens.supported(), reason="needs FTS5")
@pytest.mark.usefixtures("second_file")
def test_the_second_layout_without_fts5(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is migrated where Python's SQLite lacks FTS5 is indexed where it has it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "supported", lambda: False)
        with open_store("sqlite:///store.db") as store:
            check_second(store)
    with open_store("sqlite:///store.db") as store:
        assert store.read("SELECT value FROM facts WHERE name = 'tokens'") == [("current",)]
        check_second(store)


@pytest.mark.usefixtures("old_file")
def test_several_open_an_older_file_at_once() -> None:
    """One of them migrates it, the others wait."""
    stores: list[Store] = []
    threads = [threading.Thread(target=lambda: stores.append(open_store("sqlite:///store.db"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(stores) == 8
    for store in stores:
        check_migrated(store)
        store.close()


@pytest.mark.usefixtures("old_file")
def test_a_failed_migration_leaves_the_file_as_it_was() -> None:
    """A migration that cannot be finished (a full disk) has not begun."""
    with closing(sqlite3.connect("store.db")) as connection:
        connection.execute("CREATE TABLE facts (in_the_way)")
    before = dump("store.db")
    with pytest.raises(StoreError):
        open_store("sqlite:///store.db")
    assert dump("store.db") == before


def dump(path: str) -> list[str]:
    """Return a database as SQL."""
    with closing(sqlite3.connect(path)) as connection:
        return [*connection.iterdump(), str(connection.execute("PRAGMA user_version").fetchone())]


@pytest.mark.skipif(not tokens.supported(), reason="needs FTS5")
def test_without_fts5() -> None:
    """Where Python's SQLite lacks FTS5 everything works by reading rows, and the index is made up for later."""
    with open_store("sqlite:///store.db") as store:
        store.write([trace(1)], [span(1, 1)])
    with pytest.MonkeyPatch.context() as patch, open_store("sqlite:///store.db") as store:
        patch.setattr(tokens, "supported", lambda: False)  # nothing else here can take FTS5 away
        store.write([trace(2)], [span(2, 1)])
        store.patch(trace_id(1), tags={"a": "b"})
        assert [t.row.trace_id for t in store.search("user = 'jane'").traces] == [trace_id(2), trace_id(1)]
        assert [t.row.trace_id for t in store.search("tags.a = 'b'").traces] == [trace_id(1)]
        store.write([trace(3)], [])
        assert store.delete(trace_ids=[trace_id(3)]) == 1
    with open_store("sqlite:///store.db", create=False) as store:
        assert store.read("SELECT value FROM facts WHERE name = 'tokens'") == [("current",)]
        assert [t.row.trace_id for t in store.search("user = 'jane'").traces] == [trace_id(2), trace_id(1)]
        assert [t.row.trace_id for t in store.search("tags.a = 'b'").traces] == [trace_id(1)]


@pytest.mark.parametrize(
    ("said", "kind", "text"),
    [
        ("unable to open database file", StoreError, "limit of open files"),
        ("user-defined function raised exception", FilterError, "RLIKE takes too long"),
        ("Expression tree is too large (maximum depth 1000)", FilterError, "too many conditions"),
        ("something new", StoreError, "cannot be used: something new"),
    ],
)
def test_what_sqlite_says_is_explained(said: str, kind: type[Exception], text: str, tmp_path: Path) -> None:
    """Whatever SQLite says becomes an error of ours that says what to do."""
    error = explained(sqlite3.OperationalError(said), str(tmp_path / "store.db"))
    assert type(error) is kind
    if "unable" in said:
        assert "create the directory" in str(explained(sqlite3.OperationalError(said), "/not/there/store.db"))
        (tmp_path / "store.db").touch()
        error = explained(sqlite3.OperationalError(said), str(tmp_path / "store.db"))
    assert text in str(error)


def test_a_store_in_memory_does_not_wait_for_itself() -> None:
    """Used from a signal handler while the same thread is using it, it says so instead of hanging."""
    with open_store("memory:") as store, store._pool.connection():
        with pytest.raises(StoreError, match="in use by this very thread") as caught:
            store.search()
        assert caught.value.retry
