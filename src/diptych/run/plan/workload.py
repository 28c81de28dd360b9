"""A recipe with everything that its cost depends on, and the memory that its training takes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from diptych.recipe.schema import Recipe
from diptych.recipe.tasks import Grid, Task
from diptych.run.plan import arithmetic
from diptych.run.plan.assumptions import Book
from diptych.run.plan.sizes import Counts, TeacherSizes, frozen_bytes, memory_shapes
from diptych.student.runtime import presets
from diptych.train import canvases_at_once, captions_at_once


@dataclass(frozen=True)
class Workload:
    """A recipe with everything that its cost depends on."""

    recipe: Recipe
    task: Task
    teacher: TeacherSizes
    counts: Counts
    book: Book
    on_cpu: bool

    @cached_property
    def layout(self) -> Grid:
        return self.task.layout(self.recipe.write.layout)

    @cached_property
    def size(self) -> int:
        """Pixels of a panel's side."""
        return self.teacher.panel(self.recipe.paint.panel_size)

    @property
    def grids(self) -> int:
        return self.recipe.write.count * self.recipe.paint.images

    @property
    def pairs(self) -> int:
        """Every two panels, in whichever order."""
        return self.grids * math.comb(self.layout.panels, 2)

    @property
    def candidates(self) -> int:
        return 2 * self.pairs

    @cached_property
    def kept(self) -> int:
        return round(self.candidates * self.book["keep_rate"])

    @property
    def text_flops(self) -> float:
        """Of one prompt through the text encoders."""
        return 2.0 * self.counts.text * self.teacher.text_tokens

    def number_bytes(self, asked: str) -> int:
        """Bytes of a number in a precision; `auto` is settled as the device decides."""
        return 4 if asked == "float32" or (asked == "auto" and self.on_cpu) else 2

    def canvas(self, rows: int, cols: int) -> arithmetic.Canvas:
        image = arithmetic.image_tokens(rows * self.size, cols * self.size, self.teacher.factor)
        return arithmetic.Canvas(image, self.teacher.text_tokens)

    def money(self, role: str, spent: dict[str, int]) -> float | None:
        """Of tokens in and out; None without both prices."""
        prices = [self.book.maybe(f"{role}_{way}_price") for way in ("input", "output")]
        if None in prices:
            return None
        return sum(n * (price or 0.0) for n, price in zip(spent.values(), prices, strict=True)) / 1e6

    def row_bytes(self, name: str, panels: int) -> float:
        """Bytes of a row with images of `panels` panels: as measured or set (`name`), else counted."""
        if self.book.known[name].value is not None:
            return self.book[name]
        return panels * self.size**2 * self.book["pixel_bytes"] + self.book["row_bytes"]

    def hours(self, seconds: str, times: int, flops: float, share: str) -> float:
        """Device hours of `times` pieces of work: by the seconds of one, measured or set, else by operations.

        Who chooses a device or its rate asks about that one, and not about where something was measured.
        """
        known = self.book.known[seconds]
        if known.of == "set" or (known.value is not None and not self.book.was_set("tflops", share)):
            return times * self.book[seconds] / 3600
        return arithmetic.hours(flops, self.book["tflops"], self.book[share])


