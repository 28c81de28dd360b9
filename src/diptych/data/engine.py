"""The loop over shards: a stage maps rows to rows; an engine reads, batches, publishes and resumes.

A stage is independent of files and processes:

    class Stage:
        name: str            # "paint"
        batch_size: int      # rows per call
        def load(self) -> Callable[[list[dict]], list[list[dict] | Failure]]: ...

The callable takes one batch of input rows, in order and from one shard. For each it returns the output rows (none, one
or several) or a `Failure`. If it raises UserError, the batch is repeated row by row, so that one bad row costs one row.
Shard i of the output depends only on shard i of the input: any order and any engine (`LocalEngine`,
`ray_engine.RayEngine`) give the same files.
"""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from diptych.data.store import Dataset
from diptych.errors import UserError, describe

if TYPE_CHECKING:
    from diptych.recipe.schema import Recipe

LOST = "no reply: "  # start of the reasons of lost rows in `failed/`
Row = dict[str, Any]


@dataclass(frozen=True)
class Failure:
    """A row that could not be processed, with the reason in one line. A `lost` row met a temporary fault, such as a
    server that does not reply; the next run tries it again."""

    reason: str
    lost: bool = False


Work = Callable[[list[Row]], Sequence[Sequence[Row] | Failure]]
Progress = Callable[..., None]  # (rows done, all rows, note="")
Setup = Callable[[], Callable[[Any], Any]]  # runs once in each worker and returns the function for an item
Timed = Callable[[int, float], None]  # (rows, seconds of the stage's work)


class Stage(Protocol):
    """A stage, as an engine sees it."""

    @property
    def name(self) -> str: ...
    @property
    def batch_size(self) -> int: ...
    def load(self) -> Work: ...


@dataclass(frozen=True)
class Result:
    """The counts of a stage."""

    inputs: int
    """Rows read."""
    rows: int
    """Rows written."""
    failed: int
    """Rows that failed, in this and earlier runs."""
    processed: int
    """Rows that this process worked on; 0 if all were there."""
    reasons: list[str] = field(default_factory=list)
    """The first few reasons of failures, for a summary."""
    lost: int = 0
    """Failures that the next run tries again."""


@dataclass(frozen=True)
class StageJob:
    """A stage with its input and output: enough to make any of its shards, in any process."""

    stage: Stage
    inputs: Dataset | Sequence[list[Row]]
    output: Dataset
    failed: Dataset
    fingerprint: str

    def rows(self, shard: int) -> list[Row]:
        """The input rows of a shard."""
        return self.inputs.read_shard(shard) if isinstance(self.inputs, Dataset) else self.inputs[shard]

    def make(self, shard: int, rows: list[Row], work: Work, report: Callable[[int], None], timed: Timed) -> None:
        """Makes a shard from its input and publishes it. `report` gets the number of rows done so far."""
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
        # Failures first: a published shard then always has its failures.
        if bad:
            self.failed.write_shard(shard, bad, self.fingerprint)
        self.output.write_shard(shard, good, self.fingerprint)


