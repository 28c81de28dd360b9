"""Grammars: what a grid shows, drawn from words, for a writer that needs no language model.

A grammar is a function from a grid's number and a generator to a `Draft`. Those of `GRAMMARS` speak in the pocket
world's words (`diptych.pocket.captions`), the only ones its teacher knows; a task names the one that draws it
(`grammar.pocket`). Teachers that know English get theirs from a vocabulary file (`compose`).

Kinds and places come even by construction: in each run of as many grids as there are of them, each occurs once, in an
order of its own. So the first thousand grids of a run are as mixed as all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from diptych.data.records import seed_of

if TYPE_CHECKING:
    import numpy as np

    from diptych.pocket.world import Scene


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
