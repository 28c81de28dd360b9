"""Exact modulation precompute: FLUX's AdaLN weights leave the device, and a table of their outputs replaces them.

The inputs of the AdaLN linear layers (27 % of FLUX.1's 11.9 B parameters) are the timestep, the distilled guidance and
the pooled text, never the image. All steps of a call are known before its loop. So one product per layer over all steps
gives the same values, up to float rounding, because other batch sizes use other kernels. The weights need not be on the
device. The table has a row for each step and each distinct pooled text of the batch and the branches of true guidance.

    modulation = Modulation(transformer)
    modulation.detach()                    # replaces the modules; the weights are now on the CPU
    with precomputed(transformer, timesteps, [pooled], guidance):
        transformer(...)                   # with any of those timesteps and pooled texts
    modulation.attach()                    # restores the modules
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
    """The AdaLN modules of a FLUX transformer by name, in order. Each has a `linear` whose only input is the
    modulation."""
    return {name: module for name, module in transformer.named_modules() if isinstance(module, ADALN)}


class Slot(torch.nn.Module):
    """Replaces an AdaLN linear layer and returns the tensor (B, columns) that `Lookup` sets. Its input is not read.

    A tensor, not an offset into the table, so that all compiled blocks of one kind share one graph.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rows: torch.Tensor | None = None

    def forward(self, _: torch.Tensor) -> torch.Tensor | None:
        return self.rows


class Lookup(torch.nn.Module):
    """Replaces `time_text_embed`: looks up each row of the batch in the table and sets the slots.

    A row is identified by equality with the table's inputs, so that no counter can lose its position in the loop. A
    timestep or pooled text that is not in the table gives NaN, because a check would make a GPU wait at every step.
    """

    def __init__(self, owner: Modulation, slots: Sequence[Slot], widths: Sequence[int]) -> None:
        super().__init__()
        self.owner = owner
        self.slots = list(slots)  # a list, not a ModuleList: they are the blocks' modules
        self.widths = list(widths)
        self.table: torch.Tensor | None = None  # (steps, texts, sum of widths)
        self.timesteps = self.pooled = torch.empty(0)

    def forward(self, timestep: torch.Tensor, *guidance_and_pooled: torch.Tensor) -> torch.Tensor:
        """Timestep (B,) and, as the last argument, pooled text (B, P), to (B, 1), which the slots ignore."""
        if self.table is None:
            raise UserError(
                "argument_type",
                "This transformer's modulation is detached. Call it within Modulation.precomputed(...).",
            )
        step = timestep[:, None] == self.timesteps
        text = (guidance_and_pooled[-1][:, None] == self.pooled).all(dim=-1)
        rows = self.table[step.int().argmax(dim=1), text.int().argmax(dim=1)]
        known = step.any(dim=1) & text.any(dim=1)
        rows = rows.masked_fill(~known[:, None], torch.nan)
        for slot, part in zip(self.slots, rows.split(self.widths, dim=1), strict=True):
            slot.rows = part
        return rows[:, :1]

    def clear(self) -> None:
        self.table = None
        for slot in self.slots:
            slot.rows = None


