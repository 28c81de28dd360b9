"""Suites: references × prompts by difficulty. A suite is a versioned YAML file.

Suites with a `layout` use images in a folder (`images.py`). The others use subjects of the pocket world, whose truth is
known. A suite gives samples (`samples`), each with a reference image, a prompt, and the attributes that the prompt
names. The pocket suite renders its references, so it can also render the true image (`truth`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from diptych.data import records
from diptych.errors import UsageError, nearest
from diptych.utils import documents
from diptych.utils.io import sha256

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    from diptych.pocket.world import Identity, Scene

Split = Literal["identities", "kinds"]
MAIN: Split = "identities"
PURPOSES = {"suite": 0, "calibration": 1, "check": 2}  # independent streams of the suite's namespace
SPLITS = {"identities": 0, "kinds": 1}
WORDINGS = 32  # of these, a grid prompt takes the shortest


_Model = TypeVar("_Model", bound=BaseModel)


class Part(BaseModel):
    """A part of a suite's file: immutable, without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class SplitSpec(Part):
    """The subjects of a split: their kinds, the noun for them, and their number as a share of the samples."""

    kinds: Literal["train", "held_out"]
    noun: Literal["kind", "generic"]
    share: float = Field(gt=0, le=1)


class ReferenceScene(Part):
    """The fixed attributes of a reference's scene."""

    pose: str
    framing: str
    prop: str
    weather: str
    colour: str
    intensity: str


class Level(Part):
    """A difficulty: the attributes that its prompts name."""

    name: str
    asks: tuple[Literal["place", "light", "colour", "pose", "prop", "weather"], ...] = Field(min_length=1)


class Calibration(Part):
    """The number of identities whose renders fix the scores' scale, by split."""

    identities: int = Field(ge=2)
    kinds: int = Field(ge=2)


class Prior(Part):
    """How often a simulated grid shows one subject, a drifted one, or another."""

    same: float = Field(gt=0)
    drifted: float = Field(ge=0)
    other: float = Field(ge=0)

    @model_validator(mode="after")
    def _whole(self) -> Prior:
        if abs(self.same + self.drifted + self.other - 1) > 1e-9 or self.same == 1:
            raise ValueError("same + drifted + other must be 1, and same must be below 1")
        return self


class Check(Part):
    """The renders for measuring judges and curation; `blur` is a radius in pixels."""

    identities: int = Field(ge=2)
    prior: Prior
    blur: float = Field(ge=0)


@dataclass(frozen=True)
class Sample:
    """One reference and one prompt. `asked` maps attribute groups of the reader to the values that the prompt names."""

    id: str
    split: Split
    identity: int  # number of the reference within its split, which the bootstrap resamples
    kind: str
    level: str
    prompt: str
    grid_prompt: str  # the same request as a 1×2 grid: reference left, target right
    asked: dict[str, str]
    subject: str = ""  # noun for the reference in prompts, for methods that need a class word


@dataclass(frozen=True)
class Known:
    """A subject, the scene of its reference, and the scene of a prompt."""

    subject: Identity
    reference: Scene
    target: Scene


