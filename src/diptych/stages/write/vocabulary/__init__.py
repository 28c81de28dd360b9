"""Vocabularies as data: what a grammar draws grids from when no language model writes them.

A vocabulary is one YAML file, `photo.yaml` beside this one or any other: categories of subjects with what tells one
individual from another, and lists of phrases (places, actions, lights, …) that a task's `grammar` names as fields.
What a subject looks like and what a scene shows are kept apart, so that captions can leave the looks out.

    draft = grids(load("photo"), tasks.load("subject"), panels=4)

What stays and what changes in a grid is the task's to say (`grammar.scene`, `grammar.change`). The individual is
described once, in detail, for all panels; a panel's caption knows only its kind: a draft in which a word of the looks
also occurs in a caption is drawn again. Even by construction: categories have their turn, within a category its kinds,
styles, and every phrase of a list.
"""

from __future__ import annotations

import re
from functools import partial
from math import perm, prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from diptych.errors import UsageError, nearest
from diptych.recipe.tasks import check_fields, fields_of
from diptych.stages.write import grammar
from diptych.stages.write.grammar import Draft, Grammar, Turn
from diptych.utils import documents
from diptych.utils.documents import parse_yaml, read_text
from diptych.utils.io import sha256_file

if TYPE_CHECKING:
    import numpy as np

    from diptych.recipe.tasks import Task

