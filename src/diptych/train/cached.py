"""Tensor files that training makes once and reads again: latents, and the negatives of preference training.

A file is published by renaming and carries the hash of all it holds, so that a damaged or swapped one is found when
training starts, and made again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import torch

from diptych.errors import UserError
from diptych.train import captions_at_once
from diptych.train.metrics import Progress, report

HASH = "sha256"  # the header's key for the hash of the rest
log = logging.getLogger(__name__)


def write(tensors: dict[str, torch.Tensor], path: Path, header: dict[str, str] | None = None) -> None:
    """Writes a file of a cache, the hash of its header, tensors and place in the header. UserError if it cannot."""
    header = header or {}
    publish(tensors, path, header | {HASH: _digest(path, header, tensors)})


def publish(tensors: dict[str, torch.Tensor], path: Path, header: dict[str, str] | None = None) -> None:
    """Writes a safetensors file whole or not at all. UserError if it cannot."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata=header)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:  # the latter is what a full disk is to safetensors
        temporary.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write {path}: {reason}; make room, then run the same command again") from error


def is_whole(path: Path) -> bool:
    """Whether `write` has made this very file; one that was damaged or swapped since is none, and a warning says so.

    A process reads its bytes once while the file stays as it is.
    """
    from safetensors import SafetensorError

    if not path.exists():
        return False
    stat = path.stat()
    try:
        _check(path, (stat.st_ino, stat.st_size, stat.st_mtime_ns))
    except (OSError, SafetensorError, ValueError) as error:
        log.warning("%s is damaged (%s); it is made again", path, error)
        return False
    return True


@lru_cache(maxsize=100_000)
def _check(path: Path, state: tuple[int, ...]) -> None:
    """ValueError where a file's hash is not that of what it holds; `state` tells its versions apart."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:  # the header's lengths are compared with the file's
        header = dict(file.metadata() or {})
        said = header.pop(HASH, "")
        names = file.keys()
        if said != _digest(path, header, {name: file.get_tensor(name) for name in names}):
            raise ValueError("its sha256 differs")


def _digest(path: Path, header: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> str:
    """sha256 of a file's header and tensors and of its place in the cache, so that swapped files are found too."""
    digest = hashlib.sha256(json.dumps([path.parent.name, path.name, sorted(header.items())]).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


# Text embeddings for training: one pass over the distinct captions, or, when they would not fit, batch by batch. T5's
# embeddings of 400k captions are 1.7 TB at FLUX's size, while encoding them online costs 3.6 % of a step: so a small
# table is kept in memory and a large one is not made at all.

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
