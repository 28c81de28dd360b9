"""Step-distilled teachers are found by name and config, refused for training, and named wherever they are used."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from diptych.cli import app, doctor
from diptych.errors import UsageError
from diptych.recipe import load
from diptych.run import plan, resolve, runner
from diptych.stages import paint
from diptych.student.families import teachers
from diptych.train import distill
from raising import raises


def model(folder: Path, **configs: Any) -> Path:
    """A folder with these JSON files; `__` is a slash in a name."""
    for name, values in configs.items():
        path = folder / f"{name.replace('__', '/')}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    return folder


STATIC = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 1.0, "use_dynamic_shifting": False}
FLUX = {"_class_name": "FluxTransformer2DModel", "guidance_embeds": False}
FOUND: dict[str, tuple[int, dict[str, Any]]] = {
    "klein": (4, {"model_index": {"_class_name": "Flux2KleinPipeline", "is_distilled": True}}),
    "krea": (8, {"model_index": {"_class_name": "Krea2Pipeline", "is_distilled": True}}),
    "zimage": (
        8,
        {"model_index": {"_class_name": "ZImagePipeline"}, "scheduler__scheduler_config": STATIC | {"shift": 3.0}},
    ),
    "whole": (4, {"transformer__config": FLUX | {"num_attention_heads": 24}, "scheduler__scheduler_config": STATIC}),
    "saved": (4, {"transformer__config": {"_name_or_path": "black-forest-labs/FLUX.1-schnell"}}),
    "consistent": (4, {"scheduler__scheduler_config": {"_class_name": "LCMScheduler"}}),
    "sana": (2, {"model_index": {"_class_name": "SanaSprintPipeline"}}),
}
NOT_FOUND: dict[str, dict[str, Any]] = {
    "klein-base": {"model_index": {"_class_name": "Flux2KleinPipeline", "is_distilled": False}},
    "zimage-base": {
        "model_index": {"_class_name": "ZImagePipeline"},
        "scheduler__scheduler_config": STATIC | {"shift": 6.0},
    },
    "small": {"transformer__config": FLUX | {"num_attention_heads": 3}, "scheduler__scheduler_config": STATIC},
    "dev": {"transformer__config": FLUX | {"guidance_embeds": True}, "scheduler__scheduler_config": STATIC},
    "moving": {"transformer__config": FLUX, "scheduler__scheduler_config": {"use_dynamic_shifting": True}},
    "broken": {"model_index": ["no", "object"]},
}
NAMES = {
    "black-forest-labs/FLUX.1-schnell": 4,
    "Tongyi-MAI/Z-Image-Turbo": 4,
    "stabilityai/stable-diffusion-3.5-large-turbo@main": 4,
    "ByteDance/Hyper-FLUX.1-dev-8steps": 8,
    "somebody/sdxl_lightning_2step": 2,
    "black-forest-labs/FLUX.2-klein-4B": 4,
    "SimianLuo/LCM_Dreamshaper_v7": 4,
}
OTHERS = (
    "pocket",
    "black-forest-labs/FLUX.1-dev",
    "nyanko7/flux-dev-de-distill",
    "black-forest-labs/FLUX.2-klein-base-4B",
)
OTHERS += ("Qwen/Qwen-Image-2512", "somebody/undistilled-turbo", "somebody/step-2000", "somebody/trained-128steps")


def test_distilled_teachers_are_found_by_their_configs_and_names(tmp_path: Path) -> None:
    for name, (steps, configs) in FOUND.items():
        found = teachers.examine(str(model(tmp_path / name, **configs)))
        assert found is not None and found.steps == steps, name
    for name, configs in NOT_FOUND.items():
        assert teachers.examine(str(model(tmp_path / name, **configs))) is None, name
    for name, steps in NAMES.items():
        found = teachers.examine(name)
        assert found is not None and found.steps == steps, name
    assert [name for name in OTHERS if teachers.examine(name)] == []
    snapshot = tmp_path / "models--black-forest-labs--FLUX.1-schnell" / "snapshots" / "abc"
    assert teachers.examine(str(model(snapshot, model_index={"_class_name": "FluxPipeline"})))


@pytest.fixture
def few(recipe: Any, teacher: Path, tmp_path: Path) -> Any:
    """The tiny recipe with a teacher that says it is distilled."""
    folder = shutil.copytree(teacher, tmp_path / "FLUX.1-schnell")
    return recipe.model_copy(update={"teacher": str(folder)})


def allowed(recipe: Any) -> Any:
    return recipe.model_copy(update={"distill": recipe.distill.model_copy(update={"allow_distilled_teacher": True})})


def test_a_run_that_would_train_from_one_stops_before_anything_is_written(
    few: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for start in (lambda: runner.run(few, tmp_path / "run"), lambda: distill.distill(few, None, tmp_path / "student")):
        with raises("teacher_distilled", few.teacher, "distill.allow_distilled_teacher=true", kind=UsageError):
            start()
    assert not (tmp_path / "run").exists() and not (tmp_path / "student").exists()
    with caplog.at_level(logging.WARNING):
        teachers.refuse(few.teacher, allowed(few).distill.allow_distilled_teacher)
    assert few.teacher in caplog.text and "distill.allow_distilled_teacher" in caplog.text


def test_forcing_it_is_a_key_that_may_change_and_trains_the_same_student(few: Any, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    resolve.freeze(few, tmp_path / "run")
    assert resolve.freeze(allowed(few), tmp_path / "run").distill.allow_distilled_teacher
    path = tmp_path / "few.yaml"
    path.write_text(allowed(few).dump())
    assert load(path).distill.allow_distilled_teacher


def test_painting_with_one_says_which_steps_and_guidance_it_is_made_for(few: Any, teacher: Path) -> None:
    def told(steps: int, guidance: float) -> str:
        settings = few.paint.model_copy(update={"steps": steps, "true_guidance": guidance})
        return " ".join(paint.warnings(few.model_copy(update={"paint": settings}), teacher))

    assert "paint.steps=4" in told(20, 1.0) and "true_guidance" not in told(20, 1.0)
    assert "paint.true_guidance=1" in told(4, 2.0) and "paint.steps" not in told(4, 2.0)
    assert "paint.steps=4" in told(20, 2.0) and "paint.true_guidance=1" in told(20, 2.0)
    assert told(4, 1.0) == "" == told(8, 1.0)


def test_plan_says_so_and_counts_what_the_pipeline_runs(tmp_path: Path) -> None:
    recipe = load("flux-subject", ["teacher=black-forest-labs/FLUX.1-schnell", "paint.true_guidance=2"])
    found = plan.make(recipe, run_dir=tmp_path)
    notes = " ".join(found["notes"])
    assert found["teacher"]["distilled"] and "distill rejects it" in notes and "paint.true_guidance=1" in notes
    assert found["stages"]["paint"]["forwards_per_grid"] == 2 * recipe.paint.steps
    usual = plan.make(load("flux-subject"), run_dir=tmp_path)
    assert usual["teacher"]["distilled"] is None and "step-distilled" not in " ".join(usual["notes"])


def test_doctor_lists_the_teachers_of_the_cache_and_the_named_one(
    few: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    model(tmp_path / "hub" / "models--a--B-Turbo" / "snapshots" / "abc", model_index={"_class_name": "ZImagePipeline"})
    listed = {one["name"]: one for one in doctor.examine(few.teacher)["teachers"]}
    assert listed[few.teacher]["class"] == "FluxPipeline" and listed[few.teacher]["distilled"]
    assert listed["a/B-Turbo"]["class"] == "ZImagePipeline" and listed["a/B-Turbo"]["distilled"]
    assert app.call(["doctor", "--teacher", "pocket"]) == 0
    assert "pocket: FluxPipeline, not step-distilled" in capsys.readouterr().out
