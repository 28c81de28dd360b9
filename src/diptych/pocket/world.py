"""Identities and scenes of the pocket world.

An *identity* is a kind with continuous and categorical attributes (palette, shape, pattern, face, accessory). Text
names the kind and never the rest, so only a reference image identifies an individual. A *scene* is everything else:
place, light, pose, framing, prop and weather, all of which text can describe. Both are frozen dataclasses, sampled from
a `numpy` generator, so the truth about every render is known.
"""

import colorsys
from dataclasses import dataclass, replace

import numpy as np

PANEL = 64
"""Side of a panel in pixels."""

KINDS = ("blob", "cat", "robot", "bird", "fish", "mushroom", "teapot", "car", "house", "cactus", "snail", "rocket")
HELD_OUT_KINDS = ("teapot", "snail")
"""Kinds that are not in the training of teacher, student or judges."""
TRAIN_KINDS = tuple(kind for kind in KINDS if kind not in HELD_OUT_KINDS)

PLACES = (
    "meadow", "beach", "forest", "desert", "city", "mountains", "seabed", "moon", "kitchen", "library", "cave", "castle"
)  # fmt: skip
INDOOR = ("kitchen", "library", "cave", "seabed", "moon")
"""Places without weather."""
WEATHERS = ("clear", "rain", "fog", "snow", "autumn", "spring")
POSES = ("standing", "jumping", "leaning", "sleeping", "upside down")
FRAMINGS = ("close", "medium", "wide")
PROPS = ("none", "ball", "balloon", "flower", "umbrella", "book", "cake", "lamp")
DIRECTIONS = ("left", "right", "above", "behind")
LIGHT_COLOURS = {
    "white": (1.0, 1.0, 1.0),
    "golden": (1.12, 0.9, 0.6),
    "blue": (0.6, 0.8, 1.15),
    "pink": (1.12, 0.7, 0.94),
    "green": (0.66, 1.08, 0.7),
}
INTENSITIES = {"bright": 1.16, "soft": 0.96, "dim": 0.72}

PATTERNS = ("plain", "spots", "stripes", "belly", "half", "checks", "patch")
ACCESSORIES = ("none", "hat", "cap", "bow", "antenna", "scarf", "glasses", "crown", "sprout")
MOUTHS = ("smile", "open", "flat", "fang", "small")


@dataclass(frozen=True)
class Identity:
    """An individual. Colors are RGB in 0..1; the other numbers are fractions that `draw.py` scales."""

    kind: str
    body: tuple[float, float, float]
    second: tuple[float, float, float]
    accent: tuple[float, float, float]
    width: float
    height: float
    roundness: float
    limb: float
    pattern: str
    pattern_scale: float
    pattern_angle: float
    eyes: int
    eye_size: float
    eye_gap: float
    mouth: str
    accessory: str
    marks: float


SECONDS = ("none", "pale", "dark", "red", "yellow", "green", "cyan", "blue", "magenta")
"""Names of the second color. `none`: the subject has no pattern that would show it."""
TRAITS = {"pattern": PATTERNS, "second": SECONDS, "accessory": ACCESSORIES, "eyes": ("1", "2", "3")}
"""What distinguishes subjects of one kind and can be named, with its values. No caption names it."""


def traits(identity: Identity) -> dict[str, str]:
    """The value of each of `TRAITS`."""
    hue, saturation, value = colorsys.rgb_to_hsv(*identity.second)
    second = SECONDS[3 + round(hue * 6) % 6] if saturation > 0.3 else "pale"
    second = "none" if identity.pattern == "plain" else "dark" if value < 0.5 else second
    return {
        "pattern": identity.pattern,
        "second": second,
        "accessory": identity.accessory,
        "eyes": str(identity.eyes),
    }


@dataclass(frozen=True)
class Light:
    """Direction, color and strength of the light. `azimuth` and `elevation` are in degrees; azimuth 0° is from the
    right, 180° from the left."""

    direction: str = "above"
    colour: str = "white"
    intensity: str = "bright"
    azimuth: float = 90.0
    elevation: float = 70.0


@dataclass(frozen=True)
class Scene:
    """Everything in an image except the subject's identity. `x` is the subject's center as a fraction of the width;
    `layout` seeds the details of the place."""

    place: str = "meadow"
    light: Light = Light()
    pose: str = "standing"
    framing: str = "medium"
    prop: str = "none"
    weather: str = "clear"
    x: float = 0.5
    facing: int = 1
    tilt: float = 0.0
    layout: int = 0


def _vivid(rng: np.random.Generator, hue: float) -> tuple[float, float, float]:
    return colorsys.hsv_to_rgb(hue % 1.0, rng.uniform(0.6, 0.9), rng.uniform(0.75, 1.0))


def _second(rng: np.random.Generator, hue: float) -> tuple[float, float, float]:
    """The color of a pattern on a body of `hue`: contrasting, pale or dark."""
    scheme = choice(rng, ("contrast", "pale", "dark"), (5, 4, 1))
    if scheme == "contrast":
        return _vivid(rng, hue + rng.uniform(0.33, 0.67))
    saturation, value = (rng.uniform(0.05, 0.25), rng.uniform(0.92, 1.0)) if scheme == "pale" else (0.8, 0.4)
    return colorsys.hsv_to_rgb((hue + rng.uniform(-0.05, 0.05)) % 1.0, saturation, value)


