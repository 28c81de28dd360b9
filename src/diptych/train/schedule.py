"""The samples of each training step: pairs, sizes and order, and their noise and dropout.

There is no global random generator. A sample's noise level, dropout and noise are a function of (run seed, sample id,
turn), where the turn is the epoch unless its data set has a weight. The order of an epoch is a function of (run seed,
epoch), and the position in it a function of the step. So a resumed run, a prefetching run and a run on another number
of devices have the same samples with the same noise.

Panels may have several sizes. Each pair is trained at the size nearest to its images, and all samples of a batch have
one size. The sizes come from the recipe or, for `auto`, from diffusers' ladder of aspect ratios; each has its timestep
shift. The bucket of a step is a function of the step: the batches of every bucket are spread evenly over an epoch, in
proportion to its pairs.
"""

from __future__ import annotations

import hashlib
import heapq
import logging
import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal

import torch

from diptych.data.records import prompt_of, seed_of
from diptych.student.canvas import Canvas
from diptych.student.families import family_of
from diptych.train.cache import CachedPair, Latents
from diptych.train.objective import Batch, shifted

if TYPE_CHECKING:
    from diptych.recipe.schema import Distill
    from diptych.student.reference_pipeline import ReferencePipeline

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Draw:
    """The random values of one sample in one epoch."""

    sigma: float
    drop_reference: bool
    drop_text: bool
    noise: torch.Tensor  # (N, C) float32
    instruct: bool  # use the instruction instead of the caption


def draw(options: Distill, sample_id: str, epoch: int, shape: tuple[int, int]) -> Draw:
    """Noise level, dropout and noise (of `shape`) of a sample in an epoch, always on the CPU.

    In `options`, `shift` and `instructions` must be resolved to numbers.
    """
    from diffusers.training_utils import compute_density_for_timestep_sampling

    generator = torch.Generator().manual_seed(seed_of(options.seed or 0, sample_id, f"train {epoch}"))
    density = compute_density_for_timestep_sampling(
        "logit_normal" if options.timestep_density == "logit_normal" else "none",
        1,
        options.logit_mean,
        options.logit_std,
        generator=generator,
    )
    chance = torch.rand(1, generator=generator).item()
    both = options.both_dropout
    reference = both + options.reference_dropout
    return Draw(
        sigma=shifted(density, float(options.shift)).item(),
        drop_reference=chance < reference,
        drop_text=chance < both or reference <= chance < reference + options.text_dropout,
        noise=torch.randn(shape, generator=generator),
        instruct=torch.rand(1, generator=generator).item() < float(options.instructions),
    )


def fixed_noise(seed: int, sample_id: str, sigma: float, shape: tuple[int, int]) -> torch.Tensor:
    """The noise of a validation sample at a noise level, equal at every validation of every run with this seed."""
    generator = torch.Generator().manual_seed(seed_of(seed, sample_id, f"validate {sigma}"))
    return torch.randn(shape, generator=generator)


