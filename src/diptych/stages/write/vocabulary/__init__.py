"""Vocabularies as data: what a grammar samples grids from when no language model writes them.

A vocabulary is one YAML file, `photo.yaml` in this folder or any other. It has categories of subjects, with the looks
that distinguish individuals, and lists of phrases (places, actions, lights, …) that a task's `grammar` names as fields.
Looks and scenes are separate, so that captions can leave out the looks.

    draft = grids(load("photo"), tasks.load("subject"), panels=4)

The task defines what stays and what changes in a grid (`grammar.scene`, `grammar.change`). The individual is described
once, in detail, for all panels. A panel's caption names only its kind: a draft in which a word of the looks also occurs
in a caption is sampled again. Categories, the kinds of a category, styles and the phrases of a list are evenly
distributed.
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
    """Subjects of one sort, which can look alike and do the same things in the same places."""

    kinds: Words
    """Names of the subjects in captions, without an article. They are used evenly."""
    description: Text
    """Template of an individual, without an article. Fields: {kind} and the names of `looks`."""
    looks: dict[str, Words]
    """Phrases that distinguish individuals, by name. A phrase may have fields that are names of palettes."""
    suits: dict[str, Words] = {}
    """Groups of a list whose phrases fit these subjects, by the list's name. All groups of other lists fit."""
    apart: bool = False
    """Whether only tasks that name this category use it. Places are such a category: they are not in other places."""

    @model_validator(mode="after")
    def _described(self) -> Category:
        check_fields(self.description, frozenset({"kind", *self.looks}), {"kind", *self.looks})
        if re.match(r"(an?|the)\b", self.description, re.IGNORECASE):
            raise ValueError(f"leave the article out of the description '{self.description}'; it is added")
        return self


class Phrases(_Part):
    """A list of phrases that a task's grammar names as a field."""

    groups: dict[str, Words] = Field(min_length=1)
    """Phrases without commas, by group. A file may list the phrases alone if there is one group."""
    together: bool = False
    """Whether all panels of a grid take phrases of the same group."""
    ordered: bool = False
    """Whether the phrases of a group keep their order, as in a story."""

    @model_validator(mode="before")
    @classmethod
    def _one_group(cls, value: object) -> object:
        return {"groups": {"all": value}} if isinstance(value, list) else value

    @field_validator("groups")
    @classmethod
    def _one_clause(cls, groups: dict[str, list[str]]) -> dict[str, list[str]]:
        for phrase in (phrase for phrases in groups.values() for phrase in phrases):
            if "," in phrase or "{" in phrase:
                raise ValueError(f"'{phrase}' has a comma or a field; a phrase must be recoverable from a caption")
        return groups


class Vocabulary(_Part):
    """A vocabulary file."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_-]*$")
    """Name of the vocabulary in `write.grammar`."""
    version: int = Field(ge=1)
    """Version of the file. Raise it when a change alters the prompts."""
    description: Text
    """Description of the vocabulary in one sentence."""
    styles: Words
    """Styles of all panels of a grid, such as "a watercolour illustration". They are used evenly."""
    palettes: dict[str, Words] = {}
    """Words that fill the fields of looks, by name. No word occurs twice in one description."""
    subjects: dict[str, Category] = Field(min_length=1)
    """Categories of subjects, by name. They are used evenly."""
    lists: dict[str, Phrases] = Field(min_length=1)
    """Lists of phrases, by the names of the fields that they fill."""

    @model_validator(mode="after")
    def _known_names(self) -> Vocabulary:
        palettes = frozenset(self.palettes)
        seen: dict[str, str] = {}
        for name, category in self.subjects.items():
            for kind in category.kinds:
                if kind in seen:
                    raise ValueError(f"subjects.{name}.kinds: '{kind}' is also a kind of {seen[kind]}")
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

    def categories(self, names: list[str]) -> dict[str, Category]:
        """Return the categories of these names, or all that are not `apart`. Raises UsageError for an unknown name."""
        for name in names:
            if name not in self.subjects:
                raise UsageError(
                    "vocabulary_invalid",
                    f"grammar.subjects: the vocabulary '{self.name}' has no subjects '{name}'. "
                    f"It has: {', '.join(self.subjects)}{nearest(name, self.subjects)}",
                )
        return {name: it for name, it in self.subjects.items() if (name in names if names else not it.apart)}

    def phrases(self, field: str, category: Category) -> dict[str, list[str]]:
        """Return the groups of the list `field` that suit a category."""
        groups = self.lists[field].groups
        return {name: groups[name] for name in category.suits.get(field, groups)}

    def individuals(self, name: str) -> int:
        """Return the number of different descriptions of a category."""
        category = self.subjects[name]
        looks = [sum(self._fillings(phrase) for phrase in phrases) for phrases in category.looks.values()]
        return len(category.kinds) * prod(looks)

    def _fillings(self, phrase: str) -> int:
        """Return the number of ways to fill a phrase's palettes, without regard to other phrases."""
        return prod(perm(len(self.palettes[name]), phrase.count(f"{{{name}}}")) for name in fields_of(phrase))


