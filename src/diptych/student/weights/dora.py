"""DoRA beside the weights (Liu et al. 2024): a variant of peft's LoRA layer that computes what `Delta.change` adds.

peft's own variant computes the norm of every adapted weight again in each forward, has it of rows only, and multiplies
what earlier adapters added. Here the norms are computed once for a scale, rows and columns are both known, and an
adapter adds what it adds alone.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import LoraVariant

from diptych.errors import UserError
from diptych.student.weights.delta import factor


class Magnitude(torch.nn.Module):
    """The magnitudes of one adapter of one layer, (out, 1) or (1, in)."""

    def __init__(self, weight: torch.nn.Parameter) -> None:
        super().__init__()
        self.weight = weight
        self._factor: torch.Tensor | None = None
        self._scale: float | None = None

    def factor(self, layer: Any, name: str) -> torch.Tensor:
        """m / ||W + s B A||, float32, for the scale that is set now."""
        scale = layer.scaling[name]
        if self._factor is None or self._scale != scale:
            a, b = (x.weight.float() for x in (layer.lora_A[name], layer.lora_B[name]))
            weight = _dense(layer.get_base_layer())[:, : a.shape[1]].to(a.device)
            self._factor, self._scale = factor(weight + scale * (b @ a), self.weight.to(a.device)), scale
        return self._factor


class Dora(LoraVariant):
    """peft's hook for a layer's forward."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **_: Any) -> torch.Tensor:
        a, b, scale = module.lora_A[active_adapter], module.lora_B[active_adapter], module.scaling[active_adapter]
        scaled = module.lora_magnitude_vector[active_adapter].factor(module, active_adapter).to(x.device)
        x = x[..., : a.weight.shape[1]]  # the release's x_embedder saw no condition
        base = module.get_base_layer()
        if scaled.shape[1] == 1:
            rows = scaled[:, 0]
            added = (rows - 1).to(x) * _product(base, x, result.dtype) + rows.to(x) * F.linear(a(x), b.weight) * scale
        else:
            columns = scaled[0]
            added = F.linear(a(columns.to(x) * x), b.weight) * scale
            added = added + _product(base, (columns - 1).to(x) * x, result.dtype)
        if b.bias is not None:
            added = added + b.bias * scale
        return result + added.to(result.dtype)

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        raise UserError(
            f"{active_adapter} is a DoRA; load it with fuse=True, or call diptych.student.weights.lora.fuse_loras(pipe)"
        )

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: torch.Tensor) -> None:
        Dora.merge_safe(module, active_adapter, orig_weight)

    unmerge = merge_safe


def put_magnitude(layer: Any, name: str, magnitude: torch.nn.Parameter) -> None:
    """Makes an adapter of a peft layer, whose A and B are there, a DoRA."""
    layer.lora_magnitude_vector[name] = Magnitude(magnitude)
    layer.lora_variant[name] = Dora()
    layer.use_dora[name] = True


def _product(base: Any, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """W x, by the layer itself, which may hold W quantized; of the first columns of W where x has no more."""
    y = base(F.pad(x, (0, base.in_features - x.shape[-1])).to(dtype))
    return y if base.bias is None else y - base.bias.to(y.dtype)


def _dense(base: Any) -> torch.Tensor:
    """A layer's weight, float32, dequantized where it is not plain."""
    weight = base.weight.data if base.weight.dtype.is_floating_point else base.weight
    if hasattr(weight, "quant_type"):
        from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

        return dequantize_gguf_tensor(weight).float()
    return weight.float()
