"""Relighting: the reference's scene under another light, everything in its place (paper section 4, second task).

    relight(student, "cat.png", "soft golden light from the left")          # a picture
    relight(student, "cat.png", ["dim blue light from above", "bright white light from behind"])   # two

The student is told the light in the words of the task's own file (`tasks/relight.yaml`), so any task whose panels are
aligned works the same: `task="season.yaml"`, and "in winter" for a light.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np

from diptych.errors import UsageError
from diptych.student.sampling import RelightOptions, as_list, given
from diptych.utils.io import sha256

if TYPE_CHECKING:
    from PIL.Image import Image

    from diptych.apps.student import Student
    from diptych.recipe.tasks import Task

Box = tuple[int, int, int, int]  # left, upper, right, lower, in pixels
DETAIL = 1.0
SHADE = 1 / 30  # of the panel's side: brightness that changes more finely than this is detail, and the reference's
TINT = 1 / 10  # the same for colour, in which light varies less
LUMA = (0.299, 0.587, 0.114)  # of red, green and blue (ITU-R BT.601)
DARK = 0.04  # added before dividing, so that the darkest parts are not torn


def relight(
    student: Student,
    reference: Image | str | Path,
    light: str | Sequence[str],
    *,
    seed: int | Sequence[int] = 0,
    **options: Unpack[RelightOptions],
) -> Image | list[Image]:
    """The reference under each light with each seed; one picture, or a list if `light` or `seed` is one.

    Args:
        light: what changes, in words: "warm light from the left".
        scene: what the reference shows, in words ("a cat in a kitchen"), for a model that is surer when told; else it
            reads that from the reference alone.
        task: a task whose panels are aligned, by name or file.
        mask: of the reference's size: white may change, black stays. What stays is held while the rest is drawn, and in
            the end taken from the reference itself; grey mixes.
        detail: how much of the fine detail is the reference's own, 0 to 1: the drawn picture then gives the light and
            the reference what it falls on. 0 takes the drawn picture as it is.
        size: of the model's image and of the result, in pixels, as in `Student.generate`. None: the model works at its
            own size and its light is laid over the reference, so that the result is as large as the reference (with
            `detail=0`, which takes nothing from the reference, as large as the model's image).
        fit: how to fit the reference to the model's size: `crop`, `pad` or `contain`. None: `contain` where `size` is
            None, so that the whole reference is relit, else `crop`.
        options: those above from `scene` on, and others of `student.sampling.RelightOptions`.

    Raises UsageError for what does not fit together, UserError for a picture that cannot be read.
    """
    from diptych.student.callbacks import in_turn

    asked = given(options, RelightOptions)
    scene, task, mask = asked.pop("scene", ""), asked.pop("task", "relight"), asked.pop("mask", None)
    detail, callback = asked.pop("detail", DETAIL), asked.pop("callback_on_step_end", None)
    size, background = asked.get("size"), asked.get("background", "white")
    found = aligned(task)
    if not 0 <= detail <= 1:
        raise UsageError(f"detail {detail!r} is a number from 0 to 1")
    lights, seeds = as_list(light, "light and seed"), as_list(seed, "light and seed")
    for text in lights:
        if not isinstance(text, str) or not text.strip():
            raise UsageError("the light is empty; say how the scene is lit, for instance 'soft light from the left'")
    if reference is None:
        raise UsageError("missing a reference, the picture that is to be relit")
    opened, canvas = student.opened(reference, background), student.canvas(size)
    assert opened is not None
    asked["fit"] = fit = asked.get("fit") or default_fit(size)
    panel = original = _fitted(opened, canvas, fit)
    stays = masked = None if mask is None else kept(mask, opened.size, canvas, fit)
    inside = (0, 0, *panel.size)
    if size is None:
        seen, inside = placed(opened.size, panel.size, fit)
        original = _part(opened, seen, inside)
        masked = None if mask is None else _stays(_part(_opened(mask), seen, inside))
    told: dict[str, Any] = {"task": found.name, "detail": detail}
    if stays is not None:
        told["mask"] = sha256(stays.tobytes())
    switched = bool(student.pipeline.runtime.speed.null_panel)
    for key, value in student.pipeline.settings.relight.items():  # the model's own, where nothing else is said
        if key not in asked and not (key == "null_panel" and switched):
            asked[key] = value
    pictures = []
    for text in lights:
        words = prompt_of(text, scene, task)
        for number in seeds:
            calls = [callback] if callback is not None else []
            if stays is not None:
                calls.insert(0, _hold(student, panel, stays, canvas, number))
            calling = in_turn(calls) if calls else None
            image = student.generate(opened, words, seed=number, callback_on_step_end=calling, **asked)
            done = keep_detail(image.crop(inside), original, detail)
            if masked is not None:
                done = keep_part(done, original, masked)
            done.info = {**image.info, "light": text, **told}
            pictures.append(done)
    return pictures if isinstance(light, (list, tuple)) or isinstance(seed, (list, tuple)) else pictures[0]


def prompt_of(light: str, scene: str = "", task: str = "relight") -> str:
    """The prompt for a light, in the wording of the task."""
    from diptych.stages.write import grammar

    return grammar.student_prompt(aligned(task), light.strip(), scene.strip())


def aligned(task: str) -> Task:
    """The task. UsageError unless its panels are aligned."""
    from diptych.recipe import tasks

    found = tasks.load(task)
    if found.geometry != "aligned":
        raise UsageError(f"the task '{found.name}' moves things about; relighting needs one whose geometry is aligned")
    return found


def kept(mask: Image | str | Path, size: tuple[int, int], canvas: Any, fit: str) -> np.ndarray:
    """What of a panel stays, float32 (H, W) from 0 to 1, of a mask whose white may change.

    UsageError for a mask that is not of the reference's `size`, or leaves nothing to change.
    """
    opened = _opened(mask)
    if opened.size != size:
        raise UsageError(
            f"the mask has {opened.width}×{opened.height} pixels and the reference {size[0]}×{size[1]}; "
            "they must be of one size"
        )
    stays = _stays(_fitted(opened, canvas, fit))
    if stays.min() == 1:
        raise UsageError("the mask is black everywhere; what may change is white")
    return stays


def _opened(mask: Image | str | Path) -> Image:
    from PIL import Image as pillow

    from diptych.data.images import open_image, to_rgb

    return to_rgb(mask) if isinstance(mask, pillow.Image) else open_image(mask)


def _stays(mask: Image) -> np.ndarray:
    return 1 - np.asarray(mask.convert("L"), dtype=np.float32) / 255


def _part(image: Image, seen: Box, inside: Box) -> Image:
    """The part of an image that the model sees, as large as it is there, and no smaller than on the panel."""
    from PIL import Image as pillow

    part, size = image.crop(seen), (inside[2] - inside[0], inside[3] - inside[1])
    return part.resize(size, pillow.Resampling.LANCZOS) if part.width * part.height < size[0] * size[1] else part


def keep_detail(drawn: Image, reference: Image, amount: float = 1.0) -> Image:
    """The reference under the light of `drawn`: what is coarse of the one, what is fine of the other. Both show the
    same part of a scene; the reference may be larger, and the result is as large as the reference.

    reference × gain, where gain is soft(drawn) / soft(reference) channel by channel, `soft` being a Gaussian blur of a
    tenth of the side; of brightness alone, a blur of a thirtieth, since shade and shadows are finer than tints. Laid
    over `drawn` with the weight `amount`. As in retouching by frequency separation.
    """
    from PIL import Image as pillow

    if amount == 0:
        return drawn
    size = reference.size
    small = reference if size == drawn.size else reference.resize(drawn.size, pillow.Resampling.LANCZOS)
    new, old = (np.asarray(image.convert("RGB"), dtype=np.float32) / 255 for image in (drawn, small))
    bright, was = (pixels @ np.array(LUMA, np.float32)[:, None] for pixels in (new, old))
    tint, shade = (share * min(drawn.size) for share in (TINT, SHADE))
    gain = _gain(new, old, tint) * _gain(bright, was, shade) / _gain(bright, was, tint)
    bands = []  # one after the other: a reference may have 64 megapixels
    for band, whole in enumerate(reference.convert("RGB").split()):
        lit = (np.asarray(whole, dtype=np.float32) / 255 + DARK) * _enlarged(gain[..., band], size) - DARK
        mixed = amount * np.clip(lit, 0, 1) + (1 - amount) * _enlarged(new[..., band], size)
        bands.append(pillow.fromarray((mixed * 255).round().clip(0, 255).astype(np.uint8)))
    return pillow.merge("RGB", bands)


def _enlarged(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Values (H, W) at another size (width, height)."""
    from PIL import Image as pillow

    if values.shape[::-1] == size:
        return values
    return np.asarray(pillow.fromarray(np.ascontiguousarray(values)).resize(size, pillow.Resampling.BICUBIC))


def _gain(new: np.ndarray, old: np.ndarray, sigma: float) -> np.ndarray:
    """How much brighter (H, W, C) `new` is than `old`, seen through a blur of `sigma` pixels."""
    return (soft(new, sigma) + DARK) / (soft(old, sigma) + DARK)


def keep_part(drawn: Image, reference: Image, stays: np.ndarray) -> Image:
    """The reference where `stays` (H, W) is 1, the drawn picture where it is 0, a mixture between, at the size of
    the drawn picture."""
    from PIL import Image as pillow

    mask = pillow.fromarray((stays * 255).round().astype(np.uint8))
    reference, mask = (image if image.size == drawn.size else image.resize(drawn.size) for image in (reference, mask))
    return pillow.composite(reference, drawn, mask)


def soft(pixels: np.ndarray, sigma: float) -> np.ndarray:
    """Pixels (H, W, C) blurred by a Gaussian of `sigma` pixels, mirrored at the border."""
    radius = max(1, min(round(3 * sigma), min(pixels.shape[:2]) - 1))
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / max(sigma, 1e-3)) ** 2).astype(np.float32)
    weights /= weights.sum()
    for axis in (0, 1):
        around = [(0, 0)] * 3
        around[axis] = (radius, radius)
        wide = np.pad(pixels, around, mode="symmetric")
        pixels = sum(
            weight * np.take(wide, np.arange(pixels.shape[axis]) + shift, axis) for shift, weight in enumerate(weights)
        )  # pyright: ignore[reportAssignmentType]
    return pixels


