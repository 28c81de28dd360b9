"""An evaluation resumes, keeps its contract, and refuses to let a judge score what it chose."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_world as tiny

from diptych.data.store import Dataset
from diptych.errors import UserError
from diptych.evaluate import generation, harness
from diptych.evaluate.scoring.summary import compare_folders as compare
from diptych.run import plan
from raising import raises

METHODS = ["student", "text_only", "copy", "inpaint"]


@pytest.fixture
def recipe(teacher: Path, judge_folders: Path) -> Any:
    return tiny.make_recipe(teacher, judge_folders)


@pytest.fixture
def done(evaluated: Path, run_dir: Path, oracles: Any) -> dict[str, Any]:
    """The metrics of a finished evaluation, whose folder is now `run_dir`."""
    shutil.copytree(evaluated, run_dir, dirs_exist_ok=True)
    return json.loads((run_dir / "report" / "metrics.json").read_text())


def test_the_metrics_keep_their_contract(done: dict[str, Any]) -> None:
    found = done
    assert found["suite"] == "pocket" and found["version"] == 4 and found["seeds"] == [0] and found["machine"]["cores"]
    assert list(found["methods"]) == METHODS
    for scores in (*found["methods"].values(), *found["splits"]["kinds"]["methods"].values()):
        assert {"cp", "pf", "cp_pf", "copy_rate", "n", "ci95", "seconds_per_image"} <= scores.keys()
        assert all(0 <= scores[key] <= 1 for key in ("cp", "pf", "cp_pf", "copy_rate"))
        assert all(low <= high for low, high in scores["ci95"].values())
    assert found["methods"]["student"]["n"] == 8 and found["splits"]["kinds"]["methods"]["student"]["n"] == 4
    assert found["methods"]["copy"]["copy_rate"] == 1
    assert found["anchors"]["truth"]["cp_pf"] > 0.9 and found["anchors"]["other"]["cp"] < 0.2
    # These judges know the truth. One image of another subject resembles a reference by chance.
    true, other = found["anchors"]["truth"], found["anchors"]["other"]
    assert true["retrieved"] == true["traits"] == 1 and other["retrieved"] <= 0.5 and other["traits"] < 0.6
    assert found["traits"]["truth"] == dict.fromkeys(("pattern", "second", "accessory", "eyes"), 1.0)
    assert abs(true["kid"]) < found["methods"]["text_only"]["kid"]
    assert found["methods"]["copy"]["sharpness"] > 0
    assert found["judges"]["reader"]["accuracy"]["identities"]["place"] == 1
    assert found["judges"]["scorer"]["auc"]["identities"] > 0.99
    assert set(found["comparisons"]["student"]) == {"text_only", "copy", "inpaint"}
    assert 0 <= found["copy_rate_of_renders"]["copy_rate"] <= 0.2
    assert found["curation"]["grids"] is None  # this run has none


def test_there_is_one_line_for_each_image(done: dict[str, Any], run_dir: Path) -> None:
    lines = [json.loads(line) for line in (run_dir / "samples" / "scores.jsonl").read_text().splitlines()]
    assert len(lines) == (8 + 4) * (len(METHODS) + 2)
    assert {line["method"] for line in lines} == {*METHODS, "truth", "other"}
    assert all(line["met"].keys() == line["asked"].keys() for line in lines)


def test_a_plan_counts_the_generated_images(done: dict[str, Any], recipe: Any, run_dir: Path) -> None:
    drawn = sum(len(Dataset(folder)) for folder in (run_dir / "samples").iterdir() if folder.is_dir())
    found = plan.make(recipe, run_dir=run_dir / "no run")
    assert found["stages"]["evaluate"] == {"suite": "pocket", "pictures": drawn} and drawn == (8 + 4) * 6
    assert f"evaluate  {drawn} images" in "\n".join(plan.format_plan(found))
    twice = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"seeds": [0, 1]})})
    assert plan.make(twice, run_dir=run_dir / "no run")["stages"]["evaluate"]["pictures"] == 2 * drawn


def test_a_finished_evaluation_is_not_done_again(
    done: dict[str, Any], recipe: Any, run_dir: Path, suite: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "generate", lambda *_: pytest.fail("drawn again"))
    assert harness.evaluate_run(recipe, run_dir, suite=suite) == done


def test_only_missing_images_are_generated_again(done: dict[str, Any], recipe: Any, run_dir: Path, suite: Any) -> None:
    part, kept = (run_dir / "samples" / "student" / f"part-0000{i}.parquet" for i in (0, 1))
    before, untouched = part.read_bytes(), kept.stat().st_mtime_ns
    part.unlink()
    (run_dir / "report" / "metrics.json").unlink()
    log_before = (run_dir / "log.jsonl").read_text().count('"drawn"')
    again = harness.evaluate_run(recipe, run_dir, suite=suite)
    assert part.read_bytes() == before and kept.stat().st_mtime_ns == untouched
    assert (run_dir / "log.jsonl").read_text().count('"drawn"') - log_before == generation.SHARD
    varying = {"seconds"}
    for found in (done, again):
        for scores in (*found["methods"].values(), *found["splits"]["kinds"]["methods"].values()):
            scores["seconds_per_image"] = None
    assert {k: v for k, v in again.items() if k not in varying} == {k: v for k, v in done.items() if k not in varying}


def test_images_of_another_student_are_not_mixed_in(
    done: dict[str, Any], recipe: Any, run_dir: Path, suite: Any, teacher: Path
) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    path = run_dir / "student" / "transformer" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    state["proj_out.bias"] = torch.ones_like(state["proj_out.bias"])
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match="made by other settings"):
        harness.evaluate_run(recipe, run_dir, suite=suite)


def test_the_judge_that_curated_may_not_score(recipe: Any, judge_folders: Path, run_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(judge_folders / "curator", tmp_path / "renamed")
    same = tiny.make_recipe(Path(recipe.teacher), judge_folders, scorer=str(tmp_path / "renamed"))
    with raises("judge_conflict", "evaluate.scorer", "curate.judge"):
        harness.evaluate_run(same, run_dir)


def test_the_same_weights_with_another_config_are_the_same_judge(recipe: Any, run_dir: Path, tmp_path: Path) -> None:
    for name in ("curator", "scorer", "reader"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"name": name}))
        (tmp_path / name / "model.safetensors").write_bytes(b"the same weights")
    same = tiny.make_recipe(Path(recipe.teacher), tmp_path)
    with raises("judge_conflict", "evaluate.scorer", "curate.judge"):
        harness.evaluate_run(same, run_dir)


def test_a_missing_packaged_student_is_skipped_and_listed(
    recipe: Any, run_dir: Path, suite: Any, oracles: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diptych.utils import models

    seen: list[tuple[int, int, str]] = []

    real = models.resolve

    def resolve(name: str, role: str) -> Path:
        if name == "pocket":
            raise UserError("model_not_found", "the pocket student is not in this installation")
        return real(name, role)

    monkeypatch.setattr(models, "resolve", resolve)
    asked = tiny.make_recipe(
        Path(recipe.teacher), Path(recipe.curate.judge).parent, methods=["student_shipped", "copy"]
    )
    found = harness.evaluate_run(asked, run_dir, lambda done, total, note="": seen.append((done, total, note)), suite)
    assert "not in this installation" in found["skipped"]["student_shipped"] and list(found["methods"]) == ["copy"]
    # Progress counts the missing images: two anchors and one method, twelve images each.
    assert seen[-1][:2] == (36, 36) and {note for _, _, note in seen} == {"copy", "truth", "other"}
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)


def test_a_run_without_a_student_is_rejected_before_generation(
    recipe: Any, tmp_path: Path, suite: Any, oracles: Any
) -> None:
    with raises("run_incomplete", "diptych distill"):
        harness.evaluate_run(recipe, tmp_path / "new", suite=suite)
    assert not (tmp_path / "new" / "samples").exists()


def test_runs_are_compared_image_by_image(done: dict[str, Any], run_dir: Path, tmp_path: Path) -> None:
    found = compare(f"{run_dir}:student", f"{run_dir}:copy", times=50)["scores"]
    assert found["cp_pf"]["difference"] == done["comparisons"]["student"]["copy"]["difference"]
    assert found["cp_pf"]["n"] == 8
    with raises("option_invalid", run_dir, "student, text_only, copy, inpaint"):
        compare(str(run_dir), f"{run_dir}:copy")
    other = tmp_path / "other"
    shutil.copytree(run_dir, other)
    done["judges"]["reader"]["fingerprint"] = "another"
    (other / "report" / "metrics.json").write_text(json.dumps(done))
    with raises("suite_mismatch", f"{run_dir}:student", f"{other}:student"):
        compare(f"{run_dir}:student", f"{other}:student")


def test_images_of_another_run_with_equal_settings_are_shared(
    evaluated: Path, teacher: Path, judge_folders: Path, suite: Any, oracles: Any, tmp_path: Path
) -> None:
    before = json.loads((evaluated / "report" / "metrics.json").read_text())
    shutil.copytree(evaluated / "student", tmp_path / "run" / "student")
    recipe = tiny.make_recipe(teacher, judge_folders, bootstrap=200)
    found = harness.evaluate_run(recipe, tmp_path / "run", suite=suite, source=evaluated)
    for name in METHODS:
        parts = list((evaluated / "samples" / name).glob("part-*.parquet"))
        assert parts and all(path.samefile(tmp_path / "run" / path.relative_to(evaluated)) for path in parts)
        assert found["methods"][name]["cp_pf"] == before["methods"][name]["cp_pf"]
        assert found["methods"][name]["seconds_per_image"] == before["methods"][name]["seconds_per_image"]
    generation.take(evaluated, tmp_path / "other", "student", "made otherwise")
    assert not (tmp_path / "other").exists()
