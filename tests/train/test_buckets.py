"""Pairs of several shapes: a batch is of one size, and the position in the data is still the number of the step."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import kills
import pytest
import tiny_run

from diptych.data import records
from diptych.data.images import image_cell, open_image
from diptych.data.store import Dataset
from diptych.train import schedule
from diptych.train.distill import distill
from diptych.train.loop import Trainer
from diptych.train.schedule import Schedule

SIZES = [[16, 16], [16, 24]]
WIDE = {"buckets": SIZES, "validation_pairs": 4}


@pytest.fixture(scope="module")
def mixed(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """The world's pairs, those of every third grid wide: 8 of 24."""

    def widened(cell: dict[str, Any]) -> dict[str, Any]:
        return image_cell(open_image(cell).resize((24, 16)))

    data = Dataset(tmp_path_factory.mktemp("mixed") / "pairs", records.schema(records.PAIR))
    rows = list(world.pairs)
    for row in rows:
        if int(row["grid_id"][2:]) % 3 == 0:
            row |= {"conditioning": widened(row["conditioning"]), "image": widened(row["image"])}
    data.write_shard(0, rows[:15], "mixed")
    data.write_shard(1, rows[15:], "mixed")
    data.publish({"fingerprint": "mixed"})
    return data


def test_each_batch_is_of_one_size_and_an_epoch_has_every_pair(world: Any, mixed: Dataset, tmp_path: Path) -> None:
    recipe = tiny_run.make_recipe(world.teacher, **WIDE | {"validation_pairs": 0})
    job = tiny_run.prepare(recipe, mixed, tmp_path / "out")
    assert [(b.canvas.panel_height, b.canvas.panel_width) for b in job.buckets] == [(16, 16), (16, 24)]
    assert Counter(sample.bucket for sample in job.latents.samples) == {0: 16, 1: 8}
    trainer = Trainer(job)
    shapes = Counter()
    for step in range(1, 7):  # six batches of four: one epoch
        batch = trainer.next_batch(step)
        assert batch.clean.shape[1] == batch.canvas.tokens == batch.noise.shape[1]
        shapes[batch.canvas.panel_width] += 1
    assert shapes == {16: 4, 24: 2}
    seen = Counter(row for step in range(1, 7) for row, _ in trainer.order.at(step))
    assert seen == Counter(range(24))


def test_the_schedule_is_a_function_of_the_step(world: Any, mixed: Dataset, tmp_path: Path) -> None:
    job = tiny_run.prepare(tiny_run.make_recipe(world.teacher, **WIDE), mixed, tmp_path / "out")

    def fresh() -> Schedule:
        return Schedule(job.train_rows, job.latents, job.material.weights, 4, 5)

    straight = fresh()
    steps = [straight.at(step) for step in range(1, 40)]
    assert [fresh().at(step) for step in (39, 7, 20)] == [steps[38], steps[6], steps[19]]
    assert {turn for _, turn in steps[38]} != {0}  # later epochs have other noise


def test_a_training_in_buckets_stops_and_goes_on_exactly(world: Any, mixed: Dataset, tmp_path: Path) -> None:
    from PIL import Image

    summary = distill(tiny_run.make_recipe(world.teacher, **WIDE), mixed, tmp_path / "straight")
    for steps in (5, 12):
        distill(tiny_run.make_recipe(world.teacher, **WIDE, steps=steps), mixed, tmp_path / "twice")
    (one, weights), (other, same) = (kills.result(tmp_path / name) for name in ("straight", "twice"))
    assert weights == same
    assert [line["loss"] for line in one] == [line["loss"] for line in other]  # a last step is validated besides
    assert summary["pairs"] == 20 and summary["validation_pairs"] == 4 and math.isfinite(summary["validation"]["loss"])
    sheet = Image.open(tmp_path / "straight" / "training" / "samples" / "step-000012.png")
    assert sheet.height == 4 * 16 and sheet.width in (48, 72)
    lora = {**WIDE, "steps": 2, "preference": {"pairs": 12}, "sample_steps": 2, "init": str(tmp_path / "straight")}
    assert distill(tiny_run.make_recipe(world.teacher, **lora), mixed, tmp_path / "preferred")["steps"] == 2


def test_each_size_has_the_shift_that_the_base_samples_it_with(world: Any, tmp_path: Path) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.training_utils import generate_aspect_ratio_buckets

    job = tiny_run.prepare(tiny_run.make_recipe(world.teacher), world.pairs, tmp_path / "out")
    job.pipe.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    found = schedule.choose(job.pipe, [(16, 16), (32, 64)], None, "auto")
    assert found[0].shift < found[1].shift
    assert [bucket.shift for bucket in schedule.choose(job.pipe, [(16, 16), (32, 64)], None, 3.0)] == [3.0, 3.0]
    ladder = schedule.choose(job.pipe, "auto", 64, "auto")
    sizes = [(bucket.canvas.panel_height, bucket.canvas.panel_width) for bucket in ladder]
    assert sizes == generate_aspect_ratio_buckets(64, 8) and sizes[0] == (64, 64) and len(sizes) > 5


def test_an_aligned_pair_of_two_shapes_is_left_out(world: Any, tmp_path: Path) -> None:
    rows = list(world.pairs)
    odd = open_image(rows[0]["conditioning"]).resize((24, 16))
    larger = open_image(rows[1]["conditioning"]).resize((32, 32))
    rows[0] |= {"conditioning": image_cell(odd)}
    rows[1] |= {"conditioning": image_cell(larger)}
    data = Dataset(tmp_path / "pairs", records.schema(records.PAIR))
    data.write_shard(0, rows, "odd")
    data.publish({"fingerprint": "odd"})
    recipe = tiny_run.make_recipe(world.teacher)
    independent = tiny_run.prepare(recipe, data, tmp_path / "independent")
    assert len(independent.latents) == 24
    aligned = tiny_run.prepare(recipe.model_copy(update={"task": "relight"}), data, tmp_path / "aligned")
    assert len(aligned.latents) == 23
    (left_out,) = aligned.latents.skipped
    assert left_out["id"] == rows[0]["id"] and "different shapes (24x16 and 16x16)" in left_out["reason"]