def strip(pictures: Sequence[Image], gap: int = 2) -> Image:
    """Pictures of one height side by side, `gap` white pixels between them."""
    from PIL import Image as pillow

    wide = sum(picture.width for picture in pictures) + gap * (len(pictures) - 1)
    sheet = pillow.new("RGB", (wide, pictures[0].height), "white")
    left = 0
    for picture in pictures:
        sheet.paste(picture, (left, 0))
        left += picture.width + gap
    return sheet


def _hold(student: Student, panel: Image, stays: np.ndarray, canvas: Any, seed: int) -> Any:
    from diptych.student.callbacks import Hold

    return Hold(student.pipeline, panel, stays >= 0.5, canvas, seed)


def default_fit(size: int | tuple[int, int] | None) -> str:
    """How a reference is fitted unless a call says: whole where the result has the reference's own size."""
    return "contain" if size is None else "crop"


def placed(size: tuple[int, int], panel: tuple[int, int], fit: str) -> tuple[Box, Box]:
    """The part of an image of `size` that a `panel` shows (`canvas.fit_image`), and where on the panel it is."""
    if fit == "crop":
        scale = max(panel[0] / size[0], panel[1] / size[1])
        wide, high = (min(whole, round(side / scale)) for whole, side in zip(size, panel, strict=True))
        left, top = (size[0] - wide) // 2, (size[1] - high) // 2
        return (left, top, left + wide, top + high), (0, 0, *panel)
    scale = min(panel[0] / size[0], panel[1] / size[1])
    wide, high = (min(side, max(1, round(whole * scale))) for whole, side in zip(size, panel, strict=True))
    left, top = (panel[0] - wide) // 2, (panel[1] - high) // 2
    return (0, 0, *size), (left, top, left + wide, top + high)


def _fitted(image: Image, canvas: Any, fit: str) -> Image:
    from diptych.student.canvas import fit_image

    return fit_image(image, canvas.panel_height, canvas.panel_width, fit)
