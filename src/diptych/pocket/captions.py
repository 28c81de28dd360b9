"""Captions of scenes in plain English with varied wording. They name the kind and the scene, never the identity.

The training captions of the pocket models and the prompts of the grammar writer share one vocabulary, `WORDS`.
"""

import re
from dataclasses import replace

import numpy as np

from . import world
from .world import Scene, choice

GENERIC = ("character", "creature", "friend")
"""Generic nouns, for subjects of a kind that the models do not know."""
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
"""Wordings for a 1×2 grid of one subject in two scenes, short enough for the pocket's text encoders."""
LIGHT_GRIDS = (
    "one scene in two lights: {scene}. left: {left}. right: {right}",
    "two panels, different light: {scene}. left: {left}. right: {right}",
)
"""Wordings for an aligned 1×2 grid of one scene under two lights."""
MASK = 0.2
"""Probability of a generic noun in place of the kind."""
LONGEST = 31
"""Limit of words and marks in a prompt: the length of the pocket's text encoders without their end mark."""


def describe_light(light: world.Light) -> str:
    """For example "soft golden light from the left"."""
    return f"{light.intensity} {light.colour} light {DIRECTIONS[light.direction]}"


def details(scene: Scene, rng: np.random.Generator, say: dict[str, float] | None = None) -> str:
    """Describes a scene without its subject. `say` is the probability of naming each attribute."""
    chance = {"place": 0.95, "pose": 0.85, "weather": 0.9, "prop": 0.95, "light": 0.75, "framing": 0.4} | (say or {})
    named = {name: rng.random() < p for name, p in chance.items()}
    parts = []
    if named["pose"] and (scene.pose != "standing" or rng.random() < 0.6):
        parts.append(choice(rng, POSES[scene.pose]))
    if named["place"]:
        parts.append(choice(rng, PLACES[scene.place]))
    if scene.weather != "clear" and named["weather"]:
        parts.append(choice(rng, WEATHERS[scene.weather]))
    if scene.prop != "none" and named["prop"]:
        parts.append(choice(rng, PROPS[scene.prop]))
    light = describe_light(scene.light) if named["light"] else ""
    framing = choice(rng, FRAMINGS[scene.framing]) if named["framing"] else ""
    return ", ".join(part for part in (" ".join(parts), light, framing) if part)


def noun(kind: str, rng: np.random.Generator) -> str:
    """The kind's name, or sometimes a generic noun; always a generic noun for held-out kinds."""
    if kind in world.HELD_OUT_KINDS or rng.random() < MASK:
        return choice(rng, GENERIC)
    return kind


def caption(kind: str, scene: Scene, rng: np.random.Generator, say: dict[str, float] | None = None) -> str:
    """Describes one panel: "a cat jumping on the beach with a ball, soft golden light from the left"."""
    article = choice(rng, ("a", "the", "one"))
    return f"{article} {noun(kind, rng)} {details(scene, rng, say)}".strip()


def grid(kind: str, left: Scene, right: Scene, rng: np.random.Generator) -> tuple[str, list[str]]:
    """The prompt of a 1×2 grid of one subject in two scenes, and the caption of each panel in the same words."""
    say = {"framing": 0.15, "light": 0.5, "pose": 0.7}
    subject, scenes = noun(kind, rng), [details(scene, rng, say) for scene in (left, right)]
    prompt = choice(rng, GRIDS).format(subject=subject, left=scenes[0], right=scenes[1])
    return prompt, [f"a {subject} {words}".strip() for words in scenes]


def light_grid(kind: str, left: Scene, right: Scene, rng: np.random.Generator) -> tuple[str, list[str]]:
    """The prompt of an aligned 1×2 grid of one scene in which only the light (or the season) changes, and the caption
    of each panel."""
    scene = caption(kind, replace(left, weather="clear"), rng, {"light": 0.0, "framing": 0.1, "pose": 0.6, "prop": 0.7})
    if left.weather != right.weather:
        lights = [choice(rng, WEATHERS[side.weather]) for side in (left, right)]
    else:
        lights = [describe_light(side.light) for side in (left, right)]
    prompt = choice(rng, LIGHT_GRIDS).format(scene=scene, left=lights[0], right=lights[1])
    return prompt, [f"{scene}, {words}" for words in lights]


def _every_word() -> tuple[str, ...]:
    texts = [*world.TRAIN_KINDS, *GENERIC, "a the one an light", *DIRECTIONS.values(), *GRIDS, *LIGHT_GRIDS]
    texts += [*world.LIGHT_COLOURS, *world.INTENSITIES]
    for table in (PLACES, POSES, FRAMINGS, PROPS, WEATHERS):
        texts += [phrase for phrases in table.values() for phrase in phrases]
    plain = re.sub(r"\{\w+\}", " ", " ".join(texts))
    return tuple(sorted(set(re.findall(r"[a-z0-9-]+", plain.lower()))))


WORDS = _every_word()
"""The vocabulary of the pocket models."""


def count_words(text: str) -> int:
    """Counts words and marks, which are the tokens of the pocket's text encoders, without the end mark."""
    return len(re.findall(r"[\w-]+|[^\w\s]", text))


def unknown_words(text: str) -> list[str]:
    """The words of `text` that are not in the vocabulary, in order, each once."""
    distinct = dict.fromkeys(re.findall(r"[a-z0-9-]+", text.lower()))
    return [word for word in distinct if word not in WORDS]