class Suite(Part):
    """A suite of the pocket world."""

    name: str
    version: int = Field(ge=1)
    namespace: int = Field(ge=2**20)  # training seeds are small numbers
    splits: dict[Split, SplitSpec]
    reference: ReferenceScene
    levels: tuple[Level, ...] = Field(min_length=1)
    calibration: Calibration
    check: Check

    def fingerprint(self) -> str:
        """sha256 over the suite's file."""
        return sha256(self.model_dump_json())

    def samples(self, identities: int, prompts: int) -> list[Sample]:
        """References × prompts: `identities` of the main split and each other split's share of them (at least 2)."""
        return [
            self._sample(split, i, j, prompts)
            for split, count in self.references(identities).items()
            for i in range(count)
            for j in range(prompts)
        ]

    def references(self, identities: int) -> dict[Split, int]:
        """The number of references of each split."""
        return {split: max(2, round(identities * spec.share)) for split, spec in self.splits.items()}

    def level(self, prompt: int, prompts: int) -> Level:
        """The difficulty of prompt number `prompt` of `prompts`: evenly spaced over the levels, easiest first."""
        return self.levels[int((prompt + 0.5) * len(self.levels) / prompts) % len(self.levels)]

    def _sample(self, split: Split, identity: int, prompt: int, prompts: int) -> Sample:
        from diptych.pocket import captions

        level = self.level(prompt, prompts)
        known = self.known(split, identity, level, prompt)
        rng = self.rng("suite", split, identity, 2, prompt)
        noun = known.subject.kind if self.splits[split].noun == "kind" else captions.GENERIC[rng.integers(3)]
        say = {name: float(name in level.asks) for name in ("place", "light", "pose", "prop", "weather")}
        request = captions.details(known.target, rng, say | {"framing": 0.0})
        return Sample(
            id=f"{split[0]}{identity:03d}-{prompt}",
            split=split,
            identity=identity,
            kind=known.subject.kind,
            level=level.name,
            prompt=f"a {noun} {request}",
            grid_prompt=_grid_prompt(noun, known, say | {"framing": 0.0}, rng),
            asked={group: _value(known.target, group) for group in level.asks},
            subject=noun,
        )

    def rng(self, purpose: str, split: Split, *numbers: int) -> np.random.Generator:
        """A generator of this suite's namespace, which nothing else in diptych uses."""
        import numpy as np

        return np.random.default_rng([self.namespace, PURPOSES[purpose], SPLITS[split], *numbers])

    def subject(self, purpose: str, split: Split, identity: int) -> Identity:
        """Subject number `identity`; kinds take turns."""
        from diptych.pocket import world

        kinds = world.TRAIN_KINDS if self.splits[split].kinds == "train" else world.HELD_OUT_KINDS
        return world.sample_identity(self.rng(purpose, split, identity, 0), kinds[identity % len(kinds)])

    def known(self, split: Split, identity: int, level: Level, prompt: int = 0, purpose: str = "suite") -> Known:
        """A subject with the scene of its reference and a scene that prompts of `level` describe."""
        from diptych.pocket import world

        subject = self.subject(purpose, split, identity)
        fixed = self.reference
        scene = world.sample_scene(self.rng(purpose, split, identity, 1))
        light = replace(scene.light, colour=fixed.colour, intensity=fixed.intensity)
        plain = {"pose": fixed.pose, "framing": fixed.framing, "prop": fixed.prop, "weather": fixed.weather}
        reference = replace(scene, light=light, **plain)
        target = _target(self.rng(purpose, split, identity, 3, prompt), reference, level)
        return Known(subject, reference, target)

    def of(self, sample: Sample) -> Known:
        """The subject and scenes of a sample."""
        level = next(level for level in self.levels if level.name == sample.level)
        return self.known(sample.split, sample.identity, level, int(sample.id.rpartition("-")[2]))

    def reference_image(self, sample: Sample) -> Image:
        """The reference of a sample."""
        known = self.of(sample)
        return render(known.subject, known.reference)

    def truth(self, sample: Sample) -> Image:
        """A perfect image for a sample (one of many)."""
        known = self.of(sample)
        return render(known.subject, known.target)

    def other(self, sample: Sample) -> Image:
        """The scene of the prompt with another subject of the kind: it follows the prompt and ignores the reference."""
        from diptych.pocket import world

        known = self.of(sample)
        rng = self.rng("suite", sample.split, sample.identity, 4)
        return render(world.sample_identity(rng, known.subject.kind), known.target)

    def traits(self, split: Split, identity: int) -> dict[str, str]:
        """The named traits of a subject."""
        from diptych.pocket import world

        return world.traits(self.subject("suite", split, identity))

    def rivals(self, split: Split, identity: int, count: int) -> list[Image]:
        """`count` other subjects of the kind, in the scene of the reference: only the subject distinguishes them."""
        from diptych.pocket import world

        known = self.known(split, identity, self.levels[0])
        rng = self.rng("suite", split, identity, 5)
        return [render(world.sample_identity(rng, known.subject.kind), known.reference) for _ in range(count)]


