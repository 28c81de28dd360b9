"""The grammar writer: prompts the pocket teacher knows, evenly spread, each from its own seed."""

from __future__ import annotations

import json
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from diptych.data import records
from diptych.data.engine import Failure
from diptych.errors import UsageError
from diptych.pocket import captions, world
from diptych.recipe import tasks
from diptych.recipe.schema import Recipe
from diptych.recipe.schema import Write as Settings
from diptych.run.runner import PromptShards
from diptych.stages.write import grammar as wording
from diptych.stages.write import stage
from diptych.stages.write.grammar import GRAMMARS, Draft, Turn
from raising import raises


def written(task: str, count: int, seed: int = 0, shard: int = 50, **settings: Any) -> list[dict[str, Any]]:
    work = stage.WriteStage(Recipe(name="x", task=task, seed=seed, write=Settings(**settings))).load()
    results = chain.from_iterable(work(rows) for rows in PromptShards(seed, count, shard))
    return [row for result in results if not isinstance(result, Failure) for row in result]


@pytest.mark.parametrize("task", ["subject", "relight"])
def test_every_prompt_is_one_the_pocket_teacher_can_read(task: str) -> None:
    rows = written(task, 120)
    assert [row["id"] for row in rows] == [records.prompt_id(i) for i in range(120)]
    for row in rows:
        assert list(row) == list(records.PROMPT)
        assert not captions.unknown_words(" ".join([row["prompt"], *row["panels"]]))
        assert captions.count_words(row["prompt"]) <= captions.LONGEST
        assert row["subject"] in (*world.TRAIN_KINDS, *captions.GENERIC) and row["task"] == task
        assert all(row["subject"] in panel.split() for panel in row["panels"])
        own = [wording.parts(tasks.load(task).panel_template, panel, row["subject"]) for panel in row["panels"]]
        assert all((fields["change"] or fields["scene"]) in row["prompt"] for fields in own)
    assert len({row["prompt"] for row in rows}) >= 118  # so few words may say the same twice


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
    before = max(captions.count_words(row["prompt"]) for row in written("subject", 60))
    monkeypatch.setattr(captions, "LONGEST", 30)
    after = written("subject", 60)
    assert before > 30 >= max(captions.count_words(row["prompt"]) for row in after) and len(after) == 60
    monkeypatch.setattr(captions, "LONGEST", 5)
    (failure,) = stage.WriteStage(Recipe(name="x")).load()(PromptShards(0, 1, 1)[0])
    assert "no prompt of at most 5 words" in failure.reason  # pyright: ignore


def own_task(tmp_path: Path, base: str, **change: Any) -> str:
    """A task file made from one that ships."""
    values = yaml.safe_load((Path(tasks.__file__).parent / f"{base}.yaml").read_text())
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump({**values, **change}))
    return str(path)


def test_a_task_that_the_pocket_world_cannot_draw_is_refused_by_name(tmp_path: Path) -> None:
    with raises("vocabulary_invalid", "'instruction'", "grammar.pocket", "photo", kind=UsageError):
        written("instruction", 1)
    path = own_task(tmp_path, "subject", name="mine", grammar={"pocket": "seson", "scene": "{place}"})
    with raises("vocabulary_invalid", "'mine'", "'seson'", "'season'", kind=UsageError):
        written(path, 1)
    with raises("task_unsuited", "1x2", "2x2", kind=UsageError):
        written("subject", 1, layout="2x2")
    with raises("name_unknown", "'phto'", "'photo'", kind=UsageError):
        written("subject", 1, grammar="phto")


