"""Text embeddings for training: one pass over the distinct captions, or, when they would not fit, batch by batch.

T5's embeddings of 400k captions are 1.7 TB at FLUX's size, while encoding them online costs 3.6 % of a step
(facts.md 4): so a small table is kept in memory and a large one is not made at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from diptych.train.metrics import Progress, report
from diptych.train.options import captions_at_once

# Captions to (B, L, D) and (B, P); no gradient.
EncodeText = Callable[[list[str]], tuple[torch.Tensor, torch.Tensor]]
IN_MEMORY = 2 * 2**30  # bytes


class Text(Protocol):
    """Where training gets its text from."""

    def gather(self, captions: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings (B, L, D) and pooled embeddings (B, P) of these captions."""
        ...


class Table:
    """All distinct captions and the empty prompt, encoded once. The encoders are not needed any more."""

    def __init__(
        self, encode: EncodeText, captions: Sequence[str], at_once: int, progress: Progress | None = None
    ) -> None:
        distinct = ["", *sorted(set(captions) - {""})]
        self._row = {caption: row for row, caption in enumerate(distinct)}
        parts = []
        for first in range(0, len(distinct), at_once):
            embeds, pooled = encode(distinct[first : first + at_once])
            parts.append((embeds.cpu(), pooled.cpu()))
            report(progress, min(first + at_once, len(distinct)), len(distinct), "encoding captions")
        self._embeds, self._pooled = (torch.cat(side) for side in zip(*parts, strict=True))

    def gather(self, captions: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        index = torch.tensor([self._row[caption] for caption in captions])
        return self._embeds.index_select(0, index), self._pooled.index_select(0, index)


class Online:
    """Captions encoded as they come; the encoders stay where they are."""

    def __init__(self, encode: EncodeText, at_once: int) -> None:
        self._encode, self._at_once = encode, at_once

    def gather(self, captions: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        distinct = sorted(set(captions))
        firsts = range(0, len(distinct), self._at_once)
        # To main memory at once: the device has no room for a whole step's.
        parts = [[each.cpu() for each in self._encode(distinct[first : first + self._at_once])] for first in firsts]
        embeds, pooled = (torch.cat(side) for side in zip(*parts, strict=True))
        index = torch.tensor([distinct.index(caption) for caption in captions])
        return embeds.index_select(0, index), pooled.index_select(0, index)


def prepare(encode: EncodeText, captions: Sequence[str], progress: Progress | None = None) -> Text:
    """A table when all distinct captions' embeddings fit in memory, else an online encoder."""
    embeds, pooled = encode([""])
    size = (embeds.numel() * embeds.element_size() + pooled.numel() * pooled.element_size()) * (len(set(captions)) + 1)
    at_once = captions_at_once(embeds.shape[1])
    return Table(encode, captions, at_once, progress) if size <= IN_MEMORY else Online(encode, at_once)
