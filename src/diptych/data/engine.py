"""The loop over shards: a stage maps rows to rows, the engine reads, batches, publishes and resumes.

A stage knows nothing of files or processes:

    class Stage:
        name: str            # "paint"
        batch_size: int      # rows a call
        def load(self) -> Callable[[list[dict]], list[list[dict] | Failure]]: ...

The callable takes one batch of input rows, in order, never from two shards, and gives for each input row its output
rows (none, one or several) or a `Failure`. If it raises UserError the batch is tried again row by row, so that one bad
row costs one row. Shard i of the output depends on shard i of the input alone: any order, and any engine (Ray's will
take this same interface), gives the same files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from diptych.data.store import Dataset
from diptych.errors import UserError

Row = dict[str, Any]


@dataclass(frozen=True)
class Failure:
    """A row that could not be processed, and why, in one line."""

    reason: str


Work = Callable[[list[Row]], Sequence[Sequence[Row] | Failure]]
Progress = Callable[[int, int], None]  # rows done, rows in all


class Stage(Protocol):
    """What the engine needs of a stage."""

    @property
    def name(self) -> str: ...
    @property
    def batch_size(self) -> int: ...
    def load(self) -> Work: ...


@dataclass(frozen=True)
class Result:
    """What a stage did: rows read and written, failures in all, rows and calls of this process (0 = all was there)."""

    inputs: int
    rows: int
    failed: int
    processed: int
    reasons: list[str] = field(default_factory=list)  # the first few, for a summary


class LocalEngine:
    """Runs a stage in this process, one shard after the other."""

    def run(
        self,
        stage: Stage,
        inputs: Dataset | Sequence[list[Row]],
        output: Dataset,
        failed: Dataset,
        fingerprint: str,
        progress: Progress | None = None,
        manifest: dict[str, Any] | None = None,
    ) -> Result:
        """Makes what is missing of `output`, then publishes it with `manifest` (seeds, versions, input hashes).

        `inputs` is a complete data set, or the shards themselves as lists of rows. `failed` gets one part for each
        shard with failures (stage, id, reason, the row's text columns as JSON). Raises UserError if a part of
        another fingerprint is there, or if every single row failed. `load` is called only if there is work.
        """
        shards = inputs.shards() if isinstance(inputs, Dataset) else list(range(len(inputs)))
        sizes = {i: inputs.rows_in(i) if isinstance(inputs, Dataset) else len(inputs[i]) for i in shards}
        total = sum(sizes.values())
        output.clean()
        failed.clean()
        done = output.shards_done(fingerprint)
        if not done <= set(shards):
            raise UserError(f"{output.url} holds parts that its input does not; remove {output.url} and run again")
        for i in set(failed.shards()) - done:
            failed.drop_shard(i)  # of a shard that never came, or of an output that was removed
        missing = [i for i in shards if i not in done]
        if missing:
            output.unpublish()
        count = sum(sizes[i] for i in done)
        report = progress or (lambda *_: None)
        report(count, total)
        work: Work | None = None
        processed = 0
        for shard in missing:
            rows = inputs.read_shard(shard) if isinstance(inputs, Dataset) else inputs[shard]
            if work is None and rows:
                work = stage.load()
            good: list[Row] = []
            bad: list[Row] = []
            for start in range(0, len(rows), stage.batch_size):
                batch = rows[start : start + stage.batch_size]
                assert work is not None
                for row, result in zip(batch, attempt(work, batch), strict=True):
                    if isinstance(result, Failure):
                        bad.append(failed_row(stage.name, row, result.reason))
                    else:
                        good.extend(result)
                processed += len(batch)
                report(count + start + len(batch), total)
            count += len(rows)
            # Failures first: once the shard itself is there, its failures are known to be there too.
            if bad:
                failed.write_shard(shard, bad, fingerprint)
            output.write_shard(shard, good, fingerprint)
        failures = failed.columns("reason") if failed.shards() else []
        if not output.is_complete(fingerprint):
            output.publish(
                {"stage": stage.name, "fingerprint": fingerprint, "failed": len(failures), **(manifest or {})}
            )
        if total and len(failures) == total:
            raise UserError(
                f"{stage.name}: all {total} rows failed; the first reason: {failures[0]['reason']} "
                f"(all reasons in {failed.url}; remove {output.url} to try again)"
            )
        reasons = list(dict.fromkeys(row["reason"] for row in failures))[:5]
        return Result(total, len(output), len(failures), processed, reasons)


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
            return [Failure(one_line(error))]
        return [result for row in batch for result in attempt(work, [row])]
    assert len(results) == len(batch), f"a stage gave {len(results)} results for {len(batch)} rows"
    return results


def failed_row(stage: str, row: Row, reason: str) -> Row:
    """A row of `failed/`: enough to find the row, and its small columns to see what it was; no pictures."""
    small = {key: value for key, value in row.items() if not isinstance(value, bytes | dict)}
    text = json.dumps(small, ensure_ascii=False, sort_keys=True, default=str)
    return {"stage": stage, "id": str(row.get("id", "")), "reason": reason, "row": text[:4000]}


def one_line(error: BaseException) -> str:
    """An error's message on one line."""
    return " ".join(str(error).split()) or type(error).__name__