def names() -> list[str]:
    """Return the names of the vocabularies that ship with diptych."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.yaml"))


def find(name: str) -> Path:
    """Return the file of a shipped vocabulary, or a custom file. Raises UsageError if it does not exist."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else Path(__file__).parent / f"{name}.yaml"
    if not path.is_file():
        known = ["auto", "pocket", *names()]
        raise UsageError(
            "name_unknown",
            f"Unknown vocabulary '{name}'. Known: {', '.join(known)}, or a YAML file{nearest(name, known)}",
        )
    return path


def digest(name: str) -> str:
    """Return the SHA-256 of a vocabulary's file."""
    return sha256_file(find(name))


def load(name: str) -> Vocabulary:
    """Load a vocabulary by name or from a YAML file. Raises UsageError if it is unknown or invalid."""
    path = find(name)
    try:
        return Vocabulary.model_validate(parse_yaml(read_text(path), str(path)))
    except ValidationError as error:
        keys = frozenset(key for part in (Vocabulary, Category, Phrases) for key in part.model_fields)
        raise UsageError("vocabulary_invalid", f"{path}: {documents.first(error, keys)}") from error


# Words that do not describe looks, so a caption may share them with a description.
_PLAIN = """
    a an the and or of in on at to from with without as by for like one two three both around over under above
    below between left right side top front back down
"""
PLAIN = frozenset(_PLAIN.split())


def fitting(task: Task, further: str | None = None) -> list[str]:
    """Return those of the shipped vocabularies, and of a further one, that can write the task's default layout."""
    known = names() if further is None else [*names(), further]
    return [name for name in dict.fromkeys(known) if _fits(load(name), task)]


def _fits(words: Vocabulary, task: Task) -> bool:
    try:
        grids(words, task, task.layout().panels)
    except UsageError:
        return False
    return True


def grids(words: Vocabulary, task: Task, panels: int) -> Grammar:
    """Return the grammar for a task's grids of `panels` panels. Raises UsageError if the vocabulary does not fit."""
    rules = task.grammar
    if rules is None or not (rules.scene or rules.change):
        how = "Set grammar.scene or grammar.change in its file."
        raise UsageError("vocabulary_invalid", f"The task '{task.name}' has no fields for a vocabulary. {how}")
    categories = words.categories(rules.subjects)
    fields = sorted((fields_of(rules.scene) | fields_of(rules.change)) - {"subject"})
    if missing := [field for field in fields if field not in words.lists]:
        raise UsageError(
            "vocabulary_invalid",
            f"The vocabulary '{words.name}' lacks lists that grammar.scene and grammar.change of the task "
            f"'{task.name}' name: {', '.join(missing)}. It has: {', '.join(words.lists)}"
            f"{nearest(missing[0], words.lists)}. Add them; docs/tasks.md#vocabularies has the form.",
        )
    for name, category in categories.items():
        for field in fields:
            _check_count(words, name, category, field, panels)
    return partial(_sample, words, task, categories, panels)


