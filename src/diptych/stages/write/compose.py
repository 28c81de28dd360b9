"""Grids composed from a vocabulary file: the grammar of teachers that know English, such as FLUX.

    draft = grids(vocabulary.load("photo"), tasks.load("subject"), panels=4)

What stays and what changes is the task's to say (`grammar.scene`, `grammar.change`). The individual is described once,
in detail, for all panels; a panel's caption knows only its kind: a draft in which a word of the looks also occurs in a
caption is drawn again.

Even by construction: categories have their turn, within a category its kinds, styles, and every phrase of a list.
"""

from __future__ import annotations

import re
from functools import partial
from typing import TYPE_CHECKING

from diptych.errors import UsageError
from diptych.recipe.tasks import fields_of
from diptych.stages.write import wording
from diptych.stages.write.grammar import Draft, Grammar, Turn

if TYPE_CHECKING:
    import numpy as np

    from diptych.recipe.tasks import Task
    from diptych.stages.write.vocabulary import Category, Vocabulary

# Words that tell nothing of what somebody looks like, so a caption may share them with a description.
_PLAIN = """
    a an the and or of in on at to from with without as by for like one two three both around over under above
    below between left right side top front back down
"""
PLAIN = frozenset(_PLAIN.split())


def grids(words: Vocabulary, task: Task, panels: int) -> Grammar:
    """The grammar that draws a task's grids of so many panels from a vocabulary. UsageError if it cannot."""
    rules = task.grammar
    if rules is None or not (rules.scene or rules.change):
        raise UsageError(
            f"the task '{task.name}' does not say what a vocabulary fills it with; "
            "set grammar.scene or grammar.change in its file"
        )
    categories = words.categories(rules.subjects)
    for name, category in categories.items():
        for template in (rules.scene, rules.change):
            for field in fields_of(template) - {"subject"}:
                _enough(words, name, category, field, panels)
    return partial(_draw, words, task, categories, panels)


def _enough(words: Vocabulary, name: str, category: Category, field: str, panels: int) -> None:
    groups = words.phrases(field, category)
    together = words.lists[field].together
    least = min(len(group) for group in groups.values()) if together else len(_all(groups))
    if least < panels:
        raise UsageError(
            f"the vocabulary '{words.name}' has only {least} phrases of '{field}'{' in a group' if together else ''} "
            f"for {name}; {panels} panels need as many"
        )


def _draw(
    words: Vocabulary, task: Task, categories: dict[str, Category], panels: int, turn: Turn, rng: np.random.Generator
) -> Draft | None:
    assert task.grammar is not None
    name = turn.of(list(categories), "category")
    category = categories[name]
    own = Turn(turn.run_seed, turn.index // len(categories))  # a category comes once in every so many grids
    kind = own.of(category.kinds, f"kind-{name}")
    description = wording.article(describe(words, category, kind, rng))

    def told(template: str, count: int) -> list[str]:
        drawn = {
            field: phrases(words, name, category, field, own, count, rng)
            for field in sorted(fields_of(template) - {"subject"})
        }
        each = [{field: of[number] for field, of in drawn.items()} for number in range(count)]
        return [wording.fill(template, subject=kind, **values) for values in each]

    alone = not (task.grammar.scene and task.grammar.change)
    scenes = told(task.grammar.scene, panels if alone else 1)
    changes = told(task.grammar.change, panels)
    captions = [
        wording.fill(task.panel_template, subject=kind, scene=scenes[number % len(scenes)], change=changes[number])
        for number in range(panels)
    ]
    if leaks(description, kind, captions):
        return None
    return Draft(kind, captions, description=description, style=turn.of(words.styles, "style"))


def describe(words: Vocabulary, category: Category, kind: str, rng: np.random.Generator) -> str:
    """An individual of this kind, drawn anew, without its article; no word of a palette comes twice."""
    used: set[str] = set()

    def coloured(found: re.Match[str]) -> str:
        palette = words.palettes[found[2]]
        free = [word for word in palette if word not in used] or palette
        used.add(word := free[int(rng.integers(len(free)))])
        return wording.article(word) if found[1] else word

    looks = {look: options[int(rng.integers(len(options)))] for look, options in category.looks.items()}
    filled = {look: re.sub(r"(\ban? )?\{(\w+)\}", coloured, phrase) for look, phrase in looks.items()}
    return wording.fill(category.description, kind=kind, **filled)


def phrases(
    words: Vocabulary, name: str, category: Category, field: str, own: Turn, count: int, rng: np.random.Generator
) -> list[str]:
    """`count` different phrases of a list, for the panels of the category's `own.index`-th grid."""
    groups = words.phrases(field, category)
    if words.lists[field].together:
        group = groups[own.of(list(groups), f"{field}-group-{name}")]
        picked = rng.permutation(len(group))[:count]
        return [group[int(place)] for place in (sorted(picked) if words.lists[field].ordered else picked)]
    every, taken = _all(groups), []
    for number in range(own.index * count, (own.index + 1) * count):
        phrase = Turn(own.run_seed, number).of(every, f"{field}-{name}")
        if phrase in taken:  # a round of turns ends within this grid
            free = [other for other in every if other not in taken]
            phrase = free[int(rng.integers(len(free)))]
        taken.append(phrase)
    return taken


def leaks(description: str, kind: str, captions: list[str]) -> set[str]:
    """The words by which a caption gives away what its subject looks like."""
    looks = _words(description) - _words(kind) - PLAIN
    return looks & _words(" ".join(captions))


def _words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text.lower()))


def _all(groups: dict[str, list[str]]) -> list[str]:
    return list(dict.fromkeys(phrase for group in groups.values() for phrase in group))