def seed_of(sample_id: str, seed: int) -> int:
    """The noise seed of a sample, equal for every method, so that comparisons are paired."""
    return records.seed_of(seed, sample_id, "evaluate")


@cache
def render(subject: Identity, scene: Scene) -> Image:
    """`pocket.render` as a PIL image, cached in this process."""
    from PIL import Image

    from diptych.pocket import render as renderer

    return Image.fromarray(renderer.render(subject, scene))


def _grid_prompt(noun: str, known: Known, say: dict[str, float], rng: np.random.Generator) -> str:
    """The prompt of a grid in few words. If it is too long, the left scene, which `inpaint` sets to the reference, is
    left out: a truncated prompt would be unfair to that baseline."""
    from diptych.pocket import captions

    place = {"place": 1.0, "pose": 0.0, "light": 0.0, "framing": 0.0}
    left, right = (
        min((captions.details(scene, rng, named) for _ in range(WORDINGS)), key=captions.count_words)
        for scene, named in ((known.reference, place), (known.target, say))
    )
    prompt = captions.GRIDS[2].format(subject=noun, left=left, right=right)
    fits = captions.count_words(prompt) <= captions.LONGEST
    return prompt if fits else captions.GRIDS[2].format(subject=noun, left="", right=right)


def _value(scene: Scene, group: str) -> str:
    if group == "light":
        return scene.light.direction
    if group == "colour":
        return scene.light.colour
    return getattr(scene, group)


def _target(rng: np.random.Generator, reference: Scene, level: Level) -> Scene:
    """Another place, with the attributes of `level` changed and the others as in the reference."""
    from diptych.pocket import world

    asks = set(level.asks)

    def another(options: Any, *excluded: str) -> str:
        left = [option for option in options if option not in excluded]
        return left[int(rng.integers(len(left)))]

    scene = world.sample_scene(rng)
    outdoor = world.INDOOR if "weather" in asks else ()
    light = scene.light
    direction = another(world.DIRECTIONS, reference.light.direction)
    while light.direction != direction:
        light = world.sample_light(rng)
    colour = another(world.LIGHT_COLOURS, reference.light.colour) if "colour" in asks else reference.light.colour
    return replace(
        scene,
        place=another(world.PLACES, reference.place, *outdoor),
        light=replace(light, colour=colour, intensity=reference.light.intensity),
        pose=another(world.POSES, reference.pose) if "pose" in asks else reference.pose,
        prop=another(world.PROPS, reference.prop) if "prop" in asks else reference.prop,
        weather=another(world.WEATHERS, reference.weather) if "weather" in asks else reference.weather,
        framing=reference.framing,
    )


def names() -> list[str]:
    """The suites that ship with diptych."""
    return sorted(path.stem for path in (Path(__file__).parent).glob("*.yaml"))


def load(name: str) -> Suite:
    """A suite of the pocket world by name, or from a YAML file. UsageError if it is unknown or invalid."""
    return check(Suite, read(name), name)


def read(name: str) -> dict[str, Any]:
    """The content of a suite's file, by name or path. UsageError if it does not exist or is not YAML."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else Path(__file__).parent / f"{name}.yaml"
    if not path.is_file():
        hint = nearest(name, names())
        raise UsageError("name_unknown", f"Unknown suite '{name}'. Known suites: {', '.join(names())}{hint}")
    values = documents.parse_yaml(documents.read_text(path), str(path))
    if not isinstance(values, dict):
        raise UsageError("suite_invalid", f"{path}: a suite's file has `key: value` lines, but this file does not.")
    return values


def check(kind: type[_Model], values: dict[str, Any], where: str) -> _Model:
    """Validates plain values as a `kind` of suite. UsageError names the first wrong key."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise UsageError("suite_invalid", f"{where}: {documents.first(error, kind.model_fields)}") from error
