"""Tasks: what a pair means, as data. A task is one YAML file, in this folder or anywhere else (docs/tasks.md).

It holds the layouts and templates of grid prompts, the brief for a language model that writes them, and the phrases
with which a grammar fills them. It also holds the questions for a vision-language judge (the paper's three steps), the
brief for captions, and whether the two panels share their geometry. A new task is one file and no code.
"""

from __future__ import annotations

import string
from collections.abc import Set
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

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


def fields_of(template: str) -> set[str]:
    """The field names in a template. ValueError for broken braces, and for anything but a name in them: a width could
    fill the memory, and an attribute could expose internals."""
    names: set[str] = set()
    for _, name, spec, conversion in string.Formatter().parse(template):
        if name is None:
            continue
        if spec or conversion or "." in name or "[" in name:
            raise ValueError(f"use a plain name in braces: {{{name[:40]}}} in '{template[:80]}'")
        names.add(name)
    return names


def check_fields(template: str, allowed: Set[str], needed: Set[str] = frozenset()) -> None:
    """Raises ValueError if a template has an unknown field, lacks a needed one, or has broken braces."""
    fields = fields_of(template)
    for name in sorted(fields - allowed):
        raise ValueError(f"unknown field {{{name}}} in '{template}'{nearest(name, allowed)}")
    for name in sorted(needed - fields):
        raise ValueError(f"'{template}' lacks the field {{{name}}}")


def _fields(allowed: frozenset[str] | None = None, needed: Set[str] = frozenset()) -> AfterValidator:
    """Validates a template's fields; None allows all plain names."""

    def check(template: str) -> str:
        check_fields(template, fields_of(template) if allowed is None else allowed, needed)
        return template

    return AfterValidator(check)


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Grid(_Part):
    """A layout of panels, and the prompt templates that describe it."""

    rows: int = Field(ge=1, le=4)
    """Number of rows of panels."""
    cols: int = Field(ge=1, le=4)
    """Number of columns of panels."""
    templates: list[Annotated[Text, _fields(GRID_FIELDS)]] = Field(min_length=1)
    """Prompt templates; one is chosen at random for each grid. Fields: {subject} (its kind), {description} (the
    individual, with article), {scene} (what the panels share), {left} and {right} (1×2 grids), {panels} (all panels),
    {count}, {style}."""
    panel: Annotated[Text, _fields(ITEM_FIELDS, {"content"})] = "{number}: {content}"
    """Template of each panel's text in {panels}. Fields: {number}, {position} ("top left"), {subject}, {description},
    {content}."""

    @model_validator(mode="after")
    def _every_panel(self) -> Grid:
        if self.panels < 2:
            raise ValueError("a grid needs at least two panels")
        for template in self.templates:
            fields = fields_of(template)
            if "panels" not in fields and not (self.panels == 2 and {"left", "right"} <= fields):
                need = "{panels}, or {left} and {right}," if self.panels == 2 else "{panels}"
                raise ValueError(f"a template of a {self.name} grid needs {need} to describe each panel: {template}")
        return self

    @property
    def name(self) -> str:
        """Rows x columns, for instance "2x2"."""
        return f"{self.rows}x{self.cols}"

    @property
    def panels(self) -> int:
        """Number of panels."""
        return self.rows * self.cols


class WriterBrief(_Part):
    """The request to a language model that writes grids."""

    brief: Annotated[Text, _fields(BRIEF_FIELDS)]
    """Prompt for the language model. Fields: {count} (panels), {layout} ("2x2"), {words} (word limit of a panel)."""
    answer: dict[Answer, Text]
    """Parts of its reply, each with a description: `subject`, `description`, `panels` (what each panel shows), and,
    where the task needs them, `scene` (what the panels share) and `style`."""


class Grammar(_Part):
    """The phrases with which a grammar fills a grid, when no language model writes it."""

    pocket: Text | None = None
    """Grammar of the pocket world that writes this task (subject, relight, season). null if none can."""
    subjects: list[Text] = []
    """Categories of a vocabulary's subjects to use. An empty list is all subjects that can stand in scenes."""
    scene: Annotated[str, _fields()] = ""
    """Template of {scene} in `panel_template`, with a vocabulary's lists as fields: "{action} {place}, {light}". If
    there is also a {change}, one scene is chosen for all panels."""
    change: Annotated[str, _fields()] = ""
    """Template of {change} in `panel_template`, chosen for each panel. It has no comma, so that it can be read back
    from a caption."""

    @field_validator("change")
    @classmethod
    def _one_clause(cls, change: str) -> str:
        if "," in change:
            raise ValueError("remove the comma: a change must be readable from a caption")
        return change


