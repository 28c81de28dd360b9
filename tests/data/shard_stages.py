"""Stages for tests and benchmarks of the engines: no models, no torch, but ways to be slow, to fail and to die.

As a module they are imported by workers; as a script (FOLDER ADDRESS COUNT SIZE SECONDS) a driver to be killed.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from diptych.data import records
from diptych.data.engine import Engine, Failure, Result, Row, Work
from diptych.data.store import Dataset
from diptych.errors import UsageError, UserError
from diptych.llm.client import Client, answers
from diptych.llm.endpoint import Endpoint
from llm.counting import number

PROMPTS = records.schema(records.PROMPT)
FAILED = records.schema(records.FAILED)


def row(i: int) -> Row:
    return {"id": records.prompt_id(i), "prompt": "", "panels": [], "subject": "", "task": "", "seed": i}


def shards(count: int, size: int) -> list[list[Row]]:
    """`count` shards of `size` rows."""
    return [[row(i) for i in range(start, start + size)] for start in range(0, count * size, size)]


class Doubling:
    """Gives each row twice, after `seconds` a row; every seventh fails.

    What else befalls it is text by `Trouble`. Each batch that is begun leaves a line in `diary`: process and first row.
    """

    name = "doubling"
    batch_size = 4

    def __init__(self, seconds: float = 0.0, trouble: Trouble | None = None, diary: Path | None = None) -> None:
        self.seconds, self.trouble, self.diary = seconds, trouble, diary

    def load(self) -> Work:
        if self.trouble is not None:
            self.trouble("load")
        return self.work

    def work(self, rows: list[Row]) -> list[list[Row] | Failure]:
        if self.diary is not None:
            with self.diary.open("a") as stream:
                stream.write(f"{os.getpid()} {rows[0]['seed']}\n")
        time.sleep(self.seconds * len(rows))
        if self.trouble is not None:
            for one in rows:
                self.trouble(str(one["seed"]))
        return [Failure("a seventh") if r["seed"] % 7 == 6 else [r, {**r, "id": r["id"] + "b"}] for r in rows]


class Asking:
    """Asks an endpoint one question a row, and leaves its process in `diary` for each batch."""

    name = "write"  # the stage of whose endpoint the workers share the limits
    batch_size = 4

    def __init__(self, endpoint: Endpoint, diary: Path) -> None:
        self.endpoint, self.diary = endpoint, diary

    def load(self) -> Work:
        client = Client(self.endpoint)

        def work(rows: list[Row]) -> list[list[Row] | Failure]:
            with self.diary.open("a") as stream:
                stream.write(f"{os.getpid()}\n")
            replies = answers(client, [number(row["seed"]) for row in rows])
            return [[row] if replies[str(row["seed"])].status == "answered" else Failure("no answer") for row in rows]

        return work


class Trouble:
    """What befalls a worker at a row, or at `load`: `kind` is an entry of `KINDS`; `once` is a file that remembers."""

    def __init__(self, at: str, kind: str, once: Path | None = None) -> None:
        self.at, self.kind, self.once = at, kind, once

    def __call__(self, where: str) -> None:
        if where != self.at:
            return
        if self.once is not None:
            if self.once.exists():
                return
            self.once.touch()
        KINDS[self.kind]()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    error = UserError("endpoint_unreachable", "the server is down")
    error.stops = True
    raise error


def misuse() -> None:
    raise UsageError("size_invalid", "the model knows no such size")


def crash() -> None:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


KINDS: dict[str, Callable[[], None]] = {"die": die, "stop": stop, "misuse": misuse, "crash": crash}


def run(
    engine: Engine, folder: str | Path, stage: Doubling | Asking, inputs: list[list[Row]], **more: object
) -> Result:
    """A stage with an engine, into `folder/out` and `folder/failed`."""
    output, failed = Dataset(f"{folder}/out", PROMPTS), Dataset(f"{folder}/failed", FAILED)
    return engine.run(stage, inputs, output, failed, "f", **more)  # pyright: ignore[reportArgumentType]


def files(folder: Path) -> dict[str, bytes]:
    """Every file of the two data sets."""
    result = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert not [name for name in result if name.endswith(".tmp")], "leftovers of a killed writer"
    return result


if __name__ == "__main__":
    from diptych.data.ray_engine import connect

    where, address, count, size, seconds = sys.argv[1:]
    with connect(address) as engine:
        run(engine, Path(where), Doubling(float(seconds)), shards(int(count), int(size)))
