"""`run --from`: a corrected recipe takes over every stage of an earlier run that it leaves as it is."""

from __future__ import annotations

import json
import shlex
import uuid
from pathlib import Path
from typing import Any

import pytest

import plain_stages as stages
from diptych.cli import app
from diptych.data import labels, places
from diptych.data.store import Dataset
from diptych.errors import UsageError
from diptych.llm.cache import Cache
from diptych.llm.question import Reply, Usage
from diptych.recipe import load
from diptych.run.runner import run
from diptych.utils.console import Display
from raising import raises

QUIET = Display(quiet=True)
ROWS = ("write", "paint", "curate")


@pytest.fixture
def judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run curated to its end; its recipe is `small.yaml` beside it."""
    folder = stages.judged(tmp_path, monkeypatch)
    stages.CALLS.clear()
    (tmp_path / "other-judge").mkdir()
    (tmp_path / "other-judge" / "config.json").write_text('{"name": "other"}')
    return folder


def recipe(judged: Path, *sets: str) -> Any:
    return load(judged.parent / "small.yaml", sets)


def other_judge(judged: Path) -> str:
    return f"curate.judge={judged.parent}/other-judge"


def loaded() -> list[str]:
    return [call for call in stages.CALLS if call.startswith("load")]


def test_another_judge_keeps_the_prompts_and_grids(judged: Path, tmp_path: Path) -> None:
    summary = run(recipe(judged, other_judge(judged)), tmp_path / "b", source=judged, display=QUIET)
    assert loaded() == ["load curate"]
    for name in ("prompts", "grids", "failed/paint"):
        files = list((judged / name).iterdir())
        assert files and all(path.samefile(tmp_path / "b" / name / path.name) for path in files)
    assert summary["stages"]["paint"]["processed"] == 0 and summary["stages"]["curate"]["processed"] > 0
    [taken] = [event for event in places.read(tmp_path / "b") if event["event"] == "take over"]
    assert taken["parts"]["grids"] == 5 and taken["parts"]["candidates"] == 0
    assert load(tmp_path / "b" / "recipe.yaml").curate.judge.endswith("other-judge")


def test_other_training_keeps_the_pairs(judged: Path, tmp_path: Path) -> None:
    run(recipe(judged, "distill.lora_targets=[to_q]"), tmp_path / "b", source=judged, display=QUIET)
    assert loaded() == [] and "distill" in stages.CALLS
    pairs = list((judged / "pairs").glob("*.parquet"))
    assert pairs and all(path.samefile(tmp_path / "b" / "pairs" / path.name) for path in pairs)


def test_what_a_takeover_ends_with_is_what_a_new_run_ends_with(judged: Path, tmp_path: Path) -> None:
    other = recipe(judged, other_judge(judged))
    run(other, tmp_path / "b", ROWS, source=judged, display=QUIET)
    run(other, tmp_path / "c", ROWS, display=QUIET)
    assert stages.data(tmp_path / "b") == stages.data(tmp_path / "c")


def test_the_earlier_run_is_left_as_it_was(judged: Path, tmp_path: Path) -> None:
    before = stages.data(judged)
    run(recipe(judged, other_judge(judged)), tmp_path / "b", source=judged, display=QUIET)
    assert stages.data(judged) == before


def test_an_unfinished_stage_goes_on_where_it_was(judged: Path, tmp_path: Path) -> None:
    grids = Dataset(judged / "grids")
    for shard in (2, 4):
        grids.drop_shard(shard)
    grids.unpublish()
    summary = run(recipe(judged, "distill.steps=7"), tmp_path / "b", ROWS, source=judged, display=QUIET)
    assert summary["stages"]["paint"]["processed"] == 8  # shards of 5 and 3
    run(recipe(judged, "distill.steps=7"), tmp_path / "c", ROWS, display=QUIET)
    assert stages.data(tmp_path / "b") == stages.data(tmp_path / "c")


def test_what_the_machine_decided_is_taken_over_too(judged: Path, tmp_path: Path) -> None:
    open_ = ["device=auto", "threads=null", "paint.dtype=auto", "distill.precision=auto"]
    run(recipe(judged, *open_, "distill.steps=7"), tmp_path / "b", ROWS, source=judged, display=QUIET)
    assert loaded() == []
    assert load(tmp_path / "b" / "recipe.yaml").threads == 1


def test_it_can_be_stopped_and_called_again(judged: Path, tmp_path: Path) -> None:
    other = recipe(judged, other_judge(judged))
    run(other, tmp_path / "b", ("write",), source=judged, display=QUIET)
    (tmp_path / "b" / "grids" / "part-00003.parquet").unlink()
    run(other, tmp_path / "b", ROWS, source=judged, display=QUIET)
    assert loaded() == ["load curate"]
    run(other, tmp_path / "b", ROWS, display=QUIET)  # and without the source
    assert loaded() == ["load curate"]


def test_the_refusal_names_the_command_that_takes_over(
    judged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(judged.parent / "small.yaml")
    sets = ["--set", other_judge(judged), "--set", "distill.lora_targets=[to_q, to_k]"]
    (tmp_path / "a-2").mkdir()  # a name that is taken
    assert app.call(["curate", file, "--out", str(judged), *sets]) == 2
    said = capsys.readouterr().err
    command = ["diptych", "run", file, "--from", str(judged), "--out", f"{judged}-3", *sets]
    assert shlex.join(command) in said
    words = shlex.split(said[said.index("diptych run ") :])
    assert app.call([*words[1:], "--json"]) == 0
    assert loaded() == ["load curate"]
    assert json.loads(capsys.readouterr().out)["run"] == f"{judged}-3"


def test_the_advice_where_no_pair_is_kept_works(judged: Path, tmp_path: Path) -> None:
    with raises("run_empty") as refused:
        run(recipe(judged, "curate.thresholds.same=2"), tmp_path / "none", ROWS, display=QUIET)
    words = shlex.split(str(refused.value)[str(refused.value).index("diptych ") :].replace("NUMBER", "0.3"))
    stages.CALLS.clear()
    assert words[:3] == ["diptych", "data", "recurate"] and app.call(words[1:]) == 0
    assert loaded() == [] and len(Dataset(words[-1] + "/pairs"))


def test_people_s_decisions_go_along_with_the_grids(judged: Path, tmp_path: Path) -> None:
    [first, *_] = [row["id"] for row in Dataset(judged / "pairs")]
    labels.add(judged, first, "reject", "ana")
    run(recipe(judged, other_judge(judged)), tmp_path / "b", ROWS, source=judged, display=QUIET)
    assert first not in [row["id"] for row in Dataset(tmp_path / "b" / "pairs")]
    run(recipe(judged, "paint.steps=7"), tmp_path / "c", ROWS, source=judged, display=QUIET)
    assert labels.decided(tmp_path / "c") == {}  # other pictures under the same names


def test_answers_that_were_paid_for_go_along(judged: Path, tmp_path: Path) -> None:
    with Cache(judged / "answers.sqlite") as cache:
        cache.put("question", Reply("yes", "a model", Usage(1, 2, 3)))
        run(recipe(judged, "distill.steps=7"), tmp_path / "b", ROWS, source=judged, display=QUIET)
    with Cache(tmp_path / "b" / "answers.sqlite") as cache:
        reply = cache.get("question")
    assert reply is not None and reply.text == "yes"


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        (["seed=1"], ["seed"]),
        (["write.count=24", "distill.steps=7"], ["write.count"]),
    ],
)
def test_a_run_of_which_nothing_holds_is_refused(
    judged: Path, tmp_path: Path, sets: list[str], words: list[str]
) -> None:
    with raises("run_mismatch", *words, kind=UsageError) as refused:
        run(recipe(judged, *sets), tmp_path / "b", source=judged, display=QUIET)
    assert "distill.steps" not in str(refused.value)
    assert not (tmp_path / "b").exists()


def test_a_folder_that_is_no_run_or_is_the_output_is_refused(judged: Path, tmp_path: Path) -> None:
    file = str(judged.parent / "small.yaml")
    for source, out in (
        (tmp_path / "nothing", tmp_path / "b"),
        (judged, judged),
        (judged, tmp_path / "b" / ".." / "a"),
    ):
        assert app.call(["run", file, "--from", str(source), "--out", str(out)]) == 2
    assert app.call(["run", file, "--from", "", "--out", str(tmp_path / "b")]) == 2
    assert not (tmp_path / "b").exists()


def test_runs_at_addresses_are_taken_over_by_copies(
    judged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("upath", reason="the extra `s3` is not installed")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    one, two = (f"memory://{uuid.uuid4().hex}/run" for _ in range(2))
    same, other = recipe(judged, "distill.steps=7"), recipe(judged, other_judge(judged))
    run(same, one, ROWS, source=judged, display=QUIET)  # a folder to an address
    run(other, two, ROWS, source=one, display=QUIET)  # between addresses
    assert loaded() == ["load curate"]
    run(other, tmp_path / "b", ROWS, source=two, display=QUIET)  # an address to a folder
    assert loaded() == ["load curate"]
    assert list(Dataset(two + "/pairs")) == list(Dataset(tmp_path / "b" / "pairs"))