class Curation(_Part):
    """How pairs are judged."""

    questions: list[Text] = Field(min_length=1)
    """Questions that a vision-language judge answers in order. The last one decides."""
    thresholds: dict[Literal["same", "near_copy", "seam", "change"], float] = {}
    """Thresholds that replace the recipe's defaults. Aligned tasks may also set `change`, the minimum difference over
    the whole image (`stages.alignment.whole_change`, default 0), so that a new light passes and a new hat does not."""


class CaptionBriefs(_Part):
    """The requests and templates for captions and instructions of a pair."""

    description: Text
    """Prompt for a description of the target."""
    instruction: Text
    """Prompt for an instruction that turns the reference into the target."""
    instruction_templates: list[Annotated[Text, _fields(PANEL_FIELDS - {"scene"})]] = Field(min_length=1)
    """Templates of instructions without a language model. Fields: {subject}, {change} (what the target's caption
    says)."""
    instructions: float = Field(default=0.0, ge=0, le=1)
    """Share of training samples that use the instruction in place of the caption, if `distill.instructions` is
    `auto`."""


class Task(_Part):
    """A task file."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_-]*$")
    """Name of the task in recipes."""
    version: int = Field(ge=1)
    """Version of the file. Raise it with each change that changes rows."""
    description: Text
    """One sentence that says what a pair of this task is."""
    geometry: Literal["independent", "aligned"]
    """`aligned` if a pixel of the reference and the same pixel of the target show the same spot, else `independent`."""
    grids: list[Grid] = Field(min_length=1)
    """Layouts of the grids. The first is the default."""
    panel_template: Annotated[Text, _fields(PANEL_FIELDS)]
    """Template of the caption of one panel. Fields: {subject}, {scene}, {change}."""
    writer: WriterBrief | None = None
    """Brief for a language model. null if no language model writes this task."""
    grammar: Grammar | None = None
    """Phrases for a grammar. null if no grammar writes this task."""
    curation: Curation
    """How pairs are judged."""
    captions: CaptionBriefs
    """How captions and instructions are made."""

    @model_validator(mode="after")
    def _parts_agree(self) -> Task:
        fields = fields_of(self.panel_template)
        layouts = [grid.name for grid in self.grids]
        if twice := next((name for name in layouts if layouts.count(name) > 1), None):
            raise ValueError(f"the layout {twice} is listed twice; merge its templates into one")
        if not fields & {"scene", "change"}:
            raise ValueError("panel_template needs {scene} or {change}, which say what a panel shows")
        if self.writer:
            needed = {"subject", "description", "panels"} | ({"scene"} if {"scene", "change"} <= fields else set())
            if absent := sorted(needed - set(self.writer.answer)):
                raise ValueError(f"writer.answer lacks {', '.join(absent)}")
        if self.grammar and (self.grammar.scene or self.grammar.change):
            for field in ("scene", "change"):
                if (field in fields) != bool(getattr(self.grammar, field)):
                    has, fix = ("has", "set") if field in fields else ("has no", "remove")
                    raise ValueError(f"panel_template {has} {{{field}}}; {fix} grammar.{field}")
        if "change" in self.curation.thresholds and self.geometry != "aligned":
            raise ValueError("curation.thresholds.change compares aligned panels; set geometry: aligned")
        return self

    def layout(self, name: str | None = None) -> Grid:
        """Returns the layout of this name ("2x2"), the first one for None. UsageError if the task has no such
        layout."""
        layouts = {grid.name: grid for grid in self.grids}
        if (name := name or self.grids[0].name) in layouts:
            return layouts[name]
        known = ", ".join(layouts)
        raise UsageError("recipe_conflict", f"write.layout: the task '{self.name}' has no {name} grid; it has: {known}")

    def layout_of(self, panels: int, name: str | None = None) -> Grid | None:
        """Returns the layout with this number of panels: the one called `name` if it fits, else the first. None if
        none."""
        fitting = [grid for grid in self.grids if grid.panels == panels]
        return next((grid for grid in fitting if grid.name == name), fitting[0] if fitting else None)

    def answer_schema(self, panels: int) -> dict[str, Any]:
        """Returns the JSON schema of a language model's reply for a number of panels. UsageError without a writer."""
        if self.writer is None:
            raise UsageError(
                "task_unsuited", f"the task '{self.name}' has no `writer`, so no language model can write it"
            )
        text = {"type": "string", "minLength": 1}
        parts: dict[str, Any] = {name: {**text, "description": about} for name, about in self.writer.answer.items()}
        about = self.writer.answer["panels"]
        parts["panels"] = {"type": "array", "items": text, "minItems": panels, "maxItems": panels, "description": about}
        return {"type": "object", "properties": parts, "required": list(parts), "additionalProperties": False}

    def thresholds(self, recipe: Limits) -> Limits:
        """Returns a recipe's thresholds, where the task's values replace those that are at their defaults."""
        defaults = type(recipe)()
        known = {k: v for k, v in self.curation.thresholds.items() if k in type(recipe).model_fields}
        return recipe.model_copy(update={k: v for k, v in known.items() if getattr(recipe, k) == getattr(defaults, k)})


