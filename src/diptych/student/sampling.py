"""Sampling options, declared once: the name, type, range and meaning of each.

Everything that draws takes its options from `Sampling`: `Student.generate`, `relight` and `story`, the command line,
the rows of a batch, the HTTP API and the ComfyUI nodes. `Sampling` is a `TypedDict`, so that type checkers know the
keywords of a call (`**options: Unpack[Sampling]`). Its annotations are plain values that need no pydantic, which would
triple the time that `diptych --help` takes; `field` turns one into a field of a pydantic model.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypedDict, TypeGuard, TypeVar, get_args, get_type_hints

from diptych.errors import UsageError, nearest
from diptych.student.settings import MAX_STEPS, NULL_PANELS

if TYPE_CHECKING:
    from pathlib import Path

    from PIL import Image

    from diptych.student.callbacks import Show
    from diptych.student.sampler import Callback

Fit = Literal["crop", "pad", "contain", "keep"]
FITS: tuple[str, ...] = get_args(Fit)
MAX_SEED = 2**63 - 1
SEED = "The same seed gives the same image."
_T = TypeVar("_T")
_F = TypeVar("_F", bound=Callable[..., object])


@dataclass(frozen=True)
class Option:
    """What an option means, and the values that it takes."""

    help: str
    least: int | None = None
    most: int | None = None
    choices: tuple[str, ...] = ()
    default: str = ""  # what None means; empty: the model's own setting


class Sampling(TypedDict, total=False):
    """How to draw an image. None, for any of them, is the default: for `steps` and the guidance scales the model's own
    setting (`pipeline.settings`; 28, 3.5, 1 and 1 for a model without any, as released), for `size` the model's own.
    Image and text guidance take up to three times the work."""

    steps: Annotated[int | None, Option("Sampling steps.", 1, MAX_STEPS)]
    guidance: Annotated[float | None, Option("Distilled guidance, for models that have it.", 0)]
    image_guidance: Annotated[float | None, Option("Strength of the reference; 1 is off.", 0)]
    text_guidance: Annotated[float | None, Option("Strength of the prompt; 1 is off.", 0)]
    null_panel: Annotated[str | None, Option("Left panel that the null pass of guidance sees.", choices=NULL_PANELS)]
    negative_prompt: Annotated[str | None, Option("What not to show; needs image or text guidance above 1.")]
    size: Annotated[int | tuple[int, int] | None, Option("Image size in pixels.", default="the model's")]
    fit: Annotated[str | None, Option("How to fit the reference to the image size.", choices=FITS, default="crop")]
    background: Annotated[str | None, Option("Color under a transparent reference.", default="white")]


OPTIONS: Mapping[str, Option] = {
    name: get_args(hint)[1] for name, hint in get_type_hints(Sampling, include_extras=True).items()
}
SCALES = ("steps", "guidance", "image_guidance", "text_guidance")  # whose defaults a model's settings hold


class CallOptions(Sampling, total=False):
    """What a call may say beside: `on_preview(done, steps, images)` is called with small previews every `preview_every`
    steps (`student.callbacks`), `callback_on_step_end` as by diffusers. The last four are diffusers' names for `steps`
    and the guidance scales."""

    on_preview: Show | None
    preview_every: int
    callback_on_step_end: Callback | None
    num_inference_steps: int | None
    guidance_scale: float | None
    image_guidance_scale: float | None
    text_guidance_scale: float | None


class GenerateOptions(CallOptions, total=False):
    """The options of `Student.generate` that are the same for all images of a call.

    `batch_size` images are generated together. With `pairwise` the lists go together, one reference, prompt and seed
    for each image, instead of being multiplied.
    """

    batch_size: int
    pairwise: bool
    callback_on_step_end_tensor_inputs: Sequence[str]


class RelightOptions(CallOptions, total=False):
    """The options of `Student.relight` that are the same for all images of a call; see `apps.relight.relight`."""

    scene: str
    task: str
    mask: Image.Image | str | Path | None
    detail: float


ALIASES = {"num_inference_steps": "steps", **{f"{name}_scale": name for name in SCALES[1:]}}


def lists(kind: type) -> Callable[[_F], _F]:
    """Makes the signature of a method list the keys of a `TypedDict` in place of its `**options`."""

    def decorate(function: _F) -> _F:
        signature, hints = inspect.signature(function), kind.__annotations__
        own = [each for each in signature.parameters.values() if each.kind is not each.VAR_KEYWORD]
        more = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in hints]
        function.__signature__ = signature.replace(parameters=own + more)  # pyright: ignore[reportFunctionMemberAccess]
        return function

    return decorate


def given(options: Mapping[str, Any], kind: type) -> dict[str, Any]:
    """The options that are not None, under our names. TypeError for one that `kind` does not have, UsageError for one
    that is given twice: under our name and diffusers'."""
    for name in options:
        if name not in kind.__annotations__:
            raise TypeError(f"unknown option '{name}'{nearest(name, kind.__annotations__)}")
    found = {name: value for name, value in options.items() if value is not None}
    for alias, name in ALIASES.items():
        if alias in found and name in found:
            raise UsageError(f"{alias} and {name} are one option; give one of them")
        if alias in found:
            found[name] = found.pop(alias)
    return found


