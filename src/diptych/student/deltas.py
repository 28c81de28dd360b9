"""LoRA as arithmetic: what a LoRA adds to each layer, and a control-LoRA found as the difference of two models.

A layer's delta is `scale · B A` for the weight and `scale · b` for the bias (Hu et al. 2021, section 4.1). The trained
input layer of a control-LoRA is kept the one way that stock diffusers loads it: as a LoRA on `x_embedder` of rank 2C,
A the identity, B the change of the weight, `lora_B.bias` the change of the bias. That is exact.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diptych.errors import UserError
from diptych.student.lora import INPUT, check_lora, read_lora
from diptych.student.tensors import Stored, held
from diptych.student.weights import some

ROUNDING = 1e-6  # a change this much smaller than the weights, in spectral norm, is float32 rounding


@dataclass(frozen=True)
class Delta:
    """What is added to one linear (out, in): A (rank, in), B (out, rank) with its scale inside, and a bias (out,)."""

    a: torch.Tensor
    b: torch.Tensor
    bias: torch.Tensor | None = None

    def weight(self) -> torch.Tensor:
        return self.b.float() @ self.a.float()

    def joined(self, other: Delta) -> Delta:
        """Both at once: ranks add up."""
        parts = [bias for bias in (self.bias, other.bias) if bias is not None]
        bias = sum(parts[1:], parts[0]) if parts else None
        pairs = ((self.a, other.a, 0), (self.b, other.b, 1))
        a, b = (torch.cat([x.float(), y.float()], dim=dim) for x, y, dim in pairs)
        return Delta(a, b, bias)

    def whole(self) -> Delta:
        """The same with A the identity: rank `in`, exact."""
        return Delta(torch.eye(self.a.shape[1]), self.weight(), self.bias)


def read_deltas(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Delta]:
    """What a LoRA file adds to each layer of a folded transformer with these `shapes`, at scale 1.

    Raises UserError, naming the keys, when any of them finds no layer there.
    """

    def widths(layer: str) -> tuple[int, int] | None:
        shape = shapes.get(f"{layer.removeprefix('transformer.')}.weight", ())
        return (shape[1], shape[0]) if layer.startswith("transformer.") and len(shape) == 2 else None

    check_lora(read_lora(path)[0], path, widths)
    deltas = lora_deltas(path)
    for name, delta in deltas.items():
        width = shapes[f"{name}.weight"][1]  # the release's x_embedder saw no condition
        deltas[name] = Delta(torch.nn.functional.pad(delta.a, (0, width - delta.a.shape[1])), delta.b, delta.bias)
    return deltas


def lora_deltas(path: Path) -> dict[str, Delta]:
    """What a LoRA file adds to each layer of a transformer, whatever transformer that is, at scale 1.

    Raises UserError, naming the keys, for those that are no transformer's.
    """
    state, alphas, metadata = read_lora(path)
    layers = dict.fromkeys(key.partition(".lora_")[0] for key in state)
    whole = {layer for layer in layers if {f"{layer}.lora_{x}.weight" for x in "AB"} <= state.keys()}
    odd = [key for key in state if not key.startswith("transformer.") or key.partition(".lora_")[0] not in whole]
    if odd or not state:
        raise UserError(f"{path}: {len(odd)} keys match no layer of a transformer: {some(sorted(odd))}")
    settings = {k.removeprefix("transformer."): v for k, v in (metadata or {}).items()}
    if settings.get("use_dora"):
        raise UserError(f"{path} is a DoRA, which adds no fixed matrix to a layer; it cannot be fused here")
    deltas: dict[str, Delta] = {}
    for layer in layers:
        a, b = state[f"{layer}.lora_A.weight"], state[f"{layer}.lora_B.weight"]
        name = layer.removeprefix("transformer.")
        scale = _scale(name, a.shape[0], settings, (alphas or {}).get(f"{layer}.alpha"))
        bias = state.get(f"{layer}.lora_B.bias")
        scaled = b if scale == 1 else b.float() * scale
        deltas[name] = Delta(a, scaled, bias if bias is None else bias.float() * scale)
    return deltas


def _scale(layer: str, rank: int, settings: Mapping[str, Any], alpha: Any) -> float:
    """peft's alpha / r (alpha / √r with rank-stabilized LoRA) for one layer; 1 where the file says nothing."""
    if settings.get("r"):
        from peft.utils.other import get_pattern_key

        def chosen(kind: str, default: float) -> float:
            pattern = settings.get(f"{kind}_pattern") or {}
            return pattern.get(get_pattern_key(list(pattern), layer), default)

        rank = int(chosen("rank", settings["r"]))
        return float(chosen("alpha", settings["lora_alpha"])) / (rank**0.5 if settings.get("use_rslora") else rank)
    return 1.0 if alpha is None else float(alpha) / rank


