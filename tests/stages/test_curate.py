"""Curation: every pair of a grid becomes a row with its numbers and its reason; broken grids cost themselves."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image, ImageFilter

from diptych.data import records, verdicts
from diptych.data.engine import Failure
from diptych.data.images import image_cell, open_image
from diptych.recipe import tasks
from diptych.recipe.schema import Duplicates, Screens, Thresholds
from diptych.stages.curate.duplicates import panel_hash
from diptych.stages.curate.stage import CurateStage

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
    return list(CurateStage(recipe).load()(rows))


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
    from diptych.pocket.render import render

    rng = np.random.default_rng(1)
    wide = render(world.sample_identity(rng), world.sample_scene(rng), 128)[32:96]
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
    assert reasons(same=1.1, seam=-1) == ["different", "near_copy", "different"]


def test_other_thresholds_need_only_the_stored_numbers(recipe: Any, subject_panels: Pairs) -> None:
    rows = [grid(i, pair) for i, pair in enumerate(subject_panels[:8])]
    middle = sorted(pairs[0]["similarity"] for pairs in curate(with_thresholds(recipe, same=-1), rows))[4]
    strict, loose = Thresholds(same=middle), Thresholds(same=-1)
    judged = [pair for pairs in curate(with_thresholds(recipe, same=middle), rows) for pair in pairs]
    again = [pair for pairs in curate(with_thresholds(recipe, same=-1), rows) for pair in pairs]
    assert [p["id"] for p in judged if p["kept"]] == [p["id"] for p in verdicts.select(again, strict)]
    assert [p["id"] for p in again if p["kept"]] == [p["id"] for p in verdicts.select(judged, loose)]
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
    assert verdicts.select(refused, Thresholds(same=-1, near_copy=0, seam=-1)) == []


def test_relit_panels_must_change_as_a_whole(recipe: Any, relit_panels: Pairs) -> None:
    recipe = with_thresholds(recipe, "relight", same=-1, near_copy=0.01)
    assert tasks.load("relight").thresholds(recipe.curate.thresholds).seam == -1
    repainted = relit_panels[0][0].copy()
    repainted[24:44, 24:44] = 255 - repainted[24:44, 24:44]  # a part of the picture, in the same light
    rows = (*relit_panels[:4], (relit_panels[0][0], repainted))
    found = curate(recipe, [grid(i, panels, "relight") for i, panels in enumerate(rows)])
    assert [pairs[0]["reason"] for pairs in found] == ["kept"] * 4 + ["unchanged"]
    assert found[4][0]["copy_distance"] > 0.02, "it is no copy either"
    told = [json.loads(pairs[0]["evidence"])["change"] for pairs in found]
    assert all(one["least"] == 0.06 for one in told) and told[0]["whole"] > 0.06 > told[4]["whole"]
    assert verdicts.select(found[4], Thresholds(same=-1, near_copy=0, seam=-1)) == []


def test_a_broken_grid_costs_itself_and_changes_no_other_row(recipe: Any, subject_panels: Pairs) -> None:
    rows = [grid(i, pair) for i, pair in enumerate(subject_panels[:3])]
    whole = curate(recipe, [rows[0], rows[2]])
    cut = {**rows[1], "image": {"bytes": rows[1]["image"]["bytes"][:300], "path": None}}
    small = {**rows[1], "panel_size": 32}
    unsaid = {**rows[1], "panels": ["a cat"]}
    cases = ((cut, "damaged or incomplete"), (small, "are not 1×2 panels of 32"), (unsaid, "1 captions for a grid"))
    for broken, reason in cases:
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
    found = CurateStage(with_thresholds(recipe, str(path), near_copy=0.1)).thresholds
    assert found == Thresholds(same=0.9, near_copy=0.1)


# ---- screens and hashes


def screened(recipe: Any, **screens: Any) -> Any:
    curate = with_thresholds(recipe, same=-1).curate.model_copy(update={"screens": Screens.model_validate(screens)})
    return recipe.model_copy(update={"curate": curate})


def test_a_bad_panel_refuses_its_pairs_and_no_others(recipe: Any, subject_panels: Pairs) -> None:
    black = np.random.default_rng(0).integers(0, 6, (64, 64, 3), dtype=np.uint8)
    soft = np.asarray(Image.fromarray(subject_panels[0][0]).filter(ImageFilter.GaussianBlur(6)))
    rows = [grid(0, (*subject_panels[0], subject_panels[1][0], black), rows=2), grid(1, (subject_panels[1][1], soft))]
    four, two = curate(screened(recipe, dark=0.1, blur=0.001), rows)
    bad = {pair["id"] for pair in four if "3" in pair["id"][-2:]}
    assert {pair["id"] for pair in four if pair["reason"] == "screen: dark"} == bad and len(bad) == 6
    assert {pair["reason"] for pair in four if pair["id"] not in bad} == {"kept"}
    assert [pair["reason"] for pair in two] == ["screen: blur", "screen: blur"]
    evidence = json.loads(four[2]["evidence"])["screens"]  # c-000000-03
    assert evidence["reference"]["dark"] > 0.1 > evidence["target"]["dark"] and evidence["target"]["blur"] > 0.001
    assert evidence["limits"] == {"dark": {"least": 0.1}, "blur": {"least": 0.001}}


def test_screens_come_after_the_seam_and_before_the_copy(recipe: Any, subject_panels: Pairs) -> None:
    night = tuple((panel * 0.05).astype(np.uint8) for panel in subject_panels[0])
    copied = (night[0], np.pad(night[0], ((0, 0), (0, 2), (0, 0)), mode="edge")[:, 2:])

    def reason(panels: tuple[np.ndarray, ...], seam: float) -> str:
        base = screened(recipe, dark=0.2)
        limits = base.curate.model_copy(update={"thresholds": Thresholds(same=-1, seam=seam)})
        return curate(base.model_copy(update={"curate": limits}), [grid(0, panels)])[0][0]["reason"]

    assert reason(copied, seam=1) == "seam" and reason(copied, seam=-1) == "screen: dark"


def test_other_limits_need_only_the_stored_scores(recipe: Any, subject_panels: Pairs) -> None:
    rows = [grid(i, pair) for i, pair in enumerate(subject_panels[:8])]
    free = [pair for pairs in curate(screened(recipe), rows) for pair in pairs]
    assert {pair["reason"] for pair in free} <= {"kept", "seam", "near_copy"}
    middle = sorted(json.loads(pair["evidence"])["screens"]["target"]["blur"] for pair in free)[6]
    limits = verdicts.Bounds(Screens(blur=middle).limits())
    strict = [pair for pairs in curate(screened(recipe, blur=middle), rows) for pair in pairs]
    again = [verdicts.judged_again(pair, Thresholds(same=-1), limits) for pair in free]
    assert again == [(pair["kept"], pair["reason"]) for pair in strict]
    assert {"kept", "screen: blur"} <= {reason for _, reason in again}
    back = [verdicts.judged_again(pair, Thresholds(same=-1), verdicts.Bounds({})) for pair in strict]
    assert back == [(pair["kept"], pair["reason"]) for pair in free]


def test_a_classifier_refuses_by_its_label_and_every_score_is_kept(
    recipe: Any, subject_panels: Pairs, classifier: Path
) -> None:
    rows = [grid(i, pair) for i, pair in enumerate(subject_panels[:6])]
    seen = {"name": "seen", "model": str(classifier), "label": "nsfw"}

    def scores(pair: dict[str, Any]) -> dict[str, Any]:
        return json.loads(pair["evidence"])["screens"]

    free = curate(screened(recipe, classifiers=[{**seen, "most": 1}]), rows)
    worst = [max(scores(pairs[0])[side]["seen"] for side in ("reference", "target")) for pairs in free]
    most = sorted(worst)[2]
    strict = curate(screened(recipe, classifiers=[{**seen, "most": most}]), rows)
    for pairs, before, score in zip(strict, free, worst, strict=True):
        reason = before[0]["reason"] if score <= most else "screen: seen"
        assert [pair["reason"] for pair in pairs] == [reason, reason]
        one, other = (scores(pair) for pair in pairs)
        assert (one["reference"], one["target"]) == (other["target"], other["reference"])
        assert one["limits"] == {"seen": {"most": most}} and set(one["target"]) == {"dark", "flat", "blur", "seen"}
    assert {pairs[0]["reason"] for pairs in strict} >= {"screen: seen", "kept"}


def test_hashes_are_made_where_duplicates_are_looked_for_and_nowhere_else(recipe: Any, subject_panels: Pairs) -> None:
    wanted = recipe.model_copy(update={"curate": recipe.curate.model_copy(update={"duplicates": Duplicates()})})
    ((one, other),) = curate(wanted, [grid(0, subject_panels[0])])
    mine, theirs = (json.loads(pair["evidence"])["hashes"] for pair in (one, other))
    assert mine == {"reference": theirs["target"], "target": theirs["reference"]}
    assert mine["target"] == panel_hash(Image.fromarray(subject_panels[0][1]))
    ((plain, _),) = curate(recipe, [grid(0, subject_panels[0])])
    assert not {"hashes", "screens"} & set(json.loads(plain["evidence"]))


@pytest.mark.parametrize("kind", ["png", "webp", "jpeg"])
def test_panels_are_kept_in_the_format_that_is_asked_for(recipe: Any, subject_panels: Pairs, kind: str) -> None:
    asked = recipe.model_copy(update={"curate": recipe.curate.model_copy(update={"format": kind})})
    ((pair, _),) = curate(asked, [grid(1, subject_panels[0])])
    picture = open_image(pair["image"])
    assert Image.open(io.BytesIO(pair["image"]["bytes"])).format == kind.upper()
    assert pair["image"]["path"] == f"g-000001-1.{kind}"
    off = np.abs(np.asarray(picture, float) - subject_panels[0][1]).mean()
    assert off == 0 if kind != "jpeg" else 0 < off < 4
