"""What a student needs to be run right, registered in its transformer's config: how it takes its reference, how it is
sampled by default, at which sizes it was trained, and which words it reads.

    {"_class_name": "FluxTransformer2DModel", …, "_diptych": {"conditioning": "diptych", "steps": 16, …}}

The transformer is the part that every way of opening a student has: a whole folder, components, a copied
`transformer/`, a single file (whose header holds the config), a LoRA file (the same header). diffusers keeps private
config keys: its own classes load them without a warning and save them again. Folders written before have the same
values in `sampling.json` and `words.json` beside the weights; they are read where the config says nothing.
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
OF_TOKENS = ("positions", "reference_attention")  # settings of `tokens` conditioning alone
NULL_PANELS = ("shared", "own")  # as released, and `guidance.NullPanel`
SAMPLING = ("steps", "guidance", "image_guidance", "text_guidance")
RELIGHTING = ("image_guidance", "text_guidance", "null_panel")  # what may differ when relighting
MAX_STEPS = 1000
_CHOICES = {
    "conditioning": CONDITIONINGS,
    "positions": POSITIONS,
    "reference_attention": REFERENCE_ATTENTIONS,
    "null_panel": NULL_PANELS,
}


@dataclass(frozen=True)
class Settings:
    """The defaults are the FLUX.1 family's, as the released code samples: one forward a step."""

    conditioning: Conditioning = "diptych"  # how the reference enters
    positions: Positions = "frame"  # of reference tokens (`references`)
    reference_attention: ReferenceAttention = "joint"  # what reference tokens attend to
    steps: int = 28
    guidance: float = 3.5  # distilled
    image_guidance: float = 1.0
    text_guidance: float = 1.0
    null_panel: str = NULL_PANELS[0]
    relight: Mapping[str, Any] = field(default_factory=dict)  # keys of `RELIGHTING`
    sizes: tuple[tuple[int, int], ...] | None = None  # (height, width) of the panels it was trained on; None: not known
    words: tuple[str, ...] | None = None  # all words that a small model was taught, lower-case; None: no such limit

    @property
    def pipeline_class(self) -> str:
        """The diffusers pipeline that runs such a student; `OWN_CLASS` where none does."""
        if self.conditioning != "tokens":
            return "FluxControlPipeline"
        stock = (self.positions, self.reference_attention) == ("frame", "joint")
        return "FluxKontextPipeline" if stock else OWN_CLASS

    @property
    def sampling(self) -> dict[str, Any]:
        """Steps and guidance scales."""
        return {name: getattr(self, name) for name in SAMPLING}

    def values(self) -> dict[str, Any]:
        """As plain JSON values, to be registered."""
        said = {each.name: getattr(self, each.name) for each in fields(self)}
        said = {name: value for name, value in said.items() if self.conditioning == "tokens" or name not in OF_TOKENS}
        return {name: _plain(value) for name, value in said.items() if value is not None and value != {}}

    def trained_at(self, height: int, width: int) -> bool:
        """Whether panels of this size are among those that it was trained on; also true where that is not known."""
        return self.sizes is None or (height, width) in self.sizes

    def read(self, text: str) -> str:
        """A prompt as the model reads it: one with a word list was taught lower-case words alone."""
        return text if self.words is None else text.lower()


def parse(said: Any, where: str) -> Settings:
    """Settings from JSON values; UserError naming `where` for unknown keys and values that cannot be theirs."""
    try:
        return _parse(said)
    except ValueError as error:
        raise UserError(f"{where} does not say how to sample this student ({error})") from error


def of(config: Mapping[str, Any]) -> Settings:
    """The settings registered in a transformer's config; the family's where there are none."""
    said = config.get(KEY)
    return Settings() if said is None else parse(said, f"'{KEY}' in the transformer's config")


def register(transformer: Any, settings: Settings) -> None:
    """Puts settings into a transformer's config, where saving and copying keep them. UserError for invalid ones."""
    parse(settings.values(), "what is to be registered")
    transformer.register_to_config(**{KEY: settings.values()})


def adopt(transformer: Any) -> None:
    """Registers what lies in files beside the folder that diffusers opened this transformer from, if its config does
    not say it. UserError for settings that are not valid."""
    settings, name = of(transformer.config), transformer.config.get("_name_or_path")
    if name and Path(name).is_dir() and (found := resolve(transformer.config.get(KEY), [Path(name)])) != settings:
        register(transformer, found)


