"""`distill.init` with adapters: a LoRA is trained on as the LoRA that it is."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_run
import torch

from diptych import student
from diptych.errors import UsageError
from diptych.train.distill import distill
from diptych.train.loop import Trainer
from raising import raises

LORA = {"mode": "lora", "rank": 4, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def first(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("first") / "student"
    distill(tiny_run.make_recipe(world.teacher, **LORA), world.pairs, out)
    return SimpleNamespace(out=out)


def test_it_starts_as_what_was_saved_and_is_saved_for_the_same_teacher(world: Any, first: Any, tmp_path: Path) -> None:
    recipe = tiny_run.make_recipe(world.teacher, **LORA | {"init": str(first.out), "steps": 4})
    trainer = Trainer(tiny_run.prepare(recipe, world.pairs, tmp_path / "start"))
    saved = student.load(first.out, base=world.teacher, device="cpu", fuse=True).transformer
    batch = trainer.next_batch(1)
    with torch.no_grad():
        started, wanted = (trainer.losses(batch, model) for model in (trainer.transformer, saved))
    for got, want in zip(started, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)

    distill(recipe, world.pairs, tmp_path / "second")
    again = student.load(tmp_path / "second", base=world.teacher, device="cpu", fuse=True).transformer
    assert not torch.equal(again.x_embedder.weight, saved.x_embedder.weight)
    names = [sorted(open_keys(out)) for out in (first.out, tmp_path / "second")]
    assert names[0] == names[1]  # the same adapters, not one set on top of another


def open_keys(out: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(out / "pytorch_lora_weights.safetensors", "pt") as file:
        return list(file.keys())


@pytest.mark.parametrize(
    ("keys", "facts"),
    [
        ({"rank": 2}, ["rank 4", "distill.rank is 2"]),
        ({"lora_targets": ["to_q"]}, ["distill.lora_targets 3", "the LoRA"]),
        ({"lora_targets": "attention+mlp"}, ["distill.lora_targets", "the recipe"]),
    ],
)
def test_other_adapters_than_the_recipes_are_refused(
    world: Any, first: Any, tmp_path: Path, keys: dict[str, Any], facts: list[str]
) -> None:
    recipe = tiny_run.make_recipe(world.teacher, **LORA | {"init": str(first.out)} | keys)
    with raises("lora_mismatch", *facts, kind=UsageError):
        distill(recipe, world.pairs, tmp_path / "out")


def test_a_whole_student_is_no_lora_to_go_on_from(world: Any, straight: Any, tmp_path: Path) -> None:
    recipe = tiny_run.make_recipe(world.teacher, **LORA | {"init": str(straight.out)})
    with raises("recipe_conflict", straight.out, "mode: full", kind=UsageError):
        distill(recipe, world.pairs, tmp_path / "out")
