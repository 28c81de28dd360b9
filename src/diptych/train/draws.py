"""What is random in training, and why a run can be repeated: nothing is drawn from a global generator.

A sample's noise level, dropout and noise are a function of (run seed, sample id, its turn: the epoch, unless its data
set has a weight); the order of an epoch is a
function of (run seed, epoch); the position in it is a function of the step. So a resumed run, a prefetching one and one
on another number of devices all see the same samples with the same noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from diptych.data.records import seed_of
from diptych.train.objective import shifted

if TYPE_CHECKING:
    from diptych.recipe.schema import Distill


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