def resolve(said: Mapping[str, Any] | None, places: Sequence[Path], where: str = "") -> Settings:
    """A student's settings: what its weights `said` of themselves (`KEY`), else what the first of `places`, the model's
    and then its base's, says: in a `sampling.json` in or beside it, or in its transformer's config. Words that are not
    said come from the first `words.json`.

    UserError if the model's folder has a `sampling.json` that contradicts its weights.
    """
    beside = [path if (path := _beside(place) / SAMPLING_FILE).is_file() else None for place in places]
    if said is None:
        settings = next(filter(None, map(_of_place, places, beside)), Settings())
    else:
        settings = parse(said, where or f"'{KEY}' in the config of {places[0]}")
        if beside[0] is not None and not places[0].is_file():
            _check_same(parse(_json(beside[0]), str(beside[0])), settings, beside[0])
    lists = [path for place in places if (path := _beside(place) / WORDS_FILE).is_file()]
    return replace(settings, words=_words(lists[0])) if lists and settings.words is None else settings


def _of_place(place: Path, beside: Path | None) -> Settings | None:
    """What a place says, in the file `beside` it or in its transformer's config; None if it says nothing."""
    if beside is not None:
        return parse(_json(beside), str(beside))
    for config in (place / name / "config.json" for name in ("", *TRANSFORMER_FOLDERS)):
        if config.is_file() and isinstance(read := _json(config), dict) and KEY in read:
            return parse(read[KEY], f"'{KEY}' in {config}")
    return None


def _check_same(beside: Settings, registered: Settings, path: Path) -> None:
    other = [each.name for each in fields(Settings) if getattr(beside, each.name) != getattr(registered, each.name)]
    if other := [name for name in other if name not in ("words", "sizes")]:
        name = other[0]
        raise UserError(
            f"{path} contradicts the transformer's config: {name} is {getattr(beside, name)!r} in the file and "
            f"{getattr(registered, name)!r} in the config ('{KEY}'). Remove the file, or correct the config"
        )


def _beside(place: Path) -> Path:
    """The folder whose small files belong to the weights at `place`."""
    return place.parent if place.is_file() or place.name in TRANSFORMER_FOLDERS else place


def _json(path: Path) -> Any:
    try:
        return parse_json(path.read_text("utf8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}); correct it, or fetch it again") from error


def _words(path: Path) -> tuple[str, ...]:
    words = _json(path)
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise UserError(f"{path} is not a JSON list of words; correct it, or fetch it again")
    return tuple(sorted({word.lower() for word in words}))


def _parse(said: Any) -> Settings:
    known = [each.name for each in fields(Settings)]
    _check_keys(said, known)
    given = dict(said)
    for name, value in given.items():
        _check_value(name, value)
    if "relight" in given:
        _check_keys(given["relight"], RELIGHTING)
        for name, value in given["relight"].items():
            _check_value(name, value)
        given["relight"] = dict(given["relight"])
    if "words" in given:
        given["words"] = tuple(given["words"])
    if "sizes" in given:
        given["sizes"] = tuple((height, width) for height, width in given["sizes"])
    return Settings(**given)


def _check_keys(said: Any, known: Sequence[str]) -> None:
    if not isinstance(said, Mapping):
        raise ValueError(f"{said!r} is not a mapping of keys to values")
    if unknown := sorted(set(said) - set(known)):
        hint = nearest(unknown[0], known)
        raise ValueError(f"unknown {', '.join(unknown)}; known are {', '.join(known)}{hint}")


def _check_value(name: str, value: Any) -> None:
    for key, values in _CHOICES.items():
        if name == key and value not in values:
            raise ValueError(f"{name} is {' or '.join(values)}, not {value!r}")
    whole = isinstance(value, int) and not isinstance(value, bool)
    if name == "steps" and not (whole and 1 <= value <= MAX_STEPS):
        raise ValueError(f"steps is a whole number from 1 to {MAX_STEPS}, not {value!r}")
    if name.endswith("guidance") and not ((whole or isinstance(value, float)) and math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} is a number of at least 0, not {value!r}")
    if name == "sizes" and not _are_sizes(value):
        raise ValueError(f"sizes is a list of [height, width] in pixels, not {value!r}")
    if name == "words" and not (isinstance(value, (list, tuple)) and all(isinstance(word, str) for word in value)):
        raise ValueError("words is not a list of words")


def _are_sizes(value: Any) -> bool:
    if not isinstance(value, (list, tuple)) or not value:
        return False
    return all(
        isinstance(size, (list, tuple))
        and len(size) == 2
        and all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in size)
        for size in value
    )


def _plain(value: Any) -> Any:
    return (
        [_plain(each) for each in value]
        if isinstance(value, tuple)
        else dict(value)
        if isinstance(value, Mapping)
        else value
    )
