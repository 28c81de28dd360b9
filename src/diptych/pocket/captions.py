"""Says what a scene shows, in plain English with varied wording: the kind and the scene, never the identity.

The same vocabulary makes the captions the pocket models train on and the prompts the grammar writer writes, so
`WORDS` is all the pocket models know.
"""

import re
from dataclasses import replace

import numpy as np

from . import world
from .world import Scene

GENERIC = ("character", "creature", "friend")
"""Nouns that name no kind: how a subject of an unknown kind is called."""
PLACES = {
    "meadow": ("in a meadow", "on a meadow"),
    "beach": ("on the beach", "by the sea"),
    "forest": ("in a forest", "among trees"),
    "desert": ("in the desert", "on desert sand"),
    "city": ("in the city", "on a city street"),
    "mountains": ("in the mountains", "below snowy mountains"),
    "seabed": ("under water", "on the seabed"),
    "moon": ("on the moon", "in space"),
    "kitchen": ("in a kitchen", "in the kitchen"),
    "library": ("in a library", "among books"),
    "cave": ("in a cave", "in a dark cave"),
    "castle": ("at a castle", "by a castle"),
}
POSES = {
    "standing": ("standing", "standing still"),
    "jumping": ("jumping", "leaping"),
    "leaning": ("leaning", "leaning over"),
    "sleeping": ("sleeping", "fast asleep"),
    "upside down": ("upside down", "on its head"),
}
FRAMINGS = {"close": ("close-up",), "medium": ("medium shot",), "wide": ("wide shot", "seen from afar")}
PROPS = {
    "ball": ("with a ball", "next to a ball"),
    "balloon": ("with a balloon", "next to a balloon"),
    "flower": ("with a flower", "next to a flower"),
    "umbrella": ("with an umbrella", "next to an umbrella"),
    "book": ("with a book", "next to a book"),
    "cake": ("with a cake", "next to a cake"),
    "lamp": ("with a lamp", "next to a lamp"),
}
WEATHERS = {
    "rain": ("in the rain", "on a rainy day"),
    "fog": ("in the fog", "on a foggy day"),
    "snow": ("in the snow", "in winter"),
    "autumn": ("in autumn", "among falling leaves"),
    "spring": ("in spring", "among falling blossom"),
    "clear": ("on a clear day", "in summer"),
}
DIRECTIONS = {"left": "from the left", "right": "from the right", "above": "from above", "behind": "from behind"}
GRIDS = (
    "two panels of the same {subject}. left: {left}. right: {right}",
    "a grid of the same {subject}. left: {left}. right: {right}",
    "two images, one {subject}. left: {left}. right: {right}",
)
"""Wordings for a 1×2 grid of one subject in two scenes: the paper's idea in few words, for a short text encoder."""
LIGHT_GRIDS = (
    "one scene in two lights: {scene}. left: {left}. right: {right}",
    "two panels, different light: {scene}. left: {left}. right: {right}",
)
"""Wordings for an aligned 1×2 grid of one scene under two lights."""
MASK = 0.2
LONGEST = 31
"""Words and marks of a prompt, at most: what the pocket's text encoders have room for, beside their end mark."""


def _pick(rng: np.random.Generator, options) -> str:
    return options[int(rng.integers(len(options)))]


def describe_light(light: world.Light) -> str:
    """For example "soft golden light from the left"."""
    return f"{light.intensity} {light.colour} light {DIRECTIONS[light.direction]}"


def details(scene: Scene, rng: np.random.Generator, say: dict[str, float] | None = None) -> str:
    """Everything said of a scene but its subject. `say` is the chance of naming each attribute; what is not said is
    free."""
    chance = {"place": 0.95, "pose": 0.85, "weather": 0.9, "prop": 0.95, "light": 0.75, "framing": 0.4} | (say or {})
    told = {name: rng.random() < p for name, p in chance.items()}
    parts = []
    if told["pose"] and (scene.pose != "standing" or rng.random() < 0.6):
        parts.append(_pick(rng, POSES[scene.pose]))
    if told["place"]:
        parts.append(_pick(rng, PLACES[scene.place]))
    if scene.weather != "clear" and told["weather"]:
        parts.append(_pick(rng, WEATHERS[scene.weather]))
    if scene.prop != "none" and told["prop"]:
        parts.append(_pick(rng, PROPS[scene.prop]))
    first = " ".join(parts)
    rest = []
    if told["light"]:
        rest.append(describe_light(scene.light))
    if told["framing"]:
        rest.append(_pick(rng, FRAMINGS[scene.framing]))
    return ", ".join(part for part in (first, *rest) if part)


def noun(kind: str, rng: np.random.Generator) -> str:
    """The kind's name, now and then a generic noun; always generic for kinds the models never saw."""
    if kind in world.HELD_OUT_KINDS or rng.random() < MASK:
        return _pick(rng, GENERIC)
    return kind


def caption(kind: str, scene: Scene, rng: np.random.Generator, say: dict[str, float] | None = None) -> str:
    """One panel in one sentence: "a cat jumping on the beach with a ball, soft golden light from the left"."""
    article = _pick(rng, ("a", "the", "one"))
    return f"{article} {noun(kind, rng)} {details(scene, rng, say)}".strip()


def grid(kind: str, left: Scene, right: Scene, rng: np.random.Generator) -> tuple[str, list[str]]:
    """A 1×2 grid of one subject in two scenes: its prompt, and the caption of each panel in the same words."""
    say = {"framing": 0.15, "light": 0.5, "pose": 0.7}
    subject, told = noun(kind, rng), [details(scene, rng, say) for scene in (left, right)]
    prompt = _pick(rng, GRIDS).format(subject=subject, left=told[0], right=told[1])
    return prompt, [f"a {subject} {words}".strip() for words in told]


def light_grid(kind: str, left: Scene, right: Scene, rng: np.random.Generator) -> tuple[str, list[str]]:
    """An aligned 1×2 grid of one scene in which only the light (or the season) changes: its prompt, and the caption
    of each panel."""
    scene = caption(kind, replace(left, weather="clear"), rng, {"light": 0.0, "framing": 0.1, "pose": 0.6, "prop": 0.7})
    if left.weather != right.weather:
        told = [_pick(rng, WEATHERS[left.weather]), _pick(rng, WEATHERS[right.weather])]
    else:
        told = [describe_light(left.light), describe_light(right.light)]
    return _pick(rng, LIGHT_GRIDS).format(scene=scene, left=told[0], right=told[1]), [
        f"{scene}, {words}" for words in told
    ]


def _every_word() -> tuple[str, ...]:
    texts = [
        *world.TRAIN_KINDS,
        *GENERIC,
        "a the one an",
        *DIRECTIONS.values(),
        *world.LIGHT_COLOURS,
        *world.INTENSITIES,
        "light",
        *GRIDS,
        *LIGHT_GRIDS,
    ]
    for table in (PLACES, POSES, FRAMINGS, PROPS, WEATHERS):
        texts += [phrase for phrases in table.values() for phrase in phrases]
    plain = re.sub(r"\{\w+\}", " ", " ".join(texts))
    return tuple(sorted(set(re.findall(r"[a-z0-9-]+", plain.lower()))))


WORDS = _every_word()


def count_words(text: str) -> int:
    """Words and marks: the tokens of the pocket's text encoders, without the end mark."""
    return len(re.findall(r"[\w-]+|[^\w\s]", text))


def unknown_words(text: str) -> list[str]:
    """The words of `text` that the pocket models never saw, in order, each once."""
    seen = dict.fromkeys(re.findall(r"[a-z0-9-]+", text.lower()))
    return [word for word in seen if word not in WORDS]
