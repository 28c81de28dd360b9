"""Whether `jobs.sqlite` can be written: it is still the file that was opened, and its disk has room.

SQLite goes on writing into a file that somebody has deleted, and everything written there would be lost. A full disk is
found before a transaction begins, because one that fails in the middle leaves a large log behind.
"""

from __future__ import annotations

import errno
import shutil
import sqlite3
from pathlib import Path

from diptych.errors import UserError
from diptych.utils import plain

ROOM = 2**20  # bytes that must be free beside what is to be stored
FULL = (errno.ENOSPC, errno.EDQUOT)  # of OSError
FULL_STATUS = 507


class Unwritable(UserError):
    """Nothing can be stored now. `status` is 507 for a full disk and 503 for other reasons."""

    def __init__(self, message: str, status: int = 503) -> None:
        super().__init__(message)
        self.status = status


class Disk:
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
            needed = f"{plain.size(size + ROOM)} are needed"
            return Unwritable(f"the disk of the server is full: {plain.size(free)} are free, {needed}", FULL_STATUS)
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