class Engine(ABC):
    """Runs a stage over its shards: makes the missing ones, then publishes the manifest."""

    @abstractmethod
    def of(self, recipe: Recipe) -> Engine:
        """This engine with the resources that `recipe` requests."""

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
        """Makes the missing shards of `output`, then publishes it. Calls the stage's `load` only if there is work.

        Args:
            inputs: a complete data set, or the shards as lists of rows.
            failed: gets one part per shard with failures: stage, id, reason, text columns as JSON.
            manifest: further keys of the manifest (seeds, versions, input hashes).
            timed: is called with the time of each batch.
            retry: make shards again in which an earlier run lost rows.
            finish: is called with `output` and `failed` before they are published, and may move rows between them.

        Raises UserError if a part has another fingerprint, or if every row failed.
        """
        shards = inputs.shards() if isinstance(inputs, Dataset) else list(range(len(inputs)))
        sizes = {i: inputs.rows_in(i) if isinstance(inputs, Dataset) else len(inputs[i]) for i in shards}
        total = sum(sizes.values())
        output.clean()
        failed.clean()
        done = output.shards_done(fingerprint)
        if not done <= set(shards):
            raise UserError(
                "run_mismatch", f"{output.url} has parts that its input lacks; remove {output.url} and run again"
            )
        if retry:
            again = {i for i in set(failed.shards()) & done if _lost(failed.read_shard(i))}
            for i in again:
                output.drop_shard(i)
            done -= again
        for i in set(failed.shards()) - done:
            failed.drop_shard(i)  # its shard was not published, or the output was removed
        missing = {i: sizes[i] for i in shards if i not in done}
        if missing:
            output.unpublish()
        count = sum(sizes[i] for i in done)
        report = progress or (lambda *_: None)
        report(count, total)
        if missing:
            job = StageJob(stage, inputs, output, failed, fingerprint)
            self.make(job, missing, lambda rows, *note: report(count + rows, total, *note), timed or (lambda *_: None))
        if finish is not None and not output.is_complete(fingerprint):
            finish(output, failed)
        failures = failed.columns("reason") if failed.shards() else []
        if not output.is_complete(fingerprint):
            output.publish(
                {"stage": stage.name, "fingerprint": fingerprint, "failed": len(failures), **(manifest or {})}
            )
        if total and len(failures) == total:
            remedy = "run the same command" if _lost(failures) else f"remove {output.url}"
            raise UserError(
                "rows_failed",
                f"{stage.name}: all {total} rows failed; the first reason: {failures[0]['reason']} "
                f"(all reasons: {failed.url}; {remedy} to try again)",
            )
        reasons = list(dict.fromkeys(row["reason"] for row in failures))[:5]
        lost = sum(row["reason"].startswith(LOST) for row in failures)
        return Result(total, len(output), len(failures), sum(missing.values()), reasons, lost)

    @abstractmethod
    def make(self, job: StageJob, missing: dict[int, int], report: Callable[..., None], timed: Timed) -> None:
        """Makes all shards in `missing` (shard → number of rows), or raises. Calls `report(rows done, note="")`."""

    @abstractmethod
    def each(
        self, name: str, setup: Setup, items: Sequence[Any], say: Callable[[str], None]
    ) -> Iterator[tuple[int, Any]]:
        """Yields (index, result) of every item as it finishes. Calls `say` with news of the workers."""

    @abstractmethod
    def there(self, where: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """Calls a function where the stage `where` runs, on a machine with its devices, and returns its result."""


class LocalEngine(Engine):
    """Runs a stage in this process, shard by shard."""

    def of(self, recipe: Recipe) -> LocalEngine:
        """This engine; a process cannot change its resources."""
        return self

    def make(self, job: StageJob, missing: dict[int, int], report: Callable[..., None], timed: Timed) -> None:
        """Makes the shards in order."""
        work: Work | None = None
        count = 0
        for shard, number in missing.items():
            rows = job.rows(shard)
            if work is None and rows:
                work = job.stage.load()
            job.make(shard, rows, work or idle, lambda done, before=count: report(before + done), timed)
            count += number

    def each(
        self, name: str, setup: Setup, items: Sequence[Any], say: Callable[[str], None]
    ) -> Iterator[tuple[int, Any]]:
        """Yields (index, result) of every item, in order."""
        work = setup()
        yield from ((index, work(item)) for index, item in enumerate(items))

    def there(self, where: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """Calls the function in this process."""
        return function(*arguments)


def idle(rows: list[Row]) -> list[list[Row] | Failure]:
    """The work for a shard without rows, so that it loads no model."""
    assert not rows
    return []


def attempt(work: Work, batch: list[Row]) -> list[Sequence[Row] | Failure]:
    """Runs a batch through `work`. After a UserError each row runs alone, and rows that still raise become Failures.

    An error that `stops` is not caused by a row and is raised: the shard is not written, and the next run resumes
    there.
    """
    try:
        results = list(work(batch))
    except UserError as error:
        if error.stops:
            raise
        if len(batch) == 1:
            return [Failure(describe(error, limit=None))]
        return [result for row in batch for result in attempt(work, [row])]
    assert len(results) == len(batch), f"a stage returned {len(results)} results for {len(batch)} rows"
    return results


def failed_row(stage: str, row: Row, reason: str) -> Row:
    """A row of `failed/`: the id, the reason, and the small columns of the row as JSON, without images."""
    small = {key: value for key, value in row.items() if not isinstance(value, bytes | dict)}
    text = json.dumps(small, ensure_ascii=False, sort_keys=True, default=str)
    return {"stage": stage, "id": str(row.get("id", "")), "reason": reason, "row": text[:4000]}


def _lost(failures: Sequence[Row]) -> bool:
    """Whether one of these rows of `failed/` is a lost row."""
    return any(row["reason"].startswith(LOST) for row in failures)
