"""Grids from a vocabulary: all different, evenly spread, one individual told for all panels and told in no caption."""

from __future__ import annotations

from collections import Counter
from itertools import chain, pairwise
from typing import Any

import numpy as np
import pytest

from diptych.data.engine import Failure
from diptych.errors import UsageError
from diptych.pocket.captions import count_words
from diptych.recipe import tasks
from diptych.recipe.schema import Recipe
from diptych.recipe.schema import Write as Settings
from diptych.run.runner import PromptShards
from diptych.stages.write import grammar as wording
from diptych.stages.write import stage, vocabulary
from diptych.stages.write import vocabulary as compose
from diptych.stages.write.grammar import Draft, Turn
from raising import raises

PHOTO = vocabulary.load("photo")
CATEGORY = {kind: name for name, category in PHOTO.subjects.items() for kind in category.kinds}
LAYOUTS = ("1x2", "2x2", "1x3", "1x4")


def written(task: str, count: int, layout: str | None = None, seed: int = 0) -> list[dict[str, Any]]:
    settings = Settings(grammar="photo", layout=layout)
    work = stage.WriteStage(Recipe(name="x", task=task, seed=seed, write=settings)).load()
    results = list(chain.from_iterable(work(rows) for rows in PromptShards(seed, count, 500)))
    assert not [result for result in results if isinstance(result, Failure)]
    return [row for result in results if not isinstance(result, Failure) for row in result]


def drafts(task: str, panels: int, count: int, seed: int = 0) -> list[Draft]:
    draw = compose.grids(PHOTO, tasks.load(task), panels)
    found = []
    for index in range(count):
        rng = np.random.default_rng([seed, index])
        while (draft := draw(Turn(seed, index), rng)) is None:
            pass
        found.append(draft)
    return found


def spread(counts: Counter[str], names: Any) -> int:
    return max(counts[name] for name in names) - min(counts[name] for name in names)


def test_five_thousand_prompts_are_all_different_and_even_in_categories_kinds_and_places() -> None:
    rows = written("subject", 5000)
    assert len({row["prompt"] for row in rows}) == 5000
    kinds = Counter(row["subject"] for row in rows)
    categories = Counter(CATEGORY[row["subject"]] for row in rows)
    assert set(categories) == set(PHOTO.categories([])) and spread(categories, categories) <= 1
    for name in categories:
        assert spread(kinds, PHOTO.subjects[name].kinds) <= 1
    panels = {
        name: " ".join(p for r in rows if CATEGORY[r["subject"]] == name for p in r["panels"]) for name in categories
    }
    for name, text in panels.items():
        places = [p for group in PHOTO.phrases("place", PHOTO.subjects[name]).values() for p in group]
        said = Counter({place: text.count(f"{place},") for place in places})
        # A place that a grid would show twice is moved on, now and then.
        assert min(said.values()) > 0 and spread(said, places) <= 0.2 * max(said.values()) + 2


@pytest.mark.parametrize("task", tasks.names())
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_every_task_fills(task: str, layout: str) -> None:
    grid = tasks.load(task).layout(layout)
    for row in written(task, 28, layout):
        assert len(row["panels"]) == grid.panels == len(set(row["panels"])) and "{" not in row["prompt"]
        assert len(row["prompt"].split()) <= 200 and count_words(row["prompt"]) <= stage.MAX_WORDS_PHOTO
        told = [wording.parts(tasks.load(task).panel_template, panel, row["subject"]) for panel in row["panels"]]
        assert all((fields["change"] or fields["scene"]) in row["prompt"] for fields in told)
        assert all(row["subject"] in panel for panel in row["panels"])


@pytest.mark.parametrize("task", tasks.names())
def test_no_caption_tells_what_the_individual_looks_like(task: str) -> None:
    loaded = tasks.load(task)
    palettes = {word for words in PHOTO.palettes.values() for word in words}
    for draft in drafts(task, 2, 150):
        assert not compose.leaks(draft.description, draft.subject, draft.panels)
        own = [word for word in palettes if f" {word} " in f" {draft.description} "]
        assert not [word for word in own if any(f" {word} " in f" {panel} " for panel in draft.panels)]
        prompt = wording.grid_prompt(loaded, loaded.layout(), draft, np.random.default_rng(0))
        assert draft.description in prompt and draft.style in prompt