@dataclass
class Order:
    """The samples of each step. Each epoch is a permutation of all samples, and batches continue across epochs.

    `sources` are (rows, weight) of the rows' data sets, in order; the default is one of weight 1. An epoch has a
    source's rows `weight` times: for 2, all of them twice; for 0.5, half of them, and the other half in the next epoch.
    """

    count: int
    batch_size: int
    seed: int
    sources: Sequence[tuple[int, float]] = ()
    _epochs: dict[int, list[tuple[int, int]]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.sources = self.sources or ((self.count, 1.0),)
        assert sum(rows for rows, _ in self.sources) == self.count, "the sources' rows are all rows"
        self._taken = [max(1, round(rows * weight)) if rows else 0 for rows, weight in self.sources]

    @property
    def epoch_size(self) -> int:
        """Samples in an epoch."""
        return sum(self._taken)

    def at(self, step: int) -> list[tuple[int, int]]:
        """(row, turn) of every sample in the batch of step `step` (the first is 1). A row's turns are numbered from 0;
        with one source of weight 1 they are the epochs."""
        first = (step - 1) * self.batch_size
        places = [divmod(i, self.epoch_size) for i in range(first, first + self.batch_size)]
        for finished in [epoch for epoch in self._epochs if epoch < places[0][0]]:
            del self._epochs[finished]
        return [self._epoch(epoch)[place] for epoch, place in places]

    def _epoch(self, number: int) -> list[tuple[int, int]]:
        if number not in self._epochs:
            samples: list[tuple[int, int]] = []
            start = 0
            for (rows, _), taken in zip(self.sources, self._taken, strict=True):
                samples += [(start + i % rows, i // rows) for i in range(number * taken, (number + 1) * taken)]
                start += rows
            generator = torch.Generator().manual_seed(seed_of(self.seed, f"epoch {number}", "order"))
            order = torch.randperm(len(samples), generator=generator).tolist()
            self._epochs[number] = [samples[i] for i in order]
        return self._epochs[number]


@dataclass(frozen=True)
class Bucket:
    """A canvas size for training, and its timestep shift."""

    canvas: Canvas
    shift: float


def choose(
    pipe: ReferencePipeline,
    sizes: Sequence[tuple[int, int]] | Literal["auto"],
    side: int | None,
    shift: float | Literal["auto"],
) -> list[Bucket]:
    """The buckets of a recipe (`distill.buckets`, `distill.shift`). Without sizes, one square of this side."""
    from diffusers.training_utils import generate_aspect_ratio_buckets

    side = side or pipe.default_panel_size
    if sizes == "auto":
        sizes = generate_aspect_ratio_buckets(side, 2 * pipe.vae_scale_factor)
    canvases = [pipe.canvas(*size) for size in sizes or [(side, side)]]
    return [
        Bucket(canvas, timestep_shift(pipe, canvas, pipe.settings.steps) if shift == "auto" else shift)
        for canvas in canvases
    ]


def timestep_shift(pipe: Any, canvas: Canvas, steps: int) -> float:
    """The shift s with which the model of a pipeline, a student's or a stock one, samples a canvas of this size in so
    many steps (`distill.shift: auto`)."""
    config = pipe.scheduler.config
    mu = family_of(type(pipe.transformer).__name__).shift(config, canvas.tokens, steps)
    return float(config.get("shift", 1.0)) if mu is None else math.exp(mu)


def named(buckets: Sequence[Bucket]) -> str:
    """The sizes of buckets as a text for checkpoints: `512`, or `512,448x576`."""
    sizes = [(bucket.canvas.panel_height, bucket.canvas.panel_width) for bucket in buckets]
    return ",".join(str(height) if height == width else f"{height}x{width}" for height, width in sizes)


class Schedule:
    """The rows of each step, for any number of buckets. With one bucket, they are `Order`'s."""

    def __init__(
        self, rows: Sequence[int], latents: Latents, weights: Sequence[float], batch_size: int, seed: int
    ) -> None:
        """`weights` are the weights of the data sets of `latents`."""
        ends = list(accumulate(latents.counts))
        self._rows: list[list[int]] = []
        self._orders: list[Order] = []
        for bucket in sorted({latents.samples[row].bucket for row in rows}):
            of_bucket = [row for row in rows if latents.samples[row].bucket == bucket]
            owners = [bisect_right(ends, row) for row in of_bucket]
            sources = [(owners.count(number), weight) for number, weight in enumerate(weights)]
            self._rows.append(of_bucket)
            self._orders.append(Order(len(of_bucket), batch_size, seed, sources))
        self.count = len(rows)
        self.epoch_size = sum(order.epoch_size for order in self._orders)
        self._steps: list[tuple[int, int]] = []  # (index of the order, its step) of each step so far
        self._due = [(0.5 / order.epoch_size, number, 0) for number, order in enumerate(self._orders)]
        heapq.heapify(self._due)

    def at(self, step: int) -> list[tuple[int, int]]:
        """(row, turn) of every sample in the batch of step `step` (the first is 1), all of one bucket."""
        while len(self._steps) < step:
            _, number, done = self._due[0]
            self._steps.append((number, done + 1))
            heapq.heapreplace(self._due, ((done + 1.5) / self._orders[number].epoch_size, number, done + 1))
        number, step_of_order = self._steps[step - 1]
        return [(self._rows[number][place], turn) for place, turn in self._orders[number].at(step_of_order)]


def ahead(make_batch: Callable[[int], Batch], steps: range, device: torch.device) -> Iterator[Batch]:
    """The batches of these steps, in main memory, pinned for a GPU. The next one is made while an accelerator
    computes."""
    if device.type == "cpu":
        # A second thread would only take cores from the step.
        for step in steps:
            yield make_batch(step)
        return

    def pinned(step: int) -> Batch:
        return make_batch(step).map(lambda tensor: tensor.pin_memory() if device.type == "cuda" else tensor)

    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(pinned, steps[0]) if steps else None
        for step in steps:
            assert following is not None
            batch = following.result()
            following = pool.submit(pinned, step + 1) if step < steps[-1] else None
            yield batch


def split(samples: Sequence[CachedPair], held_out: int) -> tuple[list[int], list[int]]:
    """(rows to train on, rows to validate on).

    All grids of a prompt are held out together, in the order of the hashes of their ids, up to `held_out` pairs and at
    most a fifth of all pairs. So training has no validation subject, and the choice does not depend on the order. If
    every prompt (or reference, in imported data) has more pairs than `held_out`, one complete prompt is held out. If
    that is more than a fifth, single pairs are held out, and a warning says that training has their references.
    """
    most = len(samples) // 5
    wanted = min(held_out, most)
    prompts = [prompt_of(sample.grid_id) for sample in samples]
    validation = _lowest(prompts, wanted)
    if not validation and wanted:
        smallest = min(Counter(prompts).values())
        validation = _lowest(prompts, smallest) if smallest <= most else []
    if not validation and wanted:
        validation = _lowest([sample.id for sample in samples], wanted)
        log.warning(
            "%d of %d pairs are held out for validation, but training has their references with other targets, because "
            "every reference has more than %d pairs.",
            len(validation),
            len(samples),
            wanted,
        )
    elif held_out and not wanted:
        log.warning("No pair is held out for validation: that needs at least 5 pairs, and there are %d.", len(samples))
    held = set(validation)
    return [row for row in range(len(samples)) if row not in held], validation


def _lowest(groups: Sequence[str], wanted: int) -> list[int]:
    """The rows of complete groups in the order of their hashes, at most `wanted` rows. Leading groups that are too
    large are skipped; after that, the first one that does not fit ends the list."""
    rows: dict[str, list[int]] = {}
    for row, group in enumerate(groups):
        rows.setdefault(group, []).append(row)
    chosen: list[int] = []
    for group in sorted(rows, key=lambda g: hashlib.sha256(f"validation {g}".encode()).digest()):
        if len(chosen) + len(rows[group]) <= wanted:
            chosen += rows[group]
        elif chosen:
            break
    return chosen
