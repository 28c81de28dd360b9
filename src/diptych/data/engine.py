"""The loop over shards: a stage maps rows to rows, the engine reads, batches, publishes and resumes.

A stage knows nothing of files or processes:

    class Stage:
        name: str            # "paint"
        batch_size: int      # rows a call
        def load(self) -> Callable[[list[dict]], list[list[dict] | Failure]]: ...

The callable takes one batch of input rows, in order, never from two shards, and gives for each input row its output
rows (none, one or several) or a `Failure`. If it raises UserError the batch is tried again row by row, so that one bad
row costs one row. Shard i of the output depends on shard i of the input alone: any order, and any engine
(`LocalEngine`, `ray_engine.RayEngine`), gives the same files.
"""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from diptych.data.store import Dataset
from diptych.errors import UserError, describe

if TYPE_CHECKING:
    from diptych.recipe.schema import Recipe

LOST = "no reply: "  # what the reasons of lost rows begin with in `failed/`
Row = dict[str, Any]


@dataclass(frozen=True)
class Failure:
    """A row that could not be processed, and why, in one line. One that is `lost` met something that may pass, such as
    a server that gives no reply: the next run tries it again."""

    reason: str
    lost: bool = False


Work = Callable[[list[Row]], Sequence[Sequence[Row] | Failure]]
Progress = Callable[..., None]  # (rows done, rows in all, note="")
Setup = Callable[[], Callable[[Any], Any]]  # run once in each worker; gives what is done with an item
Timed = Callable[[int, float], None]  # (rows, seconds of the stage's own work)


class Stage(Protocol):
    """What the engine needs of a stage."""

    @property
    def name(self) -> str: ...
    @property
    def batch_size(self) -> int: ...
    def load(self) -> Work: ...


@dataclass(frozen=True)
class Result:
    """What a stage did: rows read and written, failures in all, rows of this process (0 = all was there), and how many
    of the failures the next run tries again."""

    inputs: int
    rows: int
    failed: int
    processed: int
    reasons: list[str] = field(default_factory=list)  # the first few, for a summary
    lost: int = 0


@dataclass(frozen=True)
class Job:
    """A stage with its input and its output: all that is needed to make any of its shards, in any process."""

    stage: Stage
    inputs: Dataset | Sequence[list[Row]]
    output: Dataset
    failed: Dataset
    fingerprint: str

    def rows(self, shard: int) -> list[Row]:
        """A shard's input."""
        return self.inputs.read_shard(shard) if isinstance(self.inputs, Dataset) else self.inputs[shard]

    def make(self, shard: int, rows: list[Row], work: Work, report: Callable[[int], None], timed: Timed) -> None:
        """Makes a shard of its input and publishes it. `report` hears the rows done so far."""
        good: list[Row] = []
        bad: list[Row] = []
        for start in range(0, len(rows), self.stage.batch_size):
            batch = rows[start : start + self.stage.batch_size]
            began = time.perf_counter()
            results = attempt(work, batch)
            timed(len(batch), time.perf_counter() - began)
            for row, result in zip(batch, results, strict=True):
                if isinstance(result, Failure):
                    bad.append(failed_row(self.stage.name, row, f"{LOST if result.lost else ''}{result.reason}"))
                else:
                    good.extend(result)
            report(start + len(batch))
        # Failures first: once the shard itself is there, its failures are known to be there too.
        if bad:
            self.failed.write_shard(shard, bad, self.fingerprint)
        self.output.write_shard(shard, good, self.fingerprint)


