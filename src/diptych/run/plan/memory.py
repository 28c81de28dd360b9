"""The device memory of each phase of a training, from captions to sample sheets: the largest one has to fit."""

from __future__ import annotations

import math
from dataclasses import dataclass

from diptych.run.plan import arithmetic
from diptych.run.plan.job import Job
from diptych.run.plan.teacher import frozen_bytes, memory_shapes
from diptych.student.runtime import presets
from diptych.train import canvases_at_once, captions_at_once


@dataclass(frozen=True)
class Training:
    """What a training's memory depends on besides the recipe. `online`: captions are encoded in every step."""

    job: Job
    shapes: arithmetic.Shapes
    canvas: arithmetic.Canvas
    size: tuple[int, int]  # pixels of the canvas: height, width
    trained: arithmetic.Trained
    online: bool

    @property
    def number(self) -> int:
        """Bytes of a number that training computes with."""
        return self.job.number_bytes(self.job.recipe.distill.precision)

    @property
    def wide(self) -> int:
        """Bytes of a number of the loaded parts."""
        return 4 if self.job.on_cpu else 2

    @property
    def processes(self) -> int:
        return int(self.job.book["devices"])

    @property
    def share(self) -> int:
        """Pairs of a step in one process."""
        return math.ceil(self.job.recipe.distill.batch_size / self.processes)

    @property
    def rows(self) -> int:
        """Pairs in one forward pass."""
        return min(self.job.recipe.distill.micro_batch or self.share, self.share)

    @property
    def offloads(self) -> bool:
        return self.job.recipe.distill.offload == "blocks" and not self.job.on_cpu

    def phases(self) -> dict[str, int]:
        """Bytes of each phase at its most, in the order in which they come."""
        settings, job = self.job.recipe.distill, self.job
        whole, numbers = self.trained.whole, self.trained.numbers
        text, vae = job.counts.text * self.wide, job.counts.vae * self.wide
        kept_text = text if self.online or job.on_cpu else 0
        loaded = job.counts.transformer * self.wide if whole else self.frozen(self.wide)
        if self.offloads:
            loaded = 0.0  # it waits in main memory
        tower = presets.text_activations(memory_shapes(job.teacher), job.teacher.text_tokens, self.wide)
        encoding = tower * captions_at_once(job.teacher.text_tokens)
        canvases = canvases_at_once(*self.size)
        half = (self.size[0], self.size[1] // 2)  # those formulas are for a canvas of two panels
        vae_config = job.teacher.configs["vae"]
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
        settings = self.job.recipe.distill
        if self.trained.whole:
            return 0.0
        frozen = float(frozen_bytes(self.job.teacher, settings.quantize, number))
        if settings.quantize != "none":  # a matrix is unpacked when it is used
            frozen += number * max(out * into for out, into in arithmetic.linears(self.shapes).values())
        if self.offloads:
            matrices = arithmetic.block_matrices(self.shapes)  # one block's are there at a time
            frozen -= (sum(matrices.values()) - max(matrices.values())) * number
        return frozen

    def held(self) -> dict[str, float]:
        """Bytes that a process holds all the time while it trains."""
        settings, job = self.job.recipe.distill, self.job
        averages = arithmetic.TRAINED_BYTES * bool(settings.ema)
        state = arithmetic.TRAINED_BYTES * (1 + bool(settings.preference)) + averages  # and what it started from
        state += arithmetic.OPTIMIZER_BYTES[settings.optimizer]
        split = self.processes if settings.sharding == "full" else 1
        # select() keeps frozen weights in bfloat16 on a GPU that computes in it.
        number = 4 if job.on_cpu else self.number
        frozen = self.frozen(number) / split
        if split > 1:  # the block that computes and the next one are gathered
            gathered = max(arithmetic.block_matrices(self.shapes).values())
            frozen += 2 * gathered * (arithmetic.TRAINED_BYTES if self.trained.whole else number)
        # Text encoders leave an accelerator once all captions are encoded, before anything is trained.
        text = job.counts.text * self.wide if self.online or job.on_cpu else 0
        return {
            "weights": frozen + job.counts.vae * self.wide + text,
            "trained": self.trained.numbers * state / split + self.gradients,
        }

    @property
    def gradients(self) -> float:
        settings = self.job.recipe.distill
        split = self.processes if settings.sharding == "full" else 1
        return self.trained.numbers * arithmetic.TRAINED_BYTES / split

    @property
    def activations(self) -> float:
        settings = self.job.recipe.distill
        rows = self.rows * (2 if settings.preference else 1)  # each target beside its negative
        return arithmetic.step_bytes(
            self.shapes, self.canvas, rows, self.trained, settings.gradient_checkpointing, self.number
        )

    @property
    def batch(self) -> float:
        """Latents and text of the pairs in a forward pass; the others wait in main memory."""
        channels = self.job.counts.shapes["x_embedder.weight"][1]
        text = self.canvas.text * self.job.counts.shapes["context_embedder.weight"][1] * self.wide
        sets = 4 if self.job.recipe.distill.preference else 3  # clean, condition, noise; and negatives
        return self.rows * (sets * self.canvas.image * channels * 4 + text)
