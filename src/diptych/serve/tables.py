"""What is in `jobs.sqlite`, and how the file is opened."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from diptych.errors import UserError

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