def fuse(
    tensors: Mapping[str, Stored], deltas: Mapping[str, Delta], dtype: torch.dtype | None = None
) -> dict[str, Stored]:
    """The tensors with the deltas added in float32, each when it is read, and then rounded to `dtype` or its own."""
    fused = dict(tensors)
    for layer, delta in deltas.items():
        fused[f"{layer}.weight"] = _plus(tensors[f"{layer}.weight"], delta.weight, dtype)
        if delta.bias is not None:
            bias = delta.bias
            fused[f"{layer}.bias"] = _plus(tensors[f"{layer}.bias"], lambda bias=bias: bias, dtype)
    return fused


def _plus(stored: Stored, change: Callable[[], torch.Tensor], dtype: torch.dtype | None) -> Stored:
    dtype = dtype or stored.dtype
    return Stored(stored.shape, dtype, lambda: (stored.read().float() + change()).to(dtype))


def difference(
    student: Mapping[str, Stored],
    teacher: Mapping[str, Stored],
    report: Callable[[int, int], None] | None = None,
) -> dict[str, Delta]:
    """A folded student minus its teacher, layer by layer.

    The input layer is exact. Elsewhere a layer may differ by a low rank (a LoRA was fused into it); UserError, naming
    the layers, where it differs otherwise: a control-LoRA could not hold that without loss.
    """
    weight, start = student[f"{INPUT}.weight"].read().float(), teacher[f"{INPUT}.weight"].read().float()
    change = weight - torch.nn.functional.pad(start, (0, weight.shape[1] - start.shape[1]))
    shift = student[f"{INPUT}.bias"].read().float() - teacher[f"{INPUT}.bias"].read().float()
    deltas = {INPUT: Delta(torch.eye(weight.shape[1]), change, shift)}
    layers = sorted({key.rpartition(".")[0] for key in student} - {INPUT})
    lost: list[str] = []
    for i, layer in enumerate(layers):
        found = _layer_difference(layer, student, teacher)
        if isinstance(found, Delta):
            deltas[layer] = found
        elif found:
            lost.append(found)
        if report:
            report(i + 1, len(layers))
    if lost:
        raise UserError(
            f"{len(lost)} layers differ from the base by more than a low rank: {some(lost)}; a control-LoRA cannot "
            "hold that without loss. Is the base the teacher of this student? If it is, the student was trained whole: "
            "keep it folded"
        )
    return deltas


def _layer_difference(layer: str, student: Mapping[str, Stored], teacher: Mapping[str, Stored]) -> Delta | str | None:
    """One layer's delta, None if the layers are equal, or the name of what no LoRA can hold."""
    names = [f"{layer}.{part}" for part in ("weight", "bias") if f"{layer}.{part}" in student]
    change = {name: student[name].read().float() - teacher[name].read().float() for name in names}
    if not any(bool(delta.any()) for delta in change.values()):
        return None
    weight = change[f"{layer}.weight"]
    if weight.ndim != 2:
        return f"{layer}.weight"
    pair = low_rank(weight, student[f"{layer}.weight"].read().float())
    return f"{layer}.weight" if pair is None else Delta(*pair, change.get(f"{layer}.bias"))


def low_rank(change: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(A, B) with B A = `change` up to `ROUNDING` of `weight`; None where they would not be smaller than the matrix."""
    out, width = change.shape
    if not change.any():
        return torch.zeros(1, width), torch.zeros(out, 1)
    u, s, v = torch.linalg.svd(change.double(), full_matrices=False)
    rank = max(1, int((s > ROUNDING * torch.linalg.matrix_norm(weight.double(), 2)).sum()))
    if rank * (out + width) >= out * width:
        return None
    root = s[:rank].sqrt()
    return (root[:, None] * v[:rank]).float(), (u[:, :rank] * root).float()


def as_lora(deltas: Mapping[str, Delta]) -> tuple[dict[str, Stored], dict[str, str]]:
    """(tensors, metadata) of a LoRA file in diffusers' keys; alpha is rank everywhere, so its scale is 1."""
    from peft import LoraConfig

    tensors: dict[str, torch.Tensor] = {}
    biased = any(delta.bias is not None for delta in deltas.values())
    for layer, delta in deltas.items():
        tensors[f"transformer.{layer}.lora_A.weight"] = delta.a
        tensors[f"transformer.{layer}.lora_B.weight"] = delta.b
        if biased:  # one file has biases on all adapters or on none (peft's `lora_bias` is one switch)
            zero = torch.zeros(delta.b.shape[0])
            tensors[f"transformer.{layer}.lora_B.bias"] = zero if delta.bias is None else delta.bias
    ranks = {layer: delta.a.shape[0] for layer, delta in deltas.items()}
    most = max(ranks.values(), key=list(ranks.values()).count)
    config = LoraConfig(
        r=most,
        lora_alpha=most,
        target_modules=sorted(ranks),
        rank_pattern={layer: rank for layer, rank in ranks.items() if rank != most},
        alpha_pattern={layer: rank for layer, rank in ranks.items() if rank != most},
        lora_bias=biased,
    ).to_dict()
    plain = {f"transformer.{k}": sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    metadata = {"lora_adapter_metadata": json.dumps(plain, sort_keys=True)}
    return {key: held(tensor.contiguous()) for key, tensor in tensors.items()}, metadata
