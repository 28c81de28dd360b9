"""What a LoRA does to one linear layer.

The weight gets `scale · B A` and the bias `scale · b` (Hu et al. 2021, section 4.1). A DoRA also sets the norm of every
row or column: the weight becomes `m · (W + scale · B A) / ‖W + scale · B A‖` (Liu et al. 2024, equation 5), so what it
adds depends on the weight that it goes on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


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
