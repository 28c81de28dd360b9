"""What a pipeline remembers between calls: embeddings of prompts and of references, the least recently used dropped.

Keys are contents (texts, pixels, sizes, dtype), never file names or objects, so a changed picture is another picture.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable

import torch

Tensors = tuple[torch.Tensor, ...]


class Recall:
    """Tensors by key, at most `megabytes` of them; 0 remembers nothing. `hits` and `misses` count the look-ups."""

    def __init__(self, megabytes: float = 0) -> None:
        self.limit = int(megabytes * 2**20)
        self.hits = self.misses = 0
        self._kept: OrderedDict[Hashable, Tensors] = OrderedDict()

    def __call__(self, key: Hashable, make: Callable[[], Tensors]) -> Tensors:
        """What `make` gave for this key before, or gives now. The tensors are shared: callers do not write to them."""
        if key in self._kept:
            self.hits += 1
            self._kept.move_to_end(key)
            return self._kept[key]
        self.misses += 1
        made = make()
        if _bytes(made) <= self.limit:
            self._kept[key] = made
            while self.size > self.limit:
                self._kept.popitem(last=False)
        return made

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def size(self) -> int:
        """Bytes held."""
        return sum(_bytes(tensors) for tensors in self._kept.values())

    def clear(self) -> None:
        """Forgets everything; needed after a text encoder or the VAE was changed in place."""
        self._kept.clear()


def content(tensor: torch.Tensor) -> str:
    """A hash of a tensor's shape, dtype and numbers."""
    array = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{tuple(array.shape)} {array.dtype}".encode())
    digest.update(array.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _bytes(tensors: Tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
