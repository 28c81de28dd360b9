"""Rotary position embeddings, computed once a call: they depend on the canvas and the text's length alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.transformers.transformer_flux import FluxPosEmbed


class OncePerShape(torch.nn.Module):
    """`FluxPosEmbed` that answers from memory for a shape it has seen: within one call, equal shapes are equal ids."""

    def __init__(self, stock: FluxPosEmbed):
        super().__init__()
        self.stock = stock
        self.known: dict[tuple[int, ...], Any] = {}

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids (tokens, 3) to (cos, sin), (tokens, head size) each."""
        shape = tuple(ids.shape)
        if shape not in self.known:
            self.known[shape] = self.stock(ids)
        return self.known[shape]


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
