"""What a pair means, as data: a task is one YAML file beside this one, or anywhere (docs/tasks.md).

It holds the layouts and wordings of grid prompts, the brief for a language model that writes them, what a grammar fills
them with, the questions a vision-language judge is asked (the paper's three steps), the brief for captions, and whether
the two panels share their geometry. A new task is one file and no code.
"""

from __future__ import annotations

import string
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from diptych.errors import UsageError, nearest
from diptych.utils import documents
from diptych.utils.documents import parse_yaml, read_text
from diptych.utils.paths import here_or_packaged

if TYPE_CHECKING:
    from diptych.recipe.schema import Recipe

GRID_FIELDS = frozenset({"subject", "description", "scene", "left", "right", "panels", "count", "style"})
ITEM_FIELDS = frozenset({"number", "position", "subject", "description", "content"})
PANEL_FIELDS = frozenset({"subject", "scene", "change"})
BRIEF_FIELDS = frozenset({"count", "layout", "words"})
Answer = Literal["subject", "description", "scene", "style", "panels"]
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
    """Wordings; one is drawn for each grid. Fields: {subject} (its kind), {description} (the individual, with article),
    {scene} (what the panels share), {left} and {right} (1×2 grids), {panels} (all of them), {count}, {style}."""
    panel: Text = "{number}: {content}"
    """How {panels} words each panel. Fields: {number}, {position} ("top left"), {subject}, {description}, {content}."""

    @field_validator("templates", "panel")
    @classmethod
    def _known_fields(cls, given: list[str] | str) -> list[str] | str:
        if isinstance(given, str):
            check_fields(given, ITEM_FIELDS, {"content"})
        for template in given if isinstance(given, list) else ():
            check_fields(template, GRID_FIELDS)
        return given

    @model_validator(mode="after")
    def _every_panel(self) -> Grid:
        if self.panels < 2:
            raise ValueError("a grid has at least two panels")
        for template in self.templates:
            fields = fields_of(template)
            if "panels" not in fields and not (self.panels == 2 and {"left", "right"} <= fields):
                need = "{panels}, or {left} and {right}," if self.panels == 2 else "{panels}"
                raise ValueError(
                    f"a wording of a {self.name} grid needs {need} to say what each panel shows: {template}"
                )
        return self

    @property
    def name(self) -> str:
        """Rows x columns: "2x2"."""
        return f"{self.rows}x{self.cols}"

    @property
    def panels(self) -> int:
        return self.rows * self.cols


class Writer(_Part):
    """How a language model is asked for a grid."""

    brief: Text
    """What it is told. Fields: {count} (panels), {layout} ("2x2"), {words} (budget of a panel)."""
    answer: dict[Answer, Text]
    """What it returns, and what each part must hold: `subject`, `description`, `panels` (what each panel shows), and
    where the task needs them `scene` (what they share) and `style`."""

    @field_validator("brief")
    @classmethod
    def _brief_fields(cls, brief: str) -> str:
        check_fields(brief, BRIEF_FIELDS)
        return brief


class Grammar(_Part):
    """What a grammar fills a grid with, when no language model writes it."""

    pocket: Text | None = None
    """Which of the pocket world's grammars draws it (subject, relight, season); null: none can."""
    subjects: list[Text] = []
    """Which categories of a vocabulary's subjects; none are all that stand in scenes."""
    scene: str = ""
    """What {scene} of `panel_template` says, from a vocabulary's lists: "{action} {place}, {light}". Beside a {change}
    it is drawn once for all panels."""
    change: str = ""
    """What {change} says: drawn for each panel, and without a comma, so that it can be read back from a caption."""

    @field_validator("scene", "change")
    @classmethod
    def _plain_fields(cls, template: str) -> str:
        fields_of(template)
        return template

    @field_validator("change")
    @classmethod
    def _one_clause(cls, change: str) -> str:
        if "," in change:
            raise ValueError("a change has no comma, so that it can be read back from a caption")
        return change


class Curation(_Part):
    """How pairs are judged."""

    questions: list[Text] = Field(min_length=1)
    """The steps a vision-language judge answers in order; the last one decides."""
    thresholds: dict[Literal["same", "near_copy", "seam", "change"], float] = {}
    """Where this task departs from the recipe's defaults; and for aligned tasks `change`, how much of the whole picture
    must differ (`stages.alignment.whole_change`), 0 if left out: that the light is another one, and not only a hat."""


