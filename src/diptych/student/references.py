"""References of `conditioning: tokens`: clean tokens beside the target's.

The transformer is the teacher's, without widening. Its input is [target tokens ; reference tokens], and the first N
tokens of its output, the target's, are the velocity. Each reference is encoded separately, at any size that is a
multiple of 2 × the VAE factor, and there may be any number of them. Their positions (`token_ids`) are an option:

- `frame`: reference i has ids (1 + i, row, column), like the one reference of FLUX.1 Kontext;
- `left`: references are to the left of the target in one wide image, like the left panel of a grid. Ids are
  (0, row, column), and the target's columns begin after the references'.

With `reference_attention: joint`, all tokens attend to each other. For `self`, see `attention`. Rows of a batch may
have different references, or none. Rows of one `layout` run as one batch (`guidance.alike`), so that an image does not
depend on what else is generated with it.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from diptych.student import attention
from diptych.student.canvas import Canvas
from diptych.student.families.base import Size, positions

Layout = tuple[tuple[int, int], ...]  # token rows and columns of each reference


@dataclass(frozen=True)
class TokenStyle:
    """The options of reference tokens: `distill.positions` and `distill.reference_attention`."""

    positions: str = "frame"
    attention: str = "joint"


def token_ids(target: tuple[int, int], layout: Layout, style: str) -> tuple[torch.Tensor, torch.Tensor]:
    """FLUX's position ids of the target (N, 3) and of all its references (R, 3), float32.

    `target` and `layout` are in token rows and columns. `style` is `frame` or `left`. Without references, the target's
    ids equal the teacher's.
    """
    column, parts = 0, [torch.zeros(0, 3)]
    for number, shape in enumerate(layout):
        frame, first = (1 + number, 0) if style == "frame" else (0, column)
        parts.append(positions(Size(*shape), frame, first))
        column += shape[1]
    return positions(Size(*target), columns_from=column if style == "left" else 0), torch.cat(parts)


class References:
    """The clean reference tokens of the rows of a batch, (R, C) each, with R = 0 for a row without a reference."""

    def __init__(self, tokens: Sequence[torch.Tensor], layouts: Sequence[Layout], style: TokenStyle) -> None:
        self.tokens, self.layouts, self.style = list(tokens), list(layouts), style
        self._parts: dict[tuple[int, ...], References] = {}
        self._ids: dict[Hashable, tuple[torch.Tensor, torch.Tensor]] = {}
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

    def beside(self, x: torch.Tensor, canvas: Canvas) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        """Input tokens, ids and attention arguments of the transformer, for the target's tokens x (B, N, C)."""
        target_ids, ids = self.ids(canvas, x.device, x.dtype)
        if not self.layout:
            return x, target_ids, {}
        if self.style.attention == "self":
            assert self._keys is not None, "capture comes before the first step"
            return x, target_ids, {"references": self._keys}
        return torch.cat([x, torch.stack(self.tokens).to(x)], dim=1), torch.cat([target_ids, ids]), {}

    def ids(self, canvas: Canvas, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """`token_ids` of these rows."""
        key = (canvas, self.layout, device, dtype)
        if key not in self._ids:
            both = token_ids((canvas.rows, canvas.columns), self.layout, self.style.positions)
            self._ids[key] = both[0].to(device, dtype), both[1].to(device, dtype)
        return self._ids[key]

    def capture(self, transformer: Any, canvas: Canvas, given: dict[str, Any] | None) -> None:
        """Computes keys and values, once for each distinct row. Does nothing for rows without a reference."""
        if not self.layout or self._keys is not None:
            return
        distinct = {id(tokens): tokens for tokens in self.tokens}
        numbers = {name: number for number, name in enumerate(distinct)}
        tokens = torch.stack(list(distinct.values()))
        _, ids = self.ids(canvas, tokens.device, tokens.dtype)
        index = torch.tensor([numbers[id(one)] for one in self.tokens])
        self._keys = attention.capture(transformer, tokens, ids, given).rows(index)
