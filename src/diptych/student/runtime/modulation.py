"""Exact modulation precompute: FLUX's AdaLN weights leave the device, and one table of their outputs takes their place.

The AdaLN linears (27 % of FLUX.1's 11.9 B parameters) see only the timestep, the distilled guidance and the pooled
text: never the image. All of a call's steps are known before its loop, so one product per linear over all steps gives
the same numbers (to float rounding: other batch sizes take other kernels), and the weights need not lie on the device.
The table has a row for each step and each distinct pooled text among the batch and the branches of true guidance.

    modulation = Modulation(transformer)
    modulation.detach()                    # reversible module replacement; the weights now wait on the CPU
    with precomputed(transformer, timesteps, [pooled], guidance):
        transformer(...)                   # with any of those timesteps and pooled texts
    modulation.attach()                    # as it was
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.embeddings import Timesteps
from diffusers.models.normalization import AdaLayerNormContinuous, AdaLayerNormZero, AdaLayerNormZeroSingle
from diffusers.models.transformers.transformer_flux import FluxPosEmbed
from torch.nn import functional as F

from diptych.errors import UserError

ADALN = (AdaLayerNormZero, AdaLayerNormZeroSingle, AdaLayerNormContinuous)


def adaln_layers(transformer: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The AdaLN modules of a FLUX transformer by name, in order; each has a `linear` fed by the modulation alone."""
    return {name: module for name, module in transformer.named_modules() if isinstance(module, ADALN)}


