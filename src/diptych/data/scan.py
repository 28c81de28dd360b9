"""Reading a run without its images: some columns in batches, or one row.

Memory holds one batch, however large the data set is. Of an incomplete data set, the published parts are read.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diptych import recipe as recipes
from diptych.data import labels, records, verdicts
from diptych.data.store import Dataset
from diptych.errors import UsageError
from diptych.recipe import tasks
from diptych.recipe.schema import Recipe
from diptych.utils.paths import inside

BATCH = 8192  # rows


def open_run(run_dir: str | Path) -> tuple[Path, Recipe, tasks.Task]:
    """A run's folder, its frozen recipe and its task. UsageError if the folder is not a run."""
    folder = Path(run_dir)
    if not (folder / "recipe.yaml").is_file():
        reason = (
            "it has no recipe.yaml" if folder.is_dir() else "it is a file" if folder.exists() else "it does not exist"
        )
        raise UsageError(
            "run_not_found", f"{folder} is not a run's folder: {reason}. Pass a run's folder, for instance runs/first"
        )
    recipe = recipes.load(inside(folder, "recipe.yaml"))
    return folder, recipe, tasks.load(recipe.task)


def batches(data: Dataset, *columns: str) -> Iterator[tuple[int, int, dict[str, list[Any]]]]:
    """Yields (shard, number of the batch's first row in it, `{column: values}`) in the order of the data set."""
    for shard in data.shards():
        start = 0
        with data.open_part(shard) as part:
            for batch in part.iter_batches(BATCH, columns=list(columns)):
                values = batch.to_pydict()
                if "reason" in values:
                    values["reason"] = [verdicts.reason_now(reason) for reason in values["reason"]]
                yield shard, start, values
                start += batch.num_rows


def selected(folder: str | Path, *columns: str) -> Iterator[dict[str, list[Any]]]:
    """Yields batches of a run's candidates: `columns`, and `id`, `kept` and `reason` after the selection.

    A stored candidate has its verdict before the selection. Here repeats are rejected with the reason `duplicate: hash`
    or `duplicate: embedding`, and decisions by people replace verdicts.
    """
    rejected = Dataset(Path(folder) / "failed" / "select", records.schema(records.FAILED))
    decided = labels.both_ways(labels.applied(folder))
    parts = set(rejected.shards())
    part, reasons = None, dict[str, str]()
    names = list(dict.fromkeys(("id", "kept", "reason", *columns)))
    for shard, _, batch in batches(Dataset(Path(folder) / "candidates"), *names):
        if shard != part:  # failures are in the part with the same number as their rows
            part = shard
            reasons = {row["id"]: row["reason"] for row in rejected.read_shard(shard)} if shard in parts else {}
        for i, name in enumerate(batch["id"] if reasons or decided else ()):
            if name in decided:
                batch["kept"][i] = decided[name]
                batch["reason"][i] = "kept" if decided[name] else verdicts.REJECTED
            elif reasons.get(name, "").startswith(verdicts.DUPLICATE):
                batch["kept"][i] = False
                batch["reason"][i] = f"{verdicts.DUPLICATE}:{reasons[name].rpartition(':')[2]}"
        yield batch


def row(data: Dataset, shard: int, number: int, *columns: str) -> dict[str, Any]:
    """These columns of one row. Reads its row group, not the whole part."""
    with data.open_part(shard) as part:
        for group in range(part.metadata.num_row_groups):
            rows = part.metadata.row_group(group).num_rows
            if number < rows:
                return part.read_row_group(group, columns=list(columns)).slice(number, 1).to_pylist()[0]
            number -= rows
    raise AssertionError(f"{data.url}, part {shard} has no row {number}")