_KEYS = frozenset(
    key for part in (Task, Grid, WriterBrief, Grammar, Curation, CaptionBriefs) for key in part.model_fields
)


def names() -> list[str]:
    """Names of the tasks that ship with diptych."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.yaml"))


def load(name: str) -> Task:
    """A task by its name, or from a YAML file. UsageError if it is unknown or invalid."""
    path = _file(name)
    try:
        return Task.model_validate(parse_yaml(read_text(path), str(path)))
    except ValidationError as error:
        raise UsageError("task_invalid", f"{path}: {documents.first(error, _KEYS)}") from error


def resolve(recipe: Recipe) -> Recipe:
    """The recipe with `distill.instructions: auto` replaced by the task's share."""
    if recipe.distill.instructions != "auto":
        return recipe
    share = load(recipe.task).captions.instructions
    return recipe.model_copy(update={"distill": recipe.distill.model_copy(update={"instructions": share})})


def _file(name: str) -> Path:
    is_path = name.endswith((".yaml", ".yml"))
    path = here_or_packaged(name) if is_path else Path(__file__).parent / f"{name}.yaml"
    if is_path and not path.is_file():
        raise UsageError("path_not_found", f"Task file not found: {name}. Check the path.")
    if not path.is_file():
        raise UsageError("task_unknown", f"unknown task '{name}'; known: {', '.join(names())}{nearest(name, names())}")
    return path


def source(name: str) -> str:
    """The YAML text of a task by name or file, with its comments. UsageError if it is not a task."""
    load(name)
    return read_text(_file(name))


def summary(chosen: list[Task], vocabularies: list[list[str]]) -> list[dict[str, Any]]:
    """What `diptych tasks` reports of tasks. `vocabularies` are the names of those that can write each task."""
    return [_summary(task, names) for task, names in zip(chosen, vocabularies, strict=True)]


def _summary(task: Task, vocabularies: list[str]) -> dict[str, Any]:
    pocket = ["pocket"] if task.grammar and task.grammar.pocket else []
    return {
        "name": task.name,
        "version": task.version,
        "description": task.description,
        "geometry": task.geometry,
        "layouts": {grid.name: len(grid.templates) for grid in task.grids},
        "panel": task.panel_template,
        "writers": [*pocket, *vocabularies, *(["language model"] if task.writer else [])],
        "questions": len(task.curation.questions),
        "thresholds": dict(task.curation.thresholds),
    }


def format_summary(summaries: list[dict[str, Any]]) -> list[str]:
    """A summary as text: one line per task, or all facts of a single one."""
    if len(summaries) > 1:
        width = max(len(task["name"]) for task in summaries)
        return [
            f"{task['name']:<{width}}  v{task['version']}  {task['geometry']:<11}  {' '.join(task['layouts'])}  "
            f"{task['description']}"
            for task in summaries
        ]
    (task,) = summaries
    templates = ", ".join(f"{name} ({count} templates)" for name, count in task["layouts"].items())
    limits = ", ".join(f"{key} {value:g}" for key, value in task["thresholds"].items())
    return [
        f"{task['name']}, version {task['version']}: {task['description']}",
        f"geometry    {task['geometry']}",
        f"layouts     {templates}",
        f"panel       {task['panel']}",
        f"writers     {', '.join(task['writers']) or 'none of those that ship: pass --vocabulary, or add a writer'}",
        f"curation    {task['questions']} questions, thresholds: {limits or 'the recipe’s'}",
    ]
