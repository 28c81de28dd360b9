"""A task's templates, filled: the prompt of a whole grid, and the instruction that turns one panel into another.

A panel's caption follows its task's `panel_template`, so its parts can be read back from it: "a cat on the moon" is
subject "cat" and scene "on the moon".
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from diptych.tasks import Grid, Task


def parts(template: str, caption: str, subject: str) -> dict[str, str]:
    """The fields of a caption that was made from `template`; what does not fit is all {change}."""
    pattern = re.escape(template.format_map(_Marks()))
    for field in ("subject", "scene", "change"):
        group = re.escape(subject) if field == "subject" else ".*"
        pattern = pattern.replace(re.escape(_Marks.mark(field)), f"(?P<{field}>{group})", 1)
    found = re.fullmatch(pattern, caption)
    fields = {"subject": subject, "scene": "", "change": ""}
    return fields | (found.groupdict() if found else {"change": caption})


class _Marks(dict[str, str]):
    """Fills every field with a mark that occurs in no caption."""

    @staticmethod
    def mark(field: str) -> str:
        return f"\0{field}\0"

    def __missing__(self, field: str) -> str:
        return self.mark(field)


def grid_prompt(task: Task, layout: Grid, subject: str, captions: list[str], rng: np.random.Generator) -> str:
    """The prompt of a grid with these panels, in one of its layout's wordings.

    {left} and {right} are what the two panels say beside what they share: for a task without {change}, their scenes.
    """
    told = [parts(task.panel_template, caption, subject) for caption in captions]
    own = [fields["change"] or fields["scene"] for fields in told]
    template = layout.templates[int(rng.integers(len(layout.templates)))]
    numbered = ". ".join(f"{number}: {text}" for number, text in enumerate(own, 1))
    return template.format(
        subject=subject, scene=told[0]["scene"], left=own[0], right=own[-1], panels=numbered, count=len(own)
    )


def instruction(task: Task, subject: str, caption: str, rng: np.random.Generator) -> str:
    """What to ask for to get a panel with this caption from another one of its grid, from the task's templates."""
    fields = parts(task.panel_template, caption, subject)
    templates = task.captions.instruction_templates
    template = templates[int(rng.integers(len(templates)))]
    return template.format(subject=subject, change=fields["change"] or fields["scene"] or caption).strip()
