"""Counts the bytes that are alive while a model of full size runs on tensors without data.

Fake tensors have shapes, dtypes and gradients, and no memory. What a GPU does otherwise than a CPU is put in: attention
is one flash kernel, and autocast computes layer norms in float32.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """`now` and `peak`: bytes of all storages that were made inside and are still referenced, by autograd too."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._known:
            self._known[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self._known.pop(key)

    @contextmanager
    def phase(self) -> Iterator[None]:
        """Within it `peak` is counted from here on."""
        self.peak = self.now
        yield


@contextmanager
def live(monkeypatch: pytest.MonkeyPatch) -> Iterator[LiveBytes]:
    """Every tensor made inside is a fake one, and counted."""
    plain = F.layer_norm

    def flash(query: Any, key: Any, value: Any, **_: Any) -> Any:
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]

    def layer_norm(x: Any, *args: Any, **given: Any) -> Any:
        if not torch.is_autocast_enabled("cpu"):
            return plain(x, *args, **given)
        with torch.autocast("cpu", enabled=False):
            return plain(x.float(), *args, **given)

    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", flash)
        patch.setattr(F, "layer_norm", layer_norm)
        with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as counted:
            yield counted


def fake(model: torch.nn.Module) -> None:
    """A model on the meta device gets fake parameters and buffers, in place."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                module._parameters[name] = torch.nn.Parameter(empty, requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
