"""Linear layers by oneDNN on a CPU, their weights packed once: the switch `packed` of `speed`.

PyTorch gives float32 products to MKL, which keeps its widest instructions for Intel's CPUs; oneDNN uses them on every
x86 CPU that has them, from weights that lie in blocks of its own. Packing moves values and changes none: `unpack` gives
the same bits back, and there is no second copy meanwhile. Results differ from MKL's by float rounding.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from diffusers.hooks.group_offloading import _is_group_offload_enabled
from torch import nn

from diptych.student.runtime.modulation import ADALN

ROWS = 128  # the layout is chosen for products of about so many rows; it serves others as well


class PackedLinear(nn.Module):
    """In the place of a float32 `nn.Linear`, whose weight it holds packed."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.original = [linear]  # a list, so that it is not a submodule: its weight is empty
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.data, ROWS)
        linear.weight.data = linear.weight.data.new_empty(0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, in_features) → (…, out_features)."""
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")

    def unpacked(self) -> nn.Linear:
        """The linear layer that was here, its weight as it was."""
        linear = self.original[0]
        linear.weight.data = self.weight.to_dense()
        return linear


def pack(transformer: nn.Module, blocks: Iterable[nn.Module]) -> None:
    """Packs the linear layers of `blocks`, modules of `transformer`, but those of AdaLN, which see a row or two."""
    chosen = {id(module) for block in blocks for module in block.modules() if type(module) is nn.Linear}
    chosen -= {id(module.linear) for module in transformer.modules() if isinstance(module, ADALN)}
    for name, module in list(transformer.named_modules()):
        if id(module) in chosen:
            transformer.set_submodule(name, PackedLinear(module))  # pyright: ignore[reportArgumentType]


def unpack(transformer: nn.Module) -> None:
    """The layers as they were before `pack`, to the bit."""
    for name, module in list(transformer.named_modules()):
        if isinstance(module, PackedLinear):
            transformer.set_submodule(name, module.unpacked())


def cannot_pack(transformer: Any) -> str:
    """Why there is nothing to pack, or no way to; empty if there is."""
    weights = [weight for weight in transformer.parameters() if weight.dim() == 2]
    if any(weight.device.type != "cpu" for weight in weights):
        return "on CPUs alone"
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return "this PyTorch has no oneDNN"
    if any(type(weight.data) is not torch.Tensor or weight.dtype != torch.float32 for weight in weights):
        return "for float32 alone; others PyTorch gives to oneDNN anyhow"
    if getattr(transformer, "peft_config", None):
        return "an unfused LoRA sits on the layers (fused_lora=on)"
    if hasattr(transformer, "_hf_hook") or _is_group_offload_enabled(transformer):
        return "the transformer is offloaded"
    return ""
