"""The engine: one shard at a time, nothing lost, nothing mixed, the same files in any order."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from diptych.data import records
from diptych.data.engine import Failure, LocalEngine, Row, Work
from diptych.data.store import Dataset
from diptych.errors import UserError
from raising import raises

PROMPTS = records.schema(records.PROMPT)
FAILED = records.schema(records.FAILED)


def row(i: int) -> Row:
    return {"id": records.prompt_id(i), "prompt": "", "panels": [], "subject": "", "task": "", "seed": i}


def shards(*sizes: int) -> list[list[Row]]:
    numbers = iter(range(sum(sizes)))
    return [[row(next(numbers)) for _ in range(size)] for size in sizes]


class Doubling:
    """Gives each row twice; even a plain stage has state to load, so loads are counted."""

    name = "doubling"

    def __init__(self, batch_size: int = 3, bad: Sequence[int] = (), raising: Sequence[int] = ()) -> None:
        self.batch_size, self.bad, self.raising = batch_size, set(bad), set(raising)
        self.loads = 0
        self.batches: list[list[int]] = []

    def load(self) -> Work:
        self.loads += 1
        return self.work

    def work(self, rows: list[Row]) -> list[list[Row] | Failure]:
        self.batches.append([r["seed"] for r in rows])
        if any(r["seed"] in self.raising for r in rows):
            raise UserError("row_invalid", "cannot\ndo this one")
        return [Failure("bad") if r["seed"] in self.bad else [r, {**r, "id": r["id"] + "b"}] for r in rows]


class Run:
    """Output and failures of a stage in one folder."""

    def __init__(self, folder: Path) -> None:
        self.output, self.failed = Dataset(folder / "out", PROMPTS), Dataset(folder / "failed" / "doubling", FAILED)
        self.folder = folder

    def __call__(self, stage: Any, inputs: Any, fingerprint: str = "f", **more: Any) -> Any:
        return LocalEngine().run(stage, inputs, self.output, self.failed, fingerprint, **more)

    def files(self) -> dict[str, bytes]:
        return {str(p.relative_to(self.folder)): p.read_bytes() for p in self.folder.rglob("*") if p.is_file()}


def test_batches_form_inside_a_shard_in_order(tmp_path: Path) -> None:
    stage = Doubling(batch_size=3)
    result = Run(tmp_path)(stage, shards(5, 4))
    assert stage.batches == [[0, 1, 2], [3, 4], [5, 6, 7], [8]]
    assert (result.inputs, result.rows, result.failed, result.processed) == (9, 18, 0, 9)


def test_a_failed_row_goes_to_failed_with_its_reason(tmp_path: Path) -> None:
    run = Run(tmp_path)
    result = run(Doubling(bad=[4]), shards(3, 3))
    assert result.failed == 1 and result.rows == 10 and result.reasons == ["bad"]
    (failure,) = list(run.failed)
    assert (failure["stage"], failure["id"], failure["reason"]) == ("doubling", "p-000004", "bad")
    assert run.failed.shards() == [1]
    assert run.output.manifest is not None and run.output.manifest["failed"] == 1


def test_one_raising_row_costs_one_row(tmp_path: Path) -> None:
    run = Run(tmp_path)
    stage = Doubling(batch_size=4, raising=[1])
    result = run(stage, shards(4, 4))
    assert [r["reason"] for r in run.failed] == ["cannot do this one"]
    assert result.rows == 14
    assert stage.batches == [[0, 1, 2, 3], [0], [1], [2], [3], [4, 5, 6, 7]]


def test_a_programming_error_is_not_swallowed(tmp_path: Path) -> None:
    class Broken(Doubling):
        def work(self, rows: list[Row]) -> list[list[Row] | Failure]:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Run(tmp_path)(Broken(), shards(2))


def test_a_stage_that_loses_rows_is_caught(tmp_path: Path) -> None:
    class Losing(Doubling):
        def work(self, rows: list[Row]) -> list[list[Row] | Failure]:
            return super().work(rows)[1:]

    with pytest.raises(AssertionError, match="2 results for 3 rows"):
        Run(tmp_path)(Losing(), shards(3))


def test_all_rows_failing_is_an_error_with_the_reason(tmp_path: Path) -> None:
    for _ in range(2):  # and stays one when tried again
        with raises("rows_failed", "all 3 rows", "bad"):
            Run(tmp_path)(Doubling(bad=[0, 1, 2]), shards(3))


def test_only_what_is_missing_is_done_again_and_the_files_are_the_same(tmp_path: Path) -> None:
    whole, broken = Run(tmp_path / "whole"), Run(tmp_path / "broken")
    inputs = shards(3, 3, 3, 1)
    whole(Doubling(bad=[4], raising=[9]), inputs)
    broken(Doubling(bad=[4], raising=[9]), inputs)
    # As a kill leaves it: no manifest, parts missing, half a file, failures without their shard.
    broken.output.unpublish()
    broken.output.drop_shard(1)
    broken.output.drop_shard(2)
    (tmp_path / "broken/out/.part-00001.parquet.77.tmp").write_bytes(b"half")
    stage = Doubling(bad=[4], raising=[9])
    seen: list[tuple[int, int]] = []
    result = broken(stage, inputs, progress=lambda done, total: seen.append((done, total)))
    assert stage.batches == [[3, 4, 5], [6, 7, 8]] and result.processed == 6
    assert seen == [(4, 10), (7, 10), (10, 10)]
    assert broken.files() == whole.files()


def test_a_finished_stage_is_not_even_loaded(tmp_path: Path) -> None:
    Run(tmp_path)(Doubling(bad=[0]), shards(3))
    before = Run(tmp_path).files()
    stage = Doubling()
    result = Run(tmp_path)(stage, shards(3))
    assert stage.loads == 0 and result.processed == 0 and result.failed == 1
    assert Run(tmp_path).files() == before


def test_any_order_of_shards_gives_the_same_files(tmp_path: Path) -> None:
    inputs = shards(2, 3, 1, 2)
    straight = Run(tmp_path / "straight")
    straight(Doubling(bad=[3]), inputs)
    order = list(range(4))
    random.Random(1).shuffle(order)
    other = Run(tmp_path / "other")
    for keep in range(1, 5):  # as if other processes had done shards in another order
        for shard in order[:keep]:
            if shard not in other.output.shards():
                rows = straight.output.read_shard(shard)
                other.output.write_shard(shard, rows, "f")
                if shard in straight.failed.shards():
                    other.failed.write_shard(shard, straight.failed.read_shard(shard), "f")
    other(Doubling(bad=[3]), inputs)
    assert other.files() == straight.files()


def test_parts_of_another_fingerprint_stop_the_stage(tmp_path: Path) -> None:
    Run(tmp_path)(Doubling(), shards(3), "old")
    before = Run(tmp_path).files()
    with raises("run_mismatch", tmp_path):
        Run(tmp_path)(Doubling(), shards(3), "new")
    assert Run(tmp_path).files() == before


def test_parts_that_the_input_does_not_have_stop_the_stage(tmp_path: Path) -> None:
    Run(tmp_path)(Doubling(), shards(3, 3))
    with raises("run_mismatch", tmp_path):
        Run(tmp_path)(Doubling(), shards(3))


def test_a_stage_reads_what_another_wrote(tmp_path: Path) -> None:
    first, second = Run(tmp_path / "1"), Run(tmp_path / "2")
    first(Doubling(), shards(2, 0, 1))
    result = second(Doubling(batch_size=10), first.output, manifest={"inputs": {"1": first.output.manifest_hash()}})
    assert result.rows == 12 and second.output.shards() == [0, 1, 2]
    assert second.output.manifest is not None and len(second.output.manifest["inputs"]["1"]) == 64


def test_an_error_that_stops_the_run_blames_no_row_and_the_next_run_goes_on(tmp_path: Path) -> None:
    class Down(UserError):
        stops = True

    class Endpoint(Doubling):
        up = False

        def work(self, rows: list[Row]) -> list[list[Row] | Failure]:
            if not self.up and any(r["seed"] >= 4 for r in rows):
                raise Down("endpoint_unreachable", "the server is down")
            return super().work(rows)

    run, stage = Run(tmp_path), Endpoint()
    with pytest.raises(Down, match="the server is down"):
        run(stage, shards(3, 3, 3))
    assert run.output.shards() == [0] and run.failed.shards() == []
    stage.up = True
    assert run(stage, shards(3, 3, 3)).rows == 18


def test_a_stage_does_not_work_on_swapped_parts_and_goes_on_once_they_are_back(tmp_path: Path) -> None:
    first, second = Run(tmp_path / "a"), Run(tmp_path / "b")
    first(Doubling(), shards(2, 2, 2))
    parts = [tmp_path / "a/out" / first.output.part_name(shard) for shard in (1, 2)]
    whole = [part.read_bytes() for part in parts]
    for part, other in zip(parts, whole[::-1], strict=True):
        part.write_bytes(other)
    with raises("store_damaged", "part-00001"):
        second(Doubling(), Dataset(tmp_path / "a/out"))
    assert second.output.manifest is None
    for part, data in zip(parts, whole, strict=True):
        part.write_bytes(data)
    assert second(Doubling(), Dataset(tmp_path / "a/out")).rows == 24
