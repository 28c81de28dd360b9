"""References of `conditioning: tokens`: clean tokens beside the target's.

The transformer is the teacher's, without widening. Its input is [target tokens ; reference tokens], and the first N
tokens of its output, the target's, are the velocity. Each reference is encoded separately, at any size that is a
multiple of 2 × the VAE factor, and there may be any number of them. Their positions are the family's. For FLUX.1 they
are an option (`flux1.token_ids`):

- `frame`: reference i has ids (1 + i, row, column), like the one reference of FLUX.1 Kontext;
- `left`: references are to the left of the target in one wide image, like the left panel of a grid. Ids are
  (0, row, column), and the target's columns begin after the references'.

With `reference_attention: joint`, all tokens attend to each other. For `self`, see `attention`. Rows of a batch may
have different references, or none. Rows of one `layout` run as one batch (`guidance.alike`), so that an image does not
depend on what else is generated with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from diptych.student import attention
from diptych.student.canvas import Canvas
from diptych.student.families.base import Reference, Size
from diptych.student.families.flux1 import Layout, token_ids


@dataclass(frozen=True)
class TokenStyle:
    """The options of reference tokens: `distill.positions` and `distill.reference_attention`."""

    positions: str = "frame"
    attention: str = "joint"

    def of(self, tokens: torch.Tensor | None, layout: Layout) -> list[Reference]:
        """References of this `layout`, whose tokens (B, R, C) are one after another. None if their keys and values are
        given instead."""
        sizes, left = [Size(*shape) for shape in layout], self.positions == "left"
        parts = [None] * len(sizes) if tokens is None else tokens.split([size.tokens for size in sizes], dim=1)
        return [Reference(part, size, left) for part, size in zip(parts, sizes, strict=True)]


class References:
    """The clean reference tokens of the rows of a batch, (R, C) each, with R = 0 for a row without a reference."""

    def __init__(self, tokens: Sequence[torch.Tensor], layouts: Sequence[Layout], style: TokenStyle) -> None:
        self.tokens, self.layouts, self.style = list(tokens), list(layouts), style
        self._parts: dict[tuple[int, ...], References] = {}
        self._keys: attention.Keys | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def channels(self) -> int:
        return self.tokens[0].shape[-1]

    @property
    def layout(self) -> Layout:
        """The layout of all rows, which must be equal."""
        (layout,) = set(self.layouts)
        return layout

    def __getitem__(self, rows: torch.Tensor | slice) -> References:
        """Some rows. Equal selections are the same object, which keeps its keys and values."""
        index = list(range(len(self)))[rows] if isinstance(rows, slice) else rows.tolist()
        return self._part(tuple(index))

    def _part(self, index: tuple[int, ...]) -> References:
        if index == tuple(range(len(self))):
            return self
        if index not in self._parts:
            tokens, layouts = ([each[i] for i in index] for each in (self.tokens, self.layouts))
            part = self._parts[index] = References(tokens, layouts, self.style)  # pyright: ignore[reportArgumentType]
            if self._keys is not None:
                part._keys = self._keys.rows(torch.tensor(index))
        return self._parts[index]

    def repeat(self, times: int) -> References:
        """Each row N times, one after another."""
        return self._part(tuple(i for i in range(len(self)) for _ in range(times)))

    def doubled(self, times: int) -> References:
        """All rows N times, one batch after another."""
        return self._part(tuple(range(len(self))) * times)

    def none(self) -> References:
        """The same number of rows, without references."""
        return References([tokens[:0] for tokens in self.tokens], [()] * len(self), self.style)

    def to(self, dtype: torch.dtype) -> References:
        cast = {id(tokens): tokens.to(dtype) for tokens in self.tokens}  # repeated tokens stay one tensor
        return References([cast[id(tokens)] for tokens in self.tokens], self.layouts, self.style)

    # In the transformer's input -----------------------------------------------------------------------------------

    def beside(self, x: torch.Tensor) -> tuple[list[Reference], dict[str, Any]]:
        """The references and the attention arguments of the transformer, for the target's tokens x (B, N, C)."""
        if not self.layout or self.style.attention == "joint":
            return self.style.of(torch.stack(self.tokens).to(x), self.layout), {}
        assert self._keys is not None, "capture comes before the first step"
        return self.style.of(None, self.layout), {"references": self._keys}

    def capture(self, transformer: Any, canvas: Canvas, given: dict[str, Any] | None) -> None:
        """Computes keys and values, once for each distinct row. Does nothing for rows without a reference."""
        if not self.layout or self._keys is not None:
            return
        distinct = {id(tokens): tokens for tokens in self.tokens}
        numbers = {name: number for number, name in enumerate(distinct)}
        tokens = torch.stack(list(distinct.values()))
        _, ids = token_ids(canvas.size, self.layout, self.style.positions)
        index = torch.tensor([numbers[id(one)] for one in self.tokens])
        self._keys = attention.capture(transformer, tokens, ids.to(tokens), given).rows(index)
