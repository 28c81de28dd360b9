"""Panels of several shapes: each pair is trained at the size nearest to its own, and a batch is of one size.

Sizes come from the recipe or, for `auto`, from diffusers' ladder of aspect ratios; each has its own timestep shift.
Which bucket a step takes is a function of the step: every bucket has its batches spread evenly over an epoch, in
proportion to its pairs. So the position in the data is the number of the step, as it is with one size.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Literal

from diptych.student.canvas import Canvas
from diptych.train.draws import Order
from diptych.train.latents import Latents

if TYPE_CHECKING:
    from diptych.student.pipeline import DiptychPipeline


@dataclass(frozen=True)
class Bucket:
    """A canvas that pairs are trained on, and the timestep shift that it is trained with."""

    canvas: Canvas
    shift: float


def choose(
    pipe: DiptychPipeline,
    sizes: Sequence[tuple[int, int]] | Literal["auto"],
    side: int | None,
    shift: float | Literal["auto"],
) -> list[Bucket]:
    """The buckets of a recipe (`sections.Distill.buckets`, `shift`); where it names none, one square of this side."""
    from diffusers.training_utils import generate_aspect_ratio_buckets

    side = side or pipe.default_panel_size
    if sizes == "auto":
        sizes = generate_aspect_ratio_buckets(side, 2 * pipe.vae_scale_factor)
    canvases = [pipe.canvas(*size) for size in sizes or [(side, side)]]
    return [Bucket(canvas, timestep_shift(pipe, canvas) if shift == "auto" else shift) for canvas in canvases]


def timestep_shift(pipe: DiptychPipeline, canvas: Canvas) -> float:
    """The shift s that the base samples a canvas of this size with (`distill.shift: auto`)."""
    from diptych.student.sampler import shift_exponent

    config = pipe.scheduler.config
    mu = shift_exponent(config, canvas.tokens)
    return float(config.get("shift", 1.0)) if mu is None else math.exp(mu)


def named(buckets: Sequence[Bucket]) -> str:
    """The sizes of these, for a checkpoint: `512`, or `512,448x576`."""
    sizes = [(bucket.canvas.panel_height, bucket.canvas.panel_width) for bucket in buckets]
    return ",".join(str(height) if height == width else f"{height}x{width}" for height, width in sizes)


class Schedule:
    """Which of the rows to train on make a step; with one bucket, what `Order` says of them."""

    def __init__(
        self, rows: Sequence[int], latents: Latents, weights: Sequence[float], batch_size: int, seed: int
    ) -> None:
        """`weights` are those of the data sets that `latents` come from."""
        ends = list(accumulate(latents.counts))
        self._rows: list[list[int]] = []
        self._orders: list[Order] = []
        for bucket in sorted({latents.samples[row].bucket for row in rows}):
            own = [row for row in rows if latents.samples[row].bucket == bucket]
            owners = [bisect_right(ends, row) for row in own]
            sources = [(owners.count(number), weight) for number, weight in enumerate(weights)]
            self._rows.append(own)
            self._orders.append(Order(len(own), batch_size, seed, sources))
        self.count = len(rows)
        self.epoch_size = sum(order.epoch_size for order in self._orders)
        self._steps: list[tuple[int, int]] = []  # (which order, which of its steps) of each step so far
        self._due = [(0.5 / order.epoch_size, number, 0) for number, order in enumerate(self._orders)]
        heapq.heapify(self._due)

    def at(self, step: int) -> list[tuple[int, int]]:
        """(row, turn) of every sample of the batch that makes step `step` (the first is 1), all of one bucket."""
        while len(self._steps) < step:
            _, number, done = self._due[0]
            self._steps.append((number, done + 1))
            heapq.heapreplace(self._due, ((done + 1.5) / self._orders[number].epoch_size, number, done + 1))
        number, own = self._steps[step - 1]
        return [(self._rows[number][place], turn) for place, turn in self._orders[number].at(own)]
