"""The file `jobs.sqlite`: its tables, whether it can be written, and the clock that its rows are stamped with.

SQLite goes on writing into a file that somebody has deleted, and everything written there would be lost. A full disk is
found before a transaction begins, because one that fails in the middle leaves a large log behind.
"""

from __future__ import annotations

import errno
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path

from diptych.errors import UserError
from diptych.utils import documents

ROOM = 2**20  # bytes that must be free beside what is to be stored
FULL = (errno.ENOSPC, errno.EDQUOT)  # of OSError
FULL_STATUS = 507


class Unwritable(UserError):
    """Nothing can be stored now. `status` is 507 for a full disk and 503 for other reasons."""

    def __init__(self, message: str, status: int = 503) -> None:
        super().__init__("storage_full", message)
        self.status = status


class DatabaseFile:
    """The files of an open database. `failed` remembers an error of SQLite until `worked`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files: dict[Path, tuple[int, int]] = {}
        self._failure: Unwritable | None = None

    def opened(self) -> None:
        """Remembers which files they are."""
        for path in (self.path, self.path.with_name(f"{self.path.name}-wal")):
            if path.exists():
                self._files[path] = _identity(path)

    def obstacle(self, size: int = 0) -> Unwritable | None:
        """Why `size` bytes cannot be stored now, as far as can be known without writing."""
        for path, known in self._files.items():
            try:
                there = _identity(path)
            except OSError as error:
                return Unwritable(f"{path}: cannot be found ({error.strerror}), so nothing is stored; {_RESTART}")
            if there != known:
                return Unwritable(f"{path}: another file has taken its place, so nothing is stored; {_RESTART}")
        try:
            free = shutil.disk_usage(self.path.parent).free
        except OSError as error:
            return Unwritable(f"{self.path.parent}: cannot be read ({error.strerror}), so nothing is stored")
        if free < size + ROOM:
            needed = f"{documents.size(size + ROOM)} are needed"
            return Unwritable(f"the disk of the server is full: {documents.size(free)} are free, {needed}", FULL_STATUS)
        return None

    def trouble(self) -> Unwritable | None:
        """Why nothing can be stored now: an obstacle, or that the last attempt failed."""
        return self.obstacle() or self._failure

    def failed(self, error: sqlite3.Error) -> Unwritable:
        """An error of SQLite while it wrote."""
        full = getattr(error, "sqlite_errorname", "") == "SQLITE_FULL"
        self._failure = Unwritable(
            "the disk of the server is full" if full else f"the jobs cannot be stored ({error})",
            FULL_STATUS if full else 503,
        )
        return self._failure

    def worked(self) -> None:
        """Something was stored."""
        self._failure = None


_RESTART = "put it back, or start the server again"


def _identity(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_dev, found.st_ino


JUMP = 60.0  # seconds; a smaller difference is an ordinary correction
SETTLE = 600.0  # seconds without a jump until a clock is believed


class Clock:
    """Seconds since 1970 that pass evenly: results must not expire because the computer's clock jumps. A jump counts
    once it has lasted `settle` seconds."""

    def __init__(
        self,
        settle: float = SETTLE,
        wall: Callable[[], float] = time.time,
        steady: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settle, self._wall, self._steady = settle, wall, steady
        self._lock = threading.Lock()
        self._since = steady()  # no jump has been seen after this
        self._believed = self._seen = wall() - self._since

    def now(self) -> float:
        """Seconds since 1970."""
        with self._lock:
            return self._look() + self._believed

    def settled(self) -> bool:
        """Whether the wall clock has not jumped for `settle` seconds, so that things may expire by it."""
        with self._lock:
            return self._look() - self._since >= self.settle

    def _look(self) -> float:
        now = self._steady()
        offset = self._wall() - now
        if abs(offset - self._seen) > JUMP:
            self._since = now
        self._seen = offset
        if abs(offset - self._believed) <= JUMP or now - self._since >= self.settle:
            self._believed = offset
        return now


VERSION = 1
_TABLES = """
CREATE TABLE jobs (
    number INTEGER PRIMARY KEY,
    id TEXT NOT NULL,
    owner TEXT NOT NULL,
    created REAL NOT NULL,   -- seconds since 1970
    finished REAL,
    status TEXT NOT NULL,    -- queued, running, done, failed, cancelled
    request TEXT NOT NULL,   -- JSON
    error TEXT NOT NULL DEFAULT '',
    UNIQUE (owner, id)
);
CREATE TABLE pictures (
    id TEXT PRIMARY KEY,
    job INTEGER NOT NULL REFERENCES jobs (number) ON DELETE CASCADE,
    place INTEGER NOT NULL,
    seed INTEGER NOT NULL,
    settings TEXT NOT NULL,  -- pictures of equal settings may be drawn together
    status TEXT NOT NULL,
    tries INTEGER NOT NULL DEFAULT 0,
    kind TEXT NOT NULL DEFAULT '',
    data BLOB,
    made_by TEXT NOT NULL DEFAULT '{}'  -- JSON
);
CREATE INDEX waiting ON pictures (status, job, place);
CREATE INDEX members ON pictures (job, place);
CREATE TABLE refs (
    id TEXT PRIMARY KEY,
    owner TEXT NOT NULL,
    created REAL NOT NULL,
    width INTEGER NOT NULL,
    height INTEGER NOT NULL,
    data BLOB NOT NULL       -- PNG
);
CREATE TABLE secrets (name TEXT PRIMARY KEY, value BLOB NOT NULL);
"""


def prepare(connection: sqlite3.Connection, path: Path) -> None:
    """Takes the file for this process alone, and makes the tables of a new one."""
    # Another server on the same file would take this one's pictures for those of a killed one.
    connection.execute("PRAGMA locking_mode=EXCLUSIVE")
    connection.execute("PRAGMA auto_vacuum=INCREMENTAL")  # of a new file
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")
    connection.execute("PRAGMA foreign_keys=ON")
    with connection:
        connection.execute("BEGIN IMMEDIATE")
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version == 0:
            for statement in _TABLES.split(";"):
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {VERSION}")
        elif version != VERSION:
            raise UserError(f"{path} is of another version of diptych; choose another --data")
