"""Relighting: the reference's scene under another light, everything in its place (paper section 4, second task).

    relight(student, "cat.png", "soft golden light from the left")          # an image
    relight(student, "cat.png", ["dim blue light from above", "bright white light from behind"])   # two

The prompt follows the wording of the task file (`tasks/relight.yaml`). Any task with aligned panels works the same way:
`task="season.yaml"`, with "in winter" as the light.
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
SHADE = 1 / 30  # of the panel's side: finer changes of brightness are detail, which comes from the reference
TINT = 1 / 10  # the same for color, in which light varies less
LUMA = (0.299, 0.587, 0.114)  # of red, green and blue (ITU-R BT.601)
DARK = 0.04  # added before dividing, for stability in the darkest parts


def relight(
    student: Student,
    reference: Image | str | Path,
    light: str | Sequence[str],
    *,
    seed: int | Sequence[int] = 0,
    **options: Unpack[RelightOptions],
) -> Image | list[Image]:
    """Returns the reference under each light with each seed.

    Args:
        light: what changes, in words: "warm light from the left".
        scene: what the reference shows, in words ("a cat in a kitchen"). It helps the model; without it the model reads
            the scene from the reference alone.
        task: a task with aligned panels, by name or file.
        mask: an image of the reference's size: white may change, black stays, gray mixes. The part that stays is held
            while the rest is generated, and then copied from the reference.
        detail: share of the fine detail that comes from the reference, 0 to 1. The generated image gives the light. 0
            returns the generated image unchanged.
        size: size of the model's image and of the result in pixels, as in `Student.generate`. None: the model works at
            its default size, and its light is applied to the reference, so the result is as large as the reference.
            With `detail=0`, which uses nothing of the reference, it is as large as the model's image.
        fit: how to fit the reference to the model's size: `crop`, `pad` or `contain`. None: `contain` if `size` is
            None, so that the whole reference is relit, else `crop`.
        options: those above from `scene` on, and others of `student.sampling.RelightOptions`.

    Returns one image, or a list if `light` or `seed` is a list.
    Raises UsageError for arguments that do not fit together, UserError for an image that cannot be read.
    """
    from diptych.student.callbacks import in_turn

    chosen = given(options, RelightOptions)
    scene, task_name, mask = chosen.pop("scene", ""), chosen.pop("task", "relight"), chosen.pop("mask", None)
    detail, callback = chosen.pop("detail", DETAIL), chosen.pop("callback_on_step_end", None)
    size, background = chosen.get("size"), chosen.get("background", "white")
    task = aligned(task_name)
    if not 0 <= detail <= 1:
        raise UsageError("option_invalid", f"detail must be a number from 0 to 1, not {detail!r}")
    lights, seeds = as_list(light, "light and seed"), as_list(seed, "light and seed")
    for text in lights:
        if not isinstance(text, str) or not text.strip():
            raise UsageError("text_empty", "The light is empty. Describe it, for example 'soft light from the left'.")
    if reference is None:
        raise UsageError("image_missing", "The reference is missing. Pass the image to relight.")
    opened, canvas = student.opened(reference, background), student.canvas(size)
    assert opened is not None
    chosen["fit"] = fit = chosen.get("fit") or default_fit(size)
    panel = original = _fitted(opened, canvas, fit)
    stays = masked = None if mask is None else kept(mask, opened.size, canvas, fit)
    inside = (0, 0, *panel.size)
    if size is None:
        seen, inside = placed(opened.size, panel.size, fit)
        original = _part(opened, seen, inside)
        masked = None if mask is None else _stays(_part(_opened(mask), seen, inside))
    provenance: dict[str, Any] = {"task": task.name, "detail": detail}
    if stays is not None:
        provenance["mask"] = sha256(stays.tobytes())
    switched = bool(student.pipeline.runtime.speed.null_panel)
    for key, value in student.pipeline.settings.relight.items():  # the model's defaults
        if key not in chosen and not (key == "null_panel" and switched):
            chosen[key] = value
    images = []
    for text in lights:
        prompt = prompt_of(text, scene, task_name)
        for number in seeds:
            calls = [callback] if callback is not None else []
            if stays is not None:
                calls.insert(0, _hold(student, panel, stays, canvas, number))
            calling = in_turn(calls) if calls else None
            image = student.generate(opened, prompt, seed=number, callback_on_step_end=calling, **chosen)
            relit = keep_detail(image.crop(inside), original, detail)
            if masked is not None:
                relit = keep_part(relit, original, masked)
            relit.info = {**image.info, "light": text, **provenance}
            images.append(relit)
    return images if isinstance(light, (list, tuple)) or isinstance(seed, (list, tuple)) else images[0]


def prompt_of(light: str, scene: str = "", task: str = "relight") -> str:
    """Returns the prompt for a light, in the wording of the task."""
    from diptych.stages.write import grammar

    return grammar.student_prompt(aligned(task), light.strip(), scene.strip())


def aligned(task: str) -> Task:
    """Loads a task. UsageError unless its panels are aligned."""
    from diptych.recipe import tasks

    loaded = tasks.load(task)
    if loaded.geometry != "aligned":
        raise UsageError("task_unsuited", f"Task '{loaded.name}' does not have aligned panels, as relighting requires.")
    return loaded


def kept(mask: Image | str | Path, size: tuple[int, int], canvas: Any, fit: str) -> np.ndarray:
    """Returns the share of each panel pixel that stays, float32 (H, W) from 0 to 1. White in the mask may change.

    UsageError for a mask of another size than the reference's, or one that leaves nothing to change.
    """
    opened = _opened(mask)
    if opened.size != size:
        sizes = f"{opened.width}×{opened.height}", f"{size[0]}×{size[1]}"
        raise UsageError("size_invalid", f"The mask has {sizes[0]} pixels, not {sizes[1]} as the reference.")
    stays = _stays(_fitted(opened, canvas, fit))
    if stays.min() == 1:
        raise UsageError("option_invalid", "The mask is all black, so nothing may change. Paint that part white.")
    return stays


def _opened(mask: Image | str | Path) -> Image:
    from PIL import Image as pillow

    from diptych.data.images import open_image, to_rgb

    return to_rgb(mask) if isinstance(mask, pillow.Image) else open_image(mask)


def _stays(mask: Image) -> np.ndarray:
    return 1 - np.asarray(mask.convert("L"), dtype=np.float32) / 255


def _part(image: Image, seen: Box, inside: Box) -> Image:
    """The part of an image that the model sees, at its size in the image but at least its size on the panel."""
    from PIL import Image as pillow

    part, size = image.crop(seen), (inside[2] - inside[0], inside[3] - inside[1])
    return part.resize(size, pillow.Resampling.LANCZOS) if part.width * part.height < size[0] * size[1] else part


def keep_detail(relit: Image, reference: Image, amount: float = 1.0) -> Image:
    """Returns the reference under the light of `relit`: coarse structure of `relit`, fine detail of the reference.

    Both show the same part of a scene. The reference may be larger; the result is as large as the reference.

    The result is reference × gain. The gain is soft(relit) / soft(reference) for each channel, where `soft` is a
    Gaussian blur of a tenth of the side; for brightness the blur is a thirtieth, since shadows are finer than tints.
    It is blended with `relit` by the weight `amount`. This is frequency separation, as in photo retouching.
    """
    from PIL import Image as pillow

    if amount == 0:
        return relit
    size = reference.size
    small = reference if size == relit.size else reference.resize(relit.size, pillow.Resampling.LANCZOS)
    new, old = (np.asarray(image.convert("RGB"), dtype=np.float32) / 255 for image in (relit, small))
    bright, was = (pixels @ np.array(LUMA, np.float32)[:, None] for pixels in (new, old))
    tint, shade = (share * min(relit.size) for share in (TINT, SHADE))
    gain = _gain(new, old, tint) * _gain(bright, was, shade) / _gain(bright, was, tint)
    bands = []  # one at a time, for memory: a reference may have 64 megapixels
    for band, whole in enumerate(reference.convert("RGB").split()):
        lit = (np.asarray(whole, dtype=np.float32) / 255 + DARK) * _enlarged(gain[..., band], size) - DARK
        mixed = amount * np.clip(lit, 0, 1) + (1 - amount) * _enlarged(new[..., band], size)
        bands.append(pillow.fromarray((mixed * 255).round().clip(0, 255).astype(np.uint8)))
    return pillow.merge("RGB", bands)


def _enlarged(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Values (H, W) resized to (width, height)."""
    from PIL import Image as pillow

    if values.shape[::-1] == size:
        return values
    return np.asarray(pillow.fromarray(np.ascontiguousarray(values)).resize(size, pillow.Resampling.BICUBIC))