class Slot(torch.nn.Module):
    """In the place of an AdaLN linear: gives what `Lookup` put into it, (B, columns), whatever its input.

    A tensor attribute and no offset into the table, so that compiled blocks of one kind stay one graph.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rows: torch.Tensor | None = None

    def forward(self, _: torch.Tensor) -> torch.Tensor | None:
        return self.rows


class Lookup(torch.nn.Module):
    """In the place of `time_text_embed`: finds each row of the batch in the table and fills the slots.

    Rows are found by equality with what the table was made from, so no counter can go out of step with the sampler.
    A timestep or pooled text that is not in the table gives NaN: checking would make a GPU wait at every step.
    """

    def __init__(self, owner: Modulation, slots: Sequence[Slot], widths: Sequence[int]) -> None:
        super().__init__()
        self.owner = owner
        self.slots = list(slots)  # a list, not a ModuleList: they are the blocks' modules
        self.widths = list(widths)
        self.table: torch.Tensor | None = None  # (steps, texts, sum of widths)
        self.timesteps = self.pooled = torch.empty(0)

    def forward(self, timestep: torch.Tensor, *guidance_and_pooled: torch.Tensor) -> torch.Tensor:
        """timestep (B,), pooled text last (B, P); returns (B, 1), which the slots ignore."""
        if self.table is None:
            raise UserError("this transformer's modulation is precomputed; call it within Modulation.precomputed(...)")
        step = timestep[:, None] == self.timesteps
        text = (guidance_and_pooled[-1][:, None] == self.pooled).all(dim=-1)
        rows = self.table[step.int().argmax(dim=1), text.int().argmax(dim=1)]
        found = step.any(dim=1) & text.any(dim=1)
        rows = rows.masked_fill(~found[:, None], torch.nan)
        for slot, part in zip(self.slots, rows.split(self.widths, dim=1), strict=True):
            slot.rows = part
        return rows[:, :1]

    def clear(self) -> None:
        self.table = None
        for slot in self.slots:
            slot.rows = None


class Modulation:
    """The AdaLN linears and the timestep embedding of one transformer, in it or (detached) out of it.

    Raises UserError when a linear carries an unfused LoRA, which could change between steps.
    """

    def __init__(self, transformer: Any) -> None:
        self.transformer = transformer
        self.time_text_embed = transformer.time_text_embed
        self.norms: dict[str, Any] = adaln_layers(transformer)
        self.linears: dict[str, torch.nn.Linear] = {name: norm.linear for name, norm in self.norms.items()}
        for name, linear in self.linears.items():
            if hasattr(linear, "base_layer"):
                raise UserError(
                    f"modulation precompute needs {name}.linear without an unfused LoRA; load with fuse=True, or turn "
                    "the precompute off"
                )
        slots, widths = [Slot() for _ in self.linears], [linear.out_features for linear in self.linears.values()]
        self.lookup = Lookup(self, slots, widths)

    @property
    def detached(self) -> bool:
        return self.transformer.time_text_embed is self.lookup

    def detach(self, device: str | torch.device | None = "cpu") -> Modulation:
        """Takes the weights out of the transformer, onto `device`; None leaves them where they are."""
        for norm, slot, linear in zip(self.norms.values(), self.lookup.slots, self.linears.values(), strict=True):
            norm.linear = slot
            if device is not None:
                linear.to(device)
        self.transformer.time_text_embed = self.lookup
        if device is not None:
            self.time_text_embed.to(device)
        return self

    def attach(self, device: str | torch.device | None = None) -> None:
        """Puts the weights back, on `device` if given, else where they waited."""
        for norm, linear in zip(self.norms.values(), self.linears.values(), strict=True):
            norm.linear = linear if device is None else linear.to(device)
        embed = self.time_text_embed
        self.transformer.time_text_embed = embed if device is None else embed.to(device)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Within it the transformer has all its weights (to be saved or listed); afterwards it is as before."""
        was = self.detached
        self.attach()
        try:
            yield
        finally:
            if was:
                self.detach(None)

    @torch.no_grad()
    def table(
        self, timesteps: torch.Tensor, pooled: torch.Tensor, guidance: float | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The modulation of every step (S,), 0 to 1000, with every pooled text (R, P): (timesteps as seen, (S, R, W)).

        Computed on `pooled`'s device and in its dtype; weights visit that device one layer at a time. `guidance` is the
        distilled one, for transformers that embed it.
        """
        device, dtype = pooled.device, pooled.dtype
        # Through the same roundings as a call: the pipeline divides by 1000 and the transformer multiplies again.
        seen = (timesteps.to(device, dtype) / 1000).to(dtype) * 1000
        steps, texts = len(seen), len(pooled)
        given = [seen.repeat_interleave(texts)]
        if self.transformer.config.guidance_embeds:
            if guidance is None:
                raise UserError("this transformer embeds the distilled guidance; give precomputed(...) its value")
            given.append(torch.full_like(given[0], guidance) * 1000)
        holder: Any = self
        with exact_timesteps(holder):  # it looks for the `time_text_embed` of what it is given
            temb = F.silu(_on(device, self.time_text_embed, *given, pooled.repeat(steps, 1)))
        table = torch.empty(steps * texts, sum(self.lookup.widths), device=device, dtype=dtype)
        for linear, part in zip(self.linears.values(), table.split(self.lookup.widths, dim=1), strict=True):
            part.copy_(_on(device, linear, temb))
        return seen, table.unflatten(0, (steps, texts))

    @contextmanager
    def precomputed(
        self, timesteps: torch.Tensor, pooled: Sequence[torch.Tensor], guidance: float | None = None
    ) -> Iterator[None]:
        """Within it, the detached transformer takes any of `timesteps` with any row of the `pooled` texts (B, P)."""
        distinct = torch.unique(torch.cat(list(pooled)), dim=0)
        self.lookup.timesteps, self.lookup.table = self.table(timesteps, distinct, guidance)
        self.lookup.pooled = distinct
        try:
            yield
        finally:
            self.lookup.clear()


@contextmanager
def precomputed(
    transformer: Any,
    timesteps: torch.Tensor,
    pooled: Sequence[torch.Tensor],
    guidance: float | None = None,
    *,
    wanted: bool = False,
) -> Iterator[None]:
    """What a sampler's loop runs in: the table of all its steps, if the modulation is detached or the table `wanted`.

    Args:
        timesteps: (S,), 0 to 1000, as the scheduler gives them.
        pooled: the pooled texts (B, P) of every branch of true guidance.
        guidance: the distilled guidance, for transformers that embed it.
        wanted: also when the weights are in place; they then stay on their device.
    """
    lookup = transformer.time_text_embed
    if isinstance(lookup, Lookup):
        with lookup.owner.precomputed(timesteps, pooled, guidance):
            yield
        return
    if not wanted:
        yield
        return
    modulation = Modulation(transformer).detach(None)
    try:
        with modulation.precomputed(timesteps, pooled, guidance):
            yield
    finally:
        modulation.attach()


def _on(device: torch.device, module: torch.nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
    """`module(*inputs)` with its weights visiting `device` for this one call."""
    weights = {name: weight.to(device) for name, weight in module.named_parameters()}
    return torch.func.functional_call(module, weights, inputs)


# Rotary position embeddings, computed once a call: they depend on the layout of the tokens alone.


class OncePerShape(torch.nn.Module):
    """`FluxPosEmbed` that answers from memory for ids it has seen: within one call, equal layouts (`name_layout`) and
    shapes are equal ids."""

    def __init__(self, stock: FluxPosEmbed):
        super().__init__()
        self.stock = stock
        self.layout: Hashable = None  # of the references of the next forward
        self.known: dict[Hashable, Any] = {}

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids (tokens, 3) to (cos, sin), (tokens, head size) each."""
        key = (self.layout, tuple(ids.shape))
        if key not in self.known:
            self.known[key] = self.stock(ids)
        return self.known[key]


def name_layout(transformer: Any, layout: Hashable) -> None:
    """Before a forward: the layout of its reference tokens, where rotary embeddings are remembered."""
    if isinstance(transformer.pos_embed, OncePerShape):
        transformer.pos_embed.layout = layout


@contextmanager
def rotary_once(transformer: torch.nn.Module) -> Iterator[None]:
    """Within it, a stock FLUX transformer uses `OncePerShape`; afterwards it is as it was. The numbers are the same."""
    stock = getattr(transformer, "pos_embed", None)
    if type(stock) is not FluxPosEmbed:
        yield  # something else was put there on purpose
        return
    transformer.pos_embed = OncePerShape(stock)
    try:
        yield
    finally:
        transformer.pos_embed = stock


# FLUX's timesteps: how far a resolution shifts them, and their frequencies correctly rounded. The rounding removes
# the largest difference between two machines' pictures. The embedding takes sin and cos of `1000·sigma·f`, so one
# unit in the last place of f (float32) becomes 6e-5 in the phase. f is an `exp`, which float32 libraries may round
# either way. Measured on one CPU against the release's fixture (tests/fixtures): with torch's own exp, off there at 3
# of 128 frequencies, final latents differ by 5e-5 (9e-5 guided); with correctly rounded ones by 8e-6 (1e-5 guided),
# which is as near as a float64 run comes.


class ExactTimesteps(torch.nn.Module):
    """diffusers' `Timesteps` with `exp` evaluated in float64. (B,) to (B, num_channels), float32; no parameters."""

    def __init__(self, stock: Timesteps):
        super().__init__()
        self.stock = stock
        half = stock.num_channels // 2
        exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32) / (half - stock.downscale_freq_shift)
        # No buffer: casting the model to bfloat16 must leave the frequencies alone.
        self.frequencies = [float(f) for f in torch.exp(exponent.double())]

    def forward(self, timesteps: torch.Tensor) -> torch.Tensor:
        frequencies = torch.tensor(self.frequencies, dtype=torch.float32, device=timesteps.device)
        phase = self.stock.scale * (timesteps[:, None].float() * frequencies)
        parts = [torch.cos(phase), torch.sin(phase)]
        return torch.cat(parts if self.stock.flip_sin_to_cos else parts[::-1], dim=-1)


@contextmanager
def exact_timesteps(transformer: torch.nn.Module) -> Iterator[None]:
    """Within it, a stock FLUX transformer uses `ExactTimesteps`; afterwards it is as it was."""
    embed = getattr(transformer, "time_text_embed", None)
    stock = getattr(embed, "time_proj", None)
    if embed is None or type(stock) is not Timesteps or stock.num_channels % 2:
        yield  # something else was put there on purpose
        return
    embed.time_proj = ExactTimesteps(stock)
    try:
        yield
    finally:
        embed.time_proj = stock