@dataclass(frozen=True)
class TrainingMemory:
    """The device memory of each phase of a training, from captions to sample sheets: the largest one has to fit.

    `online`: captions are encoded in every step."""

    work: Workload
    shapes: arithmetic.Shapes
    canvas: arithmetic.Canvas
    size: tuple[int, int]  # pixels of the canvas: height, width
    trained: arithmetic.Trained
    online: bool

    @property
    def tokens(self) -> int:
        """Tokens of the canvas that is encoded, which a condition or a reference has as well."""
        return arithmetic.image_tokens(*self.size, self.work.teacher.factor)

    @property
    def number(self) -> int:
        """Bytes of a number that training computes with."""
        return self.work.number_bytes(self.work.recipe.distill.precision)

    @property
    def wide(self) -> int:
        """Bytes of a number of the loaded parts."""
        return 4 if self.work.on_cpu else 2

    @property
    def processes(self) -> int:
        return int(self.work.book["devices"])

    @property
    def share(self) -> int:
        """Pairs of a step in one process."""
        return math.ceil(self.work.recipe.distill.batch_size / self.processes)

    @property
    def rows(self) -> int:
        """Pairs in one forward pass."""
        return min(self.work.recipe.distill.micro_batch or self.share, self.share)

    @property
    def offloads(self) -> bool:
        return self.work.recipe.distill.offload == "blocks" and not self.work.on_cpu

    def phases(self) -> dict[str, int]:
        """Bytes of each phase at its most, in the order in which they come."""
        settings, work = self.work.recipe.distill, self.work
        whole, numbers = self.trained.whole, self.trained.numbers
        text, vae = work.counts.text * self.wide, work.counts.vae * self.wide
        kept_text = text if self.online or work.on_cpu else 0
        loaded = work.counts.transformer * self.wide if whole else self.frozen(self.wide)
        if self.offloads:
            loaded = 0.0  # it waits in main memory
        tower = presets.text_activations(memory_shapes(work.teacher), work.teacher.text_tokens, self.wide)
        encoding = tower * captions_at_once(work.teacher.text_tokens)
        canvases = canvases_at_once(*self.size)
        half = (self.size[0], self.size[1] // 2)  # those formulas are for a canvas of two panels
        vae_config = work.teacher.configs["vae"]
        encoded = presets.encoding(vae_config, half, self.wide) * canvases
        decoded = presets.decoding(vae_config, half, 0, self.wide)
        drawing = arithmetic.forward_bytes(self.shapes, self.canvas, 1, self.trained, self.wide)
        drawn = max(drawing, decoded)

        held = sum(self.held().values())
        resting = held - self.gradients  # gradients are freed after each step
        found = {
            "captions": loaded + text + vae + encoding,
            "latents": loaded + text + vae + encoded,
        }
        if settings.preference:
            adapters = 0 if whole else numbers * self.wide
            found["negatives"] = loaded + adapters + kept_text + vae + drawn * canvases
        if settings.sharding == "full" and self.processes > 1:
            # Each process has the whole weights before they are split.
            found["splitting"] = (numbers * 4 if whole else self.frozen(self.number) + numbers * 4) + kept_text + vae
        found["steps"] = held + self.activations + self.batch + (encoding if self.online else 0)
        found["validation"] = resting + self.batch + (encoding if self.online else 0)
        found["validation"] += arithmetic.forward_bytes(self.shapes, self.canvas, self.rows, self.trained, self.number)
        copies = 0 if whole else numbers * self.wide  # adapters as their file gives them
        found["samples"] = resting + copies + drawn
        return {name: round(size) for name, size in found.items()}

    def frozen(self, number: int) -> float:
        """Bytes of the frozen weights on the device, in numbers of N bytes."""
        settings = self.work.recipe.distill
        if self.trained.whole:
            return 0.0
        frozen = float(frozen_bytes(self.work.teacher, settings.quantize, number))
        if settings.quantize != "none":  # a matrix is unpacked when it is used
            frozen += number * max(out * into for out, into in arithmetic.linears(self.shapes).values())
        if self.offloads:
            matrices = arithmetic.block_matrices(self.shapes)  # one block's are there at a time
            frozen -= (sum(matrices.values()) - max(matrices.values())) * number
        return frozen

    def held(self) -> dict[str, float]:
        """Bytes that a process holds all the time while it trains."""
        settings, work = self.work.recipe.distill, self.work
        averages = arithmetic.TRAINED_BYTES * bool(settings.ema)
        state = arithmetic.TRAINED_BYTES * (1 + bool(settings.preference)) + averages  # and what it started from
        state += arithmetic.OPTIMIZER_BYTES[settings.optimizer]
        split = self.processes if settings.sharding == "full" else 1
        # select() keeps frozen weights in bfloat16 on a GPU that computes in it.
        number = 4 if work.on_cpu else self.number
        frozen = self.frozen(number) / split
        if split > 1:  # the block that computes and the next one are gathered
            gathered = max(arithmetic.block_matrices(self.shapes).values())
            frozen += 2 * gathered * (arithmetic.TRAINED_BYTES if self.trained.whole else number)
        # Text encoders leave an accelerator once all captions are encoded, before anything is trained.
        text = work.counts.text * self.wide if self.online or work.on_cpu else 0
        return {
            "weights": frozen + work.counts.vae * self.wide + text,
            "trained": self.trained.numbers * state / split + self.gradients,
        }

    @property
    def gradients(self) -> float:
        settings = self.work.recipe.distill
        split = self.processes if settings.sharding == "full" else 1
        return self.trained.numbers * arithmetic.TRAINED_BYTES / split

    @property
    def activations(self) -> float:
        settings = self.work.recipe.distill
        rows = self.rows * (2 if settings.preference else 1)  # each target beside its negative
        return arithmetic.step_bytes(
            self.shapes, self.canvas, rows, self.trained, settings.gradient_checkpointing, self.number
        )

    @property
    def batch(self) -> float:
        """Latents and text of the pairs in a forward pass; the others wait in main memory."""
        channels = self.work.counts.shapes["x_embedder.weight"][1]
        text = self.canvas.text * self.work.counts.shapes["context_embedder.weight"][1] * self.wide
        sets = 4 if self.work.recipe.distill.preference else 3  # clean, condition, noise; and negatives
        return self.rows * (sets * self.tokens * channels * 4 + text)