class Captions(_Part):
    """How a pair is put into words."""

    description: Text
    """The brief for a description of the target."""
    instruction: Text
    """The brief for an instruction that turns the reference into the target."""
    instruction_templates: list[Text] = Field(min_length=1)
    """Wordings for when no language model is at hand. Fields: {subject}, {change} (what the target says of itself)."""
    instructions: float = Field(default=0.0, ge=0, le=1)
    """Share of training samples that get the instruction in place of the caption, where the recipe leaves
    `distill.instructions` at `auto`."""

    @field_validator("instruction_templates")
    @classmethod
    def _instruction_fields(cls, templates: list[str]) -> list[str]:
        for template in templates:
            check_fields(template, PANEL_FIELDS - {"scene"})
        return templates


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
    writer: Writer | None = None
    """Null: language models are not asked to write this task."""
    grammar: Grammar | None = None
    """Null: no grammar writes this task."""
    curation: Curation
    captions: Captions

    @field_validator("panel_template")
    @classmethod
    def _panel_fields(cls, template: str) -> str:
        check_fields(template, PANEL_FIELDS)
        return template

    @model_validator(mode="after")
    def _parts_agree(self) -> Task:
        asked = fields_of(self.panel_template)
        layouts = [grid.name for grid in self.grids]
        if twice := next((name for name in layouts if layouts.count(name) > 1), None):
            raise ValueError(f"the layout {twice} is there twice; put its wordings into one")
        if not asked & {"scene", "change"}:
            raise ValueError("panel_template needs {scene} or {change}: what a panel shows")
        if self.writer:
            needed = {"subject", "description", "panels"} | ({"scene"} if {"scene", "change"} <= asked else set())
            if absent := sorted(needed - set(self.writer.answer)):
                raise ValueError(f"writer.answer lacks {', '.join(absent)}")
        if self.grammar and (self.grammar.scene or self.grammar.change):
            for field in ("scene", "change"):
                if (field in asked) != bool(getattr(self.grammar, field)):
                    has = "asks for" if field in asked else "has no"
                    raise ValueError(
                        f"panel_template {has} {{{field}}}, so grammar.{field} must be "
                        f"{'given' if field in asked else 'left out'}"
                    )
        if "change" in self.curation.thresholds and self.geometry != "aligned":
            raise ValueError("curation.thresholds.change compares aligned panels, so geometry must be aligned")
        return self

    def layout(self, name: str | None = None) -> Grid:
        """A layout by name ("2x2"), the first one if None. UsageError if the task has none such."""
        if name is None:
            return self.grids[0]
        for grid in self.grids:
            if grid.name == name:
                return grid
        known = ", ".join(grid.name for grid in self.grids)
        raise UsageError("recipe_conflict", f"write.layout: the task '{self.name}' has no {name} grid; it has: {known}")

    def layout_of(self, panels: int, name: str | None = None) -> Grid | None:
        """The layout of a grid with so many panels: the one called `name` if it fits, else the first that does."""
        fitting = [grid for grid in self.grids if grid.panels == panels]
        return next((grid for grid in fitting if grid.name == name), fitting[0] if fitting else None)

    def answer_schema(self, panels: int) -> dict[str, Any]:
        """The JSON schema of what a language model returns for so many panels. UsageError without a writer."""
        if self.writer is None:
            raise UsageError(
                "task_unsuited", f"the task '{self.name}' has no `writer`, so no language model can write it"
            )
        texts = {
            name: {"type": "string", "minLength": 1, "description": text} for name, text in self.writer.answer.items()
        }
        parts: dict[str, Any] = dict(texts)
        item = {"type": "string", "minLength": 1}
        about = self.writer.answer["panels"]
        parts["panels"] = {"type": "array", "items": item, "minItems": panels, "maxItems": panels, "description": about}
        return {"type": "object", "properties": parts, "required": list(parts), "additionalProperties": False}

    def thresholds(self, recipe: Limits) -> Limits:
        """A recipe's thresholds (`sections.Thresholds`); those it leaves at their defaults are the task's, if any."""
        defaults = type(recipe)()
        given = {k: v for k, v in self.curation.thresholds.items() if k in type(recipe).model_fields}
        own = {k: v for k, v in given.items() if getattr(recipe, k) == getattr(defaults, k)}
        return recipe.model_copy(update=own)


