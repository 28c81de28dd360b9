"""A training that a corrected recipe takes over: its latents always, its steps where the recipe takes the same ones."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import kills
import pytest
import tiny_run

from diptych.run.runner import run
from diptych.student.settings import resolve
from diptych.utils.console import Display

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def trained(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has trained four steps on other people's pairs."""
    return go(world, tmp_path_factory.mktemp("trained") / "run")


def go(world: Any, out: Path, source: Path | None = None, evaluate: dict[str, Any] | None = None, **keys: Any) -> Path:
    data = [{"path": str(world.folder / "pairs")}]
    recipe = tiny_run.make_recipe(world.teacher, data=data, **{"steps": 4, "checkpoint_every": 2, **keys})
    settings = recipe.evaluate.model_copy(update={"suite": "none", **(evaluate or {})})
    recipe = recipe.model_copy(update={"evaluate": settings})
    run(recipe, out, ("distill",), Display(quiet=True), source=source)
    return out


def linked(one: Path, other: Path, pattern: str) -> list[bool]:
    files = [path for path in (one / "student/training").glob(pattern) if path.is_file()]
    assert files
    there = (other / path.relative_to(one) for path in files)
    return [path.exists() and path.samefile(own) for path, own in zip(there, files, strict=True)]


def test_a_training_by_the_same_recipe_is_taken_and_exported_as_the_new_one_has_it(
    world: Any, trained: Path, tmp_path: Path
) -> None:
    again = go(world, tmp_path / "b", trained, {"image_guidance": 3.5}, sample_every=3)
    assert all(linked(trained, again, "step-*/*")) and all(linked(trained, again, "latents/*/*"))
    assert (again / "student" / WEIGHTS).read_bytes() == (trained / "student" / WEIGHTS).read_bytes()
    assert kills.result(again / "student")[0] == kills.result(trained / "student")[0]
    assert resolve(None, [again / "student"]).image_guidance == 3.5
    origin = json.loads((again / "student/origin.json").read_text())
    assert origin["recipe_sha256"] == hashlib.sha256((again / "recipe.yaml").read_bytes()).hexdigest()


def test_more_steps_go_on_from_the_last_checkpoint(world: Any, trained: Path, tmp_path: Path) -> None:
    longer, straight = go(world, tmp_path / "b", trained, steps=6), go(world, tmp_path / "c", steps=6)
    assert kills.result(longer / "student")[0] == kills.result(straight / "student")[0]
    assert (longer / "student" / WEIGHTS).read_bytes() == (straight / "student" / WEIGHTS).read_bytes()
    assert not (trained / "student/training/step-000006").exists()


@pytest.mark.parametrize("keys", [{"learning_rate": 1e-4}, {"mode": "lora", "rank": 2}, {"seed": 9}, {"steps": 3}])
def test_another_training_takes_the_latents_alone(
    world: Any, trained: Path, tmp_path: Path, keys: dict[str, Any]
) -> None:
    other = go(world, tmp_path / "b", trained, **keys)
    assert all(linked(trained, other, "latents/*/*")) and not any(linked(trained, other, "step-*/*"))


def test_a_student_whose_checkpoints_were_removed_is_taken_as_it_is(world: Any, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "a")
    for path in (tmp_path / "a/student/training").glob("step-*"):
        shutil.rmtree(path)
    again = go(world, tmp_path / "b", tmp_path / "a")
    assert (again / "student" / WEIGHTS).samefile(tmp_path / "a/student" / WEIGHTS)
