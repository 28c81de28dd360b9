"""The grammar writer: prompts the pocket teacher knows, evenly spread, each from its own seed."""

from __future__ import annotations

from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from diptych import tasks
from diptych.data import records
from diptych.data.engine import Failure
from diptych.errors import UsageError
from diptych.pocket import captions, world
from diptych.recipe import Recipe
from diptych.run import prompt_shards
from diptych.stages import wording, write
from diptych.stages.grammar import GRAMMARS, Draft, Turn


def written(task: str, count: int, seed: int = 0, shard: int = 50) -> list[dict[str, Any]]:
    work = write.Write(Recipe(name="x", task=task, seed=seed)).load()
    results = chain.from_iterable(work(rows) for rows in prompt_shards(seed, count, shard))
    return [row for result in results if not isinstance(result, Failure) for row in result]


@pytest.mark.parametrize("task", ["subject", "relight"])
def test_every_prompt_is_one_the_pocket_teacher_can_read(task: str) -> None:
    rows = written(task, 120)
    assert [row["id"] for row in rows] == [records.prompt_id(i) for i in range(120)]
    for row in rows:
        assert list(row) == list(records.PROMPT)
        assert not captions.unknown_words(" ".join([row["prompt"], *row["panels"]]))
        assert write.count_words(row["prompt"]) <= write.MAX_WORDS
        assert row["subject"] in (*world.TRAIN_KINDS, *captions.GENERIC) and row["task"] == task
        assert all(row["subject"] in panel.split() for panel in row["panels"])
        own = [wording.parts(tasks.load(task).panel_template, panel, row["subject"]) for panel in row["panels"]]
        assert all((fields["change"] or fields["scene"]) in row["prompt"] for fields in own)
    assert len({row["prompt"] for row in rows}) == 120


def test_kinds_and_places_come_even_by_construction() -> None:
    turns = [Turn(5, i) for i in range(120)]
    assert set(Counter(turn.of(world.TRAIN_KINDS, "kind") for turn in turns).values()) == {12}
    assert set(Counter(turn.of(world.PLACES, "left") for turn in turns).values()) == {10}
    assert [t.of(world.PLACES, "left") for t in turns] != [t.of(world.PLACES, "right") for t in turns]
    rows = written("subject", 120, seed=5)
    for side, slack in ((0, 0), (1, 8)):  # on the right, equal places are moved on
        said = Counter(
            place
            for row in rows
            for place, words in captions.PLACES.items()
            if words[0] in row["panels"][side] or words[1] in row["panels"][side]
        )
        assert set(said) == set(world.PLACES) and max(said.values()) - min(said.values()) <= slack + 1
    kinds = Counter(row["subject"] for row in rows)
    assert set(world.TRAIN_KINDS) <= set(kinds) and not set(world.HELD_OUT_KINDS) & set(kinds)


def test_panels_of_a_subject_grid_are_in_two_places_and_those_of_a_light_grid_in_one() -> None:
    def places(text: str) -> set[str]:
        return {place for place, words in captions.PLACES.items() if any(word in text for word in words)}

    for row in written("subject", 60):
        assert not places(row["panels"][0]) & places(row["panels"][1]) - {"forest"}
    for row in written("relight", 60):
        left, right = row["panels"]
        shared = left.rpartition(", ")[0]
        assert right.startswith(shared) and left != right and places(left) == places(right)


def test_a_row_depends_on_its_number_and_the_seed_alone() -> None:
    one = written("subject", 30, seed=2, shard=7)
    assert one == written("subject", 40, seed=2, shard=40)[:30]
    assert one != written("subject", 30, seed=3)


def test_a_prompt_that_is_too_long_is_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    before = max(write.count_words(row["prompt"]) for row in written("subject", 60))
    monkeypatch.setattr(write, "MAX_WORDS", 30)
    after = written("subject", 60)
    assert before > 30 >= max(write.count_words(row["prompt"]) for row in after) and len(after) == 60
    monkeypatch.setattr(write, "MAX_WORDS", 5)
    (failure,) = write.Write(Recipe(name="x")).load()(prompt_shards(0, 1, 1)[0])
    assert "no prompt of at most 5 words" in failure.reason  # pyright: ignore


def test_a_task_without_a_grammar_is_refused_by_name(tmp_path: Path) -> None:
    values = yaml.safe_load((Path(tasks.__file__).parent / "subject.yaml").read_text())
    path = tmp_path / "depth.yaml"
    path.write_text(yaml.safe_dump({**values, "name": "subjects"}))
    with pytest.raises(UsageError, match="no grammar for the task 'subjects'; it has: relight, subject"):
        write.Write(Recipe(name="x", task=str(path))).load()


def test_a_task_file_decides_the_wording(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = yaml.safe_load((Path(tasks.__file__).parent / "subject.yaml").read_text())
    values["grids"] = [{"rows": 1, "cols": 2, "templates": ["{count} views of one {subject}. {panels}"]}]
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(values))
    draft = Draft("cat", ["a cat on the moon", "a cat asleep"])
    monkeypatch.setitem(GRAMMARS, "subject", lambda turn, rng: draft)
    (row,) = written(str(path), 1)
    assert row["prompt"] == "2 views of one cat. 1: on the moon. 2: asleep"


@pytest.mark.parametrize(
    ("task", "subject", "caption", "expected"),
    [
        ("subject", "cat", "a cat jumping on the beach, dim light", "jumping on the beach, dim light"),
        ("subject", "cat", "two dogs", "two dogs"),
        ("relight", "cat", "a cat in a cave, close-up, dim blue light from above", "dim blue light from above"),
    ],
)
def test_an_instruction_names_only_what_changes(task: str, subject: str, caption: str, expected: str) -> None:
    loaded = tasks.load(task)
    for seed in range(8):
        text = wording.instruction(loaded, subject, caption, np.random.default_rng(seed))
        forms = [t.format(subject=subject, change=expected) for t in loaded.captions.instruction_templates]
        assert text in forms
