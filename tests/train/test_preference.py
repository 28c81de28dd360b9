"""Preference training: negatives from degraded references, and a loss that prefers the target to them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch

from diptych.errors import UsageError
from diptych.recipe import load
from diptych.train import checkpoint
from diptych.train.distill import distill
from diptych.train.loop import Trainer
from diptych.train.preference import degrade, loss

STEPS = 6


@pytest.fixture(scope="module")
def recipe(world: Any, straight: Any) -> Any:
    wish = {"pairs": 10, "beta": 2000.0, "drop_text": 0.5, "shrink": 0.25}
    return lambda steps: tiny_run.make_recipe(
        world.teacher, init=str(straight.out), steps=steps, sample_steps=3, preference=wish
    )


@pytest.fixture(scope="module")
def preferred(world: Any, recipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("preferred") / "student"
    distill(recipe(STEPS), world.pairs, out)
    return out


def lines_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "training" / "metrics.jsonl").read_text().splitlines()]


def test_the_loss_is_that_of_a_coin_at_the_start_and_falls_as_the_margin_grows() -> None:
    even = torch.tensor([0.5])
    assert loss(even, even, even, even, 100.0).item() == pytest.approx(math.log(2))
    better, worse = loss(even - 0.01, even, even, even, 100.0), loss(even, even - 0.01, even, even, 100.0)
    assert better < math.log(2) < worse
    # β·margin of 1, by hand.
    assert better.item() == pytest.approx(math.log(1 + math.exp(-1)), rel=1e-4)


def test_a_degraded_reference_keeps_its_colours_and_loses_its_detail() -> None:
    picture = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    poor = degrade(picture, 0.25)
    assert poor.shape == picture.shape and poor.std() < 0.5 * picture.std()
    torch.testing.assert_close(poor.mean((2, 3)), picture.mean((2, 3)), atol=0.06, rtol=0)


def test_a_student_learns_to_prefer_the_target(preferred: Path) -> None:
    lines = lines_of(preferred)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert lines[0]["preference"] == pytest.approx(math.log(2))  # nothing has moved yet
    assert lines[-1]["preference"] < math.log(2) - 0.01 and lines[-1]["preferred"] > 0.5
    assert (preferred / "model_index.json").exists()


def test_negatives_share_the_true_left_panel_and_differ_on_the_right(world: Any, recipe: Any, tmp_path: Path) -> None:
    from diptych.student.canvas import split_tokens

    job = tiny_run.prepare(recipe(STEPS), world.pairs, tmp_path / "out")
    assert len(job.train_rows) == 10 and job.negatives is not None
    clean, _ = job.latents.gather(job.train_rows)
    negative = job.negatives.gather(job.train_rows)
    (left, right), (same, other) = (split_tokens(tokens, job.canvas) for tokens in (clean, negative))
    assert torch.equal(left, same) and (right - other).abs().mean() > 0.05
    batch = Trainer(job).next_batch(1)
    assert batch.negative is not None and batch.negative.shape == batch.clean.shape
    assert [len(part.sigma) for part in batch.split(3)] == [3, 1]


def test_a_lora_draws_its_own_negatives_and_goes_on(world: Any, recipe: Any, tmp_path: Path) -> None:
    lora = {"mode": "lora", "rank": 4, "learning_rate": 1e-2}
    distill(tiny_run.make_recipe(world.teacher, steps=6, **lora), world.pairs, tmp_path / "first")
    unborn = {**lora, "steps": 1, "learning_rate": 1e-12}  # its negatives are the bare teacher's
    distill(tiny_run.make_recipe(world.teacher, **unborn), world.pairs, tmp_path / "unborn")
    wish = {"pairs": 10, "drop_text": 0.0, "shrink": 0.25}
    found = []
    for name in ("first", "unborn"):
        values = {**lora, "init": str(tmp_path / name), "steps": 2, "sample_steps": 3, "preference": wish}
        job = tiny_run.prepare(tiny_run.make_recipe(world.teacher, **values), world.pairs, tmp_path / f"{name}-2")
        assert job.negatives is not None and not getattr(job.pipe.transformer, "peft_config", None)
        found.append(job.negatives.gather(job.train_rows))
    assert (found[0] - found[1]).abs().mean() > 0.01


def test_it_continues_exactly(world: Any, recipe: Any, preferred: Path, tmp_path: Path) -> None:
    distill(recipe(2), world.pairs, tmp_path / "student")
    drawn = sorted((tmp_path / "student" / "training").glob("negatives-*/*"))
    times = [path.stat().st_mtime_ns for path in drawn]
    distill(recipe(STEPS), world.pairs, tmp_path / "student")
    assert drawn and [path.stat().st_mtime_ns for path in drawn] == times  # drawn once
    found = [checkpoint.load(out / "training") for out in (preferred, tmp_path / "student")]
    straight, resumed = (one.tensors["weights"] for one in found if one is not None)
    assert all(torch.equal(straight[name], tensor) for name, tensor in resumed.items())


def test_a_damaged_file_of_negatives_is_drawn_anew(world: Any, recipe: Any, tmp_path: Path) -> None:
    job = tiny_run.prepare(recipe(1), world.pairs, tmp_path / "out")
    (path,) = (tmp_path / "out" / "training").glob("negatives-*/*")
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    again = tiny_run.prepare(recipe(1), world.pairs, tmp_path / "out")
    assert path.read_bytes() == whole and again.negatives is not None and job.train_rows == again.train_rows


def test_what_it_cannot_start_from_is_refused() -> None:
    with pytest.raises(UsageError, match=r"preference .* init"):
        load("demo", ["distill.preference={}"])
    with pytest.raises(UsageError, match=r"offload: blocks .* preference"):
        sets = ["init=x", "mode=lora", "preference={}", "offload=blocks", "gradient_checkpointing=true"]
        load("pocket", [f"distill.{one}" for one in sets])
