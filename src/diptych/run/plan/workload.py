"""A recipe with everything that its cost depends on, and the memory of its training."""

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
        """The grid layout of the recipe."""
        return self.task.layout(self.recipe.write.layout)

    @cached_property
    def size(self) -> int:
        """A panel's side in pixels."""
        return self.teacher.panel(self.recipe.paint.panel_size)

    @property
    def grids(self) -> int:
        """Number of grids."""
        return self.recipe.write.count * self.recipe.paint.images

    @property
    def pairs(self) -> int:
        """Number of unordered pairs of panels."""
        return self.grids * math.comb(self.layout.panels, 2)

    @property
    def candidates(self) -> int:
        """Number of ordered pairs of panels."""
        return 2 * self.pairs

    @cached_property
    def kept(self) -> int:
        """Number of accepted pairs."""
        return round(self.candidates * self.book["keep_rate"])

    @property
    def text_flops(self) -> float:
        """Operations of one prompt in the text encoders."""
        return 2.0 * self.counts.text * self.teacher.text_tokens

    def number_bytes(self, precision: str) -> int:
        """Return the bytes of a number in a precision; `auto` depends on the device."""
        return 4 if precision == "float32" or (precision == "auto" and self.on_cpu) else 2

    def canvas(self, rows: int, cols: int) -> arithmetic.TokenCounts:
        """Return the tokens of a grid of rows×cols panels."""
        image = arithmetic.image_tokens(rows * self.size, cols * self.size, self.teacher.factor)
        return arithmetic.TokenCounts(image, self.teacher.text_tokens)

    def money(self, role: str, spent: dict[str, int]) -> float | None:
        """Return the price of input and output tokens; None without both prices."""
        prices = [self.book.maybe(f"{role}_{way}_price") for way in ("input", "output")]
        if None in prices:
            return None
        return sum(n * (price or 0.0) for n, price in zip(spent.values(), prices, strict=True)) / 1e6

    def row_bytes(self, name: str, panels: int) -> float:
        """Return the bytes of a row with images of `panels` panels: measured or set (`name`), else counted."""
        if self.book.known[name].value is not None:
            return self.book[name]
        return panels * self.size**2 * self.book["pixel_bytes"] + self.book["row_bytes"]

    def hours(self, seconds: str, times: int, flops: float, share: str) -> float:
        """Return the device hours of `times` units of work: by the seconds of one unit, else by operations.

        Measured seconds do not apply if a device or its rate is set, because they come from another device.
        """
        known = self.book.known[seconds]
        if known.of == "set" or (known.value is not None and not self.book.was_set("tflops", share)):
            return times * self.book[seconds] / 3600
        return arithmetic.hours(flops, self.book["tflops"], self.book[share])