_KEYS = frozenset(key for part in (Task, Grid, Writer, Grammar, Curation, Captions) for key in part.model_fields)


def fields_of(template: str) -> set[str]:
    """The names in braces. ValueError for broken braces, and for a field that says more than its name: a width of two
    thousand million letters fills the memory, and an attribute is nobody's business."""
    names: set[str] = set()
    for _, name, spec, conversion in string.Formatter().parse(template):
        if name is None:
            continue
        if spec or conversion or "." in name or "[" in name:
            raise ValueError(f"a field is a name in braces and nothing else: {{{name[:40]}}} in '{template[:80]}'")
        names.add(name)
    return names


def check_fields(template: str, allowed: frozenset[str], needed: set[str] | frozenset[str] = frozenset()) -> None:
    """Raises ValueError if a template has a field that nothing fills, lacks a needed one, or has broken braces."""
    found = fields_of(template)
    for name in sorted(found - allowed):
        raise ValueError(f"unknown field {{{name}}} in '{template}'{nearest(name, allowed)}")
    for name in sorted(needed - found):
        raise ValueError(f"'{template}' lacks the field {{{name}}}")


def names() -> list[str]:
    """The tasks that ship with diptych."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.yaml"))


def load(name: str) -> Task:
    """A task by name, or from a YAML file. UsageError if it is unknown or does not hold what a task holds."""
    path = _file(name)
    try:
        return Task.model_validate(parse_yaml(read_text(path), str(path)))
    except ValidationError as error:
        raise UsageError("task_invalid", f"{path}: {documents.first(error, _KEYS)}") from error


def resolve(recipe: Recipe) -> Recipe:
    """The recipe with the values of its task where it leaves them open: `distill.instructions`."""
    if recipe.distill.instructions != "auto":
        return recipe
    share = load(recipe.task).captions.instructions
    return recipe.model_copy(update={"distill": recipe.distill.model_copy(update={"instructions": share})})


def _file(name: str) -> Path:
    path = here_or_packaged(name) if name.endswith((".yaml", ".yml")) else Path(__file__).parent / f"{name}.yaml"
    if not path.is_file():
        raise UsageError("task_unknown", f"unknown task '{name}'; known: {', '.join(names())}{nearest(name, names())}")
    return path


def source(name: str) -> str:
    """The YAML text of a task by name or file, as it is, comments included. UsageError if it is not a task."""
    load(name)
    return read_text(_file(name))


def summary(name: str | None = None) -> list[dict[str, Any]]:
    """What `diptych tasks` tells: of each task that ships, or of one by name or file. UsageError if a file is wrong."""
    return [_summary(load(one)) for one in ([name] if name is not None else names())]


def _summary(task: Task) -> dict[str, Any]:
    grammar = task.grammar
    drawn = {
        "pocket": grammar is not None and grammar.pocket,
        "photo": grammar is not None and grammar.scene + grammar.change,
    }
    return {
        "name": task.name,
        "version": task.version,
        "description": task.description,
        "geometry": task.geometry,
        "layouts": {grid.name: len(grid.templates) for grid in task.grids},
        "panel": task.panel_template,
        "writers": [*(name for name, able in drawn.items() if able), *(["language model"] if task.writer else [])],
        "questions": len(task.curation.questions),
        "thresholds": dict(task.curation.thresholds),
    }


def lines(found: list[dict[str, Any]]) -> list[str]:
    """A summary for people: a line for each task; all there is to say for a single one."""
    if len(found) > 1:
        wide = max(len(task["name"]) for task in found)
        return [
            f"{task['name']:<{wide}}  v{task['version']}  {task['geometry']:<11}  {' '.join(task['layouts'])}  "
            f"{task['description']}"
            for task in found
        ]
    (task,) = found
    wordings = ", ".join(f"{name} ({count} wordings)" for name, count in task["layouts"].items())
    limits = ", ".join(f"{key} {value:g}" for key, value in task["thresholds"].items())
    return [
        f"{task['name']}, version {task['version']}: {task['description']}",
        f"geometry    {task['geometry']}",
        f"layouts     {wordings}",
        f"a panel     {task['panel']}",
        f"written by  {', '.join(task['writers']) or 'nobody: it has neither a grammar nor a writer'}",
        f"curated by  {task['questions']} questions, thresholds: {limits or 'the recipe’s'}",
    ]
