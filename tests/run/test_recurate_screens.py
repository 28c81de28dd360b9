"""Screens and duplicates in a whole run, and recurate's other limits for them: the real curation, a judge of colours.

Sixteen grids of five ideas: two good ones, one with a black panel, one out of focus, one whose panels differ in colour.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter

import plain_stages as stages
from coloured import Colours
from diptych.data import funnel
from diptych.data.images import image_cell
from diptych.data.store import Dataset
from diptych.errors import UsageError
from diptych.recipe import load
from diptych.recipe.schema import Recipe
from diptych.run import recurate as again
from diptych.run.runner import run
from diptych.stages.curate.stage import CurateStage as RealCurate
from diptych.utils.console import Display
from raising import raises

QUIET = Display(quiet=True)
ROWS = ("write", "paint", "curate")
GRIDS = [number for number in range(18) if number % 7 != 6]  # what the plain painter does not lose
IDEAS = 5
GOOD, BLACK, SOFT, OTHER = (0, 1), 2, 3, 4


class Redness:
    """A classifier that needs none either."""

    name = "red"

    def scores(self, panels: list[Any]) -> list[float]:
        return [round(float(np.asarray(panel)[..., 0].mean() / 255), 6) for panel in panels]


class CurateStage(RealCurate):
    """The real stage with these two."""

    def load(self) -> Any:
        stages.CALLS.append("load curate")
        looking: Any = [Redness()] if self.screens and self.screens.classifiers else []
        return self.work(Colours(), None, looking)  # pyright: ignore[reportArgumentType]


class PaintStage(stages.PaintStage):
    """Two panels of tiles over one colour, the same for each grid of an idea."""

    def one(self, row: dict[str, Any]) -> Any:
        made: Any = super().one(row)
        if isinstance(made, stages.Failure):
            return made
        number = int(row["id"][2:])
        idea = number % IDEAS
        panels = [panel(idea, side) for side in (0, 1)]
        if idea == BLACK:
            panels[1] = Image.fromarray((np.asarray(panels[1]) * 0.05).astype(np.uint8))
        if idea == SOFT:
            panels[0] = panels[0].filter(ImageFilter.GaussianBlur(8))
        if idea == OTHER:
            panels[1] = Image.fromarray(255 - np.asarray(panels[1]))
        whole = Image.new("RGB", (128, 64))
        for side, image in enumerate(panels):
            whole.paste(image, (64 * side, 0))
        return [{**made[0], "image": image_cell(whole), "panel_size": 64}]


def panel(idea: int, side: int) -> Image.Image:
    tiles = np.random.default_rng([idea, side]).permutation(np.linspace(0, 120, 64)).reshape(8, 8)
    shade = np.kron(tiles, np.ones((8, 8)))
    return Image.fromarray(np.stack([shade + 130 - 20 * idea, shade, shade], -1).astype(np.uint8))


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    for name in ("teacher", "judge", "red"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"name": name}))
    path = tmp_path / "small.yaml"
    path.write_text(f"""
name: small
teacher: {tmp_path}/teacher
device: cpu
threads: 1
write: {{count: 18, shard_size: 5}}
paint: {{dtype: float32}}
curate:
  judge: {tmp_path}/judge
  batch_size: 2
  thresholds: {{same: 0, near_copy: 0.02, seam: -1}}
  screens: {{dark: 0.1, blur: 0.01, classifiers: [{{name: red, model: {tmp_path}/red, label: red, most: 1}}]}}
  duplicates: {{hash: 4}}
