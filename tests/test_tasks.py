"""A task is one file, checked: a template field that nothing fills is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from diptych import tasks
from diptych.errors import UsageError


def test_the_tasks_that_ship_load_and_know_their_geometry() -> None:
    assert tasks.load("subject").geometry == "independent"
    assert tasks.load("relight").geometry == "aligned"
    for name in tasks.names():
        task = tasks.load(name)
        assert task.name == name and len(task.curation.questions) == 3


def test_every_wording_names_both_panels() -> None:
    words = {"subject": "cat", "scene": "a cat", "left": "on the left", "right": "on the right"}
    for name in tasks.names():
        for template in tasks.load(name).grid_templates:
            text = template.format(**words)
            assert "on the left" in text and "on the right" in text


def test_the_wordings_are_those_the_pocket_teacher_learnt() -> None:
    from diptych.pocket import captions

    assert tuple(tasks.load("subject").grid_templates) == captions.GRIDS
    # There the shared scene is called {left} and the two lights {first} and {second}.
    light = tuple(t.format(left="{scene}", first="{left}", second="{right}") for t in captions.LIGHT_GRIDS)
    assert tuple(tasks.load("relight").grid_templates) == light


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grids": [{"rows": 1, "cols": 2, "templates": ["{subjct}"]}]}, "unknown field {subjct}.*did you mean 'subj"),
        ({"grids": [{"rows": 1, "cols": 2, "templates": ["{left"]}]}, "grids.0.templates"),
        ({"grids": []}, "grids: "),
        ({"geometry": "alinged"}, "geometry: Input should be 'independent' or 'aligned'"),
        ({"captoins": {}}, "captoins: .*did you mean 'captions'"),
        ({"version": 0}, "version: "),
    ],
)
def test_a_wrong_task_file_is_refused_with_the_place(tmp_path: Path, change: dict[str, object], message: str) -> None:
    values = tasks.load("subject").model_dump() | change
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(UsageError, match=message):
        tasks.load(str(path))


def test_a_task_of_ones_own_is_one_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(tasks.load("subject").model_dump() | {"name": "mine"}))
    assert tasks.load(str(path)).name == "mine"


def test_an_unknown_task_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="unknown task 'subjct'; known: relight, subject; did you mean 'subject'"):
        tasks.load("subjct")
