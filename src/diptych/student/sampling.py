"""Sampling options, declared once: the name, type, range and meaning of each.

`Student.generate`, `relight` and `story`, the command line, the rows of a batch, the HTTP API and the ComfyUI nodes all
derive their options from `Sampling`. It is a `TypedDict`, so that type checkers know the keywords of a call
(`**options: Unpack[Sampling]`). Its annotations are plain values without pydantic, which would triple the time of
`diptych --help`; `field` makes a pydantic field of one.
"""

from __future__ import annotations

import inspect
import math
import sys
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
    """The description of an option and its allowed values."""

    help: str
    least: int | None = None
    most: int | None = None
    choices: tuple[str, ...] = ()
    default: str = ""  # the meaning of None; empty: the model's setting


class Sampling(TypedDict, total=False):
    """Options for generating an image. None means the default. For `steps`, the guidance scales and `size`, that is the
    model's setting (`pipeline.settings`; for a model without settings 28, 3.5, 1 and 1, as released). Image and text
    guidance take up to three times as long."""

    steps: Annotated[int | None, Option("Sampling steps.", 1, MAX_STEPS)]
    guidance: Annotated[float | None, Option("Distilled guidance, for models that have it.", 0)]
    image_guidance: Annotated[float | None, Option("Strength of the reference; 1 is off.", 0)]
    text_guidance: Annotated[float | None, Option("Strength of the prompt; 1 is off.", 0)]
    null_panel: Annotated[str | None, Option("Left panel that the null pass of guidance sees.", choices=NULL_PANELS)]
    guidance_rescale: Annotated[
        float | None,
        Option("Rescaling against saturation; 0 is off.", 0, 1, default="0"),
    ]
    guidance_parallel: Annotated[
        float | None,
        Option("Share along the prediction; 1 is off.", 0, 1, default="1"),
    ]
    guidance_norm: Annotated[float | None, Option("Limit of the guidance; 0 is off.", 0, default="0")]
    negative_prompt: Annotated[str | None, Option("What to avoid; needs image or text guidance above 1.")]
    size: Annotated[int | tuple[int, int] | None, Option("Image size in pixels.", default="the model's")]
    fit: Annotated[str | None, Option("Fit of the reference.", choices=FITS, default="crop")]
    background: Annotated[str | None, Option("Color under a transparent reference.", default="white")]


OPTIONS: Mapping[str, Option] = {
    name: get_args(hint)[1] for name, hint in get_type_hints(Sampling, include_extras=True).items()
}
SCALES = ("steps", "guidance", "image_guidance", "text_guidance")  # their defaults are a model's settings
CORRECTIONS = ("guidance_rescale", "guidance_parallel", "guidance_norm")  # of `guidance.Guidance`


class CallOptions(Sampling, total=False):
    """Further options of a call. `on_preview(done, steps, images)` is called with small previews every `preview_every`
    steps (`student.callbacks`); `callback_on_step_end` is diffusers'. The last four are diffusers' names for `steps`
    and the guidance scales."""

    on_preview: Show | None
    preview_every: int
    callback_on_step_end: Callback | None
    num_inference_steps: int | None
    guidance_scale: float | None
    image_guidance_scale: float | None
    text_guidance_scale: float | None


class GenerateOptions(CallOptions, total=False):
    """The options of `Student.generate` that apply to all images of a call.

    `batch_size` is the number of images generated together. With `pairwise`, the lists have one reference, prompt and
    seed for each image, instead of being combined.
    """

    batch_size: int
    pairwise: bool
    callback_on_step_end_tensor_inputs: Sequence[str]


class RelightOptions(CallOptions, total=False):
    """The options of `Student.relight` that apply to all images of a call; see `apps.relight.relight`."""

    scene: str
    task: str
    mask: Image.Image | str | Path | None
    detail: float


ALIASES = {"num_inference_steps": "steps", **{f"{name}_scale": name for name in SCALES[1:]}}


def lists(kind: type) -> Callable[[_F], _F]:
    """A decorator that lists the keys of a `TypedDict` in a method's signature, in place of its `**options`."""

    def decorate(function: _F) -> _F:
        signature, hints = inspect.signature(function), kind.__annotations__
        named = [each for each in signature.parameters.values() if each.kind is not each.VAR_KEYWORD]
        more = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in hints]
        function.__signature__ = signature.replace(parameters=named + more)  # pyright: ignore[reportFunctionMemberAccess]
        return function

    return decorate


