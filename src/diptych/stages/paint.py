"""Stage 2, paint: the teacher draws grids (paper section 3.1), with any diffusers text-to-image folder.

Each row's noise comes from its own CPU generator, seeded from its id, so a grid does not depend on its batch or device
beyond the last bits of float sums; with batches formed by the engine, one machine gives the same bytes.
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


class Paint:
    """Prompt rows to grid rows."""

    name = "paint"

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.batch_size = recipe.paint.batch_size
        self.task = tasks.load(recipe.task)

    def load(self) -> Work:
        """Opens the teacher. UserError if it cannot be, UsageError if it cannot draw panels of the recipe's size."""
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
        # What cannot work is told before gigabytes are read.
        for doubt in doubts(self.recipe, folder):
            log.warning("%s", doubt)
        held = memory_for(self.recipe, folder, device, getattr(torch, dtype))
        speed = stock.resolve_speed(folder, settings.speed)
        pipe = open_teacher(folder, getattr(torch, dtype))
        size = panel_size(pipe, settings.panel_size)
        drawing = stock.apply(pipe, held, speed, device)

        def work(rows: list[Row]) -> list[list[Row] | Failure]:
            results: dict[str, list[Row] | Failure] = {}
            for layout, group in self._by_layout(rows, results):
                options = call_options(pipe, settings, len(group))
                canvas = {"height": layout.rows * size, "width": layout.cols * size}
                drawn: dict[str, list[Row | Failure]] = {row["id"]: [] for row in group}
                for number in range(settings.images):
                    seeds = [seed_of(self.recipe.seed, row["id"], _purpose(number)) for row in group]
                    with drawing.call():
                        images = draw(pipe, [row["prompt"] for row in group], seeds, **canvas, **options)
                    check_size(pipe, images, **canvas)
                    for row, seed, image in zip(group, seeds, images, strict=True):
                        name = grid_id(row["id"], number)
                        drawn[row["id"]].append(_grid(name, row, seed, image, layout, size, model, settings.format))
                results |= {name: _together(grids) for name, grids in drawn.items()}
            return [results[row["id"]] for row in rows]

        return work

    def _by_layout(
        self, rows: list[Row], results: dict[str, list[Row] | Failure]
    ) -> Iterator[tuple[tasks.Grid, list[Row]]]:
        """The rows of each of the task's layouts, found by their number of panels; the others become Failures."""
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


def _purpose(number: int) -> str:
    """What an image's seed is for: those of one prompt have a seed each."""
    return f"paint {number}" if number else "paint"


def _together(grids: list[Row | Failure]) -> list[Row] | Failure:
    """All grids of a prompt; if one could not be drawn, the prompt fails: `failed/` has no place for a part of it."""
    broken = [grid for grid in grids if isinstance(grid, Failure)]
    return broken[0] if broken else [grid for grid in grids if not isinstance(grid, Failure)]


def _grid(
    name: str, row: Row, seed: int, image: torch.Tensor, layout: tasks.Grid, size: int, model: str, kind: str
) -> Row | Failure:
    """A grid row from its picture (3, H, W) in 0..1, kept as `kind`."""
    from PIL import Image

    if not bool(image.isfinite().all()):
        return Failure("the teacher drew no picture (numbers that are not finite); try paint.dtype: float32")
    pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
    shared = {key: row[key] for key in ("prompt", "panels", "subject", "task")}
    place = {"rows": layout.rows, "cols": layout.cols, "panel_size": size}
    cell = image_cell(Image.fromarray(pixels), f"{name}.{kind}", kind.upper())
    return {"id": name, "image": cell, "prompt_id": row["id"], **shared, "seed": seed, **place, "model": model}


def doubts(recipe: Recipe, folder: Path) -> list[str]:
    """What a recipe's owner should know before the teacher in `folder` paints. UsageError for what cannot work."""
    settings = recipe.paint
    found = [teachers.doubt(class_of(folder), settings.true_guidance)]
    found.append(teachers.advice(recipe.teacher, settings.steps, settings.true_guidance))
    return [doubt for doubt in found if doubt]


def memory_for(recipe: Recipe, folder: Path, device: torch.device, dtype: torch.dtype) -> Memory | None:
    """`paint.memory` for the teacher in `folder`, planned from its configs; None if the recipe has none.

    UsageError if it cannot work here, UserError if `auto` finds nothing that fits.
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
    drawn = {"rows": rows, "panel": (layout.rows * size, layout.cols * size // 2)}
    return stock.resolve_memory(folder, settings.memory, device, dtype, drawn)


def settle_memory(recipe: Recipe) -> str:
    """The preset that `paint.memory: auto` is on this machine, for a recipe whose device and dtype are settled."""
    import torch

    folder = models.resolve(recipe.teacher, "teacher")
    held = memory_for(recipe, folder, torch.device(recipe.device), getattr(torch, recipe.paint.dtype))
    assert held is not None
    return held.name.rpartition(" ")[2]  # "auto → 24"


def panel_size(pipe: Any, asked: int | None) -> int:
    """Pixels of a panel's side: `asked`, or the teacher's own size, at most 512. UsageError if it cannot draw that."""
    config = getattr(getattr(pipe, "vae", None), "config", None)
    size = asked or min(MAX_PANEL, int(getattr(config, "sample_size", None) or MAX_PANEL))
    unit = 2 * int(getattr(pipe, "vae_scale_factor", 8))  # the student packs 2×2 latents into a token
    if size % unit:
        near = max(unit, round(size / unit) * unit)
        raise UsageError(f"paint.panel_size {size} is not a multiple of {unit} pixels for this teacher; try {near}")
    return size


def call_options(pipe: Any, paint: Any, count: int) -> dict[str, Any]:
    """What `paint` means to this pipeline, as arguments of its call for `count` prompts (`teachers.Traits`)."""
    asks = inspect.signature(pipe.__call__).parameters
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
    # FLUX's second encoder reads the whole prompt, in a length of its own; the default is FLUX.1-dev's 512.
    if "tokenizer_2" in pipe.components:
        limits = [t.model_max_length for name, t in pipe.components.items() if name.startswith("tokenizer") and t]
        options["max_sequence_length"] = min(MAX_TEXT_TOKENS, max(limits, default=MAX_TEXT_TOKENS))
    return {name: value for name, value in options.items() if name in asks}


def check_size(pipe: Any, images: torch.Tensor, height: int, width: int) -> None:
    """UserError for images of another size than the grid's: its panels would be cut at the wrong places."""
    tall, wide = images.shape[-2:]
    if (tall, wide) != (height, width):
        raise UserError(
            f"a {type(pipe).__name__} drew {tall}×{wide} pixels where the grid has {height}×{width}; "
            "choose a paint.panel_size that it can draw, or another teacher"
        )


def draw(pipe: Any, prompts: list[str], seeds: list[int], **options: Any) -> torch.Tensor:
    """Pictures (N, 3, H, W), float32 in 0..1 on the CPU, each from the noise of its own seed."""
    import torch

    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    with torch.no_grad():
        # By name: the first thing that FLUX.2's pipelines take is a picture.
        # Lists are copied: Z-Image's pipeline writes its chat template into those that it is given.
        given = {name: list(value) if isinstance(value, list) else value for name, value in options.items()}
        images = pipe(prompt=list(prompts), generator=generators, output_type="pt", **given).images
    return images.float().cpu()
