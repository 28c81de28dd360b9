"""A task is one file, validated: an unknown template field is an error that names its place."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from diptych.cli import app
from diptych.errors import UsageError
from diptych.recipe import tasks
from raising import raises

SHIPPED = ["character", "instruction", "relight", "scene", "subject"]


def changed(tmp_path: Path, change: dict[str, Any], of: str = "subject") -> str:
    """A task file that differs from one that ships."""
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(tasks.load(of).model_dump() | change))
    return str(path)


def test_five_tasks_ship_and_know_their_geometry() -> None:
    assert tasks.names() == SHIPPED
    assert [tasks.load(name).geometry == "aligned" for name in SHIPPED] == [False, False, True, False, False]
    for name in SHIPPED:
        task = tasks.load(name)
        assert task.name == name and len(task.curation.questions) == 3


@pytest.mark.parametrize("name", SHIPPED)
def test_every_task_has_the_four_layouts_in_several_templates(name: str) -> None:
    task = tasks.load(name)
    assert [grid.name for grid in task.grids] == ["1x2", "2x2", "1x3", "1x4"]
    assert len(task.grids[0].templates) >= 3 and all(len(grid.templates) >= 2 for grid in task.grids)
    assert task.layout().name == "1x2" and task.layout("1x3").panels == 3
    found = (task.layout_of(4), task.layout_of(4, "1x4"), task.layout_of(4, "1x2"))
    assert [grid and grid.name for grid in found] == ["2x2", "1x4", "2x2"] and task.layout_of(5) is None


@pytest.mark.parametrize("name", SHIPPED)
def test_every_template_has_each_panel_and_describes_the_individual(name: str) -> None:
    words = {
        "subject": "cat",
        "scene": "a cat",
        "left": "on the left",
        "right": "on the right",
        "style": "a photograph",
    }
    for grid in tasks.load(name).grids:
        item = grid.panel.format(number=1, position="top left", subject="cat", description="a fat cat", content="here")
        for template in grid.templates:
            text = template.format(**words, description="a fat cat", panels=item, count=grid.panels)
            expected = ["here"] if "panels" in tasks.fields_of(template) else ["on the left", "on the right"]
            for part in (*expected, "a fat cat", "a photograph"):
                assert part in text, template


def test_what_a_language_model_must_return_is_a_strict_schema() -> None:
    schema = tasks.load("subject").answer_schema(4)
    assert schema["required"] == ["subject", "description", "style", "panels"] and not schema["additionalProperties"]
    assert (schema["properties"]["panels"]["minItems"], schema["properties"]["panels"]["maxItems"]) == (4, 4)
    for name in SHIPPED:
        task = tasks.load(name)
        assert ("scene" in task.answer_schema(2)["properties"]) == ("{scene}" in task.panel_template) & (
            "{change}" in task.panel_template
        )
        assert task.writer and "4 separate panels (2x2" in task.writer.brief.format(count=4, layout="2x2", words=40)


def test_the_grammar_writes_in_the_templates_that_the_pocket_teacher_learned() -> None:
    from diptych.pocket import captions
    from diptych.stages.write.grammar import GRAMMARS, Turn

    learned = (("subject", captions.GRIDS), ("relight", captions.LIGHT_GRIDS), ("season", captions.LIGHT_GRIDS))
    for name, templates in learned:
        drafts = [GRAMMARS[name](Turn(0, n), np.random.default_rng(n)) for n in range(20)]
        assert {draft.templates for draft in drafts if draft} == {templates}


PAIR = {"rows": 1, "cols": 2, "templates": ["{left} {right}"]}


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        ({"grids": [{"rows": 1, "cols": 2, "templates": ["{subjct}"]}]}, ["{subjct}", "'subject'"]),
        ({"grids": [{"rows": 1, "cols": 2, "templates": ["{left"]}]}, ["grids.0.templates"]),
        ({"grids": [{**PAIR, "templates": ["{left}"]}]}, ["grids.0: ", "{panels}", "{right}"]),
        ({"grids": [{**PAIR, "rows": 2}]}, ["grids.0: ", "2x2", "{panels}"]),
        ({"grids": [{"rows": 1, "cols": 1, "templates": ["{panels}"]}]}, ["grids.0: ", "two panels"]),
        ({"grids": [PAIR, PAIR]}, ["1x2"]),
        ({"grids": [{**PAIR, "panel": "{position}"}]}, ["grids.0.panel", "{content}"]),
        ({"grids": [{**PAIR, "templats": ["{left}"]}]}, ["grids.0.templats", "'templates'"]),
        ({"grids": []}, ["grids: "]),
        ({"geometry": "alinged"}, ["geometry: ", "'independent' or 'aligned'", "did you mean 'aligned'"]),
        ({"captoins": {}}, ["captoins: ", "'captions'"]),
        ({"version": 0}, ["version: "]),
        ({"panel_template": "a {subject}"}, ["panel_template", "{scene}", "{change}"]),
        ({"panel_template": "a {subject} {change}"}, ["panel_template", "{scene}", "remove grammar.scene"]),
        ({"grammar": {"scene": "{place}", "change": "{light}"}}, ["{change}", "remove grammar.change"]),
        (
            {"grammar": {"scene": "{place}"}, "panel_template": "{scene}, {change}", "writer": None},
            ["set grammar.change"],
        ),
        ({"grammar": {"change": "{view}, {light}"}}, ["grammar.change: ", "comma"]),
        ({"grammar": {"seen": "{place}"}}, ["grammar.seen: ", "'scene'"]),
        ({"writer": {"brief": "{word}", "answer": {}}}, ["writer.brief: ", "{word}", "'words'"]),
        ({"writer": {"brief": "write", "answer": {"subject": "x"}}}, ["writer.answer", "description, panels"]),
        ({"writer": {"brief": "write", "answer": {"subjct": "x"}}}, ["writer.answer.subjct: ", "'subject'"]),
        (
            {"curation": {"questions": ["same?"], "thresholds": {"near_cpy": 0.1}}},
            ["curation.thresholds.near_cpy: ", "'near_copy'"],
        ),
        (
            {"curation": {"questions": ["same?"], "thresholds": {"change": 0.1}}},
            ["curation.thresholds.change", "geometry: aligned"],
        ),
        ({"geometry": None, "geometri": "aligned"}, ["geometri: ", "'geometry'"]),
        ({"version": "one"}, ["version: ", "whole number"]),
        ({"description": ""}, ["description: ", "empty"]),
    ],
)
def test_an_invalid_task_file_is_an_error_with_the_place(
    tmp_path: Path, change: dict[str, Any], facts: list[str]
) -> None:
    with raises("task_invalid", "mine.yaml: ", *facts, kind=UsageError):
        tasks.load(changed(tmp_path, change))


def test_a_custom_task_is_one_file(tmp_path: Path) -> None:
    assert tasks.load(changed(tmp_path, {"name": "mine"})).name == "mine"
    least = {"name": "mine", "writer": None, "grammar": None, "grids": [PAIR]}
    task = tasks.load(changed(tmp_path, least))
    assert task.layout().panel == "{number}: {content}"
    with raises("task_unsuited", "mine", "`writer`"):
        task.answer_schema(2)
    with raises("recipe_conflict", "write.layout", "'mine'", "2x2", "1x2"):
        task.layout("2x2")


def test_an_unknown_task_names_the_nearest() -> None:
    with raises("task_unknown", "'subjct'", "character, ", "did you mean 'subject'", kind=UsageError):
        tasks.load("subjct")


def test_the_command_lists_the_tasks_and_checks_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.call(["tasks"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == SHIPPED
    assert "aligned" in lines[2] and "1x2 2x2 1x3 1x4" in lines[2]
    assert app.call(["tasks", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert [value["name"] for value in values] == SHIPPED and values[4]["layouts"]["1x2"] == 4
    assert values[4]["writers"] == ["pocket", "photo", "language model"]
    assert values[1]["writers"] == ["photo", "language model"]
    weather = changed(tmp_path, {"name": "wet", "grammar": {"scene": "{place}, {humidity}"}})
    assert app.call(["tasks", weather, "--json"]) == 0  # no vocabulary that ships has the list `humidity`
    assert json.loads(capsys.readouterr().out)[0]["writers"] == ["language model"]
    assert app.call(["tasks", weather, "--vocabulary", "photo"]) == 2
    err = capsys.readouterr().err
    assert all(fact in err for fact in ("error[vocabulary_invalid]: ", "'photo'", "humidity", "docs/tasks.md"))
    assert app.call(["tasks", "subject", "--vocabulary", "photo"]) == 0
    assert app.call(["tasks", "--vocabulary", "photo"]) == 2
    capsys.readouterr()
    assert app.call(["tasks", changed(tmp_path, {"name": "mine"})]) == 0
    assert capsys.readouterr().out.startswith("mine, version 2: The same individual")
    assert app.call(["tasks", changed(tmp_path, {"geometry": "bent"})]) == 2
    err = capsys.readouterr().err
    assert all(fact in err for fact in ("error[task_invalid]: ", "mine.yaml: geometry: "))


def test_a_task_is_printed_to_be_copied_and_the_copy_is_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in SHIPPED:
        assert app.call(["tasks", "show", name]) == 0
        (tmp_path / "mine.yaml").write_text(capsys.readouterr().out)
        assert tasks.load(str(tmp_path / "mine.yaml")) == tasks.load(name)
    assert app.call(["tasks", "show", "subject", "--json"]) == 0
    assert yaml.safe_load(json.loads(capsys.readouterr().out)["yaml"])["name"] == "subject"
    for wrong, says in ((["show"], "tasks show"), (["show", "subjct"], "did you mean 'subject'"), (["a", "b"], "one")):
        assert app.call(["tasks", *wrong]) == 2 and says in capsys.readouterr().err


def test_the_command_loads_nothing_heavy() -> None:
    code = (
        "import sys; from diptych.cli import app; code = app.call(['tasks', '--json']); "
        "heavy = {'torch', 'diffusers', 'transformers', 'numpy', 'pyarrow', 'PIL'} & set(sys.modules); "
        "print('HEAVY', heavy) if heavy else None; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "HEAVY" not in done.stdout, done.stdout[-300:] + done.stderr


def test_the_task_of_relighting_tests_the_change_of_the_whole_image() -> None:
    assert tasks.load("relight").curation.thresholds["change"] > 0
