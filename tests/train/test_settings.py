"""How a trained student is sampled by default: as its family, unless its recipe says otherwise."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_run

from diptych import Student
from diptych import recipe as recipes
from diptych.data.images import open_image
from diptych.recipe.schema import Evaluate
from diptych.student.settings import Settings
from diptych.student.weights.sources import read_settings
from diptych.train.distill import distill

RECIPES = Path(__file__).parents[2] / "recipes"
SHORT: dict[str, Any] = {"steps": 2, "validate_every": 2, "checkpoint_every": 2, "sample_every": 0}
LORA = {"mode": "lora", "rank": 2}


def trained(world: Any, out: Path, evaluate: dict[str, Any], **keys: Any) -> Path:
    recipe = tiny_run.make_recipe(world.teacher, **SHORT, **keys)
    distill(recipe.model_copy(update={"evaluate": Evaluate.model_validate(evaluate)}), world.pairs, out)
    return out


@pytest.mark.parametrize("suite", ["pocket", "none"])
def test_without_a_word_in_the_recipe_a_student_is_sampled_as_its_family(
    world: Any, tmp_path: Path, suite: str
) -> None:
    out = trained(world, tmp_path / "out", {"suite": suite}, **LORA)
    student = Student.load(out, base=world.teacher, device="cpu")
    assert student.pipeline.settings == Settings(sizes=((tiny_run.PANEL, tiny_run.PANEL),))
    forwards, forward = [], student.pipeline.transformer.forward

    def count(*args: Any, **given: Any) -> Any:
        forwards.append(len(given["hidden_states"]))
        return forward(*args, **given)

    student.pipeline.transformer.forward = count
    student.generate(open_image(next(iter(world.pairs))["image"]), "a cat")
    assert forwards == [1] * 28


@pytest.mark.parametrize("mode", [LORA, {"mode": "full"}], ids=["lora", "full"])
def test_what_the_recipe_says_travels_with_the_weights(world: Any, tmp_path: Path, mode: dict[str, Any]) -> None:
    said = {"suite": "none", "steps": 3, "text_guidance": 1.5, "null_panel": "own", "relighting": {"image_guidance": 2}}
    out = trained(world, tmp_path / "out", said, conditioning="channel", **mode)
    wanted = Settings(
        "channel",
        steps=3,
        text_guidance=1.5,
        null_panel="own",
        relight={"image_guidance": 2.0},
        sizes=((tiny_run.PANEL, tiny_run.PANEL),),
    )
    weights = out / ("transformer" if mode["mode"] == "full" else "pytorch_lora_weights.safetensors")
    copy = (shutil.copytree if weights.is_dir() else shutil.copyfile)(weights, tmp_path / weights.name)
    for place in (out, copy):
        assert Student.load(place, base=world.teacher, device="cpu").pipeline.settings == wanted
        assert read_settings(Path(place), world.teacher) == wanted
    assert not (out / "sampling.json").exists()


@pytest.mark.parametrize("name", ["pocket", "demo", "pocket-both", "pocket-relight"])
def test_the_pocket_recipes_say_how_their_students_are_sampled(name: str) -> None:
    asked = recipes.load(RECIPES / f"{name}.yaml").evaluate
    assert None not in (asked.steps, asked.image_guidance, asked.text_guidance, asked.null_panel)


@pytest.mark.parametrize("name", ["flux-subject", "flux-relight"])
def test_the_flux_recipes_leave_sampling_to_the_family(name: str) -> None:
    asked = recipes.load(RECIPES / f"{name}.yaml").evaluate
    assert (asked.steps, asked.image_guidance, asked.text_guidance) == (None,) * 3
