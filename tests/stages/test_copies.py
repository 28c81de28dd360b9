"""Copies that pixels do not show: what hashes and embeddings see of a pair's two panels, and what it costs a pair."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from coloured import Colours, grid, opinion
from diptych import recipe as recipes
from diptych.data import funnel, verdicts
from diptych.data.images import image_cell
from diptych.errors import UsageError
from diptych.judges.vlm import VlmJudge
from diptych.llm.client import open_model
from diptych.recipe.schema import Copies, Recipe, Thresholds
from diptych.run.runner import run
from diptych.stages.curate import alignment, duplicates
from diptych.stages.curate.stage import CurateStage
from diptych.utils.console import Display
from llm.chat_server import Serve, say
from raising import raises

Pairs = list[tuple[np.ndarray, np.ndarray]]


def dimmed(pixels: np.ndarray) -> np.ndarray:
    return (pixels * 0.6).astype(np.uint8)


COPIES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "darker": dimmed,
    "brighter": lambda pixels: (255 * (pixels / 255) ** 0.6).astype(np.uint8),
    "paler": lambda pixels: (128 + (pixels.astype(float) - 128) / 2).astype(np.uint8),
    "warmer": lambda pixels: np.clip(pixels * [1.2, 1.0, 0.75], 0, 255).astype(np.uint8),
    "grey": lambda pixels: np.asarray(Image.fromarray(pixels).convert("L").convert("RGB")),
    "mirrored": lambda pixels: np.asarray(ImageOps.mirror(Image.fromarray(pixels))),
}
LIMITS = Copies().limits()


def measured(one: np.ndarray, other: np.ndarray, similarity: float = 0.5) -> dict[str, float]:
    return duplicates.measure(
        duplicates.hash_both(Image.fromarray(one)), duplicates.hash_both(Image.fromarray(other)), similarity
    )


@pytest.mark.parametrize("name", COPIES)
def test_hashes_find_copies_that_pixels_do_not(subject_panels: Pairs, name: str) -> None:
    made = [(panel, COPIES[name](panel)) for panel, _ in subject_panels]
    found = [verdicts.failed_copy(measured(*pair), LIMITS) for pair in made]
    assert "" not in found
    if name == "mirrored":
        assert set(found) == {"mirrored"}
    by_pixels = [alignment.copy_distance(*map(Image.fromarray, pair)).distance for pair in made[:40]]
    assert np.mean(np.array(by_pixels) < Thresholds().near_copy) <= 0.25


def test_one_subject_in_two_scenes_is_no_copy(subject_panels: Pairs) -> None:
    assert [verdicts.failed_copy(measured(*pair), LIMITS) for pair in subject_panels] == [""] * len(subject_panels)


def test_the_order_of_two_panels_plays_no_part(subject_panels: Pairs) -> None:
    for one, other in subject_panels[:20]:
        assert measured(one, other) == measured(other, one)


def test_each_limit_refuses_by_its_own_name_and_what_is_not_measured_fails() -> None:
    far = {"hash": 30, "mirrored": 28, "embedding": 0.4}
    for name, number, said in (("hash", 8, "hash"), ("mirrored", 8, "mirrored"), ("embedding", 0.9, "embedding")):
        both = Copies(hash=8, embedding=0.9).limits()
        assert verdicts.failed_copy({**far, name: number}, both) == said
        beyond = math.nextafter(0.9, 0) if name == "embedding" else number + 1
        assert verdicts.failed_copy({**far, name: beyond}, both) == ""
        assert verdicts.failed_copy({**far, name: math.nan}, both) == said
        assert verdicts.failed_copy({key: far[key] for key in far if key != name}, both) == said
    assert verdicts.failed_copy({"hash": 0, "mirrored": 0, "embedding": 1.0}, Copies(hash=None).limits()) == ""


# ---- in the stage


def recipe_of(**curate: Any) -> Recipe:
    section = {"thresholds": {"seam": -1, "same": -1, "near_copy": 0.01}, **curate}
    return recipes.check({"name": "t", "device": "cpu", "threads": 1, "curate": section}, "test")


def of(number: int, *panels: np.ndarray) -> dict[str, Any]:
    """A grid of one row of two panels, or two of two."""
    rows = [np.concatenate(panels[start : start + 2], 1) for start in range(0, len(panels), 2)]
    row = grid(number, (0.5,) * len(panels), rows=len(rows))
    return row | {"image": image_cell(Image.fromarray(np.concatenate(rows, 0)))}


def curated(recipe: Recipe, rows: list[dict[str, Any]], vlm: VlmJudge | None = None) -> list[Any]:
    return list(CurateStage(recipe).work(Colours(), vlm)(rows))  # pyright: ignore[reportArgumentType]


def test_a_copy_is_refused_by_name_with_its_numbers_and_limits(subject_panels: Pairs) -> None:
    (left, right), (other, _) = subject_panels[:2]
    # Beside its own mirror image a panel has no seam to be cut at: across a grid it has.
    rows = [of(0, left, right), of(1, left, dimmed(left)), of(2, left, right, other, COPIES["mirrored"](left))]
    found = [{pair["id"][-2:]: pair for pair in pairs} for pairs in curated(recipe_of(copies={"hash": 8}), rows)]
    reasons = [{name: pair["reason"] for name, pair in pairs.items()} for pairs in found]
    assert reasons[:2] == [dict.fromkeys(("01", "10"), said) for said in ("kept", "near_copy: hash")]
    mirrored = {name for name, reason in reasons[2].items() if reason == "near_copy: mirrored"}
    assert mirrored == {"03", "30"} and list(reasons[2].values()).count("kept") == 10
    told = [
        json.loads(pairs[name]["evidence"])["copies"] for pairs, name in zip(found, ("01", "01", "03"), strict=True)
    ]
    assert all(set(one) == {"hash", "mirrored", "embedding", "limits"} for one in told)
    assert told[1]["hash"] <= 8 < told[0]["hash"] and told[2]["mirrored"] <= 8 and told[0]["limits"] == {"hash": 8}
    (plain, _), *_ = curated(recipe_of(), rows)
    assert plain["kept"] and "copies" not in json.loads(plain["evidence"])


def test_embeddings_refuse_what_shows_nearly_the_same(subject_panels: Pairs) -> None:
    rows = [of(i, *pair) for i, pair in enumerate(subject_panels[:8])]
    free = [pairs[0] for pairs in curated(recipe_of(copies={"hash": None}), rows)]
    cosines = [json.loads(pair["evidence"])["copies"]["embedding"] for pair in free]
    assert cosines == [round(pair["similarity"], duplicates.DIGITS) for pair in free] and {
        p["reason"] for p in free
    } == {"kept"}
    limit = sorted(cosines)[-3]
    strict = [pairs[0] for pairs in curated(recipe_of(copies={"hash": None, "embedding": limit}), rows)]
    assert [pair["reason"] == "near_copy: embedding" for pair in strict] == [cosine >= limit for cosine in cosines]
    again = [verdicts.judged_again(pair, Thresholds(seam=-1, same=-1), verdicts.Bounds(copies={})) for pair in strict]
    assert again == [(True, "kept")] * 8
    bounds = verdicts.Bounds(copies={"embedding": limit})
    assert [verdicts.judged_again(pair, Thresholds(seam=-1, same=-1), bounds)[1] for pair in free] == [
        pair["reason"] for pair in strict
    ]


def test_a_copy_costs_no_call_and_is_unasked_when_other_limits_let_it_through(
    subject_panels: Pairs, serve: Serve
) -> None:
    left, right = subject_panels[0]
    server = serve(lambda call: say(opinion(True)))
    endpoint = {"base_url": server.url, "model": "tiny"}
    recipe = recipe_of(copies={}, vlm={"endpoint": endpoint}, thresholds={"seam": -1, "near_copy": 0.01})
    assert recipe.curate.vlm is not None
    vlm = VlmJudge(open_model(recipe.curate.vlm.endpoint, cache=None), CurateStage(recipe).task)
    good, copied = curated(recipe, [of(0, left, right), of(1, left, dimmed(left))], vlm)
    assert len(server.calls) == 1 and copied[0]["reason"] == "near_copy: hash" and math.isnan(copied[0]["similarity"])
    loose = verdicts.Bounds(copies={})
    limits = recipe.curate.thresholds
    assert verdicts.judged_again(good[0], limits, loose) == (True, "kept")
    keep, reason = verdicts.judged_again(copied[0], limits, loose)
    assert (keep, reason) == (False, verdicts.UNASKED) and not funnel.reached_judge(reason)
    # And back again: what was never asked is no verdict that stays.
    back = verdicts.judged_again({**copied[0], "reason": reason}, limits, verdicts.Bounds.of(recipe.curate))
    assert back == (False, "near_copy: hash")


def test_a_recipe_without_them_is_the_recipe_it_was() -> None:
    plain = recipes.load("pocket")
    old = plain.values()
    assert old["curate"].pop("copies") is None and recipes.check(old, "an older recipe.yaml") == plain
    asked = [
        recipes.load("pocket", sets).fingerprint("curate") for sets in (["curate.copies={}"], ["curate.copies.hash=6"])
    ]
    assert asked[0] == asked[1] != plain.fingerprint("curate")


def test_an_aligned_task_is_told_before_anything_is_drawn(tmp_path: Any) -> None:
    with raises("recipe_conflict", "curate.copies", "'relight'", kind=UsageError):
        run(recipes.load("pocket", ["task=relight", "curate.copies={}"]), tmp_path / "a", display=Display(quiet=True))
    assert not (tmp_path / "a" / "prompts").exists()