class Engine(ABC):
    """Runs a stage over its shards: what is there stays, what is missing is made, the manifest comes last."""

    @abstractmethod
    def of(self, recipe: Recipe) -> Engine:
        """This engine with what `recipe` asks of machines."""

    def run(
        self,
        stage: Stage,
        inputs: Dataset | Sequence[list[Row]],
        output: Dataset,
        failed: Dataset,
        fingerprint: str,
        progress: Progress | None = None,
        manifest: dict[str, Any] | None = None,
        timed: Timed | None = None,
        retry: bool = True,
        finish: Callable[[Dataset, Dataset], object] | None = None,
    ) -> Result:
        """Makes what is missing of `output`, then publishes it with `manifest` (seeds, versions, input hashes).

        `inputs` is a complete data set, or the shards themselves as lists of rows. `failed` gets one part for each
        shard with failures (stage, id, reason, the row's text columns as JSON). `timed` hears what each batch took.
        With `retry`, shards in which an earlier run lost rows are made again. `finish` sees `output` and `failed` once
        all shards are there, before they are published, and may move rows from one to the other.

        Raises UserError if a part of another fingerprint is there, or if every single row failed. The stage's `load`
        is called only if there is work.
        """
        shards = inputs.shards() if isinstance(inputs, Dataset) else list(range(len(inputs)))
        sizes = {i: inputs.rows_in(i) if isinstance(inputs, Dataset) else len(inputs[i]) for i in shards}
        total = sum(sizes.values())
        output.clean()
        failed.clean()
        done = output.shards_done(fingerprint)
        if not done <= set(shards):
            raise UserError(f"{output.url} holds parts that its input does not; remove {output.url} and run again")
        if retry:
            again = {i for i in set(failed.shards()) & done if _lost(failed.read_shard(i))}
            for i in again:
                output.drop_shard(i)
            done -= again
        for i in set(failed.shards()) - done:
            failed.drop_shard(i)  # of a shard that never came, or of an output that was removed
        missing = {i: sizes[i] for i in shards if i not in done}
        if missing:
            output.unpublish()
        count = sum(sizes[i] for i in done)
        report = progress or (lambda *_: None)
        report(count, total)
        if missing:
            job = Job(stage, inputs, output, failed, fingerprint)
            self.make(job, missing, lambda rows, *note: report(count + rows, total, *note), timed or (lambda *_: None))
        if finish is not None and not output.is_complete(fingerprint):
            finish(output, failed)
        failures = failed.columns("reason") if failed.shards() else []
        if not output.is_complete(fingerprint):
            output.publish(
                {"stage": stage.name, "fingerprint": fingerprint, "failed": len(failures), **(manifest or {})}
            )
        if total and len(failures) == total:
            how = "run the same command" if _lost(failures) else f"remove {output.url}"
            raise UserError(
                f"{stage.name}: all {total} rows failed; the first reason: {failures[0]['reason']} "
                f"(all reasons in {failed.url}; {how} to try again)"
            )
        reasons = list(dict.fromkeys(row["reason"] for row in failures))[:5]
        lost = sum(row["reason"].startswith(LOST) for row in failures)
        return Result(total, len(output), len(failures), sum(missing.values()), reasons, lost)

    @abstractmethod
    def make(self, job: Job, missing: dict[int, int], report: Callable[..., None], timed: Timed) -> None:
        """Makes the shards `missing` (shard → its rows), all of them, or raises. `report(rows done, note="")`."""

    @abstractmethod
    def each(
        self, name: str, setup: Setup, items: Sequence[Any], say: Callable[[str], None]
    ) -> Iterator[tuple[int, Any]]:
        """(index, result) of every item, as they come. `say` hears news of the workers."""

    @abstractmethod
    def there(self, where: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """What a function gives where the stage `where` works: on a machine with its devices."""


class LocalEngine(Engine):
    """Runs a stage in this process, one shard after the other."""

    def of(self, recipe: Recipe) -> LocalEngine:
        """Itself: this process has what it has."""
        return self

    def make(self, job: Job, missing: dict[int, int], report: Callable[..., None], timed: Timed) -> None:
        """One shard after the other, in order."""
        work: Work | None = None
        count = 0
        for shard, number in missing.items():
            rows = job.rows(shard)
            if work is None and rows:
                work = job.stage.load()
            job.make(shard, rows, work or idle, partial(_later, report, count), timed)
            count += number

    def each(
        self, name: str, setup: Setup, items: Sequence[Any], say: Callable[[str], None]
    ) -> Iterator[tuple[int, Any]]:
        """One after the other."""
        work = setup()
        yield from ((index, work(item)) for index, item in enumerate(items))

    def there(self, where: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """Here."""
        return function(*arguments)


def _later(report: Callable[..., None], before: int, done: int) -> None:
    report(before + done)


def idle(rows: list[Row]) -> list[list[Row] | Failure]:
    """The work of a stage that has none: a shard without rows loads no model."""
    assert not rows
    return []


def attempt(work: Work, batch: list[Row]) -> list[Sequence[Row] | Failure]:
    """One batch through `work`; on a UserError each row alone, and the rows that still raise become Failures.

    An error that `stops` is no row's own and goes through: the shard is not written, and the next run starts with it.
    """
    try:
        results = list(work(batch))
    except UserError as error:
        if error.stops:
            raise
        if len(batch) == 1:
            return [Failure(describe(error, limit=None))]
        return [result for row in batch for result in attempt(work, [row])]
    assert len(results) == len(batch), f"a stage gave {len(results)} results for {len(batch)} rows"
    return results


def failed_row(stage: str, row: Row, reason: str) -> Row:
    """A row of `failed/`: enough to find the row, and its small columns to see what it was; no pictures."""
    small = {key: value for key, value in row.items() if not isinstance(value, bytes | dict)}
    text = json.dumps(small, ensure_ascii=False, sort_keys=True, default=str)
    return {"stage": stage, "id": str(row.get("id", "")), "reason": reason, "row": text[:4000]}


def _lost(failures: Sequence[Row]) -> bool:
    """Whether one of these rows of `failed/` was lost."""
    return any(row["reason"].startswith(LOST) for row in failures)
