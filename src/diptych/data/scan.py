"""Reading a run's parts without its pictures: some columns a batch at a time, one row's pictures when asked.

Memory stays that of one batch however long the data set is. An unfinished data set is read as far as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diptych import recipe as recipes
from diptych.data import labels, records
from diptych.data.store import Dataset
from diptych.errors import UsageError
from diptych.recipe import tasks
from diptych.recipe.schema import Recipe
from diptych.utils.paths import inside

BATCH = 8192  # rows


def open_run(run_dir: str | Path) -> tuple[Path, Recipe, tasks.Task]:
    """A run's folder, its frozen recipe and its task. UsageError if the folder is no run's."""
    folder = Path(run_dir)
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; name a run's folder, for instance runs/first")
    if not (folder / "recipe.yaml").is_file():
        raise UsageError(f"{folder} is not a run's folder: there is no recipe.yaml in it")
    recipe = recipes.load(inside(folder, "recipe.yaml"))
    return folder, recipe, tasks.load(recipe.task)


def batches(data: Dataset, *columns: str) -> Iterator[tuple[int, int, dict[str, list[Any]]]]:
    """Shard, number of the first row in it, and `{column: values}`, in the order of the data set."""
    for shard in data.shards():
        start = 0
        with data.open_part(shard) as part:
            for batch in part.iter_batches(BATCH, columns=list(columns)):
                values = batch.to_pydict()
                if "reason" in values:
                    values["reason"] = [records.reason_now(reason) for reason in values["reason"]]
                yield shard, start, values
                start += batch.num_rows


def selected(folder: str | Path, *columns: str) -> Iterator[dict[str, list[Any]]]:
    """`batches` of a run's candidates, `columns` with `id`, `kept` and `reason` as the selection left them.

    A candidate says what it is by itself. What `pairs/` did not take though it was kept is not kept here: a repeat has
    the reason `duplicate: hash` or `duplicate: embedding`, and people's decisions hold whatever the numbers say.
    """
    refused = Dataset(Path(folder) / "failed" / "select", records.schema(records.FAILED))
    decided = labels.both_ways(labels.applied(folder))
    parts = set(refused.shards())
    part, again = None, dict[str, str]()
    names = list(dict.fromkeys(("id", "kept", "reason", *columns)))
    for shard, _, batch in batches(Dataset(Path(folder) / "candidates"), *names):
        if shard != part:  # failures lie in parts of the same numbers as the rows they are of
            part = shard
            again = {row["id"]: row["reason"] for row in refused.read_shard(shard)} if shard in parts else {}
        for i, name in enumerate(batch["id"] if again or decided else ()):
            if name in decided:
                batch["kept"][i] = decided[name]
                batch["reason"][i] = "kept" if decided[name] else records.REJECTED
            elif name in again and again[name].startswith(records.DUPLICATE):
                batch["kept"][i] = False
                batch["reason"][i] = f"{records.DUPLICATE}:{again[name].rpartition(':')[2]}"
        yield batch


def row(data: Dataset, shard: int, number: int, *columns: str) -> dict[str, Any]:
    """Some columns of one row: reads its row group, not the part."""
    with data.open_part(shard) as part:
        for group in range(part.metadata.num_row_groups):
            rows = part.metadata.row_group(group).num_rows
            if number < rows:
                return part.read_row_group(group, columns=list(columns)).slice(number, 1).to_pylist()[0]
            number -= rows
    raise AssertionError(f"{data.url}, part {shard} has no row {number}")
