"""How a grid is described: drafts sampled from a grammar, and the task's templates that turn them into prompts.

A grammar is a function from a grid's number and a generator to a `Draft`. The grammars in `GRAMMARS` use the pocket
world's vocabulary (`diptych.pocket.captions`), the only one that its teacher understands; a task names its grammar in
`grammar.pocket`. Grammars for teachers that understand English come from a vocabulary file (`vocabulary`).

Kinds and places are evenly distributed. With N kinds, each N grids in a row have every kind once, in a random order. So
the first thousand grids of a run are as varied as all of them.

The task's templates use a draft for a panel's caption, the prompt of a whole grid, and the instruction that turns one
panel into another. A panel's caption follows its task's `panel_template`, so its parts can be recovered from it: "a cat
on the moon" has the subject "cat" and the scene "on the moon".
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
    """The description of a grid, as a writer returns it."""

    subject: str
    """The subject's kind, without an article."""
    panels: list[str]
    """The caption of each panel, in the form of the task's `panel_template`. It names only the subject's kind."""
    templates: Sequence[str] = ()
    """The grid templates that the teacher was trained on, if they are not the task's."""
    description: str = ""
    """The individual, with an article. The same words for every panel make a teacher generate it several times."""
    style: str = ""
    """The style of all panels, such as "a watercolour illustration"."""


@dataclass(frozen=True)
class Turn:
    """A position in the cycle of choices: a grid's number in its run, and the run's seed."""

    run_seed: int
    index: int

    def of(self, choices: Sequence[str], purpose: str) -> str:
        """Return the choice of this grid. Each choice occurs once in every `len(choices)` grids."""
        import numpy as np

        block, place = divmod(self.index, len(choices))
        order = np.random.default_rng(seed_of(self.run_seed, f"{purpose}-{block}", "write")).permutation(len(choices))
        return choices[int(order[place])]


Grammar = Callable[[Turn, "np.random.Generator"], Draft | None]


def subject_grid(turn: Turn, rng: np.random.Generator) -> Draft | None:
    """Sample one subject in two different places; None, to be repeated, if a panel's caption omits its place."""
    from diptych.pocket import captions, world

    kind = turn.of(world.TRAIN_KINDS, "kind")
    left = turn.of(world.PLACES, "left")
    right = turn.of(world.PLACES, "right")
    if right == left:  # a pair in one place is of little use for training, and has the weakest seam
        right = world.PLACES[
            (world.PLACES.index(left) + 1 + int(rng.integers(len(world.PLACES) - 1))) % len(world.PLACES)
        ]
    scenes = [_scene(rng, left), _scene(rng, right)]
    _, panels = captions.grid(kind, scenes[0], scenes[1], rng)
    named = all(_names_place(panel, scene.place) for panel, scene in zip(panels, scenes, strict=True))
    return Draft(_noun(kind, panels[0]), panels, captions.GRIDS) if named else None


def light_grid(turn: Turn, rng: np.random.Generator) -> Draft | None:
    """Sample one scene under two lights."""
    from diptych.pocket import world

    kind = turn.of(world.TRAIN_KINDS, "kind")
    scene = _scene(rng, turn.of(world.PLACES, "left"))
    return _aligned(kind, scene, world.relight(rng, scene), rng)


def season_grid(turn: Turn, rng: np.random.Generator) -> Draft | None:
    """Sample one outdoor scene in two weathers or seasons."""
    from diptych.pocket import world

    kind = turn.of(world.TRAIN_KINDS, "kind")
    scene = _scene(rng, turn.of([place for place in world.PLACES if place not in world.INDOOR], "left"))
    return _aligned(kind, scene, world.reseason(rng, scene), rng)


GRAMMARS: dict[str, Grammar] = {"subject": subject_grid, "relight": light_grid, "season": season_grid}


def _aligned(kind: str, scene: Scene, other: Scene, rng: np.random.Generator) -> Draft | None:
    """Return one scene twice, with its light or weather changed; None if its caption omits the place."""
    from diptych.pocket import captions

    _, panels = captions.light_grid(kind, scene, other, rng)
    return Draft(_noun(kind, panels[0]), panels, captions.LIGHT_GRIDS) if _names_place(panels[0], scene.place) else None


def _scene(rng: np.random.Generator, place: str) -> Scene:
    """Sample a scene at `place`, with the world's distribution of everything else."""
    from dataclasses import replace

    from diptych.pocket import world

    while True:
        scene = world.sample_scene(rng)
        # Only the weather depends on the place, and only on whether it is outdoors.
        if (scene.place in world.INDOOR) == (place in world.INDOOR):
            return replace(scene, place=place)