def choice(rng: np.random.Generator, options, weights=None):
    """One of the options at random, with equal probability or by `weights`."""
    if weights is None:
        return options[int(rng.integers(len(options)))]
    weights = np.asarray(weights, dtype=float)
    return options[int(rng.choice(len(options), p=weights / weights.sum()))]


def sample_identity(
    rng: np.random.Generator, kind: str | None = None, kinds: tuple[str, ...] = TRAIN_KINDS
) -> Identity:
    """A random subject of `kind`, or of any of `kinds`. Attributes that a small panel can show are more frequent."""
    hue = rng.random()

    def middling() -> float:
        return float(rng.beta(2, 2))

    return Identity(
        kind=kind or choice(rng, kinds),
        body=_vivid(rng, hue),
        second=_second(rng, hue),
        accent=_vivid(rng, hue + rng.uniform(0.4, 0.6)),
        width=middling(),
        height=middling(),
        roundness=middling(),
        limb=middling(),
        pattern=choice(rng, PATTERNS, (2.5, 2, 3, 2, 3, 1, 1)),
        pattern_scale=rng.uniform(0.7, 1.0),
        pattern_angle=(90.0 * rng.integers(2) + rng.uniform(-12, 12)) % 180.0,
        eyes=choice(rng, (1, 2, 3), (2, 8, 1)),
        eye_size=rng.uniform(0.4, 1.0),
        eye_gap=middling(),
        mouth=choice(rng, MOUTHS),
        accessory=choice(rng, ACCESSORIES, (4, 1, 1, 1, 1, 1, 1, 1, 1)),
        marks=middling(),
    )


DRIFTS = (
    ("body",),
    ("second", "pattern", "pattern_scale", "pattern_angle"),
    ("accessory", "accent"),
    ("width", "height", "roundness", "limb", "eyes", "eye_size", "mouth"),
)
"""Groups of attributes that drift together."""


def drift(rng: np.random.Generator, identity: Identity, groups: int | None = None) -> Identity:
    """The identity with `groups` of its attribute groups sampled again (default: at least two), the way a teacher's
    panels visibly disagree."""
    groups = groups or int(rng.integers(2, len(DRIFTS) + 1))
    other = sample_identity(rng, kind=identity.kind)
    chosen = rng.choice(len(DRIFTS), size=min(groups, len(DRIFTS)), replace=False)
    fields = {name: getattr(other, name) for index in chosen for name in DRIFTS[index]}
    return replace(identity, **fields)


def sample_light(rng: np.random.Generator) -> Light:
    """A random light. Light from above, white light and bright light are the most frequent."""
    direction = choice(rng, DIRECTIONS, (2, 2, 3, 1))
    center = {"left": 180.0, "right": 0.0, "above": 90.0, "behind": 90.0}[direction]
    elevation = {"left": 32.0, "right": 32.0, "above": 75.0, "behind": 30.0}[direction]
    return Light(
        direction=direction,
        colour=choice(rng, tuple(LIGHT_COLOURS), (6, 1.5, 1.5, 1, 1)),
        intensity=choice(rng, tuple(INTENSITIES), (6, 2, 1)),
        azimuth=center + rng.uniform(-15, 15),
        elevation=elevation + rng.uniform(-10, 10),
    )


def sample_scene(rng: np.random.Generator) -> Scene:
    """A random scene; indoor scenes have no weather."""
    place = choice(rng, PLACES)
    return Scene(
        place=place,
        light=sample_light(rng),
        pose=choice(rng, POSES, (10, 2, 1, 1, 0.5)),
        framing=choice(rng, FRAMINGS, (6, 3, 0.5)),
        prop=choice(rng, PROPS, (14, 1, 1, 1, 1, 1, 1, 1)),
        weather="clear" if place in INDOOR else choice(rng, WEATHERS, (8, 1, 1, 1, 1, 1)),
        x=float(rng.uniform(0.46, 0.54)),
        facing=int(rng.choice([-1, 1], p=[0.15, 0.85])),
        tilt=float(rng.uniform(-3, 3)),
        layout=int(rng.integers(2**31)),
    )


def relight(rng: np.random.Generator, scene: Scene) -> Scene:
    """The same scene under another light."""
    before = scene.light
    while True:
        light = sample_light(rng)
        if replace(light, azimuth=before.azimuth, elevation=before.elevation) != before:
            return replace(scene, light=light)


def reseason(rng: np.random.Generator, scene: Scene) -> Scene:
    """The same outdoor scene in another weather or season. ValueError for an indoor scene."""
    if scene.place in INDOOR:
        raise ValueError(f"{scene.place!r} has no weather; choose an outdoor scene")
    return replace(scene, weather=choice(rng, tuple(weather for weather in WEATHERS if weather != scene.weather)))
