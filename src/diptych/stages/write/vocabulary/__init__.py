"""Vocabularies as data: what a grammar draws grids from when no language model writes them.

A vocabulary is one YAML file, `photo.yaml` beside this one or any other: categories of subjects with what tells one
individual from another, and lists of phrases (places, actions, lights, …) that a task's `grammar` names as fields.
What a subject looks like and what a scene shows are kept apart, so that captions can leave the looks out.
"""

from __future__ import annotations

import hashlib
from math import perm, prod
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from diptych.errors import UsageError, nearest
from diptych.recipe.tasks import check_fields, fields_of
from diptych.utils import plain
from diptych.utils.documents import parse_yaml
from diptych.utils.text_files import read_text

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
    return hashlib.sha256(find(name).read_bytes()).hexdigest()


def load(name: str) -> Vocabulary:
    """A vocabulary by name, or from a YAML file. UsageError if it is unknown or does not hold what one holds."""
    path = find(name)
    try:
        return Vocabulary.model_validate(parse_yaml(read_text(path), str(path)))
    except ValidationError as error:
        keys = frozenset(key for part in (Vocabulary, Category, Phrases) for key in part.model_fields)
        raise UsageError(f"{path}: {plain.first(error, keys)}") from error
