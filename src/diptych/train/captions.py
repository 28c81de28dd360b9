"""The embeddings of the captions of a training.

Captions are encoded in one pass and stay in memory, or, if they do not fit, batch by batch. T5's embeddings of 400k
captions take 1.7 TB at FLUX's size, while encoding them online costs 3.6 % of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from diptych.student.families.base import Texts, has_mask, join
from diptych.train import captions_at_once
from diptych.train.metrics import Progress, report

EncodeText = Callable[[list[str]], Texts]  # of captions; no gradient
TEXT_IN_MEMORY = 2 * 2**30  # bytes


class Captions(Protocol):
    """The embedded captions of a training."""

    def gather(self, captions: Sequence[str]) -> Texts:
        """The tensors of these captions, such as embeddings (B, L, D) and pooled embeddings (B, P)."""
        ...


class CaptionTable:
    """All distinct captions and the empty prompt, encoded once. The encoders are not needed afterwards."""

    def __init__(
        self, encode: EncodeText, captions: Sequence[str], at_once: int, progress: Progress | None = None
    ) -> None:
        distinct = ["", *sorted(set(captions) - {""})]
        self._row = {caption: row for row, caption in enumerate(distinct)}
        parts = []
        for first in range(0, len(distinct), at_once):
            parts.append(tuple(tensor.cpu() for tensor in encode(distinct[first : first + at_once])))
            report(progress, min(first + at_once, len(distinct)), len(distinct), "encoding captions")
        self._text = join(parts)

    def gather(self, captions: Sequence[str]) -> Texts:
        return _rows(self._text, [self._row[caption] for caption in captions])


def _rows(text: Texts, rows: Sequence[int]) -> Texts:
    """Rows of a text, without padding that all of them have."""
    index = torch.tensor(rows)
    selected = tuple(tensor.index_select(0, index) for tensor in text)
    if not has_mask(selected):
        return selected
    embeds, *pooled, mask = selected
    length = int(mask.sum(1).max())
    return (embeds[:, :length], *pooled, mask[:, :length])


class OnlineCaptions:
    """Captions encoded for each batch. The encoders stay on their device."""

    def __init__(self, encode: EncodeText, at_once: int) -> None:
        self._encode, self._at_once = encode, at_once

    def gather(self, captions: Sequence[str]) -> Texts:
        distinct = sorted(set(captions))
        firsts = range(0, len(distinct), self._at_once)
        # Moved to main memory immediately, because a complete step's embeddings do not fit on the device.
        parts = [
            tuple(each.cpu() for each in self._encode(distinct[first : first + self._at_once])) for first in firsts
        ]
        return _rows(join(parts), [distinct.index(caption) for caption in captions])


def embed_captions(encode: EncodeText, captions: Sequence[str], progress: Progress | None = None) -> Captions:
    """A table if the embeddings of all distinct captions fit in memory, else an online encoder."""
    text = encode([""])  # for a family without padding, the longest caption bounds the table
    if has_mask(text):
        text = encode([max(captions, key=len, default="")])
    size = sum(tensor.numel() * tensor.element_size() for tensor in text) * (len(set(captions)) + 1)
    at_once = captions_at_once(text[0].shape[1])
    if size > TEXT_IN_MEMORY:
        return OnlineCaptions(encode, at_once)
    return CaptionTable(encode, captions, at_once, progress)
