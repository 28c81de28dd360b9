"""A model card speaks of curation only where something could refuse a pair."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_run

from diptych.data.records import in_force
from diptych.recipe.schema import Recipe
from diptych.train.export import model_card
from diptych.train.prepare import Material

OFF = {"thresholds": {"same": -1, "near_copy": 0, "seam": -1}}
NUMBERS: dict[str, Any] = {"parameters": 1, "pairs": 20, "validation_pairs": 4, "steps": 3, "epochs": 1.0}
NUMBERS |= {
    "exported": 3,
    "precision": "float32",
    "loss": {"left": 0.1, "right": 0.2},
    "validation": None,
    "seconds": 1.0,
}


def card(world: Any, curate: dict[str, Any], **more: Any) -> str:
    made = tiny_run.make_recipe(world.teacher)
    recipe = Recipe.model_validate(made.values() | {"curate": curate} | more)
    return model_card(recipe, NUMBERS, Material(world.pairs, [world.pairs], [1.0]))


def test_with_every_threshold_off_the_card_says_nothing_of_curation(world: Any) -> None:
    said = card(world, OFF)
    for word in ("kept", "threshold", "same subject", "copies", "copy of", "seam", "judge"):
        assert word not in said, word
    assert "Drawn by the teacher itself." in said and "| pairs | 24 |" in said


@pytest.mark.parametrize(
    ("curate", "there", "absent"),
    [
        (
            {"thresholds": {**OFF["thresholds"], "same": 0.6}},
            ["same subject", "same | 0.6"],
            ["seam", "copy"],
        ),
        ({"thresholds": {**OFF["thresholds"], "seam": 0.1}}, ["clear seam", "0.1"], ["same subject", "judge"]),
        (OFF | {"copies": {"hash": 6}}, ["copy of the other", "copies.hash | 6"], ["same subject", "near_copy"]),
        (OFF | {"screens": {"dark": 0.1}}, ["screens dark", "screens.dark | 0.1"], ["blur", "same subject"]),
        (OFF | {"screens": {}}, [], ["screens", "kept"]),
        (OFF | {"duplicates": {"hash": 4}}, ["no earlier pair", "duplicates.hash | 4"], ["same subject"]),
        (OFF | {"duplicates": {"hash": None}}, [], ["earlier pair", "kept"]),
    ],
)
def test_only_the_tests_in_force_are_named(world: Any, curate: Any, there: list[str], absent: list[str]) -> None:
    said = card(world, curate)
    assert all(word in said for word in there) and not any(word in said for word in absent), said


def test_a_vision_language_judge_refuses_above_nothing(world: Any) -> None:
    vlm = {"local": "a-model"}
    assert "judge | a-model" in card(world, {"vlm": vlm, "thresholds": {"same": 0.5, "near_copy": 0, "seam": -1}})
    recipe = tiny_run.make_recipe(Path("x")).model_copy(update={})
    values = recipe.values() | {"curate": {"vlm": vlm, "thresholds": {"same": 0, "near_copy": 0, "seam": -1}}}
    assert in_force(Recipe.model_validate(values)) == ([], {})
