"""Replies in one SQLite file, by the hash of the request, so that no request is paid for twice.

Safe with threads and processes on one machine, and through kill -9: it uses a write-ahead log and commits a reply
before the reply is used. Network file systems are not supported, because their locks are not sufficient for SQLite.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from diptych.errors import UserError
from diptych.llm.question import Reply, Usage
from diptych.utils.paths import private_file

VERSION = 2
TIMEOUT = 60.0  # seconds to wait for another process's write
_MARK = 0x64707463  # "dptc", in the field that names the program of an SQLite file
_TABLE = """
CREATE TABLE IF NOT EXISTS replies (
    key TEXT PRIMARY KEY,
    text TEXT NOT NULL,
    model TEXT NOT NULL,
    refused TEXT NOT NULL,
    cut INTEGER NOT NULL,
    calls INTEGER NOT NULL,
    input_tokens INTEGER NOT NULL,
    output_tokens INTEGER NOT NULL,
    time REAL NOT NULL,  -- seconds since 1970
    reasoned INTEGER NOT NULL DEFAULT 0
)"""
# The cost of replies that are not stored.
_UNKEPT = """
CREATE TABLE IF NOT EXISTS unkept (
    model TEXT PRIMARY KEY,
    calls INTEGER NOT NULL,
    input_tokens INTEGER NOT NULL,
    output_tokens INTEGER NOT NULL
)"""
_SPENT = "model, calls, input_tokens, output_tokens"
_COUNT = """
INSERT INTO unkept VALUES (?, ?, ?, ?) ON CONFLICT (model) DO UPDATE SET calls = calls + excluded.calls,
input_tokens = input_tokens + excluded.input_tokens, output_tokens = output_tokens + excluded.output_tokens"""
Result = TypeVar("Result")


class Cache:
    """The cache in a file, which is created with its folders if absent.

    Raises UserError if the file is something else or cannot be used.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._pid = 0
        self._inherited: list[object] = []
        self._do(lambda connection: None)

    def get(self, key: str) -> Reply | None:
        """Return the reply under a key, or None."""
        row = self._do(
            lambda connection: connection.execute(
                "SELECT text, model, refused, cut, reasoned, calls, input_tokens, output_tokens FROM replies "
                "WHERE key = ?",
                (key,),
            ).fetchone()
        )
        if row is None:
            return None
        text, model, refused, cut, reasoned, *usage = row
        return Reply(text, model, Usage(*usage), refused, bool(cut), reasoned=bool(reasoned))

    def put(self, key: str, reply: Reply) -> None:
        """Store a reply; of an empty reply, store only its cost. When this returns, the data survive a kill."""
        usage = reply.usage
        spent = (usage.calls, usage.input_tokens, usage.output_tokens)
        if reply.empty:
            self._do(lambda connection: connection.execute(_COUNT, (reply.model, *spent)))
            return
        row = (key, reply.text, reply.model, reply.refused, int(reply.cut), *spent, time.time(), int(reply.reasoned))
        marks = ", ".join("?" * len(row))

        def replace(connection: sqlite3.Connection) -> None:
            _forget(connection, [key])
            connection.execute(f"INSERT INTO replies VALUES ({marks})", row)

        self._do(replace)

    def drop(self, keys: Iterable[str]) -> None:
        """Remove replies, but not their cost."""
        self._do(lambda connection: _forget(connection, keys))

    def usage(self) -> dict[str, Usage]:
        """Return the cost of all replies so far, each once, by the model's name on its server."""
        rows = self._do(
            lambda connection: connection.execute(
                "SELECT model, SUM(calls), SUM(input_tokens), SUM(output_tokens) FROM "
                f"(SELECT {_SPENT} FROM replies UNION ALL SELECT {_SPENT} FROM unkept) GROUP BY model"
            ).fetchall()
        )
        return {model: Usage(*counts) for model, *counts in rows}

    def __len__(self) -> int:
        return self._do(lambda connection: connection.execute("SELECT COUNT(*) FROM replies").fetchone()[0])

    def close(self) -> None:
        """Close the file; a later use opens it again."""
        with self._lock:
            if self._connection is not None and self._pid == os.getpid():
                self._connection.close()
            self._connection = None

    def __enter__(self) -> Cache:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _do(self, work: Callable[[sqlite3.Connection], Result]) -> Result:
        """Do `work` on the connection and commit. A forked child opens another connection: they must not be shared."""
        with self._lock:
            try:
                if self._connection is None or self._pid != os.getpid():
                    # Not closed here: that connection is the parent's.
                    self._inherited.append(self._connection)
                    self._connection, self._pid = self._open(), os.getpid()
                with self._connection:
                    return work(self._connection)
            except sqlite3.Error as error:
                # SQLite raises the base class itself for a file that is damaged or not a database.
                code = "file_damaged" if type(error) is sqlite3.DatabaseError else "path_unreadable"
                how = "Move it away if it is damaged or not a cache, or name another file."
                raise UserError(code, f"Cannot use the cache of answers {self.path} ({error}). {how}") from error
            except OSError as error:
                why = f"Cannot write the cache of answers {self.path} ({error.strerror or error}). Choose another path."
                raise UserError("path_unwritable", why) from error

    def _open(self) -> sqlite3.Connection:
        if not self.path.is_dir():
            private_file(self.path)  # SQLite gives its log the permissions of the file
        connection = sqlite3.connect(self.path, timeout=TIMEOUT, check_same_thread=False)
        until = time.monotonic() + TIMEOUT
        while True:
            try:
                self._prepare(connection)
                return connection
            except sqlite3.OperationalError as error:
                # The change to WAL does not wait for other processes by itself.
                if "locked" not in str(error) or time.monotonic() > until:
                    connection.close()
                    raise
                time.sleep(0.02)
            except BaseException:
                connection.close()
                raise

    def _prepare(self, connection: sqlite3.Connection) -> None:
        # Tables first: another process may create the whole cache between the two queries.
        filled = connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0] > 0
        mark = connection.execute("PRAGMA application_id").fetchone()[0]
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if mark not in (0, _MARK) or (mark == 0 and filled) or (mark == _MARK and version != VERSION):
            code = "store_damaged" if mark == _MARK else "file_format_unknown"
            why = f"is of version {version} of the cache" if mark == _MARK else "belongs to another program"
            raise UserError(code, f"The SQLite file {self.path} {why}. Name another file for the cache of answers.")
        if mark == _MARK:
            connection.execute("PRAGMA synchronous=NORMAL")
            return
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")
        with connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute(_TABLE)
            connection.execute(_UNKEPT)
            connection.execute(f"PRAGMA application_id = {_MARK}")
            connection.execute(f"PRAGMA user_version = {VERSION}")


def _forget(connection: sqlite3.Connection, keys: Iterable[str]) -> None:
    for key in dict.fromkeys(keys):
        for spent in connection.execute(f"SELECT {_SPENT} FROM replies WHERE key = ?", (key,)).fetchall():
            connection.execute(_COUNT, spent)
        connection.execute("DELETE FROM replies WHERE key = ?", (key,))
