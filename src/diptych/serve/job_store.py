"""The jobs of a server in one SQLite file: their requests, owners and images.

A job is stored before it is acknowledged, and an image before it is reported, so both survive a kill at any moment.
`recover` queues interrupted images again, and fails their job after the third try. References and images are rows too,
so nothing in a request ever names a file.
"""

from __future__ import annotations

import collections
import json
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diptych.errors import UserError
from diptych.serve import database
from diptych.serve.database import ROOM, Clock, DatabaseFile
from diptych.serve.limits import FairShares
from diptych.utils.paths import private_file

TRIES = 3  # attempts for an image whose server was killed meanwhile
VACUUMED = 10_000  # pages returned to the disk at once
OPEN = ("queued", "running")
FAILED = "job_failed"  # code of a job that failed for no other known reason, or was cancelled


@dataclass(frozen=True)
class QueuedImage:
    """One image to generate from `text`. `reference` and `mask` are PNGs; `request` is the whole request of its job."""

    picture: str
    job: int
    owner: str
    job_id: str
    place: int
    seed: int
    text: str
    request: dict[str, Any]
    reference: bytes | None
    mask: bytes | None


class JobStore:
    """The file, created if missing. Any thread may call.

    A method that writes has committed when it returns; if it raises Unwritable, nothing changed.
    """

    def __init__(self, path: Path, clock: Clock | None = None) -> None:
        self.path, self.clock, self.disk = path, clock or Clock(), DatabaseFile(path)
        self._lock = threading.RLock()
        self._shares = FairShares()
        try:
            private_file(path)
        except UserError as error:
            raise UserError(error.code, f"{error}, or choose another --data") from error
        except OSError as error:
            raise self._unusable(error) from error
        try:
            self._connection = sqlite3.connect(path, check_same_thread=False, timeout=30)
            self._connection.row_factory = sqlite3.Row
            database.prepare(self._connection, path)
            self.disk.opened()
            self._kept = self._count_kept()
        except sqlite3.Error as error:
            raise self._unusable(error) from error

    def _unusable(self, error: Exception) -> UserError:
        return UserError(
            "path_unwritable", f"{self.path}: jobs cannot be stored there ({error}). Choose another --data."
        )

    @contextmanager
    def _writing(self, size: int = 0) -> Iterator[sqlite3.Connection]:
        """A transaction that stores about `size` bytes."""
        with self._lock:
            if (obstacle := self.disk.obstacle(size)) is not None:
                raise obstacle
            try:
                with self._connection:
                    self._connection.execute("BEGIN IMMEDIATE")
                    yield self._connection
            except sqlite3.OperationalError as error:
                raise self.disk.failed(error) from error

    def _rows(self, query: str, *values: Any) -> list[sqlite3.Row]:
        with self._lock:
            return self._connection.execute(query, values).fetchall()

    def probe(self) -> None:
        """Writes a value that changes nothing. Unwritable if that fails."""
        with self._writing() as connection:
            connection.execute(f"PRAGMA user_version = {database.VERSION}")
        self.disk.worked()

    def close(self) -> None:
        """Closes the file."""
        with self._lock:
            self._connection.close()

    # ---- requests

    def add(
        self, owner: str, id: str, request: dict[str, Any], settings: str, seeds: Sequence[int], pictures: Sequence[str]
    ) -> None:
        """Adds a job with one image for each seed. sqlite3.IntegrityError if the owner has a job of this id."""
        text = json.dumps(request)
        with self._writing(len(text)) as connection:
            job = connection.execute(
                "INSERT INTO jobs (id, owner, created, status, request) VALUES (?, ?, ?, 'queued', ?)",
                (id, owner, self.clock.now(), text),
            ).lastrowid
            connection.executemany(
                "INSERT INTO pictures (id, job, place, seed, settings, status) VALUES (?, ?, ?, ?, ?, 'queued')",
                [(name, job, n, seed, settings) for n, (name, seed) in enumerate(zip(pictures, seeds, strict=True))],
            )
            self._kept[owner] += len(text)

    def put_reference(self, owner: str, id: str, data: bytes, size: tuple[int, int]) -> None:
        """Stores a reference. The same image of the same owner has the same id, and only its age is reset."""
        with self._writing(len(data)) as connection:
            known = connection.execute("SELECT 1 FROM refs WHERE id = ?", (id,)).fetchone()
            self._kept[owner] += 0 if known else len(data)
            connection.execute(
                "INSERT INTO refs VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET created = excluded.created",
                (id, owner, self.clock.now(), *size, data),
            )

    def reference(self, owner: str, id: str) -> bytes | None:
        """Returns the PNG of an owner's reference."""
        rows = self._rows("SELECT data FROM refs WHERE id = ? AND owner = ?", id, owner)
        return rows[0]["data"] if rows else None

    def job(self, owner: str, id: str) -> dict[str, Any] | None:
        """Returns an owner's job and its images, without their bytes."""
        jobs = self._rows("SELECT * FROM jobs WHERE owner = ? AND id = ?", owner, id)
        if not jobs:
            return None
        job = {**dict(jobs[0]), "request": json.loads(jobs[0]["request"])}
        rows = self._rows(
            "SELECT id, place, seed, status, kind, made_by FROM pictures WHERE job = ? ORDER BY place", job["number"]
        )
        job["pictures"] = [{**dict(row), "made_by": json.loads(row["made_by"])} for row in rows]
        return job

    def jobs(self, owner: str, limit: int) -> list[str]:
        """Returns the ids of an owner's latest jobs, newest first."""
        rows = self._rows("SELECT id FROM jobs WHERE owner = ? ORDER BY number DESC LIMIT ?", owner, limit)
        return [row["id"] for row in rows]

    def picture(self, id: str) -> tuple[str, str, bytes] | None:
        """Returns (owner, format, bytes) of a generated image."""
        rows = self._rows(
            "SELECT owner, kind, data FROM pictures JOIN jobs ON jobs.number = job "
            "WHERE pictures.id = ? AND data IS NOT NULL",
            id,
        )
        return (rows[0]["owner"], rows[0]["kind"], rows[0]["data"]) if rows else None

    def images(self, job: int) -> list[bytes]:
        """Returns the generated images of a job, in order."""
        rows = self._rows("SELECT data FROM pictures WHERE job = ? AND data IS NOT NULL ORDER BY place", job)
        return [row["data"] for row in rows]

    def waiting(self, owner: str | None = None) -> int:
        """Returns the number of queued images, of all owners or of one."""
        if owner is None:
            return self._rows("SELECT COUNT(*) FROM pictures WHERE status = 'queued'")[0][0]
        return self._waiting_by_owner().get(owner, 0)

    def owners_waiting(self) -> int:
        """Returns the number of owners with queued images."""
        return len(self._waiting_by_owner())

    def before(self, owner: str, job: int) -> int:
        """Estimates how many images come before an owner's job: the owner's earlier ones, and as many of each other
        owner, since owners take turns."""
        mine = self._waiting_by_owner(" AND job < ?", job).get(owner, 0)
        others = self._waiting_by_owner()
        return mine + sum(min(count, mine + 1) for name, count in others.items() if name != owner)

    def _waiting_by_owner(self, some: str = "", *values: Any) -> dict[str, int]:
        rows = self._rows(
            "SELECT owner, COUNT(*) AS count FROM pictures JOIN jobs ON jobs.number = job "
            f"WHERE pictures.status = 'queued'{some} GROUP BY owner",
            *values,
        )
        return {row["owner"]: row["count"] for row in rows}

    def kept(self, owner: str) -> int:
        """Returns the bytes of an owner's requests, references and images."""
        return self._kept[owner]

    def _count_kept(self) -> collections.Counter[str]:
        sizes = (
            "SELECT owner, length(data) AS size FROM refs",
            "SELECT owner, length(request) AS size FROM jobs",
            "SELECT owner, length(data) AS size FROM pictures JOIN jobs ON jobs.number = job WHERE data IS NOT NULL",
        )
        rows = self._rows(f"SELECT owner, SUM(size) AS size FROM ({' UNION ALL '.join(sizes)}) GROUP BY owner")
        return collections.Counter({row["owner"]: row["size"] for row in rows})

    # ---- generating

    def take(self, limit: int) -> list[QueuedImage]:
        """Marks up to `limit` images of equal settings as running, and returns them.

        Owners take turns, each with their oldest images. The owner whose turn it is determines the settings.
        """
        with self._writing() as connection:
            owners = connection.execute(
                "SELECT owner, MIN(job) FROM pictures JOIN jobs ON jobs.number = job "
                "WHERE pictures.status = 'queued' GROUP BY owner ORDER BY 2"
            ).fetchall()
            if not owners:
                return []
            owner = self._shares.first([row["owner"] for row in owners])
            (settings,) = connection.execute(
                "SELECT settings FROM pictures JOIN jobs ON jobs.number = job WHERE pictures.status = 'queued' "
                "AND owner = ? ORDER BY job, place LIMIT 1",
                (owner,),
            ).fetchone()
            waiting: dict[str, list[tuple[str, float]]] = {owner: []}  # the owner whose turn it is comes first
            for row in connection.execute(
                "SELECT pictures.id, owner, coalesce(json_extract(request, '$.cost'), 1.0) AS cost FROM pictures "
                "JOIN jobs ON jobs.number = job WHERE pictures.status = 'queued' AND settings = ? ORDER BY job, place",
                (settings,),
            ):
                waiting.setdefault(row["owner"], []).append((row["id"], row["cost"]))
            chosen = [id for _, id in self._shares.choose(waiting, limit)]
            rows = connection.execute(
                "SELECT pictures.id AS picture, job, owner, jobs.id AS job_id, place, seed, request FROM pictures "
                f"JOIN jobs ON jobs.number = job WHERE pictures.id IN ({', '.join('?' * len(chosen))}) "
                "ORDER BY job, place",
                chosen,
            ).fetchall()
            ids = [(row["picture"],) for row in rows]
            connection.executemany("UPDATE pictures SET status = 'running', tries = tries + 1 WHERE id = ?", ids)
            jobs = [(number,) for number in {row["job"] for row in rows}]
            connection.executemany("UPDATE jobs SET status = 'running' WHERE number = ?", jobs)
        tasks: list[QueuedImage] = []
        known: dict[str | None, bytes | None] = {None: None}
        for row in rows:
            request = json.loads(row["request"])
            names = request["reference"], request["mask"]
            for name in names:
                if name not in known:
                    known[name] = self.reference(row["owner"], name)
            values = {**dict(row), "request": request, "text": request["texts"][row["place"]]}
            tasks.append(QueuedImage(**values, reference=known[names[0]], mask=known[names[1]]))
        return tasks

    def finish(self, picture: str, kind: str, data: bytes, made_by: dict[str, Any]) -> bool:
        """Stores a generated image. Returns False, and stores nothing, if its job was cancelled meanwhile."""
        with self._writing(len(data)) as connection:
            done = connection.execute(
                "UPDATE pictures SET status = 'done', kind = ?, data = ?, made_by = ? WHERE id = ? "
                "AND status = 'running'",
                (kind, data, json.dumps(made_by), picture),
            )
            if not done.rowcount:
                return False
            job, owner = connection.execute(
                "SELECT job, owner FROM pictures JOIN jobs ON jobs.number = job WHERE pictures.id = ?", (picture,)
            ).fetchone()
            self._kept[owner] += len(data)
            left = connection.execute(
                "SELECT COUNT(*) FROM pictures WHERE job = ? AND status != 'done'", (job,)
            ).fetchone()[0]
            if not left:
                connection.execute(
                    "UPDATE jobs SET status = 'done', finished = ? WHERE number = ?", (self.clock.now(), job)
                )
            return True

    def fail(self, job: int, reason: str, code: str) -> None:
        """Ends a job as failed, with the code of its error. Its generated images stay."""
        with self._writing() as connection:
            self._end(connection, job, "failed", reason, code)

    def cancel(self, owner: str, id: str) -> bool:
        """Cancels an owner's job. Returns False if it has ended already."""
        with self._writing() as connection:
            row = connection.execute(
                "SELECT number FROM jobs WHERE owner = ? AND id = ? AND finished IS NULL", (owner, id)
            ).fetchone()
            if row is None:
                return False
            self._end(connection, row["number"], "cancelled", "")
            return True

    def cancelled(self, pictures: Sequence[str]) -> set[str]:
        """Returns which of these images are no longer wanted."""
        marks = ", ".join("?" * len(pictures))
        rows = self._rows(f"SELECT id FROM pictures WHERE id IN ({marks}) AND status != 'running'", *pictures)
        return {row["id"] for row in rows}

    def _end(self, connection: sqlite3.Connection, job: int, status: str, reason: str, code: str = FAILED) -> None:
        connection.execute(
            "UPDATE jobs SET status = ?, error = ?, finished = ?, request = json_set(request, '$.code', ?) "
            "WHERE number = ? AND finished IS NULL",
            (status, reason, self.clock.now(), code, job),
        )
        connection.execute(
            "UPDATE pictures SET status = ? WHERE job = ? AND status IN ('queued', 'running')", (status, job)
        )

    # ---- maintenance

    def requeue(self, pictures: Sequence[str]) -> None:
        """Queues running images again without counting the attempt, because the server stops."""
        with self._writing() as connection:
            connection.executemany(
                "UPDATE pictures SET status = 'queued', tries = tries - 1 WHERE id = ? AND status = 'running'",
                [(picture,) for picture in pictures],
            )

    def recover(self, pictures: Sequence[str] | None = None) -> tuple[int, int]:
        """Queues running images again after a kill, or only `pictures` after a worker died.

        Returns (queued images, jobs that failed after too many attempts).
        """
        some = "" if pictures is None else f" AND id IN ({', '.join('?' * len(pictures))})"
        with self._writing() as connection:
            rows = connection.execute(
                f"SELECT DISTINCT job FROM pictures WHERE status = 'running' AND tries >= ?{some}",
                (TRIES, *(pictures or ())),
            ).fetchall()
            reason = f"The server stopped {TRIES} times while it generated this. Request fewer or smaller images."
            for row in rows:
                self._end(connection, row["job"], "failed", reason)
            connection.execute(
                f"UPDATE pictures SET status = 'queued' WHERE status = 'running'{some}", tuple(pictures or ())
            )
        return self.waiting(), len(rows)

    def forget(self, before: float) -> None:
        """Deletes jobs that ended, and references last used, before a time. References of open jobs stay.

        It runs on a full disk too, since it frees space.
        """
        with self._writing(-ROOM) as connection:
            connection.execute("DELETE FROM jobs WHERE finished < ?", (before,))
            connection.execute(
                "DELETE FROM refs WHERE created < ? AND NOT EXISTS (SELECT 1 FROM jobs WHERE finished IS NULL AND "
                "refs.id IN (json_extract(request, '$.reference'), json_extract(request, '$.mask')))",
                (before,),
            )
            connection.execute("DELETE FROM secrets WHERE name LIKE 'session %' AND value < ?", (self.clock.now(),))
            connection.execute(f"PRAGMA incremental_vacuum({VACUUMED})").fetchall()
            self._kept = self._count_kept()

    def secret(self, name: str, new: bytes) -> bytes:
        """Returns the secret stored under a name, or stores and returns `new`."""
        with self._writing() as connection:
            connection.execute("INSERT OR IGNORE INTO secrets VALUES (?, ?)", (name, new))
            return connection.execute("SELECT value FROM secrets WHERE name = ?", (name,)).fetchone()["value"]

    def revoke(self, cookie: str, until: float) -> None:
        """Stores a logged-out session cookie until it expires."""
        with self._writing() as connection:
            connection.execute("INSERT OR IGNORE INTO secrets VALUES (?, ?)", (f"session {cookie}", until))

    def revoked(self) -> list[str]:
        """Returns the logged-out session cookies."""
        rows = self._rows("SELECT name FROM secrets WHERE name LIKE 'session %'")
        return [row["name"].removeprefix("session ") for row in rows]
