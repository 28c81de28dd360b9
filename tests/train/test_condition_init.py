"""`distill.condition_init`: where the input layer's columns for the reference begin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from PIL import Image

from diptych import student
from diptych.recipe.schema import Distill, Recipe
from diptych.student.weights.fold import image_columns
from diptych.train.checkpoint import identity
from diptych.train.distill import distill
from diptych.train.loop import Trainer


def columns(transformer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The input layer's for the picture and for the condition."""
    return transformer.x_embedder.weight.detach().float().cpu().chunk(2, dim=1)


def test_columns_of_a_picture_say_nothing_of_what_is_empty() -> None:
    weight, empty = torch.randn(5, 12), torch.randn(6)
    found = image_columns(weight, empty)
    torch.testing.assert_close(found @ empty, torch.zeros(5), rtol=0, atol=1e-5)
    other = torch.randn(6)
    other -= (other @ empty) / (empty @ empty) * empty
    torch.testing.assert_close(found @ other, weight[:, :6] @ other, rtol=1e-4, atol=1e-5)
    for nothing in (None, torch.zeros(6)):
        assert torch.equal(image_columns(weight, nothing), weight[:, :6])


@pytest.mark.parametrize("conditioning", ["diptych", "channel"])
def test_a_student_may_begin_with_the_teachers_own(world: Any, tmp_path: Path, conditioning: str) -> None:
    started = {}
    for name in ("zeros", "teacher"):
        recipe = tiny_run.make_recipe(world.teacher, conditioning=conditioning, condition_init=name)
        trainer = Trainer(tiny_run.prepare(recipe, world.pairs, tmp_path / name))
        started[name] = columns(trainer.transformer)
    own, zeros = started["zeros"]
    assert not zeros.any() and own.any()
    pipe = trainer.job.pipe
    black = pipe.encode_reference([Image.new("RGB", (tiny_run.PANEL, tiny_run.PANEL))], trainer.job.canvas).mean((0, 1))
    wanted = image_columns(torch.cat([own, zeros], 1), black if conditioning == "diptych" else None)
    assert torch.equal(started["teacher"][0], own)
    torch.testing.assert_close(started["teacher"][1], wanted)
    assert torch.equal(wanted, own) == (conditioning == "channel")


def test_a_lora_of_such_a_student_goes_on_the_plain_widened_teacher(world: Any, tmp_path: Path) -> None:
    settings = {"mode": "lora", "rank": 4, "condition_init": "teacher", "learning_rate": 1e-4}
    recipe = tiny_run.make_recipe(world.teacher, **settings)
    began = columns(Trainer(tiny_run.prepare(recipe, world.pairs, tmp_path / "start")).transformer)[1]
    distill(recipe, world.pairs, tmp_path / "student")
    saved = student.load(tmp_path / "student", base=world.teacher, device="cpu", fuse=True).transformer
    moved = (columns(saved)[1] - began).norm() / began.norm()
    assert 0 < moved < 0.1, "it went on from there, and the file holds where it began too"

    again = tiny_run.make_recipe(world.teacher, **settings | {"init": str(tmp_path / "student"), "steps": 2})
    trainer = Trainer(tiny_run.prepare(again, world.pairs, tmp_path / "again"))
    torch.testing.assert_close(columns(trainer.transformer)[1], columns(saved)[1])


def test_what_was_begun_before_there_was_a_choice_goes_on() -> None:
    assert "condition_init" not in identity(Distill(), 0)
    assert identity(Distill(condition_init="teacher"), 0)["condition_init"] == "teacher"
    base = {"name": "a", "task": "subject", "teacher": "pocket"}
    plain, chosen = (
        Recipe.model_validate({**base, "distill": {"condition_init": each}}) for each in ("zeros", "teacher")
    )
    assert plain.fingerprint("distill") == Recipe.model_validate(base).fingerprint("distill")
    assert plain.fingerprint("distill") != chosen.fingerprint("distill")
