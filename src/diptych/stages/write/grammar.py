"""How a grid is put into words: drafts drawn from a grammar, and the task's templates that make prompts of them.

A grammar is a function from a grid's number and a generator to a `Draft`. Those of `GRAMMARS` speak in the pocket
world's words (`diptych.pocket.captions`), the only ones its teacher knows; a task names the one that draws it
(`grammar.pocket`). Teachers that know English get theirs from a vocabulary file (`vocabulary`).

Kinds and places come even by construction: in each run of as many grids as there are of them, each occurs once, in an
order of its own. So the first thousand grids of a run are as mixed as all of them.

A draft is filled into the task's templates: a panel's caption, the prompt of a whole grid, and the instruction that
turns one panel into another. A panel's caption follows its task's `panel_template`, so its parts can be read back from
it: "a cat on the moon" is subject "cat" and scene "on the moon".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from diptych.data.records import seed_of
from diptych.recipe.tasks import Grid

if TYPE_CHECKING:
    import numpy as np

    from diptych.pocket.world import Scene
    from diptych.recipe.tasks import Task


@dataclass(frozen=True)
class Draft:
    """A grid in words, as a writer returns it."""

    subject: str
    """Its kind, without an article."""
    panels: list[str]
    """The caption of each panel, as the task's `panel_template` has it: of the subject no more than its kind."""
    templates: Sequence[str] = ()
    """The wordings of a grid that the teacher knows, where they are not the task's."""
    description: str = ""
    """The individual, with its article: the same words for every panel are what makes a teacher draw it twice."""
    style: str = ""
    """What all panels are: "a watercolour illustration"."""


@dataclass(frozen=True)
class Turn:
    """Whose turn it is: a grid's number in its run, and the run's seed."""

    run_seed: int
    index: int

    def of(self, choices: Sequence[str], purpose: str) -> str:
        """The choice that has its turn: each once in every `len(choices)` grids."""
        import numpy as np

        block, place = divmod(self.index, len(choices))
        order = np.random.default_rng(seed_of(self.run_seed, f"{purpose}-{block}", "write")).permutation(len(choices))
        return choices[int(order[place])]


Grammar = Callable[[Turn, "np.random.Generator"], Draft | None]


def subject_grid(turn: Turn, rng: np.random.Generator) -> Draft | None:
    """One subject in two different places; None where a panel does not say its place, to be drawn again."""
    from diptych.pocket import captions, world

    kind = turn.of(world.TRAIN_KINDS, "kind")
    left = turn.of(world.PLACES, "left")
    right = turn.of(world.PLACES, "right")
    if right == left:  # a pair in one place teaches little, and has the weakest seam
        right = world.PLACES[
            (world.PLACES.index(left) + 1 + int(rng.integers(len(world.PLACES) - 1))) % len(world.PLACES)
        ]
    scenes = [_scene(rng, left), _scene(rng, right)]
    _, panels = captions.grid(kind, scenes[0], scenes[1], rng)
    named = all(_says(panel, scene.place) for panel, scene in zip(panels, scenes, strict=True))
    return Draft(_noun(kind, panels[0]), panels, captions.GRIDS) if named else None


def light_grid(turn: Turn, rng: np.random.Generator) -> Draft | None:
    """One scene under two lights."""
    from diptych.pocket import world

    kind = turn.of(world.TRAIN_KINDS, "kind")
    scene = _scene(rng, turn.of(world.PLACES, "left"))
    return _aligned(kind, scene, world.relight(rng, scene), rng)


def season_grid(turn: Turn, rng: np.random.Generator) -> Draft | None:
    """One outdoor scene in two weathers or seasons."""
    from diptych.pocket import world

    kind = turn.of(world.TRAIN_KINDS, "kind")
    scene = _scene(rng, turn.of([place for place in world.PLACES if place not in world.INDOOR], "left"))
    return _aligned(kind, scene, world.reseason(rng, scene), rng)


GRAMMARS: dict[str, Grammar] = {"subject": subject_grid, "relight": light_grid, "season": season_grid}


def _aligned(kind: str, scene: Scene, other: Scene, rng: np.random.Generator) -> Draft | None:
    """One scene twice, with its light or its weather changed; None where its place is not said."""
    from diptych.pocket import captions

    _, panels = captions.light_grid(kind, scene, other, rng)
    return Draft(_noun(kind, panels[0]), panels, captions.LIGHT_GRIDS) if _says(panels[0], scene.place) else None


def _scene(rng: np.random.Generator, place: str) -> Scene:
    """A scene at `place`: the world's own mixture of everything else."""
    from dataclasses import replace

    from diptych.pocket import world

    while True:
        scene = world.sample_scene(rng)
        # Only weather depends on the place, and only on whether it is out of doors.
        if (scene.place in world.INDOOR) == (place in world.INDOOR):
            return replace(scene, place=place)


def _says(caption: str, place: str) -> bool:
    from diptych.pocket import captions

    return any(phrase in caption for phrase in captions.PLACES[place])


def _noun(kind: str, caption: str) -> str:
    """What the caption calls its subject: its kind, or a generic noun."""
    from diptych.pocket import captions

    words = caption.split()
    return next(noun for noun in (kind, *captions.GENERIC) if noun in words)


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
