"""What a LoRA does to one linear layer.

The weight gets `scale · B A` and the bias `scale · b` (Hu et al. 2021, section 4.1). A DoRA also sets the norm of every
row or column: the weight becomes `m · (W + scale · B A) / ‖W + scale · B A‖` (Liu et al. 2024, equation 5), so what it
adds depends on the weight that it goes on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import LoraVariant

from diptych.errors import UserError


@dataclass(frozen=True)
class Delta:
    """What a LoRA does to one linear (out, in): A (rank, in), B (out, rank) with its scale inside, what it adds to the
    bias (out,), and, of a DoRA, the magnitudes: (out, 1) for each row, or (1, in) for each column."""

    a: torch.Tensor
    b: torch.Tensor
    bias: torch.Tensor | None = None
    magnitude: torch.Tensor | None = None

    def weight(self) -> torch.Tensor:
        """B A, float32."""
        return self.b.float() @ self.a.float()

    def change(self, weight: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        """What is added to `weight` (out, in) at a scale, float32. Columns that A does not have stay as they are."""
        width = self.a.shape[1]
        added = self.weight().to(weight.device) * scale
        if self.magnitude is not None:
            start = weight[:, :width].float()
            added = factor(start + added, self.magnitude.to(weight.device)) * (start + added) - start
        return torch.nn.functional.pad(added, (0, weight.shape[1] - width))

    def padded(self, width: int) -> Delta:
        """The same with zero columns in A, up to `width`: the release's x_embedder saw no condition. Not of a DoRA,
        whose norms are those of the columns that A has."""
        if self.magnitude is not None or width == self.a.shape[1]:
            return self
        return replace(self, a=torch.nn.functional.pad(self.a, (0, width - self.a.shape[1])))

    def joined(self, other: Delta) -> Delta:
        """Both at once: ranks add up."""
        assert self.magnitude is None and other.magnitude is None
        parts = [bias for bias in (self.bias, other.bias) if bias is not None]
        bias = sum(parts[1:], parts[0]) if parts else None
        pairs = ((self.a, other.a, 0), (self.b, other.b, 1))
        a, b = (torch.cat([x.float(), y.float()], dim=dim) for x, y, dim in pairs)
        return Delta(a, b, bias)

    def whole(self) -> Delta:
        """The same with A the identity: rank `in`, exact."""
        assert self.magnitude is None
        return Delta(torch.eye(self.a.shape[1]), self.weight(), self.bias)

    def rows(self, start: int, stop: int) -> Delta:
        """Rows `start` to `stop`, exclusive; not of a DoRA whose magnitudes are of columns, which span all rows."""
        assert self.magnitude is None or self.magnitude.shape[1] == 1
        bias, magnitude = (None if x is None else x[start:stop] for x in (self.bias, self.magnitude))
        return Delta(self.a, self.b[start:stop], bias, magnitude)


def factor(weight: torch.Tensor, magnitude: torch.Tensor) -> torch.Tensor:
    """m / ||W||, in the shape of `magnitude`: what a DoRA multiplies the rows or the columns of W = W0 + B A by
    (Liu et al. 2024, equation 5). A row or column of zeros stays one."""
    norm = torch.linalg.vector_norm(weight, dim=1 if magnitude.shape[1] == 1 else 0, keepdim=True)
    return torch.where(norm > 0, magnitude.float() / norm, torch.zeros_like(norm))


def turned(delta: Delta) -> Delta:
    """The halves of the rows in the other order: the last modulation's shift and scale."""
    half = delta.b.shape[0] // 2
    parts = (None if x is None else torch.cat([x[half:], x[:half]]) for x in (delta.b, delta.bias, delta.magnitude))
    b, bias, magnitude = parts
    assert b is not None
    return Delta(delta.a, b, bias, magnitude)


# DoRA beside the weights (Liu et al. 2024): a variant of peft's LoRA layer that computes what `Delta.change` adds.
# peft's own variant computes the norm of every adapted weight again in each forward, has it of rows only, and
# multiplies what earlier adapters added. Here the norms are computed once for a scale, rows and columns are both
# known, and an adapter adds what it adds alone.


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