def given(options: Mapping[str, Any], kind: type) -> dict[str, Any]:
    """The options that are not None, under our names. TypeError for an unknown option of `kind`, UsageError for one
    that is passed twice, under our name and diffusers'."""
    for name in options:
        if name not in kind.__annotations__:
            raise TypeError(f"unknown option '{name}'{nearest(name, kind.__annotations__)}")
    values = {name: value for name, value in options.items() if value is not None}
    for alias, name in ALIASES.items():
        if alias in values and name in values:
            raise UsageError("option_conflict", f"{alias} and {name} are two names of one option. Pass one of them.")
        if alias in values:
            values[name] = values.pop(alias)
    return values


def field(name: str, default: Any = None, **changed: Any) -> Any:
    """The option as a field of a pydantic model, with `changed` arguments of `pydantic.Field`."""
    from pydantic import Field

    option = OPTIONS[name]
    known: dict[str, Any] = {"ge": option.least, "le": option.most, "description": option.help}
    return Field(default, **{key: value for key, value in (known | changed).items() if value is not None})


def check_prompt(text: object) -> None:
    """UsageError unless it is a text that is not blank."""
    if not isinstance(text, str) or not text.strip():
        raise UsageError("text_empty", "The prompt is empty. Describe the new image.")


def check_seed(number: object) -> None:
    """UsageError unless it is a whole number that a generator accepts."""
    if not _is_whole(number) or not 0 <= number <= MAX_SEED:
        raise UsageError("option_invalid", f"The seed must be a whole number from 0 to 2^63 - 1, not {number!r}.")


def check_fit(fit: str) -> None:
    """UsageError unless `fit` is one of `FITS`."""
    if fit not in FITS:
        raise UsageError(
            "option_invalid", f"Unknown fit '{fit}'. Use one of {', '.join(FITS)}{nearest(str(fit), FITS)}"
        )


def check_options(options: Mapping[str, Any]) -> None:
    """UsageError for sampling options that are invalid for every model. None is always valid."""
    from diptych.data.formats import color

    for name, value in options.items():
        if value is None:
            continue
        if name == "steps" and not (_is_whole(value) and 1 <= value <= MAX_STEPS):
            raise UsageError("option_invalid", f"steps must be a whole number from 1 to {MAX_STEPS}, not {value!r}.")
        if name.endswith("guidance") and not ((_is_whole(value) or isinstance(value, float)) and 0 <= value < math.inf):
            raise UsageError("option_invalid", f"{name} must be a number of at least 0, not {value!r}.")
        if name in CORRECTIONS:
            least, most = OPTIONS[name].least, OPTIONS[name].most
            limits = f"from {least} to {most}" if most is not None else f"of at least {least}"
            if not ((_is_whole(value) or isinstance(value, float)) and 0 <= value <= (most or sys.float_info.max)):
                raise UsageError("option_invalid", f"{name} must be a number {limits}, not {value!r}.")
        if name == "negative_prompt" and not isinstance(value, str):
            raise UsageError("argument_type", f"negative_prompt must be a string, not {type(value).__name__}.")
        if name == "size":
            sides = value if isinstance(value, (tuple, list)) and len(value) == 2 else (value,)
            if not all(_is_whole(side) and side > 0 for side in sides):
                raise UsageError("size_invalid", f"size must be pixels, one number or (width, height), not {value!r}.")
        if name == "fit":
            check_fit(str(value))
        if name == "background":
            color(str(value))


def read_size(value: Any) -> Any:
    """`64`, `"64"`, `"512x768"` (width first) or `[512, 768]` as a number or a pair."""
    if isinstance(value, list):
        return tuple(value)
    if not isinstance(value, str):
        return value
    parts = value.lower().replace("×", "x").split("x")
    if len(parts) > 2 or not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise UsageError("size_invalid", f"size must be pixels, for instance 512 or 512x768, not {value}.")
    return int(parts[0]) if len(parts) == 1 else (int(parts[0]), int(parts[1]))


def as_list(value: _T | Sequence[_T], kinds: str = "reference, prompt and seed") -> list[_T]:
    """A list or tuple as a list, anything else as a list of one. UsageError for an empty one."""
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    if not values:
        raise UsageError("option_missing", f"The list is empty. Pass at least one {kinds}.")
    return values  # pyright: ignore[reportReturnType]


def _is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)
