"""`diptych evaluate --suite` on the pocket world: any models and baselines, fair judges, resumable, comparable."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_world as tiny
import yaml

from diptych.cli import app
from diptych.evaluate import evaluation, harness
from diptych.evaluate.evaluation import Evaluation, Judge
from diptych.evaluate.methods import students
from diptych.evaluate.report import suite_report
from diptych.evaluate.report.notebook import Report
from diptych.evaluate.scoring import judging
from diptych.evaluate.scoring.summary import compare_folders as compare
from raising import raises

BASELINES = ["copy", "text_only"]


@pytest.fixture(scope="session")
def run(teacher: Path, judge_folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with a student, as distill leaves it."""
    folder = tmp_path_factory.mktemp("run") / "mine"
    tiny.make_student(teacher, folder / "student")
    (folder / "recipe.yaml").write_text(tiny.make_recipe(teacher, judge_folders).dump())
    return folder


def put_oracle(oracle: Any, patch: pytest.MonkeyPatch) -> None:
    """Judges that know the truth, in the place of vision models."""
    patch.setattr(judging.VisionModels, "embed", lambda *_: oracle.embed)
    patch.setattr(judging.VisionModels, "reader", lambda *_: oracle)


@pytest.fixture(scope="session")
def job(run: Path, teacher: Path, judge_folders: Path) -> Evaluation:
    scorer, reader = (str(judge_folders / name) for name in ("scorer", "reader"))
    return Evaluation(
        models={"mine": str(run)},
        base=str(teacher),
        baselines=BASELINES,
        references=4,
        prompts=2,
        steps=2,
        batch_size=4,
        device="cpu",
        judge=Judge(scorer=scorer, reader=reader),
        bootstrap=50,
    )


