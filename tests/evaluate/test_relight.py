"""Relighting against the truth: samples, baselines, scores, and the whole on a tiny run."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_world as tiny
from PIL import Image

from diptych.evaluate import generation
from diptych.evaluate import relighting as relight
from diptych.evaluate.methods.common import Context
from diptych.evaluate.report import relight_report, render, run_report
from diptych.evaluate.report.gather import Run
from diptych.evaluate.suites import scenes as relight_suite
from diptych.evaluate.suites.scenes import ColorTransfer, Scenes
from diptych.pocket import captions, world
from diptych.recipe.schema import Recipe, Relighting

SUITE = Scenes()
SAMPLES = SUITE.samples(10)


def test_only_the_light_changes_and_the_requested_light_differs_from_the_reference() -> None:
    assert len(SAMPLES) == 30 and len({sample.id for sample in SAMPLES}) == 30
    assert {sample.kind for sample in SAMPLES} == set(world.TRAIN_KINDS)
    for sample in SAMPLES:
        known = SUITE.of(sample)
        before, after = known.reference.light, known.target.light
        assert world.replace(known.target, light=before) == known.reference
        groups = {"direction": {"light"}, "colour": {"colour"}, "both": {"light", "colour"}}[sample.level]
        assert sample.asked.keys() - {"intensity"} == groups
        assert sample.asked.get("light", before.direction) == after.direction
        assert ("colour" in sample.asked) == (after.colour != before.colour)
        assert sample.light == captions.describe_light(after) and sample.prompt.endswith(f", {sample.light}")
        assert not captions.unknown_words(sample.prompt) and captions.count_words(sample.prompt) <= captions.LONGEST
        assert "light" not in sample.prompt.removesuffix(sample.light)
        assert SUITE.reference_image(sample).size == SUITE.truth(sample).size == (world.PANEL, world.PANEL)
    assert Scenes().samples(3) == SAMPLES[:9]


def test_the_color_space_of_the_transfer_goes_both_ways() -> None:
    pixels = np.random.default_rng(0).uniform(0.1, 1, (50, 3))
    # The matrices are printed with four digits, so white is not quite on the gray axis.
    assert np.allclose(relight_suite.from_opponent(relight_suite.to_opponent(pixels)), pixels, atol=1e-6)
    image = Image.fromarray((pixels.reshape(10, 5, 3) * 255).astype(np.uint8))
    target = np.array([[-0.8, 0.05, 0.0], [-2.0, -3.0, -3.5]])
    assert np.allclose(relight_suite.statistics(relight_suite.moved(image, target)), target, atol=0.1)


def test_color_baselines_move_the_statistics_to_the_requested_light() -> None:
    changed = [sample for sample in SAMPLES if sample.level == "colour"]
    references, truths = ([f(sample) for sample in changed] for f in (SUITE.reference_image, SUITE.truth))

    def error(images: Any) -> float:
        apart = [np.asarray(i, dtype=float) - np.asarray(t, dtype=float) for i, t in zip(images, truths, strict=True)]
        return float(np.mean([np.abs(one).mean() for one in apart]))

    shifted = ColorTransfer(SUITE, relative=True).generate(references, changed, [])
    assert error(shifted) < 0.8 * error(references)
    transferred = ColorTransfer(SUITE, relative=False).generate(references, changed, [])
    for sample, reference, image in zip(changed, references, transferred, strict=True):
        light = SUITE.of(sample).target.light
        wanted, _ = relight_suite.light_statistics(light.direction, light.colour, light.intensity)
        before, after = (np.abs(relight_suite.statistics(each) - wanted).sum() for each in (reference, image))
        assert after < before, "its statistics are those of the requested light, clipped"


def line(method: str, scene: int, **scores: float) -> dict[str, Any]:
    plain = {"psnr": 20.0, "ssim": 0.5, "features": 0.2, "structure": 0.5, "following": 0.5, "relit": 0.25}
    return {"method": method, "scene": scene, "level": relight_suite.LEVELS[scene % 3], **plain, **scores}


def test_ahead_means_better_with_intervals_apart() -> None:
    rng = np.random.default_rng(0)
    lines = []
    for scene in range(60):
        own = {"psnr": 20 + rng.normal(), "features": 0.2 + 0.01 * rng.normal()}
        lines += [line(name, scene, **own) for name in (*relight.BASELINES, relight.ROUND_TRIP)]
        better = {"psnr": own["psnr"] + 2, "ssim": 0.6, "features": own["features"] - 0.1, "following": 0.5}
        lines.append(line("student", scene, **better))
    found = relight.summary(lines, 200)
    assert list(found["anchors"]) == [relight.ROUND_TRIP] and found["methods"]["student"]["n"] == 60
    against = found["comparisons"]["student"]["copy"]
    assert {key for key, by in against.items() if by["ahead"]} == {"psnr", "ssim", "features"}
    assert against["psnr"]["difference"] == pytest.approx(2, abs=1e-3)
    assert against["psnr"]["ci95"] == pytest.approx([2, 2], abs=1e-3), "both are resampled together"
    low, high = found["methods"]["copy"]["ci95"]["psnr"]
    assert low < found["methods"]["copy"]["psnr"] < high < low + 1
    assert "not clearly ahead on 8 counts" in relight_report.verdict(found)
    for one in lines:
        for key in ("following", "relit"):
            one[key] += one["method"] == "student"
    assert "beats every baseline" in relight_report.verdict(relight.summary(lines, 200))


def test_structure_is_the_reference_s_outlines_in_their_place() -> None:
    sample = SAMPLES[0]
    reference, truth = SUITE.reference_image(sample), SUITE.truth(sample)
    moved = Image.fromarray(np.roll(np.asarray(reference), 4, 1))
    assert relight.structure(reference, reference) > 0.99 and relight.structure(reference, moved) == 0
    assert relight.structure(reference, truth) > 0.5 > relight.structure(reference, SUITE.reference_image(SAMPLES[-1]))


@pytest.fixture(scope="module")
def relit(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    """A run whose tiny student relit two scenes, judged by random models of the right classes."""
    folder = tmp_path_factory.mktemp("relit")
    judges = tiny.make_judges(folder / "judges")
    tiny.make_student(teacher, folder / "run" / "student")
    recipe = tiny.make_recipe(teacher, judges, suite="none", relight=2, methods=["student"], steps=2)
    relight.evaluate(recipe, folder / "run")
    return recipe, folder / "run"


def test_a_student_that_was_not_trained_to_relight_is_scored(relit: tuple[Recipe, Path]) -> None:
    _, folder = relit
    found = json.loads((folder / "report" / "relight.json").read_text())
    variants = [f"student{told}{drawn}" for told in ("", "_told") for drawn in ("", "_drawn")]
    assert set(found["methods"]) == {*relight.BASELINES, *variants}
    assert all(scores["n"] == 6 and set(scores["ci95"]) == set(relight.SCORES) for scores in found["methods"].values())
    copy = found["methods"]["copy"]
    assert copy["structure"] > 0.99 and found["levels"]["copy"]["colour"]["n"] == 2
    assert found["methods"]["student"]["psnr"] != found["methods"]["student_drawn"]["psnr"]
    assert found["machine"]["cores"] and found["scenes"] == 2 and "curator" not in found["judges"]
    lines = [json.loads(row) for row in (folder / "samples" / "relight" / "scores.jsonl").read_text().splitlines()]
    assert all(x["relit"] == pytest.approx(x["structure"] * x["following"], abs=1e-4) for x in lines)
    assert len(lines) == 6 * (len(found["methods"]) + 1)


def test_a_finished_evaluation_is_not_repeated_and_an_interrupted_one_resumes(
    relit: tuple[Recipe, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, folder = relit
    before = (folder / "report" / "relight.json").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(generation, "generate", lambda *_: pytest.fail("drawn again"))
        assert relight.evaluate(recipe, folder) == json.loads(before)
    (folder / "report" / "relight.json").unlink()
    kept = {p: p.read_bytes() for p in (folder / "samples" / "relight").rglob("*.parquet")}
    again = relight.evaluate(recipe, folder)
    assert {**again, "seconds": 0} == {**json.loads(before), "seconds": 0}
    assert kept == {p: p.read_bytes() for p in (folder / "samples" / "relight").rglob("*.parquet")}


def test_relighting_may_be_guided_otherwise_than_subjects(relit: tuple[Recipe, Path]) -> None:
    recipe, folder = relit
    guided = {"image_guidance": 2.0, "text_guidance": 4.0, "null_panel": "own"}

    def method(**evaluate: Any) -> Any:
        changed = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"steps": 5, **evaluate})})
        return relight.choose_methods(Context(changed, folder, SUITE), SUITE)[0]["relight/student"]  # pyright: ignore

    def drawn(method: Any) -> bytes:
        return method.generate([SUITE.reference_image(SAMPLES[0])], [SAMPLES[0]], [0])[0].tobytes()

    plain, relighting, everywhere = method(), method(relighting=Relighting(**guided)), method(**guided)
    assert drawn(relighting) == drawn(everywhere) != drawn(plain)
    assert relighting.fingerprint() != plain.fingerprint()


def test_the_report_has_the_table_and_the_images(relit: tuple[Recipe, Path]) -> None:
    recipe, folder = relit
    page = run_report.write(recipe, folder).read_text()
    assert '<section id="relight"' in page and "color transfer" in page and page.count("<b>truth</b>") == 6
    text = (folder / "report" / "report.md").read_text()
    assert "## Relighting" in text and "| student, with the scene |" in text and "| copy |" in text
    plain = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"relight": 0})})
    assert "Relighting" not in run_report.write(plain, folder).read_text()
    empty = render.part("run.html.j2", "relight", **relight_report.view(Run(recipe, folder / "nowhere")))
    assert 'class="missing"' in empty and "diptych evaluate" in empty


def test_a_run_evaluates_relighting_where_its_recipe_asks(
    relit: tuple[Recipe, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from diptych.run.runner import Stages
    from diptych.utils.console import Display

    recipe, folder = relit
    asked: list[Any] = []
    monkeypatch.setattr(relight, "evaluate", lambda *given: asked.append(given))
    task: Any = SimpleNamespace(name="relight", version=3)
    assert Stages(recipe, task, folder, Display(quiet=True)).evaluate() == {"relight": 2}
    assert asked[0][:2] == (recipe, folder)