distill: {{precision: float32}}
""")
    return path


@pytest.fixture
def recipe(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    stages.use(monkeypatch, PaintStage=PaintStage, CurateStage=CurateStage)
    return load(recipe_file)


@pytest.fixture
def judged(recipe: Recipe, tmp_path: Path) -> Path:
    run(recipe, tmp_path / "a", stages=ROWS, display=QUIET)
    stages.CALLS.clear()
    return tmp_path / "a"


def of_idea(*ideas: int) -> list[int]:
    return [number for number in GRIDS if number % IDEAS in ideas]


# ---- the run


def test_one_pair_of_each_idea_stays_and_the_others_name_it(recipe: Recipe, tmp_path: Path) -> None:
    said: list[str] = []
    display = Display(quiet=True)
    display.say = said.append  # pyright: ignore[reportAttributeAccessIssue]
    summary = run(recipe, tmp_path / "a", stages=ROWS, display=display)["stages"]["curate"]
    pairs = [row["id"] for row in Dataset(tmp_path / "a/pairs")]
    assert pairs == ["c-000000-01", "c-000000-10", "c-000001-01", "c-000001-10"]
    refused = {row["id"]: row["reason"] for row in Dataset(tmp_path / "a/failed/select")}
    assert refused == {
        f"c-{number:06d}-{order}": f"duplicate of c-{number % IDEAS:06d}-{order}: hash"
        for number in of_idea(*GOOD)[2:]
        for order in ("01", "10")
    }
    assert summary["pairs"] == 4 and summary["duplicates"] == len(refused) == 2 * (len(of_idea(*GOOD)) - 2)
    assert [line for line in said if line.startswith(f"select: {len(refused)} pairs repeat")]
    reasons = Counter(row["reason"] for row in Dataset(tmp_path / "a/candidates"))
    expected = {"screen: dark": (BLACK,), "screen: blur": (SOFT,), "different": (OTHER,), "kept": GOOD}
    assert reasons == {reason: 2 * len(of_idea(*ideas)) for reason, ideas in expected.items()}


def test_the_funnel_counts_each_refusal_at_its_step(judged: Path) -> None:
    found = {step["name"]: step for step in funnel.measure(judged)["steps"]}
    dark, soft, other, good = (2 * len(of_idea(*ideas)) for ideas in ((BLACK,), (SOFT,), (OTHER,), GOOD))
    assert found["pre-filtered"]["lost"] == {"screen: dark": dark, "screen: blur": soft}
    assert found["kept"]["lost"] == {"different": other, "duplicate: hash": good - 4} and found["kept"]["count"] == 4
    assert all(step["of"] == step["count"] + sum(step["lost"].values()) for step in found.values())
    assert funnel.measure(judged)["balance"]["subject"]["by_name"]["cat"]["kept"] == 4
    assert f"{good - 4} duplicate: hash" in "\n".join(funnel.format_report(funnel.measure(judged)))


def test_a_selection_that_was_killed_ends_with_the_same_bytes(recipe: Recipe, judged: Path) -> None:
    whole = stages.data(judged)
    (judged / "pairs/manifest.json").unlink()
    (judged / "pairs/part-00002.parquet").unlink()
    run(recipe, judged, stages=ROWS, display=QUIET)
    assert stages.CALLS == [] and stages.data(judged) == whole


# ---- recurate


@pytest.mark.parametrize(
    "sets",
    [
        ["screens.dark=null"],
        ["curate.screens.blur=0", "screens.flat=0.05"],
        ["duplicates.hash=null"],
        ["duplicates.hash=null", "duplicates.embedding=0.9999", "same=-1"],
        ["screens.red=0.6", "same=-1"],
    ],
)
def test_other_limits_make_the_bytes_of_a_run_with_them(
    judged: Path, recipe: Recipe, tmp_path: Path, sets: list[str]
) -> None:
    found = again.recurate(judged, sets, tmp_path / "b", QUIET)
    assert stages.CALLS == [] and (found["moves"] or found["duplicates"]["before"] != found["duplicates"]["after"])
    frozen = load(tmp_path / "b/recipe.yaml")
    run(frozen, tmp_path / "anew", stages=ROWS, display=QUIET)
    assert stages.CALLS and stages.data(tmp_path / "b") == stages.data(tmp_path / "anew")
    assert found["pairs"] == len(Dataset(tmp_path / "anew/pairs"))
    assert found["kept_after"] == found["pairs"] + found["duplicates"]["after"]


def test_a_dry_run_tells_how_many_repeat_others(judged: Path) -> None:
    good = 2 * len(of_idea(*GOOD)) - 4
    found = again.recurate(judged, ["duplicates.hash=null"], display=QUIET)
    assert found["duplicates"] == {"before": good, "after": 0} and found["moves"] == []
    text = "\n".join(again.format_result(found))
    assert "duplicates.hash 4 → off" in text and f"duplicates   {good} → 0 of the accepted" in text
    assert "screens.dark 0.1" in text and "screens.flat off" in text and "screens.red 1" in text


def test_the_funnel_tells_repeats_by_embedding(judged: Path, tmp_path: Path) -> None:
    found = again.recurate(judged, ["duplicates.hash=null", "duplicates.embedding=0.9999"], tmp_path / "b", QUIET)
    good = 2 * len(of_idea(*GOOD)) - 4
    assert stages.CALLS == [] and found["duplicates"] == {"before": good, "after": good}
    assert {row["reason"].rpartition(" ")[2] for row in Dataset(tmp_path / "b/failed/select")} == {"embedding"}
    measured = funnel.measure(tmp_path / "b")
    assert measured["steps"][-1]["lost"]["duplicate: embedding"] == good and measured["steps"][-1]["count"] == 4
    # The colours of two ideas are alike within 0.9: then one pair of each order is all there is to keep.
    loose = again.recurate(judged, ["duplicates.hash=null", "duplicates.embedding=0.9"], display=QUIET)
    assert loose["duplicates"]["after"] >= good


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        ("screens.dork=0.1", r"'screens\.dark'"),
        ("screens.classifiers=[]", r"screens\.classifiers"),
        ("screens.red=2", r"curate\.screens\.classifiers\.most"),
        ("duplicates.hash=12", r"curate\.duplicates\.hash"),
    ],
)
def test_wrong_limits_are_named(judged: Path, text: str, fact: str) -> None:
    with pytest.raises(UsageError, match=fact):
        again.recurate(judged, [text], display=QUIET)


def test_what_was_never_measured_cannot_be_set(recipe: Recipe, recipe_file: Path, tmp_path: Path) -> None:
    plain = load(recipe_file, ["curate.screens=null", "curate.duplicates=null"])
    run(plain, tmp_path / "plain", stages=ROWS, display=QUIET)
    assert not (tmp_path / "plain/failed/select").exists()
    evidence = json.loads(next(iter(Dataset(tmp_path / "plain/candidates")))["evidence"])
    assert not {"screens", "hashes", "embeddings"} & set(evidence)
    reasons = {row["reason"] for row in Dataset(tmp_path / "plain/candidates")}
    assert reasons <= {"seam", "near_copy", "different", "kept"}
    for text in ("screens.dark=0.1", "duplicates.hash=4", "duplicates.embedding=0.9"):
        with raises("threshold_invalid", text, kind=UsageError):
            again.recurate(tmp_path / "plain", [text], display=QUIET)


# ---- copies


class Dimmed(PaintStage):
    """As above, but the second panel of the first idea is its first, darker."""

    def one(self, row: dict[str, Any]) -> Any:
        made: Any = super().one(row)
        if isinstance(made, stages.Failure) or int(row["id"][2:]) % IDEAS != GOOD[0]:
            return made
        whole = Image.new("RGB", (128, 64))
        left = panel(GOOD[0], 0)
        whole.paste(left, (0, 0))
        whole.paste(Image.fromarray((np.asarray(left) * 0.6).astype(np.uint8)), (64, 0))
        return [{**made[0], "image": image_cell(whole)}]


def test_what_counts_as_a_copy_can_change_and_makes_the_bytes_of_a_run_with_it(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages.use(monkeypatch, PaintStage=Dimmed, CurateStage=CurateStage)
    run(load(recipe_file, ["curate.copies.hash=null"]), tmp_path / "a", stages=ROWS, display=QUIET)
    stages.CALLS.clear()
    found = again.recurate(tmp_path / "a", ["copies.hash=8"], tmp_path / "b", QUIET)
    copied = 2 * len(of_idea(GOOD[0]))
    assert stages.CALLS == [] and found["moves"] == [{"from": "kept", "to": "near_copy: hash", "pairs": copied}]
    assert "copies.hash off → 8" in "\n".join(again.format_result(found))
    run(load(tmp_path / "b/recipe.yaml"), tmp_path / "anew", stages=ROWS, display=QUIET)
    assert stages.CALLS and stages.data(tmp_path / "b") == stages.data(tmp_path / "anew")
    manifest = Dataset(tmp_path / "b/pairs").manifest
    assert manifest is not None and manifest["copies"] == {"hash": 8}
    steps = {step["name"]: step for step in funnel.measure(tmp_path / "b")["steps"]}
    assert steps["pre-filtered"]["lost"]["near_copy: hash"] == copied
    back = again.recurate(tmp_path / "b", ["copies.hash=null"], display=QUIET)
    assert back["moves"] == [{"from": "near_copy: hash", "to": "kept", "pairs": copied}]