@pytest.fixture(scope="session")
def scored(job: Evaluation, suite: Any, oracle: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation's folder; to be copied, not changed."""
    out = tmp_path_factory.mktemp("scored") / "out"
    with pytest.MonkeyPatch.context() as patch:
        put_oracle(oracle, patch)
        harness.evaluate(job, out, suite=suite)
    return out


@pytest.fixture
def out(scored: Path, oracle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    put_oracle(oracle, monkeypatch)
    shutil.copytree(scored, tmp_path / "out")
    return tmp_path / "out"


def read(out: Path) -> dict[str, Any]:
    return json.loads((out / "report" / "metrics.json").read_text())


def test_the_metrics_keep_the_contract_and_the_headline_sees_copies_and_strangers(out: Path) -> None:
    found = read(out)
    assert found["suite"] == "pocket" and found["seeds"] == [0] and found["machine"]["cores"]
    assert list(found["methods"]) == ["mine", *BASELINES] and list(found["anchors"]) == ["truth", "other"]
    for scores in found["methods"].values():
        wanted = {"cp", "pf", "cp_pf", "copy_rate", "n", "ci95", "seconds_per_image", "peak_memory_bytes"}
        assert wanted <= scores.keys()
        assert scores["n"] == 8 and all(low <= high for low, high in scores["ci95"].values())
    assert found["methods"]["copy"]["copy_rate"] == 1 and found["methods"]["copy"]["cp_pf"] < 0.1
    assert found["anchors"]["other"]["cp_pf"] < 0.15 and found["anchors"]["truth"]["cp_pf"] > 0.9
    assert found["methods"]["mine"]["peak_memory_bytes"] > 2**26
    assert set(found["comparisons"]["mine"]) == set(BASELINES)
    assert found["splits"]["kinds"]["methods"]["mine"]["n"] == 4
    assert found["judges"]["curated_by"]["mine"] and found["judges"]["forced"] is False
    assert found["judges"]["judge"]["scorer"]["fingerprint"]


def test_a_finished_evaluation_is_neither_generated_nor_scored_again(
    out: Path, job: Evaluation, suite: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = read(out)
    monkeypatch.setattr(students.OtherStudent, "generate", lambda *_: pytest.fail("drawn again"))
    monkeypatch.setattr(judging.PocketScorer, "score", lambda *_: pytest.fail("looked at again"))
    assert harness.evaluate(job, out, suite=suite) == before


def test_interrupted_scoring_goes_on_with_what_is_missing(
    out: Path, job: Evaluation, suite: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (out / "samples" / "scores.jsonl").read_bytes()
    shutil.rmtree(out / "scores" / "text_only")
    looked: list[str] = []
    real = judging.PocketScorer.score

    def interrupted(self: Any, rows: Any) -> Any:
        looked.extend(row["method"] for row in rows)
        if len(looked) <= len(rows):
            raise KeyboardInterrupt
        return real(self, rows)

    monkeypatch.setattr(judging.PocketScorer, "score", interrupted)
    with pytest.raises(KeyboardInterrupt):
        harness.evaluate(job, out, "score", suite=suite)
    harness.evaluate(job, out, "score", suite=suite)
    assert set(looked) == {"text_only"} and len(looked) == 2 * 12
    assert (out / "samples" / "scores.jsonl").read_bytes() == before


def test_missing_images_cannot_be_scored(job: Evaluation, suite: Any, tmp_path: Path) -> None:
    with raises("run_incomplete", tmp_path / "new" / "samples", "--only score"):
        harness.evaluate(job, tmp_path / "new", "score", suite=suite)


def test_the_judge_that_curated_is_rejected_by_its_weights_unless_forced(
    out: Path, job: Evaluation, suite: Any, judge_folders: Path, tmp_path: Path
) -> None:
    shutil.copytree(judge_folders / "curator", tmp_path / "renamed")
    own = job.model_copy(update={"judge": job.judge.model_copy(update={"scorer": str(tmp_path / "renamed")})})
    with raises("judge_conflict", "mine", "--force"):
        harness.evaluate(own, out, suite=suite)
    forced = harness.evaluate(own, out, "score", force=True, suite=suite)
    assert forced["judges"]["forced"] is True
    assert "(--force)" in suite_report.write(out).read_text("utf8")


def test_a_vision_language_judge_is_known_by_its_name(run: Path, tmp_path: Path) -> None:
    curated = tmp_path / "curated"
    shutil.copytree(run, curated)
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    endpoint = {"base_url": "http://localhost:1/v1", "model": "some-vlm"}
    recipe["curate"]["vlm"] = {"endpoint": endpoint}
    (curated / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    merged = tmp_path / "merged"
    shutil.copytree(run, merged)
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["distill"]["data"] = [{"path": str(curated)}]
    (merged / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    for folder in (curated, curated / "student", merged):
        job = Evaluation(models={"m": str(folder)}, judge=Judge.model_validate({"kind": "vlm", "endpoint": endpoint}))
        known = students.curators_of(job, tmp_path)
        with raises("judge_conflict", "some-vlm"):
            students.refuse_curator(known, "some-vlm", frozenset(), force=False)
        assert not students.refuse_curator(known, "another", frozenset(), force=False)
    assert students.curators("owner/name") is None


def test_images_are_scored_without_the_models_and_their_curator_is_still_known(
    out: Path, job: Evaluation, suite: Any, judge_folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = read(out)
    gone = job.model_copy(update={"models": {"mine": str(tmp_path / "gone")}})
    told = (out / students.CURATORS).read_text().replace(str(job.models["mine"]), str(tmp_path / "gone"))
    (out / students.CURATORS).write_text(told)
    found = harness.evaluate(gone, out, "score", suite=suite)
    assert found["methods"] == before["methods"] and found["judges"] == before["judges"]
    own = gone.model_copy(update={"judge": job.judge.model_copy(update={"scorer": str(judge_folders / "curator")})})
    with raises("judge_conflict", "mine", "--force"):
        harness.evaluate(own, out, "score", suite=suite)


def test_two_evaluations_are_compared_on_what_both_have(out: Path, tmp_path: Path) -> None:
    found = compare(f"{out}:mine", f"{out}:copy", times=50)["scores"]
    assert found["cp_pf"] == read(out)["comparisons"]["mine"]["copy"]
    assert compare(str(out), "copy", out, 50)["scores"] == found
    assert compare("mine", "mine", out)["scores"]["cp_pf"]["p"] == 1
    other = tmp_path / "other"
    shutil.copytree(out, other)
    metrics = read(other)
    metrics["judges"]["judge"]["scorer"]["fingerprint"] = "another"
    (other / "report" / "metrics.json").write_text(json.dumps(metrics))
    with raises("suite_mismatch", f"{out}:mine", f"{other}:mine"):
        compare(f"{out}:mine", f"{other}:mine")
    with raises("name_unknown", "'min'", "'mine'"):
        compare(f"{out}:min", "copy", out)
    with raises("run_not_found", tmp_path / "none"):
        compare(str(tmp_path / "none"), "copy")


def test_the_page_shows_every_part_and_loads_nothing(out: Path) -> None:
    text = suite_report.write(out).read_text("utf8")
    for anchor in ("scores", "compared", "groups", "ends", "side", "cost", "judge"):
        assert f'<section id="{anchor}"' in text, anchor
    assert "<script" not in text and "url(" not in text and 'src="http' not in text
    assert text.count("<img") > 30 and '<section id="published"' not in text


def test_models_get_names_from_their_paths() -> None:
    found = evaluation.parse_models(["runs/first/student", "pocket", "owner/name@v1", "x=some/where.safetensors"])
    assert list(found) == ["first", "pocket", "name_v1", "x"] and found["x"] == "some/where.safetensors"
    with raises("output_collision", "first"):
        evaluation.parse_models(["runs/first", "old/first/student"])


def test_a_folder_remembers_its_job_and_wrong_keys_are_named(tmp_path: Path) -> None:
    made = evaluation.make({"suite": "folder", "data": "d", "seeds": [1, 2]}, tmp_path, ["judge.repeats=5"])
    (tmp_path / evaluation.FILE).write_bytes(evaluation.dump(made))
    assert evaluation.make({"steps": 9}, tmp_path) == made.model_copy(update={"steps": 9})
    for text, fact in (("judge.repeat=5", "'repeats'"), ("stepps=5", "'steps'")):
        with raises("option_invalid", text.partition("=")[0], fact):
            evaluation.make({}, tmp_path, [text])


@pytest.mark.parametrize(
    ("args", "fact"),
    [
        ("", "error[option_missing]"),
        ("pocket --suite pocket", "error[option_conflict]"),
        ("--suite pockt --model pocket", "'pocket'"),
        ("--suite pocket", "--baseline"),
        ("--suite pocket --baseline student --out {out}", "--model RUN"),
        ("--suite pocket --model pocket --only draw", "error[option_invalid]"),
        ("--suite pocket --model pocket --judge-endpoint http://x/v1", "--judge-model"),
        ("--suite pocket --model pocket --judge vlm", "--judge-local"),
        ("--suite pocket --model nope --out {out}", "nope"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(
    args: str, fact: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code = app.call(["evaluate", *args.format(out=tmp_path / "out").split()])
    error = capsys.readouterr().err
    assert code == 2 and error.startswith("error[") and fact in error and error.count("\n") == 1


def test_a_notebook_shows_an_evaluation(scored: Path) -> None:
    report, text = Report(scored), " ".join((suite_report.write(scored)).read_text("utf8").split())
    for part in (report.header(), report.scores(), report.images()):
        assert " ".join(part.html.split()) in text, "as in the report"
    assert "<img" in report.images().html and "<table" in report.scores().html
    with raises("option_unsuited", scored):
        report.pairs()
