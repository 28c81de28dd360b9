"""The settings that a student needs to run correctly, registered in its transformer's config: conditioning, sampling
defaults, training sizes, and vocabulary.

    {"_class_name": "FluxTransformer2DModel", …, "_diptych": {"conditioning": "diptych", "steps": 16, …}}

Every way of opening a student has the transformer: a complete folder, components, a copied `transformer/`, a single
file (with the config in its header), a LoRA file (the same header). diffusers loads private config keys without a
warning and saves them again. Older folders have the same values in `sampling.json` and `words.json` beside the weights,
which are read if the config has no settings.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from diptych.errors import UserError, nearest
from diptych.utils.documents import parse_json

KEY = "_diptych"
OWN_CLASS = "DiptychPipeline"
SAMPLING_FILE = "sampling.json"
WORDS_FILE = "words.json"
TRANSFORMER_FOLDERS = ("transformer", "transformers")  # the release's README spells it with an s

Conditioning = Literal["diptych", "tokens", "channel"]
Positions = Literal["frame", "left"]
ReferenceAttention = Literal["joint", "self"]
CONDITIONINGS: tuple[str, ...] = get_args(Conditioning)
POSITIONS: tuple[str, ...] = get_args(Positions)
REFERENCE_ATTENTIONS: tuple[str, ...] = get_args(ReferenceAttention)
OF_TOKENS = ("positions", "reference_attention")  # settings that only `tokens` conditioning has
NULL_PANELS = ("shared", "own")  # as released, and `guidance.NullPanel`
SAMPLING = ("steps", "guidance", "image_guidance", "text_guidance")
RELIGHTING = ("image_guidance", "text_guidance", "null_panel")  # settings that may differ for relighting
MAX_STEPS = 1000
_CHOICES = {
    "conditioning": CONDITIONINGS,
    "positions": POSITIONS,
    "reference_attention": REFERENCE_ATTENTIONS,
    "null_panel": NULL_PANELS,
}


@dataclass(frozen=True)
class Settings:
    """A student's settings. The defaults are those of the released code for FLUX.1, with one forward pass a step.

    Attributes:
        conditioning: how the reference enters.
        positions: position ids of reference tokens (`references`).
        reference_attention: what reference tokens attend to (`references`).
        steps: sampling steps.
        guidance: distilled guidance.
        image_guidance: scale of the reference.
        text_guidance: scale of the prompt.
        null_panel: left panel that the null pass sees.
        relight: other values of `RELIGHTING` for relighting.
        sizes: (height, width) of the panels it was trained on. None if unknown.
        words: vocabulary of a small model, lower-case. None for a model without such a limit.
    """

    conditioning: Conditioning = "diptych"
    positions: Positions = "frame"
    reference_attention: ReferenceAttention = "joint"
    steps: int = 28
    guidance: float = 3.5
    image_guidance: float = 1.0
    text_guidance: float = 1.0
    null_panel: str = NULL_PANELS[0]
    relight: Mapping[str, Any] = field(default_factory=dict)
    sizes: tuple[tuple[int, int], ...] | None = None
    words: tuple[str, ...] | None = None

    @property
    def pipeline_class(self) -> str:
        """The diffusers pipeline that runs such a student. `OWN_CLASS` if there is none."""
        if self.conditioning != "tokens":
            return "FluxControlPipeline"
        stock = (self.positions, self.reference_attention) == ("frame", "joint")
        return "FluxKontextPipeline" if stock else OWN_CLASS

    @property
    def sampling(self) -> dict[str, Any]:
        """Steps and guidance scales."""
        return {name: getattr(self, name) for name in SAMPLING}

    def values(self) -> dict[str, Any]:
        """The settings as plain JSON values, to register."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        values = {k: value for k, value in values.items() if self.conditioning == "tokens" or k not in OF_TOKENS}
        return {name: _plain(value) for name, value in values.items() if value is not None and value != {}}

    def trained_at(self, height: int, width: int) -> bool:
        """Whether the student was trained on panels of this size. True if its sizes are unknown."""
        return self.sizes is None or (height, width) in self.sizes

    def read(self, text: str) -> str:
        """A prompt as the model reads it: in lower case if it has a vocabulary, which is lower-case."""
        return text if self.words is None else text.lower()


def parse(values: Any, where: str) -> Settings:
    """Settings from JSON values. UserError that names `where`, for unknown keys and invalid values."""
    try:
        return _parse(values)
    except ValueError as error:
        raise UserError("json_invalid", f"{where} has invalid settings of a student: {error}.") from error


def of(config: Mapping[str, Any]) -> Settings:
    """The settings registered in a transformer's config. The defaults if there are none."""
    values = config.get(KEY)
    return Settings() if values is None else parse(values, f"'{KEY}' in the transformer's config")


def register(transformer: Any, settings: Settings) -> None:
    """Registers settings in a transformer's config, which saving and copying preserve. UserError for invalid ones."""
    parse(settings.values(), "register(…)")
    transformer.register_to_config(**{KEY: settings.values()})


