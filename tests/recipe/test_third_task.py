"""A third task by a file alone: examples/season.yaml, from prompts to an image of its student."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diptych import recipe
from diptych.cli import app
from diptych.data.images import read_provenance
from diptych.data.store import Dataset
from diptych.pocket import captions
from diptych.recipe import tasks
from diptych.utils.paths import packaged

SEASON = packaged("examples") / "season.yaml"
SETS = (
    "name=season",
    f"task={SEASON}",
    "threads=1",
    "evaluate.suite=none",
    "write.count=24",
    "paint.steps=4",
    "curate.thresholds.same=0.2",
    "distill.steps=2",
    "distill.batch_size=4",
    "distill.validation_pairs=2",
    "distill.sample_pairs=1",
    "distill.sample_steps=1",
    "distill.instructions=0.5",
)


def test_a_third_task_goes_from_a_file_to_a_student_that_follows_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "season"
    assert app.call(["run", "demo", *(x for text in SETS for x in ("--set", text)), "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["student"]
    prompts, pairs = list(Dataset(out / "prompts")), list(Dataset(out / "pairs"))
    weathers = {phrase for phrases in captions.WEATHERS.values() for phrase in phrases}
    assert len(prompts) == 24 and {row["task"] for row in prompts} == {"season"}
    assert pairs and all(row["caption"].rpartition(", ")[2] in weathers for row in pairs)
    assert all(row["instruction"] == f"the same scene, {row['caption'].rpartition(', ')[2]}" for row in pairs)
    assert all(json.loads(row["evidence"])["change"]["least"] == 0.01 for row in pairs)
    image = tmp_path / "winter.png"
    options = ["--task", str(SEASON), "--light", "in winter", "--steps", "1", "--out", str(image)]
    reference = str(packaged("examples") / "references" / "house.png")
    assert (
        app.call(["relight", "--model", str(out / "student"), "--base", "pocket", "--reference", reference, *options])
        == 0
    )
    provenance = read_provenance(image)
    assert provenance is not None and (provenance["task"], provenance["prompt"]) == (
        "season",
        "the same scene, in winter",
    )


@pytest.mark.parametrize("name", ["pocket-relight", "pocket-both", "flux-relight"])
def test_the_recipes_of_relighting_fit_their_tasks(name: str) -> None:
    loaded = recipe.load(name)
    task = tasks.load(loaded.task)
    if loaded.draws_pairs():
        assert task.name == "relight" and loaded.distill.instructions == 0.5
        limits = task.thresholds(loaded.curate.thresholds)
        assert limits.seam == -1 and limits.same == loaded.curate.thresholds.same
    else:
        assert [data.path for data in loaded.distill.data] == ["runs/pocket", "runs/pocket-relight"]
        assert loaded.evaluate.relight and loaded.evaluate.suite == "pocket"
