"""Which share of the samples is trained with the instruction, where the recipe leaves it to the task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_run
import yaml

from diptych.recipe import load, tasks
from diptych.run.resolve import OtherRecipe, freeze
from diptych.train.metrics import read


@pytest.mark.parametrize("name", tasks.names())
def test_an_instruction_task_trains_on_instructions_and_the_frozen_recipe_says_so(name: str, tmp_path: Path) -> None:
    recipe = load("demo", [f"task={name}", "device=cpu", "threads=1", "distill.precision=float32"])
    freeze(recipe, tmp_path)
    share = yaml.safe_load((tmp_path / "recipe.yaml").read_text())["distill"]["instructions"]
    assert share == {"instruction": 1.0}.get(name, 0.0)
    assert freeze(recipe, tmp_path).distill.instructions == share  # and the same recipe goes on


def test_what_the_recipe_says_is_taken_and_a_run_keeps_what_it_was_frozen_with(tmp_path: Path) -> None:
    settings = ["task=instruction", "device=cpu", "threads=1", "distill.precision=float32"]
    said = load("demo", [*settings, "distill.instructions=0.0"])
    assert tasks.resolve(said) is said
    freeze(said, tmp_path)
    assert freeze(load("demo", settings), tmp_path).distill.instructions == 0.0  # a run of before there was `auto`
    with pytest.raises(OtherRecipe, match=r"distill\.instructions"):
        freeze(load("demo", [*settings, "distill.instructions=0.5"]), tmp_path)


def test_no_row_of_a_run_depends_on_it(tmp_path: Path) -> None:
    from diptych.run.fingerprint import Fingerprints

    recipe, task = load("demo", ["device=cpu", "threads=1"]), tasks.load("subject")
    other = task.model_copy(update={"captions": task.captions.model_copy(update={"instructions": 0.7})})
    prints = [Fingerprints(recipe, each, tmp_path).of("write") for each in (task, other)]
    assert prints[0] == prints[1]


def test_training_called_by_itself_takes_the_share_of_the_task(world: Any, tmp_path: Path) -> None:
    from diptych.train.distill import distill

    pairs = tiny_run.make_pairs(tmp_path / "pairs", instruction="the same cat, in the grass")
    losses: dict[str, Any] = {}
    for task, share in (("instruction", "auto"), ("instruction", 1.0), ("subject", "auto"), ("subject", 0.0)):
        recipe = tiny_run.make_recipe(world.teacher, steps=1, instructions=share, validation_pairs=0, sample_steps=1)
        out = tmp_path / f"{task}-{share}"
        distill(recipe.model_copy(update={"task": task}), pairs, out)
        losses[f"{task}-{share}"] = read(out / "training" / "metrics.jsonl")[0]["loss"]
    assert losses["instruction-auto"] == losses["instruction-1.0"] != losses["subject-auto"] == losses["subject-0.0"]