def adopt(transformer: Any) -> None:
    """Registers the settings in files beside the transformer's folder, if its config has none. UserError for invalid
    ones."""
    settings, name = of(transformer.config), transformer.config.get("_name_or_path")
    if name and Path(name).is_dir() and (resolved := resolve(transformer.config.get(KEY), [Path(name)])) != settings:
        register(transformer, resolved)


def resolve(values: Mapping[str, Any] | None, places: Sequence[Path], where: str = "") -> Settings:
    """A student's settings: the `values` in its weights (`KEY`), else those of the first of `places` that has some: the
    model and then its base, in a `sampling.json` in or beside it, or in its transformer's config. A missing vocabulary
    comes from the first `words.json`.

    UserError if the model's folder has a `sampling.json` that contradicts its weights.
    """
    beside = [path if (path := _beside(place) / SAMPLING_FILE).is_file() else None for place in places]
    if values is None:
        settings = next(filter(None, map(_of_place, places, beside)), Settings())
    else:
        settings = parse(values, where or f"'{KEY}' in the config of {places[0]}")
        if beside[0] is not None and not places[0].is_file():
            _check_same(parse(_json(beside[0]), str(beside[0])), settings, beside[0])
    lists = [path for place in places if (path := _beside(place) / WORDS_FILE).is_file()]
    return replace(settings, words=_words(lists[0])) if lists and settings.words is None else settings


def _of_place(place: Path, beside: Path | None) -> Settings | None:
    """The settings of a place, in the file `beside` it or in its transformer's config. None if it has none."""
    if beside is not None:
        return parse(_json(beside), str(beside))
    for config in (place / name / "config.json" for name in ("", *TRANSFORMER_FOLDERS)):
        if config.is_file() and isinstance(read := _json(config), dict) and KEY in read:
            return parse(read[KEY], f"'{KEY}' in {config}")
    return None


def _check_same(beside: Settings, registered: Settings, path: Path) -> None:
    names = [each.name for each in fields(Settings) if each.name not in ("words", "sizes")]
    if name := next((name for name in names if getattr(beside, name) != getattr(registered, name)), None):
        raise UserError(
            "model_mismatch",
            f"{path} contradicts the transformer's config: {name} is {getattr(beside, name)!r} in the file and "
            f"{getattr(registered, name)!r} in the config ('{KEY}'). Remove the file, or correct the config.",
        )


def _beside(place: Path) -> Path:
    """The folder whose small files belong to the weights at `place`."""
    return place.parent if place.is_file() or place.name in TRANSFORMER_FOLDERS else place


def _json(path: Path) -> Any:
    try:
        return parse_json(path.read_text("utf8"))
    except (OSError, ValueError) as error:
        raise UserError(
            "json_invalid", f"{path} is not valid JSON ({error}). Correct it, or fetch it again."
        ) from error


def _words(path: Path) -> tuple[str, ...]:
    words = _json(path)
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise UserError("json_invalid", f"{path} is not a JSON list of words. Correct it, or fetch it again.")
    return tuple(sorted({word.lower() for word in words}))


def _parse(values: Any) -> Settings:
    _check(values, [each.name for each in fields(Settings)])
    settings = dict(values)
    if "relight" in settings:
        _check(settings["relight"], RELIGHTING)
        settings["relight"] = dict(settings["relight"])
    if "words" in settings:
        settings["words"] = tuple(settings["words"])
    if "sizes" in settings:
        settings["sizes"] = tuple((height, width) for height, width in settings["sizes"])
    return Settings(**settings)


def _check(values: Any, known: Sequence[str]) -> None:
    """ValueError unless it is a mapping of known keys to valid values."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{values!r} is not a mapping of keys to values")
    if unknown := sorted(set(values) - set(known)):
        hint = nearest(unknown[0], known)
        raise ValueError(f"unknown {', '.join(unknown)}; known are {', '.join(known)}{hint}")
    for name, value in values.items():
        _check_value(name, value)


def _check_value(name: str, value: Any) -> None:
    if name in _CHOICES and value not in _CHOICES[name]:
        raise ValueError(f"{name} must be {' or '.join(_CHOICES[name])}, not {value!r}")
    if name == "steps" and not (_is_whole(value) and 1 <= value <= MAX_STEPS):
        raise ValueError(f"steps must be a whole number from 1 to {MAX_STEPS}, not {value!r}")
    is_number = _is_whole(value) or isinstance(value, float)
    if name.endswith("guidance") and not (is_number and math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be a number of at least 0, not {value!r}")
    if name == "sizes" and not (isinstance(value, (list, tuple)) and value and all(map(_is_size, value))):
        raise ValueError(f"sizes must be a list of [height, width] in pixels, not {value!r}")
    if name == "words" and not (isinstance(value, (list, tuple)) and all(isinstance(word, str) for word in value)):
        raise ValueError("words must be a list of words")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_size(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(_is_whole(side) and side > 0 for side in value)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    return dict(value) if isinstance(value, Mapping) else value
