"""Stage 2, paint: the teacher generates grids (paper section 3.1), with any diffusers text-to-image folder.

Each row's noise comes from a CPU generator seeded from the row's id. So a grid depends on its batch and device only in
the last bits of floating-point sums, and with the engine's batches one machine always gives the same bytes.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diptych.data.engine import Failure, Row, Work
from diptych.data.images import image_cell
from diptych.data.records import grid_id, seed_of
from diptych.errors import UsageError, UserError
from diptych.recipe import tasks
from diptych.student.families import teachers
from diptych.student.families.teachers import open_teacher
from diptych.utils import models
from diptych.utils.opening import INDEX, class_of, read_file

if TYPE_CHECKING:
    import torch

    from diptych.recipe.schema import Recipe
    from diptych.student.runtime.memory import Memory

MAX_PANEL = 512
MAX_TEXT_TOKENS = 512
log = logging.getLogger(__name__)


class PaintStage:
    """Turns prompt rows into grid rows."""

    name = "paint"

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.batch_size = recipe.paint.batch_size
        self.task = tasks.load(recipe.task)

    def load(self) -> Work:
        """Open the teacher.

        Raises UserError if this fails, UsageError if it cannot generate panels of the recipe's size.
        """
        import torch

        from diptych.student.runtime import stock
        from diptych.utils.machine import pick_device, pick_precision

        if self.recipe.threads is not None:
            torch.set_num_threads(self.recipe.threads)
        folder = models.resolve(self.recipe.teacher, "teacher")
        model = models.fingerprint(folder)
        device = pick_device(self.recipe.device)
        dtype, _ = pick_precision(self.recipe.paint.dtype, device)
        settings = self.recipe.paint
        # Settings that cannot work are reported before gigabytes are read.
        for warning in warnings(self.recipe, folder):
            log.warning("%s", warning)
        memory = memory_for(self.recipe, folder, device, getattr(torch, dtype))
        speed = stock.resolve_speed(folder, settings.speed)
        pipe = open_teacher(folder, getattr(torch, dtype))
        size = panel_size(pipe, settings.panel_size)
        runtime = stock.apply(pipe, memory, speed, device)

        def work(rows: list[Row]) -> list[list[Row] | Failure]:
            results: dict[str, list[Row] | Failure] = {}
            for layout, group in self._by_layout(rows, results):
                options = call_options(pipe, settings, len(group))
                canvas = {"height": layout.rows * size, "width": layout.cols * size}
                painted: dict[str, list[Row | Failure]] = {row["id"]: [] for row in group}
                for number in range(settings.images):
                    purpose = f"paint {number}" if number else "paint"
                    seeds = [seed_of(self.recipe.seed, row["id"], purpose) for row in group]
                    with runtime.call():
                        images = generate(pipe, [row["prompt"] for row in group], seeds, **canvas, **options)
                    check_size(pipe, images, **canvas)
                    for row, seed, image in zip(group, seeds, images, strict=True):
                        name = grid_id(row["id"], number)
                        painted[row["id"]].append(_grid(name, row, seed, image, layout, size, model, settings.format))
                results |= {name: _together(grids) for name, grids in painted.items()}
            return [results[row["id"]] for row in rows]

        return work

    def _by_layout(
        self, rows: list[Row], results: dict[str, list[Row] | Failure]
    ) -> Iterator[tuple[tasks.Grid, list[Row]]]:
        """Yield the rows of each layout of the task, by their number of panels; other rows become Failures."""
        groups: dict[int, list[Row]] = {}
        for row in rows:
            groups.setdefault(len(row["panels"]), []).append(row)
        for count, group in groups.items():
            layout = self.task.layout_of(count, self.recipe.write.layout)
            if layout is None:
                failure = Failure(f"the task '{self.task.name}' has no grid of {count} panels")
                results.update({row["id"]: failure for row in group})
            else:
                yield layout, group


def _together(grids: list[Row | Failure]) -> list[Row] | Failure:
    """Return all grids of a prompt. If one failed, the prompt fails, because `failed/` cannot store a part of it."""
    broken = [grid for grid in grids if isinstance(grid, Failure)]
    return broken[0] if broken else [grid for grid in grids if not isinstance(grid, Failure)]


def _grid(
    name: str, row: Row, seed: int, image: torch.Tensor, layout: tasks.Grid, size: int, model: str, kind: str
) -> Row | Failure:
    """Return a grid row from its image (3, H, W) in 0..1, stored in the format `kind`."""
    from PIL import Image

    if not bool(image.isfinite().all()):
        return Failure("the teacher drew no picture (numbers that are not finite); try paint.dtype: float32")
    pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
    shared = {key: row[key] for key in ("prompt", "panels", "subject", "task")}
    place = {"rows": layout.rows, "cols": layout.cols, "panel_size": size}
    cell = image_cell(Image.fromarray(pixels), f"{name}.{kind}", kind.upper())
    return {"id": name, "image": cell, "prompt_id": row["id"], **shared, "seed": seed, **place, "model": model}


def warnings(recipe: Recipe, folder: Path) -> list[str]:
    """Return warnings about painting with the teacher in `folder`. Raises UsageError for settings that cannot work."""
    settings = recipe.paint
    doubt = teachers.doubt(class_of(folder), settings.true_guidance)
    advice = teachers.advice(recipe.teacher, settings.steps, settings.true_guidance)
    return [warning for warning in (doubt, advice) if warning]


def memory_for(recipe: Recipe, folder: Path, device: torch.device, dtype: torch.dtype) -> Memory | None:
    """Return `paint.memory` for the teacher in `folder`, planned from its configs; None if the recipe has none.

    Raises UsageError if it does not work here, UserError if no preset of `auto` fits.
    """
    from diptych.student.runtime import stock

    settings = recipe.paint
    if settings.memory is None:
        return None
    layout = tasks.load(recipe.task).layout(recipe.write.layout)
    shapes = stock.shapes(folder)
    size = settings.panel_size or min(MAX_PANEL, int(shapes.vae.get("sample_size") or MAX_PANEL))
    index = read_file(folder / INDEX)
    rows = settings.batch_size * teachers.of(class_of(folder)).rows(settings.true_guidance, index)
    canvas = {"rows": rows, "panel": (layout.rows * size, layout.cols * size // 2)}
    return stock.resolve_memory(folder, settings.memory, device, dtype, canvas)


def resolve_memory(recipe: Recipe) -> str:
    """Return the preset of `paint.memory: auto` on this machine, for a recipe with a resolved device and dtype."""
    import torch

    folder = models.resolve(recipe.teacher, "teacher")
    memory = memory_for(recipe, folder, torch.device(recipe.device), getattr(torch, recipe.paint.dtype))
    assert memory is not None
    return memory.name.rpartition(" ")[2]  # "auto → 24"


def panel_size(pipe: Any, size: int | None) -> int:
    """Return a panel's side in pixels: `size`, or the teacher's size up to 512.

    Raises UsageError if the teacher cannot generate it.
    """
    config = getattr(getattr(pipe, "vae", None), "config", None)
    size = size or min(MAX_PANEL, int(getattr(config, "sample_size", None) or MAX_PANEL))
    unit = 2 * int(getattr(pipe, "vae_scale_factor", 8))  # the student packs 2×2 latents into a token
    if size % unit:
        near = max(unit, round(size / unit) * unit)
        why = f"paint.panel_size {size} is not a multiple of {unit} pixels, as this teacher needs. Try {near}."
        raise UsageError("size_invalid", why)
    return size


def call_options(pipe: Any, paint: Any, count: int) -> dict[str, Any]:
    """Return the settings `paint` as arguments of this pipeline's call for `count` prompts (`teachers.Traits`)."""
    known = inspect.signature(pipe.__call__).parameters
    call = teachers.guess(pipe)
    options: dict[str, Any] = {
        "num_inference_steps": paint.steps,
        **call.switches,
        **call.arguments(paint.true_guidance),
    }
    config = getattr(getattr(pipe, "transformer", None), "config", {})
    if call.embedded and config.get("guidance_embeds", True):
        options[call.embedded] = paint.guidance
    if call.guides(paint.true_guidance, getattr(pipe, "config", {})):
        options["negative_prompt"] = [""] * count
    # FLUX's second encoder reads the whole prompt, up to a separate length; the default is FLUX.1-dev's 512.
    if "tokenizer_2" in pipe.components:
        limits = [t.model_max_length for name, t in pipe.components.items() if name.startswith("tokenizer") and t]
        options["max_sequence_length"] = min(MAX_TEXT_TOKENS, max(limits, default=MAX_TEXT_TOKENS))
    return {name: value for name, value in options.items() if name in known}


def check_size(pipe: Any, images: torch.Tensor, height: int, width: int) -> None:
    """Raise UserError for images of another size than the grid's, whose panels would be cut at the wrong places."""
    tall, wide = images.shape[-2:]
    if (tall, wide) != (height, width):
        raise UserError(
            "size_invalid",
            f"{type(pipe).__name__} generated {tall}×{wide} pixels instead of the grid's {height}×{width}. "
            "Choose a paint.panel_size that it can generate, or another teacher.",
        )


def generate(pipe: Any, prompts: list[str], seeds: list[int], **options: Any) -> torch.Tensor:
    """Return images (N, 3, H, W), float32 in 0..1 on the CPU, each from the noise of its seed."""
    import torch

    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    with torch.no_grad():
        # By name: the first argument of FLUX.2's pipelines is an image.
        # Lists are copied: Z-Image's pipeline writes its chat template into the lists of its caller.
        given = {name: list(value) if isinstance(value, list) else value for name, value in options.items()}
        images = pipe(prompt=list(prompts), generator=generators, output_type="pt", **given).images
    return images.float().cpu()