def _check_count(words: Vocabulary, name: str, category: Category, field: str, panels: int) -> None:
    groups = words.phrases(field, category)
    together = words.lists[field].together
    least = min(len(group) for group in groups.values()) if together else len(_all(groups))
    if least < panels:
        few = f"only {least} phrases of '{field}'{' in a group' if together else ''} for {name}"
        how = f"A grid of {panels} panels needs {panels}. Add phrases, or choose a smaller write.layout."
        raise UsageError("vocabulary_invalid", f"The vocabulary '{words.name}' has {few}. {how}")


def _sample(
    words: Vocabulary, task: Task, categories: dict[str, Category], panels: int, turn: Turn, rng: np.random.Generator
) -> Draft | None:
    assert task.grammar is not None
    name = turn.of(list(categories), "category")
    category = categories[name]
    inner = Turn(turn.run_seed, turn.index // len(categories))  # each category occurs once in `len(categories)` grids
    kind = inner.of(category.kinds, f"kind-{name}")
    description = grammar.article(describe(words, category, kind, rng))

    def filled(template: str, count: int) -> list[str]:
        sampled = {
            field: phrases(words, name, category, field, inner, count, rng)
            for field in sorted(fields_of(template) - {"subject"})
        }
        each = [{field: of[number] for field, of in sampled.items()} for number in range(count)]
        return [grammar.fill(template, subject=kind, **values) for values in each]

    alone = not (task.grammar.scene and task.grammar.change)
    scenes = filled(task.grammar.scene, panels if alone else 1)
    changes = filled(task.grammar.change, panels)
    captions = [
        grammar.fill(task.panel_template, subject=kind, scene=scenes[number % len(scenes)], change=changes[number])
        for number in range(panels)
    ]
    if leaks(description, kind, captions):
        return None
    return Draft(kind, captions, description=description, style=turn.of(words.styles, "style"))


def describe(words: Vocabulary, category: Category, kind: str, rng: np.random.Generator) -> str:
    """Describe a new individual of this kind, without an article; no word of a palette occurs twice."""
    used: set[str] = set()

    def color(match: re.Match[str]) -> str:
        palette = words.palettes[match[2]]
        free = [word for word in palette if word not in used] or palette
        used.add(word := free[int(rng.integers(len(free)))])
        return grammar.article(word) if match[1] else word

    looks = {look: options[int(rng.integers(len(options)))] for look, options in category.looks.items()}
    filled = {look: re.sub(r"(\ban? )?\{(\w+)\}", color, phrase) for look, phrase in looks.items()}
    return grammar.fill(category.description, kind=kind, **filled)


def phrases(
    words: Vocabulary, name: str, category: Category, field: str, turn: Turn, count: int, rng: np.random.Generator
) -> list[str]:
    """Return `count` different phrases of a list, for the panels of the category's grid number `turn.index`."""
    groups = words.phrases(field, category)
    if words.lists[field].together:
        group = groups[turn.of(list(groups), f"{field}-group-{name}")]
        picked = rng.permutation(len(group))[:count]
        return [group[int(place)] for place in (sorted(picked) if words.lists[field].ordered else picked)]
    every, taken = _all(groups), []
    for number in range(turn.index * count, (turn.index + 1) * count):
        phrase = Turn(turn.run_seed, number).of(every, f"{field}-{name}")
        if phrase in taken:  # a cycle ends within this grid
            free = [other for other in every if other not in taken]
            phrase = free[int(rng.integers(len(free)))]
        taken.append(phrase)
    return taken


def leaks(description: str, kind: str, captions: list[str]) -> set[str]:
    """Return the words of captions that reveal the looks of their subject."""
    looks = _words(description) - _words(kind) - PLAIN
    return looks & _words(" ".join(captions))


def _words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text.lower()))


def _all(groups: dict[str, list[str]]) -> list[str]:
    return list(dict.fromkeys(phrase for group in groups.values() for phrase in group))