def field(name: str, default: Any = None, **changed: Any) -> Any:
    """The option as a field of a pydantic model, with `changed` arguments of `pydantic.Field`."""
    from pydantic import Field

    option = OPTIONS[name]
    known: dict[str, Any] = {"ge": option.least, "le": option.most, "description": option.help}
    return Field(default, **{key: value for key, value in (known | changed).items() if value is not None})


def check_prompt(text: object) -> None:
    """UsageError unless it is a text that says something."""
    if not isinstance(text, str) or not text.strip():
        raise UsageError("the prompt is empty; say what the new picture shows")


def check_seed(number: object) -> None:
    """UsageError unless it is a whole number that a generator takes."""
    if not _is_whole(number) or not 0 <= number <= MAX_SEED:
        raise UsageError(f"seed {number!r} is not a whole number from 0 to 2^63 - 1")


def check_fit(fit: str) -> None:
    """UsageError unless `fit` is one of `FITS`."""
    if fit not in FITS:
        raise UsageError(f"unknown fit '{fit}': one of {', '.join(FITS)}{nearest(str(fit), FITS)}")


def check_options(options: Mapping[str, Any]) -> None:
    """UsageError for sampling options that no model could take; None is always fine. Needs no model."""
    from diptych.data.formats import colour

    for name, value in options.items():
        if value is None:
            continue
        if name == "steps" and not (_is_whole(value) and 1 <= value <= MAX_STEPS):
            raise UsageError(f"steps {value!r} is not a whole number of at least 1 and at most {MAX_STEPS}")
        if name.endswith("guidance") and not ((_is_whole(value) or isinstance(value, float)) and 0 <= value < math.inf):
            raise UsageError(f"{name} {value!r} is not a number of at least 0")
        if name == "negative_prompt" and not isinstance(value, str):
            raise UsageError(f"a negative prompt is a text, not {type(value).__name__}")
        if name == "size":
            sides = value if isinstance(value, (tuple, list)) and len(value) == 2 else (value,)
            if not all(_is_whole(side) and side > 0 for side in sides):
                raise UsageError(f"size {value!r}: give pixels, one number or (width, height)")
        if name == "fit":
            check_fit(str(value))
        if name == "background":
            colour(str(value))


def read_size(value: Any) -> Any:
    """`64`, `"64"`, `"512x768"` (width first) or `[512, 768]` as a number or a pair."""
    if isinstance(value, list):
        return tuple(value)
    if not isinstance(value, str):
        return value
    parts = value.lower().replace("×", "x").split("x")
    if len(parts) > 2 or not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise UsageError(f"size {value}: give pixels, for instance 512 or 512x768")
    return int(parts[0]) if len(parts) == 1 else (int(parts[0]), int(parts[1]))


def as_list(value: _T | Sequence[_T], kinds: str = "reference, prompt and seed") -> list[_T]:
    """A list or tuple as a list, anything else as a list of one. UsageError for an empty one."""
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    if not values:
        raise UsageError(f"an empty list was given; give at least one {kinds}")
    return values  # pyright: ignore[reportReturnType]


def _is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)
