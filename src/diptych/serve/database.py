"""The file `jobs.sqlite`: its tables, whether it can be written, and the clock for its timestamps.

SQLite continues to write into a deleted file, and that data would be lost, so the file's identity is checked. A full
disk is detected before a transaction begins, because one that fails in the middle leaves a large log behind.
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
from diptych.serve.limits import Refused
from diptych.utils import documents

ROOM = 2**20  # bytes that must stay free after a transaction
FULL = (errno.ENOSPC, errno.EDQUOT)  # of OSError
FULL_STATUS = 507


class Unwritable(Refused):
    """The store cannot be written now. `status` is 507 for a full disk and 503 for other reasons."""

    def __init__(self, message: str, status: int = 503) -> None:
        super().__init__("storage_full", message, status, seconds=10)


class DatabaseFile:
    """The files of an open database. `failed` records an error of SQLite until `worked`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files: dict[Path, tuple[int, int]] = {}
        self._failure: Unwritable | None = None

    def opened(self) -> None:
        """Records the identity of the files."""
        for path in (self.path, self.path.with_name(f"{self.path.name}-wal")):
            if path.exists():
                self._files[path] = _identity(path)

    def obstacle(self, size: int = 0) -> Unwritable | None:
        """Returns why `size` bytes cannot be stored now, as far as can be checked without writing."""
        for path, known in self._files.items():
            try:
                current = _identity(path)
            except OSError as error:
                return Unwritable(f"{path}: not found ({error.strerror}). {_RESTART}")
            if current != known:
                return Unwritable(f"{path}: replaced by another file. {_RESTART}")
        try:
            free = shutil.disk_usage(self.path.parent).free
        except OSError as error:
            return Unwritable(f"{self.path.parent}: cannot be read ({error.strerror})")
        if free < size + ROOM:
            sizes = f"{documents.size(free)} are free, {documents.size(size + ROOM)} are needed"
            return Unwritable(f"The server's disk is full: {sizes}.", FULL_STATUS)
        return None

    def trouble(self) -> Unwritable | None:
        """Returns why nothing can be stored now: an obstacle, or the failure of the last attempt."""
        return self.obstacle() or self._failure

    def failed(self, error: sqlite3.Error) -> Unwritable:
        """Records an error of SQLite during a write, and returns it."""
        if getattr(error, "sqlite_errorname", "") == "SQLITE_FULL":
            self._failure = Unwritable("The server's disk is full.", FULL_STATUS)
        else:
            self._failure = Unwritable(f"The jobs cannot be stored ({error}).")
        return self._failure

    def worked(self) -> None:
        """Records that a write succeeded."""
        self._failure = None


_RESTART = "Nothing can be stored. Restore the file, or restart the server."


def _identity(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_dev, stat.st_ino


JUMP = 60.0  # seconds; a smaller difference is an ordinary correction
SETTLE = 600.0  # seconds without a jump until the wall clock is trusted


class Clock:
    """Seconds since 1970 that pass evenly, so that results do not expire when the machine's clock jumps.

    A jump is accepted once it has lasted `settle` seconds.
    """

    def __init__(
        self,
        settle: float = SETTLE,
        wall: Callable[[], float] = time.time,
        steady: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settle, self._wall, self._steady = settle, wall, steady
        self._lock = threading.Lock()
        self._since = steady()  # time of the last jump
        self._trusted = self._latest = wall() - self._since

    def now(self) -> float:
        """Returns seconds since 1970."""
        with self._lock:
            return self._update() + self._trusted

    def settled(self) -> bool:
        """Whether the wall clock has not jumped for `settle` seconds, so that results may expire by it."""
        with self._lock:
            return self._update() - self._since >= self.settle

    def _update(self) -> float:
        now = self._steady()
        offset = self._wall() - now
        if abs(offset - self._latest) > JUMP:
            self._since = now
        self._latest = offset
        if abs(offset - self._trusted) <= JUMP or now - self._since >= self.settle:
            self._trusted = offset
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
    settings TEXT NOT NULL,  -- images of equal settings may share a batch
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
    """Locks the file for this process, and creates the tables of a new one. UserError for another version's file."""
    # A second server on the same file would take this one's running images for those of a killed server.
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
            raise UserError("store_damaged", f"{path}: written by another version of diptych. Choose another --data.")