Text = Annotated[str, Field(min_length=1)]
Words = Annotated[list[Text], Field(min_length=1)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Category(_Part):
    """Subjects of one sort: they can look alike, and do and be in the same things and places."""

    kinds: Words
    """What captions call them, without an article; each has its turn."""
    description: Text
    """The individual, without an article. Fields: {kind} and the names of `looks`."""
    looks: dict[str, Words]
    """What tells individuals apart. A phrase may hold fields that are the names of palettes."""
    suits: dict[str, Words] = {}
    """Of a list, the groups whose phrases these subjects can have; of lists that are not named, all groups."""
    apart: bool = False
    """Only for tasks that name this category: places, which do not stand in other places."""

    @model_validator(mode="after")
    def _described(self) -> Category:
        check_fields(self.description, frozenset({"kind", *self.looks}), {"kind", *self.looks})
        return self


class Phrases(_Part):
    """A list that a task's grammar names as a field."""

    groups: dict[str, Words] = Field(min_length=1)
    """Phrases by sort, without commas."""
    together: bool = False
    """The panels of a grid take theirs from one and the same group."""
    ordered: bool = False
    """And in the group's order, as a story is told."""

    @field_validator("groups")
    @classmethod
    def _one_clause(cls, groups: dict[str, list[str]]) -> dict[str, list[str]]:
        for phrase in (phrase for phrases in groups.values() for phrase in phrases):
            if "," in phrase or "{" in phrase:
                raise ValueError(f"'{phrase}': a phrase has no comma and no field, so that it can be read back")
        return groups


class Vocabulary(_Part):
    """A vocabulary file."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_-]*$")
    """What `write.grammar` calls it."""
    version: int = Field(ge=1)
    """Raised by whoever changes what the file makes."""
    description: Text
    """One sentence."""
    styles: Words
    """What all panels of a grid are: "a watercolour illustration"; each has its turn."""
    palettes: dict[str, Words] = {}
    """Words that looks are filled with; none comes twice in one description."""
    subjects: dict[str, Category] = Field(min_length=1)
    """Categories; each has its turn."""
    lists: dict[str, Phrases] = Field(min_length=1)
    """By the names of the fields that they fill."""

    @model_validator(mode="after")
    def _known_names(self) -> Vocabulary:
        palettes = frozenset(self.palettes)
        seen: dict[str, str] = {}
        for name, category in self.subjects.items():
            for kind in category.kinds:
                if kind in seen:
                    raise ValueError(f"subjects.{name}.kinds: '{kind}' is also one of {seen[kind]}")
                seen[kind] = name
            for phrase in (phrase for phrases in category.looks.values() for phrase in phrases):
                check_fields(phrase, palettes)
            for field, groups in category.suits.items():
                if field not in self.lists:
                    raise ValueError(f"subjects.{name}.suits: no list '{field}'{nearest(field, self.lists)}")
                for group in groups:
                    if group not in (known := self.lists[field].groups):
                        raise ValueError(f"subjects.{name}.suits.{field}: no group '{group}'{nearest(group, known)}")
        return self

    def categories(self, asked: list[str]) -> dict[str, Category]:
        """Those called so, or all that are not `apart`. UsageError for an unknown one."""
        for name in asked:
            if name not in self.subjects:
                raise UsageError(
                    f"grammar.subjects: the vocabulary '{self.name}' has no subjects '{name}'; "
                    f"it has: {', '.join(self.subjects)}{nearest(name, self.subjects)}"
                )
        return {name: it for name, it in self.subjects.items() if (name in asked if asked else not it.apart)}

    def phrases(self, field: str, category: Category) -> dict[str, list[str]]:
        """The groups of the list `field` that suit a category. UsageError if there is no such list."""
        if field not in self.lists:
            raise UsageError(
                f"grammar: the vocabulary '{self.name}' has no list '{field}'; it has: subject, "
                f"{', '.join(self.lists)}{nearest(field, self.lists)}"
            )
        groups = self.lists[field].groups
        return {name: groups[name] for name in category.suits.get(field, groups)}

    def individuals(self, name: str) -> int:
        """How many different descriptions the category has."""
        category = self.subjects[name]
        looks = [sum(self._fillings(phrase) for phrase in phrases) for phrases in category.looks.values()]
        return len(category.kinds) * prod(looks)

    def _fillings(self, phrase: str) -> int:
        """Ways to fill a phrase's palettes, whatever other phrases of the description took."""
        return prod(perm(len(self.palettes[name]), phrase.count(f"{{{name}}}")) for name in fields_of(phrase))


def names() -> list[str]:
    """The vocabularies that ship with diptych."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.yaml"))


def find(name: str) -> Path:
    """The file of a vocabulary that ships, or a file of one's own. UsageError if there is none."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else Path(__file__).parent / f"{name}.yaml"
    if not path.is_file():
        known = ["auto", "pocket", *names()]
        raise UsageError(
            f"write.grammar: unknown grammar '{name}'; known: {', '.join(known)}, or a vocabulary file"
            f"{nearest(name, known)}"
        )
    return path


def digest(name: str) -> str:
    """sha256 of a vocabulary's file."""
    return sha256_file(find(name))


def load(name: str) -> Vocabulary:
    """A vocabulary by name, or from a YAML file. UsageError if it is unknown or does not hold what one holds."""
    path = find(name)
    try:
        return Vocabulary.model_validate(parse_yaml(read_text(path), str(path)))
    except ValidationError as error:
        keys = frozenset(key for part in (Vocabulary, Category, Phrases) for key in part.model_fields)
        raise UsageError(f"{path}: {documents.first(error, keys)}") from error


# Words that tell nothing of what somebody looks like, so a caption may share them with a description.
_PLAIN = """
    a an the and or of in on at to from with without as by for like one two three both around over under above
    below between left right side top front back down
"""
PLAIN = frozenset(_PLAIN.split())


def grids(words: Vocabulary, task: Task, panels: int) -> Grammar:
    """The grammar that makes a task's grids of `panels` panels from a vocabulary. UsageError if it cannot."""
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
    own = Turn(turn.run_seed, turn.index // len(categories))  # a category comes once in `len(categories)` grids
    kind = own.of(category.kinds, f"kind-{name}")
    description = grammar.article(describe(words, category, kind, rng))

    def told(template: str, count: int) -> list[str]:
        drawn = {
            field: phrases(words, name, category, field, own, count, rng)
            for field in sorted(fields_of(template) - {"subject"})
        }
        each = [{field: of[number] for field, of in drawn.items()} for number in range(count)]
        return [grammar.fill(template, subject=kind, **values) for values in each]

    alone = not (task.grammar.scene and task.grammar.change)
    scenes = told(task.grammar.scene, panels if alone else 1)
    changes = told(task.grammar.change, panels)
    captions = [
        grammar.fill(task.panel_template, subject=kind, scene=scenes[number % len(scenes)], change=changes[number])
        for number in range(panels)
    ]
    if leaks(description, kind, captions):
        return None
    return Draft(kind, captions, description=description, style=turn.of(words.styles, "style"))


def describe(words: Vocabulary, category: Category, kind: str, rng: np.random.Generator) -> str:
    """A new individual of this kind, without its article; no word of a palette comes twice."""
    used: set[str] = set()

    def coloured(found: re.Match[str]) -> str:
        palette = words.palettes[found[2]]
        free = [word for word in palette if word not in used] or palette
        used.add(word := free[int(rng.integers(len(free)))])
        return grammar.article(word) if found[1] else word

    looks = {look: options[int(rng.integers(len(options)))] for look, options in category.looks.items()}
    filled = {look: re.sub(r"(\ban? )?\{(\w+)\}", coloured, phrase) for look, phrase in looks.items()}
    return grammar.fill(category.description, kind=kind, **filled)


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
