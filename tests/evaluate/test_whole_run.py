"""Every stage for real, from a random teacher to the report, with random judges of the real classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_world as tiny

from diptych.recipe.schema import Recipe


@pytest.fixture
def recipe(teacher: Path, tmp_path: Path) -> Recipe:
    judges = tiny.make_judges(tmp_path / "judges")
    base = tiny.make_recipe(teacher, judges, samples=2, prompts=1, steps=2, methods=["student", "inpaint"])
    values: dict[str, Any] = base.values()
    values |= {"write": {"count": 8, "shard_size": 4}, "paint": {"steps": 2, "batch_size": 4}}
    values["curate"] |= {"batch_size": 4, "thresholds": {"same": -1, "near_copy": 0, "seam": -1}}
    values["distill"] |= {"steps": 3, "batch_size": 4, "warmup": 1, "validation_pairs": 2, "sample_every": 0}
    values["distill"] |= {"validate_every": 3}
    return Recipe.model_validate(values)


def test_a_run_goes_from_the_teacher_to_the_report_and_again_in_no_time(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diptych.evaluate import suites
    from diptych.run.runner import run
    from diptych.utils.console import Display

    few = tiny.make_suite(10, 10)
    monkeypatch.setattr(suites, "load", lambda name: few)
    out = tmp_path / "run"
    summary = run(recipe, out, display=Display(quiet=True))
    metrics = json.loads(Path(summary["metrics"]).read_text())
    assert set(metrics["methods"]) == {"student", "inpaint"}
    grids = metrics["curation"]["grids"]
    assert grids["candidates"] == 16 and grids["kept"] == 16 and grids["reader"]["pairs"] == 8
    assert metrics["judges"]["reader"]["accuracy_through_vae"]["identities"].keys() >= {"kind", "place", "pose"}
    assert "kind" not in metrics["judges"]["reader"]["accuracy"]["kinds"]
    page = Path(summary["report"]).read_text("utf8")
    assert page.count("<img") > 20 and 'class="missing"' not in page
    again = run(recipe, out, display=Display(quiet=True))
    assert again["metrics"] == summary["metrics"] and json.loads(Path(again["metrics"]).read_text()) == metrics


@pytest.mark.parametrize(("positions", "attention"), [("frame", "joint"), ("left", "self")])
def test_a_run_whose_references_are_tokens_goes_as_far(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, positions: str, attention: str
) -> None:
    from diptych import Student
    from diptych.evaluate import suites
    from diptych.run.runner import run
    from diptych.utils.console import Display

    few = tiny.make_suite(10, 10)
    monkeypatch.setattr(suites, "load", lambda name: few)
    values = recipe.values()
    values["distill"] |= {"conditioning": "tokens", "positions": positions, "reference_attention": attention}
    values["evaluate"] |= {"image_guidance": 2.0, "text_guidance": 1.5, "null_panel": "own"}
    out = tmp_path / "run"
    summary = run(Recipe.model_validate(values), out, display=Display(quiet=True))
    assert set(json.loads(Path(summary["metrics"]).read_text())["methods"]) == {"student", "inpaint"}
    page = Path(summary["report"]).read_text("utf8")
    assert f"({positions}, {attention})" in page and "is the left panel" not in page
    student = Student.load(out / "student", device="cpu", progress_bar=False)
    settings = student.pipeline.settings
    assert (settings.conditioning, settings.positions, settings.reference_attention) == ("tokens", positions, attention)
    assert settings.image_guidance == 2.0 and settings.null_panel == "shared"  # there is no left panel
    image = student.generate(None, "a cat", steps=2)
    assert student.generate([[image, image]], "a cat", steps=2)[0].size == image.size


SOAK = pytest.mark.soak  # the same stages again, with other teachers


@pytest.mark.parametrize(
    ("family", "distill"),
    [
        ("zimage", {"conditioning": "tokens"}),
        pytest.param("flux2", {"conditioning": "tokens", "mode": "lora", "rank": 4}, marks=SOAK),
        pytest.param("flux2", {"conditioning": "diptych"}, marks=SOAK),
        pytest.param("qwen", {"conditioning": "tokens", "mode": "lora", "rank": 4}, marks=SOAK),
        pytest.param("qwen", {"conditioning": "diptych"}, marks=SOAK),
        pytest.param("sd3", {"conditioning": "diptych"}, marks=SOAK),
        pytest.param("sd3", {"conditioning": "channel"}, marks=SOAK),
    ],
    ids=str,
)
def test_a_run_with_a_teacher_of_another_family_goes_as_far(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, distill: dict[str, Any]
) -> None:
    import tiny as models
    from diptych import Student
    from diptych.evaluate import suites
    from diptych.run.runner import run
    from diptych.utils.console import Display

    few = tiny.make_suite(10, 10)
    monkeypatch.setattr(suites, "load", lambda name: few)
    values = recipe.values()
    values["teacher"] = str(getattr(models, f"{family}_teacher")(tmp_path / "other"))
    values["paint"] |= {"panel_size": 32}
    values["distill"] |= distill
    values["evaluate"] |= {"methods": ["student"], "image_guidance": 2.0}
    out = tmp_path / "run"
    summary = run(Recipe.model_validate(values), out, display=Display(quiet=True))
    assert set(json.loads(Path(summary["metrics"]).read_text())["methods"]) == {"student"}
    student = Student.load(out, device="cpu", progress_bar=False)
    assert student.pipeline.settings.conditioning == distill["conditioning"]
    image = student.generate(None, "a cat", steps=2, size=32)
    assert student.generate(image, "a cat", steps=2, size=32).size == image.size == (32, 32)
