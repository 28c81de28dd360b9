"""Curation: every pair of a grid becomes a row with its numbers and its reason; broken grids cost themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from diptych import tasks
from diptych.data import records
from diptych.data.engine import Failure
from diptych.data.images import image_cell, open_image
from diptych.recipe import Thresholds
from diptych.stages.curate import Curate

Pairs = list[tuple[np.ndarray, np.ndarray]]


def grid(number: int, panels: tuple[np.ndarray, ...], task: str = "subject", rows: int = 1) -> dict[str, Any]:
    cols = len(panels) // rows
    image = np.concatenate([np.concatenate(panels[r * cols : (r + 1) * cols], 1) for r in range(rows)], 0)
    captions = [f"a cat on the moon {i}" for i in range(len(panels))]
    if task == "relight":
        captions = [f"a cat in a cave, dim blue light from the {side}" for side in ("left", "right")]
    name = f"g-{number:06d}"
    row = {"id": name, "image": image_cell(Image.fromarray(image)), "prompt_id": "p", "prompt": "grid", "seed": number}
    row |= {"panels": captions, "subject": "cat", "task": task, "rows": rows, "cols": cols, "panel_size": 64}
    return {**row, "model": "m"}


def with_thresholds(recipe: Any, task: str = "subject", **limits: float) -> Any:
    curate = recipe.curate.model_copy(update={"thresholds": Thresholds(**limits)})
    return recipe.model_copy(update={"curate": curate, "task": task})


def curate(recipe: Any, rows: list[dict[str, Any]]) -> list[Any]:
    return list(Curate(recipe).load()(rows))


def test_both_orders_of_a_grid_become_rows_with_all_they_rest_on(recipe: Any, subject_panels: Pairs) -> None:
    recipe = with_thresholds(recipe, same=-1)
    ((one, other),) = curate(recipe, [grid(12, subject_panels[0])])
    assert (one["id"], other["id"]) == ("c-000012-01", "c-000012-10")
    assert list(one) == list(records.PAIR) and one["grid_id"] == "g-000012"
    for row, reference, target in ((one, 0, 1), (other, 1, 0)):
        assert (row["reference_panel"], row["target_panel"]) == (reference, target)
        assert np.array_equal(np.asarray(open_image(row["conditioning"])), subject_panels[0][reference])
        assert np.array_equal(np.asarray(open_image(row["image"])), subject_panels[0][target])
        assert row["caption"] == f"a cat on the moon {target}"
        assert row["reference_caption"] == f"a cat on the moon {reference}"
        assert f"on the moon {target}" in row["instruction"] and "a cat" not in row["instruction"]
        assert row["kept"] and row["reason"] == "kept" and len(row["judge"]) == 64
        assert -1 <= row["similarity"] <= 1
    assert (one["similarity"], one["copy_distance"], one["seam"]) == tuple(
        other[key] for key in ("similarity", "copy_distance", "seam")
    )
    evidence = json.loads(one["evidence"])
    assert evidence["seams"] == [{"axis": "x", "at": 64, "offset": 0, "strength": round(one["seam"], 4)}]
    assert evidence["copy"]["distance"] == pytest.approx(one["copy_distance"], abs=1e-4)
    assert evidence["structure"] is None and evidence["thresholds"]["near_copy"] == 0.045
    assert (evidence["grid_seed"], evidence["teacher"], evidence["grid_prompt"]) == (12, "m", "grid")


def test_the_reason_names_what_was_wrong(recipe: Any, subject_panels: Pairs) -> None:
    from diptych.pocket import world

    rng = np.random.default_rng(1)
    wide = world.render(world.sample_identity(rng), world.sample_scene(rng), 128)[32:96]
    shifted = np.pad(subject_panels[0][0], ((0, 0), (0, 2), (0, 0)), mode="edge")[:, 2:]
    copied = (subject_panels[0][0], shifted)
    rows = [grid(0, (wide[:, :64], wide[:, 64:])), grid(1, copied), grid(2, subject_panels[1])]

    def reasons(**limits: float) -> list[str]:
        found = curate(with_thresholds(recipe, "subject", **limits), rows)
        assert all(pair["kept"] == (pair["reason"] == "kept") for pairs in found for pair in pairs)
        assert all(first["reason"] == second["reason"] for first, second in found)
        return [pairs[0]["reason"] for pairs in found]

    assert [reasons(same=-1)[i] for i in (0, 2)] == ["seam", "kept"]
    assert reasons(same=-1, seam=-1) == ["kept", "near_copy", "kept"]
    assert reasons(same=1.1, seam=-1) == ["same", "near_copy", "same"]


def test_other_thresholds_need_only_the_stored_numbers(recipe: Any, subject_panels: Pairs) -> None:
    rows = [grid(i, pair) for i, pair in enumerate(subject_panels[:8])]
    middle = sorted(pairs[0]["similarity"] for pairs in curate(with_thresholds(recipe, same=-1), rows))[4]
    strict, loose = Thresholds(same=middle), Thresholds(same=-1)
    judged = [pair for pairs in curate(with_thresholds(recipe, same=middle), rows) for pair in pairs]
    again = [pair for pairs in curate(with_thresholds(recipe, same=-1), rows) for pair in pairs]
    assert [p["id"] for p in judged if p["kept"]] == [p["id"] for p in records.select(again, strict)]
    assert [p["id"] for p in again if p["kept"]] == [p["id"] for p in records.select(judged, loose)]
    assert 0 < sum(p["kept"] for p in judged) < len(judged)


def test_relit_panels_must_align(recipe: Any, relit_panels: Pairs, subject_panels: Pairs) -> None:
    recipe = with_thresholds(recipe, "relight", same=-1, seam=-1)
    moved = np.pad(relit_panels[0][1], ((0, 0), (0, 4), (0, 0)), mode="edge")[:, 4:]
    rows = [(relit_panels[0]), (relit_panels[0][0], moved), subject_panels[0]]
    found = curate(recipe, [grid(i, panels, "relight") for i, panels in enumerate(rows)])
    assert [pairs[0]["reason"] for pairs in found] == ["kept", "alignment", "alignment"]
    assert json.loads(found[1][0]["evidence"])["structure"]["shift"] == pytest.approx(4 / 64, abs=0.02)
    assert "dim blue light from the right" in found[0][0]["instruction"] and "cave" not in found[0][0]["instruction"]
    refused = [pair for pairs in found[1:] for pair in pairs]
    assert records.select(refused, Thresholds(same=-1, near_copy=0, seam=-1)) == []


def test_a_broken_grid_costs_itself_and_changes_no_other_row(recipe: Any, subject_panels: Pairs) -> None:
    rows = [grid(i, pair) for i, pair in enumerate(subject_panels[:3])]
    whole = curate(recipe, [rows[0], rows[2]])
    cut = {**rows[1], "image": {"bytes": rows[1]["image"]["bytes"][:300], "path": None}}
    small = {**rows[1], "panel_size": 32}
    unsaid = {**rows[1], "panels": ["a cat"]}
    for broken, reason in ((cut, "cut short"), (small, "are not 1×2 panels of 32"), (unsaid, "1 captions for a grid")):
        first, failure, last = curate(recipe, [rows[0], broken, rows[2]])
        assert isinstance(failure, Failure) and reason in failure.reason
        assert [first, last] == whole


def test_four_panels_give_twelve_pairs(recipe: Any, subject_panels: Pairs) -> None:
    (pairs,) = curate(recipe, [grid(3, (*subject_panels[0], *subject_panels[1]), rows=2)])
    names = [f"c-000003-{a}{b}" for a in range(4) for b in range(4) if a != b]
    assert [pair["id"] for pair in pairs] == names


def test_a_task_departs_from_the_defaults_and_the_recipe_has_the_last_word(tmp_path: Path, recipe: Any) -> None:
    values = yaml.safe_load((Path(tasks.__file__).parent / "subject.yaml").read_text())
    values["curation"]["thresholds"] = {"same": 0.9, "near_copy": 0.2}
    path = tmp_path / "strict.yaml"
    path.write_text(yaml.safe_dump(values))
    found = Curate(with_thresholds(recipe, str(path), near_copy=0.1)).thresholds
    assert found == Thresholds(same=0.9, near_copy=0.1)