def test_a_task_file_decides_the_wording(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grids = [{"rows": 1, "cols": 2, "templates": ["{count} views of one {subject}. {panels}"]}]
    draft = Draft("cat", ["a cat on the moon", "a cat asleep"])
    monkeypatch.setitem(GRAMMARS, "subject", lambda turn, rng: draft)
    (row,) = written(own_task(tmp_path, "subject", grids=grids), 1)
    assert row["prompt"] == "2 views of one cat. 1: on the moon. 2: asleep"


def test_a_third_task_is_a_file_alone(tmp_path: Path) -> None:
    grammar = {"pocket": "season", "scene": "a {subject} {action} {place}", "change": "{season}"}
    path = own_task(tmp_path, "relight", name="season", grammar=grammar)
    rows = written(path, 60)
    assert len({row["prompt"] for row in rows}) == 60 and {row["task"] for row in rows} == {"season"}
    weathers = {phrase for phrases in captions.WEATHERS.values() for phrase in phrases}
    for row in rows:
        assert not captions.unknown_words(row["prompt"]) and captions.count_words(row["prompt"]) <= captions.LONGEST
        told = [wording.parts("{scene}, {change}", panel, row["subject"]) for panel in row["panels"]]
        assert told[0]["scene"] == told[1]["scene"] and told[0]["change"] != told[1]["change"]
        assert {one["change"] for one in told} <= weathers
    photos = written(path, 30, grammar="photo")
    assert all("autumn" in p or "winter" in p or "spring" in p or "summer" in p for r in photos for p in r["panels"])


def test_the_teacher_decides_whose_words_are_used(tmp_path: Path) -> None:
    def words(teacher: str, **settings: Any) -> str:
        return stage.grammar_of(Recipe(name="x", teacher=teacher, write=Settings(**settings)))

    def teacher(name: str, *lengths: int) -> str:
        for number, length in enumerate(lengths):
            folder = tmp_path / name / (f"tokenizer_{number + 1}" if number else "tokenizer")
            folder.mkdir(parents=True)
            (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": length}))
        return str(tmp_path / name)

    assert words("pocket") == "pocket" and words("owner/name") == "photo"
    assert words(teacher("small", 48, 32)) == "pocket"
    assert words(teacher("flux", 77, 512)) == "photo" and words(teacher("none")) == "photo"
    assert words("pocket", grammar="photo") == "photo" and words("owner/name", grammar="pocket") == "pocket"


def test_the_digest_of_the_words_follows_the_vocabulary_file(tmp_path: Path) -> None:
    def digest(grammar: str) -> str:
        return stage.words_digest(Recipe(name="x", write=Settings(grammar=grammar)))

    path = tmp_path / "words.yaml"
    path.write_text("a: 1")
    first = digest(str(path))
    path.write_text("a: 2")
    assert digest("auto") == digest("pocket") == "" and first != digest(str(path)) != digest("photo")


@pytest.mark.parametrize(
    ("template", "caption"),
    [
        ("a {subject} {scene}", "an owl on a rock, close-up"),
        ("a {subject} {scene}, {change}", "an owl on a rock, snow"),
    ],
)
def test_an_article_suits_its_noun_and_is_read_back(template: str, caption: str) -> None:
    scene, _, change = (
        caption.removeprefix("an owl ").partition(", ") if "change" in template else (caption[7:], "", "")
    )
    fields = {"subject": "owl", "scene": scene, "change": change}
    assert wording.fill(template, **fields) == caption
    assert wording.parts(template, caption, "owl") == fields
    assert [wording.article(noun) for noun in ("unicorn", "ukulele", "elderly man", "{x}")] == [
        "a unicorn",
        "a ukulele",
        "an elderly man",
        "a {x}",
    ]
    assert wording.fill("a {subject}", subject="{x}") == "a {x}"


def test_panels_are_named_by_where_they_are() -> None:
    def named(rows: int, cols: int) -> list[str]:
        return wording.positions(tasks.Grid(rows=rows, cols=cols, templates=["{panels}"]))

    assert named(1, 2) == ["left", "right"] and named(1, 3) == ["left", "middle", "right"]
    assert named(2, 2) == ["top left", "top right", "bottom left", "bottom right"]
    assert named(1, 4) == ["first", "second", "third", "fourth"] and named(3, 2)[3] == "row 2, column 2"


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