def test_a_leak_is_found_whatever_its_spelling() -> None:
    told = "a small fox with rust-red fur and a Brass bell on the left"
    assert compose.leaks(told, "fox", ["a fox on the left"]) == set()
    assert compose.leaks(told, "fox", ["a fox under a red roof", "a fox beside a brass lamp"]) == {"red", "brass"}


def test_an_individual_is_told_in_good_english_and_without_a_colour_twice() -> None:
    every = [draft.description for task in ("subject", "scene") for draft in drafts(task, 2, 300)]
    assert len(set(every)) == len(every) and not [text for text in every if "{" in text]
    for text in every:
        colours = [colour for colour in PHOTO.palettes["colour"] if f" {colour} " in f" {text.replace(',', ' ')} "]
        assert all(text.split().count(colour) <= 1 for colour in colours), text
        words = text.replace(",", "").split()
        assert not [w for a, w in pairwise(words) if a == "a" and w[0] in "aeio"], text
        assert not [w for a, w in pairwise(words) if a == "an" and w[0] not in "aeiou"], text


def test_a_task_keeps_what_it_says_stays() -> None:
    for task in ("relight", "instruction"):
        template = tasks.load(task).panel_template
        for draft in drafts(task, 4, 60):
            told = [wording.parts(template, panel, draft.subject) for panel in draft.panels]
            assert len({fields["scene"] for fields in told}) == 1 and len({fields["change"] for fields in told}) == 4
    edits = PHOTO.lists["edit"].groups
    for draft in drafts("instruction", 4, 60):
        changes = {panel.rpartition(", ")[2] for panel in draft.panels}
        assert any(changes <= set(group) for group in edits.values())
    stories = PHOTO.lists["beat"].groups
    for draft in drafts("character", 3, 60):
        beats = [panel.partition(",")[0] for panel in draft.panels]
        inside = [group for group in stories.values() if any(beats[0].endswith(beat) for beat in group)]
        found = [next(i for i, beat in enumerate(inside[0]) if text.endswith(beat)) for text in beats]
        assert found == sorted(set(found))
    assert {CATEGORY[draft.subject] for draft in drafts("scene", 2, 20)} == {"settings"}


def test_a_row_depends_on_its_number_and_the_seed_alone() -> None:
    assert written("subject", 40)[:30] == written("subject", 30)
    assert written("subject", 30) != written("subject", 30, seed=1)


@pytest.mark.parametrize(
    ("grammar", "facts"),
    [
        (None, ["'subject'", "grammar.scene"]),
        ({"scene": "{plaec}"}, ["'photo'", "plaec", "'place'"]),
        ({"scene": "{place}, {lihgt}, {wether}"}, ["'photo'", "lihgt, wether", "'light'"]),
        ({"scene": "{place}", "subjects": ["mamals"]}, ["'photo'", "'mamals'", "'mammals'"]),
    ],
)
def test_a_task_that_the_vocabulary_cannot_fill_is_refused(grammar: dict[str, Any] | None, facts: list[str]) -> None:
    values = tasks.load("subject").model_dump() | {"grammar": grammar}
    with raises("vocabulary_invalid", *facts, kind=UsageError):
        compose.grids(PHOTO, tasks.Task.model_validate(values), 2)


def test_too_few_phrases_for_the_panels_are_told_at_once() -> None:
    values = PHOTO.model_dump()
    values["lists"]["camera"]["groups"] = {"few": ["close-up", "wide shot"]}
    few = vocabulary.Vocabulary.model_validate(values)
    compose.grids(few, tasks.load("subject"), 2)
    with raises("vocabulary_invalid", "2 phrases of 'camera'", "people", "3 panels", kind=UsageError):
        compose.grids(few, tasks.load("subject"), 3)
