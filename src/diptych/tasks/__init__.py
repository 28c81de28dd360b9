"""What a pair means, as data: a task is one YAML file beside this one, or anywhere.

It holds the wordings of grid prompts, the questions a vision-language judge is asked (the paper's three
steps), the brief for captions, and whether the two panels share their geometry. A new task is one file and no code.
"""

from __future__ import annotations

import string
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from diptych.errors import UsageError, nearest

GRID_FIELDS = frozenset({"subject", "scene", "left", "right", "panels", "count"})
PANEL_FIELDS = frozenset({"subject", "scene", "change"})
Text = Annotated[str, Field(min_length=1)]
Limits = TypeVar("Limits", bound=BaseModel)


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Grid(_Part):
    """A layout of panels and the wordings that ask for it."""

    rows: int = Field(ge=1, le=4)
    """Panels down."""
    cols: int = Field(ge=1, le=4)
    """Panels across."""
    templates: list[Text] = Field(min_length=1)
    """Wordings; one is drawn for each grid. Fields: {subject} (its kind), {scene} (what the panels share), {left} and
    {right} (1×2 grids), {panels} (all of them, numbered), {count}."""

    @field_validator("templates")
    @classmethod
    def _known_fields(cls, templates: list[str]) -> list[str]:
        for template in templates:
            check_fields(template, GRID_FIELDS)
        return templates


class Curation(_Part):
    """How pairs are judged."""

    questions: list[Text] = Field(min_length=1)
    """The steps a vision-language judge answers in order; the last one decides."""
    thresholds: dict[Literal["same", "near_copy", "seam"], float] = {}
    """Where this task departs from the recipe's defaults."""


class Captions(_Part):
    """How a pair is put into words."""

    description: Text
    """The brief for a description of the target."""
    instruction: Text
    """The brief for an instruction that turns the reference into the target."""
    instruction_templates: list[Text] = Field(min_length=1)
    """Wordings for when no language model is at hand. Fields: {subject}, {change} (the target's caption)."""


class Task(_Part):
    """A task file."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_-]*$")
    """What recipes call it."""
    version: int = Field(ge=1)
    """Raised by whoever changes what the file makes."""
    description: Text
    """One sentence: what a pair of this task is."""
    geometry: Literal["independent", "aligned"]
    """Whether a pixel of the reference and the same pixel of the target show the same spot of the scene."""
    grids: list[Grid] = Field(min_length=1)
    """Layouts; the first is the default."""
    panel_template: Text
    """The caption of one panel. Fields: {subject}, {scene}, {change}."""
    curation: Curation
    captions: Captions

    @field_validator("panel_template")
    @classmethod
    def _panel_fields(cls, template: str) -> str:
        check_fields(template, PANEL_FIELDS)
        return template

    def thresholds(self, recipe: Limits) -> Limits:
        """A recipe's thresholds (`recipe.Thresholds`); those it leaves at their defaults are the task's, if any."""
        defaults = type(recipe)()
        own = {k: v for k, v in self.curation.thresholds.items() if getattr(recipe, k) == getattr(defaults, k)}
        return recipe.model_copy(update=own)

    @property
    def grid_templates(self) -> list[str]:
        """The wordings of the default layout."""
        return self.grids[0].templates


def check_fields(template: str, allowed: frozenset[str]) -> None:
    """Raises ValueError if a template has a field that nothing fills, or broken braces."""
    for _, name, _, _ in string.Formatter().parse(template):
        if name is not None and name not in allowed:
            raise ValueError(f"unknown field {{{name}}} in '{template}'{nearest(name, allowed)}")


def names() -> list[str]:
    """The tasks that ship with diptych."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.yaml"))


def load(name: str) -> Task:
    """A task by name, or from a YAML file. UsageError if it is unknown or does not hold what a task holds."""
    import yaml

    path = Path(name) if name.endswith((".yaml", ".yml")) else Path(__file__).parent / f"{name}.yaml"
    if not path.is_file():
        raise UsageError(f"unknown task '{name}'; known: {', '.join(names())}{nearest(name, names())}")
    try:
        values = yaml.safe_load(path.read_text("utf8"))
        return Task.model_validate(values)
    except yaml.YAMLError as error:
        raise UsageError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        hint = nearest(str(first["loc"][-1]), Task.model_fields) if first["type"] == "extra_forbidden" else ""
        raise UsageError(f"{path}: {where}: {first['msg'].removeprefix('Value error, ')}{hint}") from error
