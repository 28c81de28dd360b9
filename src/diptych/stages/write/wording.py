"""A task's templates, filled: a panel's caption, the prompt of a whole grid, and the instruction that turns one panel
into another.

A panel's caption follows its task's `panel_template`, so its parts can be read back from it: "a cat on the moon" is
subject "cat" and scene "on the moon".
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from diptych.recipe.tasks import Grid

if TYPE_CHECKING:
    import numpy as np

    from diptych.recipe.tasks import Task
    from diptych.stages.write.grammar import Draft

PLACES = {(1, 2): ("left", "right"), (1, 3): ("left", "middle", "right")}
ORDINALS = ("first", "second", "third", "fourth")
# "a unicorn", "a ukulele", "a European": vowels in spelling only.
_VOWEL = re.compile(r"(?!uni|uk|eu|one\b)[aeiou]", re.IGNORECASE)


def article(noun: str) -> str:
    """The noun after "a" or "an"."""
    return f"{'an' if _VOWEL.match(noun) else 'a'} {noun}"


def fill(template: str, **fields: str) -> str:
    """A template with its fields filled; "a {subject}" becomes "an owl" where it must."""
    if "subject" in fields:
        word = article(fields["subject"]).partition(" ")[0]
        template = re.sub(r"\ban?(?= \{subject\})", word, template)
    return template.format(**fields)


def styled(caption: str, style: str) -> str:
    """A panel's caption with the style that its picture has: "a watercolour illustration of a cat on the moon"."""
    return f"{style} of {caption}" if style else caption


def parts(template: str, caption: str, subject: str) -> dict[str, str]:
    """The fields of a caption that was made from `template`, `styled` or not; what does not fit is all {change}."""
    pattern = re.escape(template.format_map(_Marks()))
    pattern = re.sub(rf"\ba(?=\\ {_Marks.mark('subject')})", "an?", pattern)
    for field in ("subject", "scene", "change"):
        group = re.escape(subject) if field == "subject" else ".*"
        pattern = pattern.replace(re.escape(_Marks.mark(field)), f"(?P<{field}>{group})", 1)
    found = re.fullmatch(pattern, caption) or re.fullmatch(f".+? of {pattern}", caption)
    fields = {"subject": subject, "scene": "", "change": ""}
    return fields | (found.groupdict() if found else {"change": caption})


class _Marks(dict[str, str]):
    """Fills every field with a mark that occurs in no caption."""

    @staticmethod
    def mark(field: str) -> str:
        return f"\0{field}\0"

    def __missing__(self, field: str) -> str:
        return self.mark(field)


def positions(layout: Grid) -> list[str]:
    """Where each panel is, in reading order: left, right; top left, …; first, second, …"""
    if (layout.rows, layout.cols) in PLACES:
        return list(PLACES[layout.rows, layout.cols])
    if (layout.rows, layout.cols) == (2, 2):
        return ["top left", "top right", "bottom left", "bottom right"]
    if layout.rows == 1:
        return list(ORDINALS[: layout.cols])
    return [f"row {row}, column {col}" for row in range(1, layout.rows + 1) for col in range(1, layout.cols + 1)]


def grid_prompt(task: Task, layout: Grid, draft: Draft, rng: np.random.Generator) -> str:
    """The prompt of a draft's grid, in one of its own wordings, or of the layout's if it has none.

    {left}, {right} and {panels} tell what panels say beside what they share: for a task without {change}, their scenes.
    """
    told = [parts(task.panel_template, caption, draft.subject) for caption in draft.panels]
    own = [fields["change"] or fields["scene"] for fields in told]
    templates: Sequence[str] = draft.templates or layout.templates
    template = templates[int(rng.integers(len(templates)))]
    description = draft.description or article(draft.subject)
    items = [
        fill(
            layout.panel,
            number=str(number),
            position=position,
            subject=draft.subject,
            description=description,
            content=content,
        )
        for number, (position, content) in enumerate(zip(positions(layout), own, strict=True), 1)
    ]
    return fill(
        template,
        subject=draft.subject,
        description=description,
        scene=told[0]["scene"],
        left=own[0],
        right=own[-1],
        panels=". ".join(items),
        count=str(len(own)),
        style=draft.style or "in one style",
    )


def instruction(task: Task, subject: str, caption: str, rng: np.random.Generator) -> str:
    """What to ask for to get a panel with this caption from another one of its grid, from the task's templates."""
    fields = parts(task.panel_template, caption, subject)
    templates = task.captions.instruction_templates
    template = templates[int(rng.integers(len(templates)))]
    return fill(template, subject=subject, change=fields["change"] or fields["scene"] or caption).strip()


def asked(task: Task, change: str, scene: str = "", subject: str = "scene") -> str:
    """What a student of this task is told: the caption of the wished panel, or, where nobody says what the scene is,
    the task's first instruction."""
    if scene:
        return fill(task.panel_template, subject=subject, scene=scene, change=change)
    return fill(task.captions.instruction_templates[0], subject=subject, change=change)