@dataclass(frozen=True)
class TrainingMemory:
    """The device memory of each phase of a training, from captions to sample sheets. The largest phase must fit.

    `online` means that captions are encoded in every step.
    """

    work: Workload
    shapes: arithmetic.Shapes
    canvas: arithmetic.TokenCounts
    size: tuple[int, int]  # pixels of the canvas: height, width
    trained: arithmetic.TrainedSize
    online: bool

    @property
    def tokens(self) -> int:
        """Tokens of the canvas that is encoded, which a condition or a reference has as well."""
        return arithmetic.image_tokens(*self.size, self.work.teacher.factor)

    @property
    def number(self) -> int:
        """Bytes of a number in the training computation."""
        return self.work.number_bytes(self.work.recipe.distill.precision)

    @property
    def wide(self) -> int:
        """Bytes of a number in the loaded parts."""
        return 4 if self.work.on_cpu else 2

    @property
    def processes(self) -> int:
        """Number of training processes."""
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
        """Whether frozen blocks are kept in main memory."""
        return self.work.recipe.distill.offload == "blocks" and not self.work.on_cpu

    def phases(self) -> dict[str, int]:
        """Return the maximum bytes of each phase, in their order."""
        settings, work = self.work.recipe.distill, self.work
        whole, numbers = self.trained.whole, self.trained.numbers
        text, vae = work.counts.text * self.wide, work.counts.vae * self.wide
        kept_text = text if self.online or work.on_cpu else 0
        loaded = work.counts.transformer * self.wide if whole else self.frozen(self.wide)
        if self.offloads:
            loaded = 0.0  # it is kept in main memory
        tower = presets.text_activations(memory_shapes(work.teacher), work.teacher.text_tokens, self.wide)
        encoding = tower * captions_at_once(work.teacher.text_tokens)
        canvases = canvases_at_once(*self.size)
        half = (self.size[0], self.size[1] // 2)  # the formulas below are for a canvas of two panels
        vae_config = work.teacher.configs["vae"]
        encoded = presets.encoding(vae_config, half, self.wide) * canvases
        decoded = presets.decoding(vae_config, half, 0, self.wide)
        sampling = max(arithmetic.forward_bytes(self.shapes, self.canvas, 1, self.trained, self.wide), decoded)

        held = sum(self.held().values())
        resting = held - self.gradients  # gradients are freed after each step
        phases = {
            "captions": loaded + text + vae + encoding,
            "latents": loaded + text + vae + encoded,
        }
        if settings.preference:
            adapters = 0 if whole else numbers * self.wide
            phases["negatives"] = loaded + adapters + kept_text + vae + sampling * canvases
        if settings.sharding == "full" and self.processes > 1:
            # Each process loads the whole weights before they are split.
            phases["splitting"] = (numbers * 4 if whole else self.frozen(self.number) + numbers * 4) + kept_text + vae
        phases["steps"] = held + self.activations + self.batch + (encoding if self.online else 0)
        phases["validation"] = resting + self.batch + (encoding if self.online else 0)
        phases["validation"] += arithmetic.forward_bytes(self.shapes, self.canvas, self.rows, self.trained, self.number)
        copies = 0 if whole else numbers * self.wide  # adapters in the precision of their file
        phases["samples"] = resting + copies + sampling
        return {name: round(size) for name, size in phases.items()}

    def frozen(self, number: int) -> float:
        """Return the bytes of the frozen weights on the device, with `number` bytes a number."""
        settings = self.work.recipe.distill
        if self.trained.whole:
            return 0.0
        frozen = float(frozen_bytes(self.work.teacher, settings.quantize, number))
        if settings.quantize != "none":  # a matrix is dequantized when it is used
            frozen += number * max(out * into for out, into in arithmetic.linears(self.shapes).values())
        if self.offloads:
            matrices = arithmetic.block_matrices(self.shapes)  # one block at a time is on the device
            frozen -= (sum(matrices.values()) - max(matrices.values())) * number
        return frozen

    def held(self) -> dict[str, float]:
        """Return the bytes that a process needs during the whole training."""
        settings, work = self.work.recipe.distill, self.work
        averages = arithmetic.TRAINED_BYTES * bool(settings.ema)
        state = (
            arithmetic.TRAINED_BYTES * (1 + bool(settings.preference)) + averages
        )  # a preference also needs the reference model
        state += arithmetic.OPTIMIZER_BYTES[settings.optimizer]
        split = self.processes if settings.sharding == "full" else 1
        # Training keeps frozen weights in bfloat16 on a GPU that computes in it.
        number = 4 if work.on_cpu else self.number
        frozen = self.frozen(number) / split
        if split > 1:  # the current block and the next one are gathered
            gathered = max(arithmetic.block_matrices(self.shapes).values())
            frozen += 2 * gathered * (arithmetic.TRAINED_BYTES if self.trained.whole else number)
        # Text encoders leave the device after all captions are encoded, before training begins.
        text = work.counts.text * self.wide if self.online or work.on_cpu else 0
        return {
            "weights": frozen + work.counts.vae * self.wide + text,
            "trained": self.trained.numbers * state / split + self.gradients,
        }

    @property
    def gradients(self) -> float:
        """Bytes of the gradients in one process."""
        settings = self.work.recipe.distill
        split = self.processes if settings.sharding == "full" else 1
        return self.trained.numbers * arithmetic.TRAINED_BYTES / split

    @property
    def activations(self) -> float:
        """Maximum bytes of the activations of a step."""
        settings = self.work.recipe.distill
        rows = self.rows * (2 if settings.preference else 1)  # each target with its negative
        return arithmetic.step_bytes(
            self.shapes, self.canvas, rows, self.trained, settings.gradient_checkpointing, self.number
        )

    @property
    def batch(self) -> float:
        """Bytes of the latents and text of the pairs in a forward pass; other pairs are in main memory."""
        channels = self.work.counts.shapes["x_embedder.weight"][1]
        text = self.canvas.text * self.work.counts.shapes["context_embedder.weight"][1] * self.wide
        sets = 4 if self.work.recipe.distill.preference else 3  # clean, condition, noise; and negatives
        return self.rows * (sets * self.tokens * channels * 4 + text)