def _gain(new: np.ndarray, old: np.ndarray, sigma: float) -> np.ndarray:
    """Ratio (H, W, C) of brightness of `new` to `old`, both blurred by `sigma` pixels."""
    return (soft(new, sigma) + DARK) / (soft(old, sigma) + DARK)


def keep_part(relit: Image, reference: Image, stays: np.ndarray) -> Image:
    """Returns the reference where `stays` (H, W) is 1, `relit` where it is 0, a mixture between, at `relit`'s size."""
    from PIL import Image as pillow

    mask = pillow.fromarray((stays * 255).round().astype(np.uint8))
    reference, mask = (image if image.size == relit.size else image.resize(relit.size) for image in (reference, mask))
    return pillow.composite(reference, relit, mask)


def soft(pixels: np.ndarray, sigma: float) -> np.ndarray:
    """Returns pixels (H, W, C) blurred by a Gaussian of `sigma` pixels, mirrored at the border."""
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


def strip(images: Sequence[Image], gap: int = 2) -> Image:
    """Returns images of one height side by side, with `gap` white pixels between them."""
    from PIL import Image as pillow

    wide = sum(image.width for image in images) + gap * (len(images) - 1)
    sheet = pillow.new("RGB", (wide, images[0].height), "white")
    left = 0
    for image in images:
        sheet.paste(image, (left, 0))
        left += image.width + gap
    return sheet


def _hold(student: Student, panel: Image, stays: np.ndarray, canvas: Any, seed: int) -> Any:
    from diptych.student.callbacks import Hold

    return Hold(student.pipeline, panel, stays >= 0.5, canvas, seed)


def default_fit(size: int | tuple[int, int] | None) -> str:
    """Returns the default fit of a reference: the whole image where the result has the reference's size."""
    return "contain" if size is None else "crop"


def placed(size: tuple[int, int], panel: tuple[int, int], fit: str) -> tuple[Box, Box]:
    """Returns the part of an image of `size` that a `panel` shows (`canvas.fit_image`), and its box on the panel."""
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