def _names_place(caption: str, place: str) -> bool:
    from diptych.pocket import captions

    return any(phrase in caption for phrase in captions.PLACES[place])


def _noun(kind: str, caption: str) -> str:
    """Return the caption's word for its subject: its kind, or a generic noun."""
    from diptych.pocket import captions

    words = caption.split()
    return next(noun for noun in (kind, *captions.GENERIC) if noun in words)


PLACES = {(1, 2): ("left", "right"), (1, 3): ("left", "middle", "right")}
ORDINALS = ("first", "second", "third", "fourth")
# "a unicorn", "a ukulele", "a European" begin with a vowel in spelling only.
_VOWEL = re.compile(r"(?!uni|uk|eu|one\b)[aeiou]", re.IGNORECASE)


def article(noun: str) -> str:
    """Return the noun with "a" or "an"."""
    return f"{'an' if _VOWEL.match(noun) else 'a'} {noun}"


def fill(template: str, **fields: str) -> str:
    """Return a template with its fields filled; "a {subject}" becomes "an owl" where needed."""
    if "subject" in fields:
        word = article(fields["subject"]).partition(" ")[0]
        template = re.sub(r"\ban?(?= \{subject\})", word, template)
    return template.format(**fields)


def styled(caption: str, style: str) -> str:
    """Return a panel's caption with its style: "a watercolour illustration of a cat on the moon"."""
    return f"{style} of {caption}" if style else caption


def parts(template: str, caption: str, subject: str) -> dict[str, str]:
    """Return the fields of a caption made from `template`, `styled` or not. A caption that does not fit is {change}."""
    pattern = re.escape(template.format_map(_Marks()))
    pattern = re.sub(rf"\ba(?=\\ {_Marks.mark('subject')})", "an?", pattern)
    for field in ("subject", "scene", "change"):
        group = re.escape(subject) if field == "subject" else ".*"
        pattern = pattern.replace(re.escape(_Marks.mark(field)), f"(?P<{field}>{group})", 1)
    match = re.fullmatch(pattern, caption) or re.fullmatch(f".+? of {pattern}", caption)
    fields = {"subject": subject, "scene": "", "change": ""}
    return fields | (match.groupdict() if match else {"change": caption})


class _Marks(dict[str, str]):
    """Fills every field with a mark that occurs in no caption."""

    @staticmethod
    def mark(field: str) -> str:
        return f"\0{field}\0"

    def __missing__(self, field: str) -> str:
        return self.mark(field)


def positions(layout: Grid) -> list[str]:
    """Return the position of each panel in reading order: left, right; top left, …; first, second, …"""
    if (layout.rows, layout.cols) in PLACES:
        return list(PLACES[layout.rows, layout.cols])
    if (layout.rows, layout.cols) == (2, 2):
        return ["top left", "top right", "bottom left", "bottom right"]
    if layout.rows == 1:
        return list(ORDINALS[: layout.cols])
    return [f"row {row}, column {col}" for row in range(1, layout.rows + 1) for col in range(1, layout.cols + 1)]


def grid_prompt(task: Task, layout: Grid, draft: Draft, rng: np.random.Generator) -> str:
    """Return the prompt of a draft's grid, from one of the draft's templates, or the layout's if it has none.

    {left}, {right} and {panels} have what differs between the panels: for a task without {change}, their scenes.
    """
    captions = [parts(task.panel_template, caption, draft.subject) for caption in draft.panels]
    contents = [fields["change"] or fields["scene"] for fields in captions]
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
        for number, (position, content) in enumerate(zip(positions(layout), contents, strict=True), 1)
    ]
    return fill(
        template,
        subject=draft.subject,
        description=description,
        scene=captions[0]["scene"],
        left=contents[0],
        right=contents[-1],
        panels=". ".join(items),
        count=str(len(contents)),
        style=draft.style or "in one style",
    )


def instruction(task: Task, subject: str, caption: str, rng: np.random.Generator) -> str:
    """Return the instruction that turns another panel of the grid into one with this caption, by a task's template."""
    fields = parts(task.panel_template, caption, subject)
    templates = task.captions.instruction_templates
    template = templates[int(rng.integers(len(templates)))]
    return fill(template, subject=subject, change=fields["change"] or fields["scene"] or caption).strip()


def student_prompt(task: Task, change: str, scene: str = "", subject: str = "scene") -> str:
    """Return the prompt of a student of this task: the caption of the target, or the first instruction template if the
    scene is not described."""
    if scene:
        return fill(task.panel_template, subject=subject, scene=scene, change=change)
    return fill(task.captions.instruction_templates[0], subject=subject, change=change)
