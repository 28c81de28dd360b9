"""Other thresholds on a judged run make, with no judge and no picture decoded, what running it anew would have made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import plain_stages as stages
from diptych.apps import audit
from diptych.cli import app
from diptych.data import funnel, places
from diptych.data.store import Dataset
from diptych.errors import UsageError
from diptych.evaluate.report.gather import Run
from diptych.recipe import load, tasks
from diptych.recipe.schema import Recipe
from diptych.run import recurate as again
from diptych.run.derive import derive
from diptych.run.runner import run
from diptych.serve.runs import Runs
from diptych.utils.console import Display
from raising import raises

QUIET = Display(quiet=True)
ROWS = ("write", "paint", "curate")


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    """A small recipe whose models are folders with a few bytes, and which leaves nothing for torch to settle."""
    for name in ("teacher", "judge"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"name": name}))
    path = tmp_path / "small.yaml"
    path.write_text(f"""
name: small
teacher: {tmp_path}/teacher
device: cpu
threads: 1
write: {{count: 23, shard_size: 5}}
paint: {{dtype: float32}}
curate: {{judge: {tmp_path}/judge, thresholds: {{same: 0.3}}}}
distill: {{precision: float32}}
""")
    return path


@pytest.fixture
def recipe(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    class CurateStage(stages.CurateStage):
        """As the real one, says in its evidence what it judged by, and loses a grid now and then."""

        def one(self, row: dict[str, Any]) -> Any:
            if row["id"].endswith("8"):
                return stages.Failure("cut short")
            limits = self.recipe.curate.thresholds
            evidence = {"thresholds": limits.model_dump(), "note": "«ñ»"}
            text = json.dumps(evidence, ensure_ascii=False, sort_keys=True)
            return [{**pair, "evidence": text} for pair in super().one(row)]  # pyright: ignore[reportGeneralTypeIssues]

    stages.use(monkeypatch, CurateStage=CurateStage)
    return load(recipe_file)


@pytest.fixture
def judged(recipe: Recipe, tmp_path: Path) -> Path:
    run(recipe, tmp_path / "a", stages=ROWS, display=QUIET)
    stages.CALLS.clear()
    return tmp_path / "a"


def test_it_makes_the_bytes_of_a_run_with_these_thresholds(judged: Path, recipe_file: Path, tmp_path: Path) -> None:
    run(load(recipe_file, ["curate.thresholds.same=0.6"]), tmp_path / "anew", stages=ROWS, display=QUIET)
    before = stages.data(judged)
    stages.CALLS.clear()
    found = again.recurate(judged, ["same=0.6"], tmp_path / "b", QUIET)
    assert stages.data(tmp_path / "b") == stages.data(tmp_path / "anew")
    assert stages.CALLS == [] and stages.data(judged) == before
    pairs = Dataset(tmp_path / "b" / "pairs")
    assert found["pairs"] == len(pairs) == found["kept_after"] and all(row["similarity"] >= 0.6 for row in pairs)
    assert found["went"] > 0 and found["came"] == 0
    assert (judged / "grids/part-00000.parquet").samefile(tmp_path / "b/grids/part-00000.parquet")
    assert [event["event"] for event in places.read(tmp_path / "b")] == ["recurate"]


def test_the_new_run_goes_on_like_any_other(judged: Path, tmp_path: Path) -> None:
    again.recurate(judged, ["same=0.6"], tmp_path / "b", QUIET)
    summary = run(load(tmp_path / "b" / "recipe.yaml"), tmp_path / "b", stages=(*ROWS, "distill"), display=QUIET)
    assert [call for call in stages.CALLS if call.startswith("load")] == []
    ids = json.loads((tmp_path / "b/student/student.json").read_text())
    assert ids == [row["id"] for row in Dataset(tmp_path / "b/pairs")] and summary["stages"]["distill"]["pairs"]


def test_no_model_needs_to_be_there_and_no_picture_to_be_whole(
    judged: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in (recipe.teacher, recipe.curate.judge):
        (Path(folder) / "config.json").unlink()
        Path(folder).rmdir()

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a picture was opened")

    monkeypatch.setattr("PIL.Image.open", refuse)
    assert again.recurate(judged, ["same=0.6"], tmp_path / "b", QUIET)["pairs"]


def test_a_dry_run_counts_and_writes_nothing(judged: Path, tmp_path: Path) -> None:
    rows = list(Dataset(judged / "candidates"))
    files = sorted(tmp_path.rglob("*"))
    found = again.recurate(judged, ["same=0.1", "curate.thresholds.near_copy=0.0"], display=QUIET)
    came = [row["id"] for row in rows if 0.1 <= row["similarity"] < 0.3]
    assert (found["came"], found["went"]) == (len(came), 0) and came and found["examples"]["came"] == came[:5]
    assert found["moves"] == [{"from": "different", "to": "kept", "pairs": len(came)}]
    assert found["kept_after"] == found["kept_before"] + len(came) and found["candidates"] == len(rows)
    assert sorted(tmp_path.rglob("*")) == files
    text = "\n".join(again.format_result(found))
    assert "same 0.3 → 0.1" in text and "Nothing was written" in text


def test_rows_that_say_same_of_what_is_different_are_read_as_before(judged: Path) -> None:
    def everything() -> list[Any]:
        rows, _, reasons = Runs(judged.parent).page(judged.name, "different", "", 0, 99)
        shown = Run(load(judged / "recipe.yaml"), judged).candidates
        found = again.recurate(judged, ["same=0.1"], display=QUIET)
        return [found, funnel.measure(judged), audit.draw(judged, 99, 0).pairs, rows, reasons, shown]

    before, candidates = everything(), Dataset(judged / "candidates")
    assert any(row["reason"] == "different" for row in candidates)
    for shard in candidates.shards():
        rows = candidates.read_shard(shard)
        older = [row | ({"reason": "same"} if row["reason"] == "different" else {}) for row in rows]
        candidates.write_shard(shard, older, candidates.part_fingerprint(shard))
    candidates.publish(
        {key: value for key, value in (candidates.manifest or {}).items() if key not in ("rows", "parts")}
    )
    assert any(row["reason"] == "same" for row in candidates) and everything() == before


def test_what_another_test_refused_stays_refused(judged: Path) -> None:
    candidates = Dataset(judged / "candidates")
    rows = candidates.read_shard(0)
    other = {**rows[0], "kept": False, "reason": "alignment", "similarity": 1.0}
    candidates.write_shard(0, [other, *rows[1:]], candidates.part_fingerprint(0))
    found = again.recurate(judged, ["same=-1"], display=QUIET)
    assert found["kept_after"] == found["candidates"] - 1
    assert {move["from"] for move in found["moves"]} == {"different"}


def test_a_derived_run_shares_what_its_recipe_does_not_change(judged: Path, recipe_file: Path, tmp_path: Path) -> None:
    later = load(recipe_file, ["distill.steps=7", "name=later"])
    derive(judged, later, tmp_path / "b", QUIET)
    for name in ("prompts", "grids", "candidates"):
        files = list((judged / name).glob("*.parquet"))
        assert files and all(path.samefile(tmp_path / "b" / name / path.name) for path in files)
    stages.CALLS.clear()
    run(load(tmp_path / "b" / "recipe.yaml"), tmp_path / "b", stages=ROWS, display=QUIET)
    assert stages.CALLS == []  # nothing was left to do
    made = stages.data(tmp_path / "b")
    derive(judged, later, tmp_path / "b", QUIET)
    assert stages.data(tmp_path / "b") == made
    assert [event["event"] for event in places.read(tmp_path / "b")].count("derive") == 1


def test_a_derived_run_has_the_candidates_of_its_own_thresholds(
    judged: Path, recipe_file: Path, tmp_path: Path
) -> None:
    stricter = load(recipe_file, ["curate.thresholds.same=0.6"])
    run(stricter, tmp_path / "anew", stages=ROWS, display=QUIET)
    derive(judged, stricter, tmp_path / "b", QUIET)
    assert stages.data(tmp_path / "b") == stages.data(tmp_path / "anew")


def test_a_killed_one_goes_on_where_it_was(judged: Path, tmp_path: Path) -> None:
    again.recurate(judged, ["same=0.6"], tmp_path / "whole", QUIET)
    again.recurate(judged, ["same=0.6"], tmp_path / "b", QUIET)
    for name in ("candidates/manifest.json", "candidates/part-00002.parquet", "pairs/manifest.json"):
        (tmp_path / "b" / name).unlink()
    (tmp_path / "b/candidates/.part-00002.parquet.1.tmp").write_bytes(b"half")
    kept = (tmp_path / "b/candidates/part-00000.parquet").stat().st_mtime_ns
    again.recurate(judged, ["same=0.6"], tmp_path / "b", QUIET)
    assert stages.data(tmp_path / "b") == stages.data(tmp_path / "whole")
    assert (tmp_path / "b/candidates/part-00000.parquet").stat().st_mtime_ns == kept


def test_a_folder_of_other_thresholds_is_refused(judged: Path, tmp_path: Path) -> None:
    again.recurate(judged, ["same=0.6"], tmp_path / "b", QUIET)
    with raises("recipe_mismatch", "curate.thresholds.same (0.6 there, 0.7 here)", kind=UsageError):
        again.recurate(judged, ["same=0.7"], tmp_path / "b", QUIET)
    with raises("option_conflict", judged, "--out", kind=UsageError):
        again.recurate(judged, ["same=0.7"], tmp_path / "b" / ".." / "a", QUIET)


def test_an_unfinished_run_can_be_compared_but_not_written(judged: Path, tmp_path: Path) -> None:
    Dataset(judged / "candidates").drop_shard(4)
    Dataset(judged / "candidates").unpublish()
    found = again.recurate(judged, ["same=0.6"], display=QUIET)
    assert found["complete"] is False and "of an unfinished run" in "\n".join(again.format_result(found))
    with raises("run_incomplete", judged / "candidates"):
        again.recurate(judged, ["same=0.6"], tmp_path / "b", QUIET)
    assert not (tmp_path / "b").exists()


def test_candidates_of_an_older_version_are_compared_but_make_no_run(judged: Path, tmp_path: Path) -> None:
    path = judged / "candidates/manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "fingerprint": "older"}))
    assert again.recurate(judged, ["same=0.6"], display=QUIET)["went"]
    with raises("run_mismatch", judged / "recipe.yaml", "--out"):
        again.recurate(judged, ["same=0.6"], tmp_path / "b", QUIET)
    assert not (tmp_path / "b").exists()


def test_thresholds_that_keep_nothing_write_nothing(judged: Path, tmp_path: Path) -> None:
    with raises("run_empty", "none of 36 candidate pairs"):
        again.recurate(judged, ["same=2"], tmp_path / "b", QUIET)
    assert not (tmp_path / "b").exists()


def test_a_default_that_the_task_overrules_is_told(recipe_file: Path, recipe: Recipe, tmp_path: Path) -> None:
    values = yaml.safe_load((Path(tasks.__file__).parent / "subject.yaml").read_text())
    values["curation"]["thresholds"] = {"same": 0.4}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(values))
    run(load(recipe_file, [f"task={tmp_path}/own.yaml"]), tmp_path / "a", stages=ROWS, display=QUIET)
    with raises("threshold_invalid", "same=0.5", "'subject'", "0.4", kind=UsageError):
        again.recurate(tmp_path / "a", ["same=0.5"], display=QUIET)
    assert again.recurate(tmp_path / "a", ["same=0.500001"], display=QUIET)["thresholds"]["after"]["same"] == 0.500001


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        ([], "error[option_missing]"),
        (["--set", "near_cpy=0.1"], "'near_copy'"),
        (["--set", "distill.steps=7"], "error[threshold_invalid]"),
        (["--set", "same"], "error[threshold_invalid]"),
        (["--set", "change=0.1"], "measured while curating"),
        (["--set", "same=high"], "curate.thresholds.same"),
        (["--set", "near_copy=-1"], "curate.thresholds.near_copy"),
        (["--set", "same=0.7", "--out", ""], "--out"),
    ],
)
def test_wrong_use_is_one_line(judged: Path, capsys: pytest.CaptureFixture[str], sets: list[str], words: str) -> None:
    assert app.call(["data", "recurate", str(judged), *sets]) == 2
    error = capsys.readouterr().err
    assert words in error and len(error.splitlines()) == 1


def test_the_command_says_what_changed(judged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "b")
    assert app.call(["data", "recurate", str(judged), "--set", "same=0.6", "--out", out, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["pairs"] == len(Dataset(tmp_path / "b" / "pairs"))
    assert app.call(["data", "recurate", str(judged), "--set", "same=0.6", "--out", out]) == 0
    assert f"{found['pairs']} pairs in {out}/pairs; next: diptych distill {out}/recipe.yaml" in capsys.readouterr().out