class Modulation:
    """The AdaLN linear layers and the timestep embedding of one transformer, attached to it or detached.

    UserError if one of the layers has an unfused LoRA, which could change between steps.
    """

    def __init__(self, transformer: Any) -> None:
        self.transformer = transformer
        self.time_text_embed = transformer.time_text_embed
        self.norms: dict[str, Any] = adaln_layers(transformer)
        self.linears: dict[str, torch.nn.Linear] = {name: norm.linear for name, norm in self.norms.items()}
        for name, linear in self.linears.items():
            if hasattr(linear, "base_layer"):
                raise UserError(
                    "lora_unsupported",
                    f"Modulation precompute does not work with the unfused LoRA on {name}.linear. Load with fuse=True, "
                    "or switch modulation off.",
                )
        slots, widths = [Slot() for _ in self.linears], [linear.out_features for linear in self.linears.values()]
        self.lookup = Lookup(self, slots, widths)

    @property
    def detached(self) -> bool:
        return self.transformer.time_text_embed is self.lookup

    def detach(self, device: str | torch.device | None = "cpu") -> Modulation:
        """Removes the weights from the transformer and moves them to `device`. None leaves them on their device."""
        for norm, slot, linear in zip(self.norms.values(), self.lookup.slots, self.linears.values(), strict=True):
            norm.linear = slot
            if device is not None:
                linear.to(device)
        self.transformer.time_text_embed = self.lookup
        if device is not None:
            self.time_text_embed.to(device)
        return self

    def attach(self, device: str | torch.device | None = None) -> None:
        """Puts the weights back into the transformer, on `device` if given."""
        for norm, linear in zip(self.norms.values(), self.linears.values(), strict=True):
            norm.linear = linear if device is None else linear.to(device)
        embed = self.time_text_embed
        self.transformer.time_text_embed = embed if device is None else embed.to(device)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """A context in which the transformer has all its weights, to save or list them."""
        detached = self.detached
        self.attach()
        try:
            yield
        finally:
            if detached:
                self.detach(None)

    @torch.no_grad()
    def table(
        self, timesteps: torch.Tensor, pooled: torch.Tensor, guidance: float | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The modulation of every step (S,), 0 to 1000, with every pooled text (R, P): (rounded timesteps, (S, R, W)).

        Computed on the device and in the dtype of `pooled`; weights move to that device one layer at a time. `guidance`
        is the distilled guidance, for transformers that embed it.
        """
        device, dtype = pooled.device, pooled.dtype
        # The same rounding as in a call: the pipeline divides by 1000 and the transformer multiplies again.
        rounded = (timesteps.to(device, dtype) / 1000).to(dtype) * 1000
        steps, texts = len(rounded), len(pooled)
        inputs = [rounded.repeat_interleave(texts)]
        if self.transformer.config.guidance_embeds:
            if guidance is None:
                raise UserError(
                    "argument_type", "This transformer embeds distilled guidance. Pass its value to precomputed(...)."
                )
            inputs.append(torch.full_like(inputs[0], guidance) * 1000)
        owner: Any = self
        with exact_timesteps(owner):  # it uses the attribute `time_text_embed`
            temb = F.silu(_on(device, self.time_text_embed, *inputs, pooled.repeat(steps, 1)))
        table = torch.empty(steps * texts, sum(self.lookup.widths), device=device, dtype=dtype)
        for linear, part in zip(self.linears.values(), table.split(self.lookup.widths, dim=1), strict=True):
            part.copy_(_on(device, linear, temb))
        return rounded, table.unflatten(0, (steps, texts))

    @contextmanager
    def precomputed(
        self, timesteps: torch.Tensor, pooled: Sequence[torch.Tensor], guidance: float | None = None
    ) -> Iterator[None]:
        """A context in which the detached transformer accepts any of `timesteps` with any row of `pooled` (B, P)."""
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
    """The context of a sampler's loop, with the table of all its steps if the modulation is detached or the table is
    `wanted`.

    Args:
        timesteps: (S,), 0 to 1000, the scheduler's.
        pooled: the pooled texts (B, P) of every branch of true guidance.
        guidance: the distilled guidance, for transformers that embed it.
        wanted: use a table even if the weights are attached. They stay on their device.
    """
    lookup = getattr(transformer, "time_text_embed", None)
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
    """`module(*inputs)` with the weights on `device` for this one call."""
    weights = {name: weight.to(device) for name, weight in module.named_parameters()}
    return torch.func.functional_call(module, weights, inputs)


# Rotary position embeddings are computed once a call: they depend only on the layout of the tokens.


class OncePerShape(torch.nn.Module):
    """`FluxPosEmbed` with a cache by layout (`name_layout`) and shape, which within one call determine the ids."""

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
    embed = getattr(transformer, "pos_embed", None)
    if isinstance(embed, OncePerShape):
        embed.layout = layout


@contextmanager
def rotary_once(transformer: torch.nn.Module) -> Iterator[None]:
    """A context in which a stock FLUX transformer uses `OncePerShape`, which gives the same values."""
    stock = getattr(transformer, "pos_embed", None)
    if type(stock) is not FluxPosEmbed:
        yield  # a custom module stays
        return
    transformer.pos_embed = OncePerShape(stock)
    try:
        yield
    finally:
        transformer.pos_embed = stock


# FLUX's timestep frequencies, correctly rounded, which removes the largest difference between two machines' images. The
# embedding uses sin and cos of `1000·sigma·f`, so one unit in the last place of f (float32) is 6e-5 in the phase, and f
# is an `exp`, which float32 libraries may round either way. Measured on one CPU against the release's fixture
# (tests/fixtures): with torch's exp, which is off at 3 of 128 frequencies, final latents differ by 5e-5 (9e-5 guided);
# with correctly rounded frequencies by 8e-6 (1e-5 guided), the same as a float64 run.


class ExactTimesteps(torch.nn.Module):
    """diffusers' `Timesteps` with `exp` evaluated in float64. (B,) to (B, num_channels), float32, without
    parameters."""

    def __init__(self, stock: Timesteps):
        super().__init__()
        self.stock = stock
        half = stock.num_channels // 2
        exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32) / (half - stock.downscale_freq_shift)
        # Not a buffer, because casting the model to bfloat16 must not change the frequencies.
        self.frequencies = [float(f) for f in torch.exp(exponent.double())]

    def forward(self, timesteps: torch.Tensor) -> torch.Tensor:
        frequencies = torch.tensor(self.frequencies, dtype=torch.float32, device=timesteps.device)
        phase = self.stock.scale * (timesteps[:, None].float() * frequencies)
        parts = [torch.cos(phase), torch.sin(phase)]
        return torch.cat(parts if self.stock.flip_sin_to_cos else parts[::-1], dim=-1)


@contextmanager
def exact_timesteps(transformer: torch.nn.Module) -> Iterator[None]:
    """A context in which a stock FLUX transformer uses `ExactTimesteps`."""
    embed = getattr(transformer, "time_text_embed", None)
    stock = getattr(embed, "time_proj", None)
    if embed is None or type(stock) is not Timesteps or stock.num_channels % 2:
        yield  # a custom module stays
        return
    embed.time_proj = ExactTimesteps(stock)
    try:
        yield
    finally:
        embed.time_proj = stock
