"""What the steps of a training see: which pairs, at which size and in which order, and what is random about them.

Nothing is drawn from a global generator. A sample's noise level, dropout and noise are a function of (run seed, sample
id, its turn: the epoch, unless its data set has a weight); the order of an epoch is a function of (run seed, epoch);
the position in it is a function of the step. So a resumed run, a prefetching one and one on another number of devices
all see the same samples with the same noise.

Panels may have several shapes: each pair is trained at the size nearest to its own, and a batch is of one size. Sizes
come from the recipe or, for `auto`, from diffusers' ladder of aspect ratios; each has its own timestep shift. Which
bucket a step takes is a function of the step: every bucket has its batches spread evenly over an epoch, in proportion
to its pairs.
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
from typing import TYPE_CHECKING, Literal

import torch

from diptych.data.records import prompt_of, seed_of
from diptych.student.canvas import Canvas
from diptych.train.cache import Latents, Sample
from diptych.train.objective import Batch, shifted

if TYPE_CHECKING:
    from diptych.recipe.schema import Distill
    from diptych.student.pipeline import DiptychPipeline

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Draw:
    """One sample's share of chance in one epoch."""

    sigma: float
    drop_reference: bool
    drop_text: bool
    noise: torch.Tensor  # (N, C) float32
    instruct: bool  # told the instruction in place of the caption


def draw(options: Distill, sample_id: str, epoch: int, shape: tuple[int, int]) -> Draw:
    """Noise level, dropout and noise (of `shape`) of a sample in an epoch; always on the CPU.

    `options` are resolved: `shift` and `instructions` are numbers.
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
    """The noise of a validation sample at a noise level: the same at every validation of every run with this seed."""
    generator = torch.Generator().manual_seed(seed_of(seed, sample_id, f"validate {sigma}"))
    return torch.randn(shape, generator=generator)


@dataclass
class Order:
    """Which samples a step takes: each epoch is a permutation of all of them, and batches run on across epochs.

    `sources` are (rows, weight) of the data sets that the rows come from, in order; none is one of weight 1. An epoch
    has a source's rows `weight` times: all of them twice, or half of them and in the next epoch the other half.
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
        """(row, turn) of every sample of the batch that makes step `step` (the first is 1); a row's turns are numbered
        from 0, and with one source of weight 1 they are the epochs."""
        first = (step - 1) * self.batch_size
        places = [divmod(i, self.epoch_size) for i in range(first, first + self.batch_size)]
        for gone in [epoch for epoch in self._epochs if epoch < places[0][0]]:
            del self._epochs[gone]
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
    """A canvas that pairs are trained on, and the timestep shift that it is trained with."""

    canvas: Canvas
    shift: float


def choose(
    pipe: DiptychPipeline,
    sizes: Sequence[tuple[int, int]] | Literal["auto"],
    side: int | None,
    shift: float | Literal["auto"],
) -> list[Bucket]:
    """The buckets of a recipe (`distill.buckets`, `distill.shift`); where it names none, one square of this side."""
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


def ahead(assemble: Callable[[int], Batch], steps: range, device: torch.device) -> Iterator[Batch]:
    """The batches of these steps, in main memory, from where a GPU takes them fast; an accelerator computes while the
    next one is made."""
    if device.type == "cpu":
        # A second thread would only take cores from the step.
        for step in steps:
            yield assemble(step)
        return

    def pinned(step: int) -> Batch:
        return assemble(step).map(lambda tensor: tensor.pin_memory() if device.type == "cuda" else tensor)

    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(pinned, steps[0]) if steps else None
        for step in steps:
            assert following is not None
            batch = following.result()
            following = pool.submit(pinned, step + 1) if step < steps[-1] else None
            yield batch


def split(samples: Sequence[Sample], held_out: int) -> tuple[list[int], list[int]]:
    """Row numbers to train on and to validate on.

    All grids of a prompt are held out together, those with the lowest hash of their id, until they make `held_out`
    pairs, but never more than a fifth of all pairs; so no validation subject was trained on and the choice does not
    move with the order. Where every prompt (or reference, in other people's data) has more pairs than `held_out`, one
    whole prompt is held out; where it would be more than a fifth, single pairs are held out, and a warning says that
    their references are trained on.
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
            "%d of %d pairs are held out for validation, and training sees their references with other targets: "
            "every reference has more than %d pairs",
            len(validation),
            len(samples),
            wanted,
        )
    elif held_out and not wanted:
        log.warning("no pair is held out for validation: that takes at least 5 pairs, and there are %d", len(samples))
    held = set(validation)
    return [row for row in range(len(samples)) if row not in held], validation


def _lowest(groups: Sequence[str], wanted: int) -> list[int]:
    """The rows of whole groups, lowest hash first, up to the first that would make more than `wanted` rows; if that is
    the very first group, of those that do fit."""
    rows: dict[str, list[int]] = {}
    for row, group in enumerate(groups):
        rows.setdefault(group, []).append(row)
    found: list[int] = []
    for group in sorted(rows, key=lambda g: hashlib.sha256(f"validation {g}".encode()).digest()):
        if len(found) + len(rows[group]) <= wanted:
            found += rows[group]
        elif found:
            break
    return found
