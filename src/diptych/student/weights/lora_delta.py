"""LoRA as arithmetic: what a LoRA does to a linear layer, a student minus its teacher, and writing LoRA files.

A LoRA adds `scale · B A` to the weight and `scale · b` to the bias (Hu et al. 2021, section 4.1). A DoRA also sets the
norm of every row or column: the weight becomes `m · (W + scale · B A) / ‖W + scale · B A‖` (Liu et al. 2024, equation
5), so its change depends on the weight.

The trained input layer of a control-LoRA is stored in the only form that stock diffusers loads: as a LoRA on
`x_embedder` of rank 2C, where A is the identity, B the change of the weight, and `lora_B.bias` the change of the bias.
This is exact.

Files are written in three common styles of keys:

    transformer.transformer_blocks.0.attn.to_q.lora_A.weight        diffusers
    diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight      ComfyUI
    lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight         kohya

The last two use Black Forest Labs' layers (`original`), in which q, k and v are one. Splitting such a layer is exact:
all parts share A. Joining several is exact too: their ranks add up, unless they share A. The change of a bias is
`diff_b`, the magnitudes of a DoRA are `dora_scale`. A student's widened input layer has its shape in `reshape_weight`,
as ComfyUI's control-LoRAs do.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from diptych.errors import UserError
from diptych.student.weights import original
from diptych.student.weights.fold import INPUT, some
from diptych.student.weights.tensors import Stored, held

ROUNDING = 1e-6  # changes below this share of the weights, in spectral norm, are float32 rounding
_PREFIX = {"comfyui": "diffusion_model.", "kohya": "lora_unet_"}
_WRITTEN = {"comfyui": ("lora_A.weight", "lora_B.weight"), "kohya": ("lora_down.weight", "lora_up.weight")}
_MLP = 4  # FLUX's MLPs are four times as wide as the model


@dataclass(frozen=True)
class Delta:
    """What a LoRA does to one linear layer (out, in): A (rank, in), B (out, rank) times its scale, the change of the
    bias (out,), and, for a DoRA, the magnitudes: (out, 1) for each row, or (1, in) for each column."""

    a: torch.Tensor
    b: torch.Tensor
    bias: torch.Tensor | None = None
    magnitude: torch.Tensor | None = None

    def weight(self) -> torch.Tensor:
        """B A, float32."""
        return self.b.float() @ self.a.float()

    def change(self, weight: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        """The change of `weight` (out, in) at a scale, float32. Columns that A does not have stay unchanged."""
        width = self.a.shape[1]
        added = self.weight().to(weight.device) * scale
        if self.magnitude is not None:
            start = weight[:, :width].float()
            added = factor(start + added, self.magnitude.to(weight.device)) * (start + added) - start
        return torch.nn.functional.pad(added, (0, weight.shape[1] - width))

    def padded(self, width: int) -> Delta:
        """The same delta with zero columns in A, up to `width`, because the release's x_embedder has no condition. A
        DoRA stays unchanged, because its norms cover only the columns of A."""
        if self.magnitude is not None or width == self.a.shape[1]:
            return self
        return replace(self, a=torch.nn.functional.pad(self.a, (0, width - self.a.shape[1])))

    def joined(self, other: Delta) -> Delta:
        """The sum of both deltas; their ranks add up."""
        assert self.magnitude is None and other.magnitude is None
        parts = [bias for bias in (self.bias, other.bias) if bias is not None]
        bias = sum(parts[1:], parts[0]) if parts else None
        pairs = ((self.a, other.a, 0), (self.b, other.b, 1))
        a, b = (torch.cat([x.float(), y.float()], dim=dim) for x, y, dim in pairs)
        return Delta(a, b, bias)

    def whole(self) -> Delta:
        """The same delta with the identity as A: rank `in`, exact."""
        assert self.magnitude is None
        return Delta(torch.eye(self.a.shape[1]), self.weight(), self.bias)

    def rows(self, start: int, stop: int) -> Delta:
        """Rows `start` to `stop`, exclusive. Not for a DoRA with magnitudes of columns, which span all rows."""
        assert self.magnitude is None or self.magnitude.shape[1] == 1
        bias, magnitude = (None if x is None else x[start:stop] for x in (self.bias, self.magnitude))
        return Delta(self.a, self.b[start:stop], bias, magnitude)

    def turned(self) -> Delta:
        """The same delta with the two halves of its rows swapped: the last modulation's shift and scale."""
        half = self.b.shape[0] // 2
        b, bias, magnitude = (
            None if x is None else torch.cat([x[half:], x[:half]]) for x in (self.b, self.bias, self.magnitude)
        )
        assert b is not None
        return Delta(self.a, b, bias, magnitude)


def factor(weight: torch.Tensor, magnitude: torch.Tensor) -> torch.Tensor:
    """m / ‖W‖ in the shape of `magnitude`: the factors of the rows or columns of W = W0 + B A in a DoRA (Liu et al.
    2024, equation 5). A row or column of zeros stays zero."""
    norm = torch.linalg.vector_norm(weight, dim=1 if magnitude.shape[1] == 1 else 0, keepdim=True)
    return torch.where(norm > 0, magnitude.float() / norm, torch.zeros_like(norm))


def fuse(
    tensors: Mapping[str, Stored], deltas: Mapping[str, Delta], dtype: torch.dtype | None = None
) -> dict[str, Stored]:
    """The tensors with the deltas added in float32 when they are read, then rounded to `dtype` or the stored type."""
    fused = dict(tensors)
    for layer, delta in deltas.items():
        fused[f"{layer}.weight"] = _plus(tensors[f"{layer}.weight"], delta.change, dtype)
        if (bias := delta.bias) is not None:
            fused[f"{layer}.bias"] = _plus(tensors[f"{layer}.bias"], lambda _, bias=bias: bias.float(), dtype)
    return fused


def _plus(stored: Stored, change: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype | None) -> Stored:
    dtype = dtype or stored.dtype

    def read() -> torch.Tensor:
        value = stored.read().float()
        return (value + change(value)).to(dtype)

    return Stored(stored.shape, dtype, read)


def difference(
    student: Mapping[str, Stored],
    teacher: Mapping[str, Stored],
    report: Callable[[int, int], None] | None = None,
) -> dict[str, Delta]:
    """A folded student minus its teacher, layer by layer.

    The input layer is exact. Other layers may differ by a low rank, if a LoRA was fused into them. UserError that names
    the layers that differ by more, which a control-LoRA cannot store without loss.
    """
    weight, start = student[f"{INPUT}.weight"].read().float(), teacher[f"{INPUT}.weight"].read().float()
    change = weight - torch.nn.functional.pad(start, (0, weight.shape[1] - start.shape[1]))
    shift = student[f"{INPUT}.bias"].read().float() - teacher[f"{INPUT}.bias"].read().float()
    deltas = {INPUT: Delta(torch.eye(weight.shape[1]), change, shift)}
    layers = sorted({key.rpartition(".")[0] for key in student} - {INPUT})
    lost: list[str] = []
    for i, layer in enumerate(layers):
        delta = _layer_difference(layer, student, teacher)
        if isinstance(delta, Delta):
            deltas[layer] = delta
        elif delta:
            lost.append(delta)
        if report:
            report(i + 1, len(layers))
    if lost:
        raise UserError(
            "model_mismatch",
            f"{len(lost)} layers differ from the base by more than a low rank: {some(lost)}. A control-LoRA cannot "
            "store that without loss. Check that the base is this student's teacher; if it is, the student was trained "
            "in mode full: use --to folded.",
        )
    return deltas


def _layer_difference(layer: str, student: Mapping[str, Stored], teacher: Mapping[str, Stored]) -> Delta | str | None:
    """The delta of one layer, None if the layers are equal, or the name of the tensor that no LoRA can store."""
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
    """(A, B) with B A = `change` up to `ROUNDING` of `weight`. None if they would not be smaller than the matrix."""
    out, width = change.shape
    if not change.any():
        return torch.zeros(1, width), torch.zeros(out, 1)
    u, s, v = torch.linalg.svd(change.double(), full_matrices=False)
    rank = max(1, int((s > ROUNDING * torch.linalg.matrix_norm(weight.double(), 2)).sum()))
    if rank * (out + width) >= out * width:
        return None
    root = s[:rank].sqrt()
    return (root[:, None] * v[:rank]).float(), (u[:, :rank] * root).float()


def ranks_of(deltas: Mapping[str, Delta]) -> dict[str, Any]:
    """peft's settings of adapters with these ranks. Their scale is 1, because alpha is the rank everywhere."""
    ranks = {layer: delta.a.shape[0] for layer, delta in deltas.items()}
    usual = max(ranks.values(), key=list(ranks.values()).count)
    # peft matches the end of a name: `proj_out` would match that of every block, too.
    ends = {layer for layer in ranks if any(other.endswith(f".{layer}") for other in ranks)}
    pattern = {f"^{layer}" if layer in ends else layer: rank for layer, rank in ranks.items() if rank != usual}
    return {"r": usual, "lora_alpha": usual, "rank_pattern": pattern, "alpha_pattern": dict(pattern)}


def as_lora(deltas: Mapping[str, Delta]) -> tuple[dict[str, Stored], dict[str, str]]:
    """(tensors, metadata) of a LoRA file in diffusers' keys. Alpha is the rank everywhere, so the scale is 1.

    UserError for what one peft config cannot express: a DoRA of some layers only, of columns, or with changed biases.
    """
    from peft import LoraConfig

    tensors: dict[str, torch.Tensor] = {}
    biased = any(delta.bias is not None for delta in deltas.values())
    dora = [layer for layer, delta in deltas.items() if delta.magnitude is not None]
    if dora and (biased or len(dora) < len(deltas) or any(deltas[x].magnitude.shape[1] != 1 for x in dora)):  # pyright: ignore
        raise UserError(
            "lora_unsupported",
            f"{len(dora)} of {len(deltas)} layers have DoRA: {some(sorted(dora))}. In diffusers' keys, all layers "
            "or none have it, by rows and without biases. Write another style, or fuse it into the weights.",
        )
    for layer, delta in deltas.items():
        tensors[f"transformer.{layer}.lora_A.weight"] = delta.a
        tensors[f"transformer.{layer}.lora_B.weight"] = delta.b
        if delta.magnitude is not None:
            tensors[f"transformer.{layer}.lora_magnitude_vector"] = delta.magnitude[:, 0]
        if biased:  # all adapters of a file have a bias, or none has (peft's `lora_bias` is one switch)
            zero = torch.zeros(delta.b.shape[0])
            tensors[f"transformer.{layer}.lora_B.bias"] = zero if delta.bias is None else delta.bias
    config = LoraConfig(
        **ranks_of(deltas), target_modules=sorted(deltas), lora_bias=biased, use_dora=bool(dora)
    ).to_dict()
    plain = {f"transformer.{k}": sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    metadata = {"lora_adapter_metadata": json.dumps(plain, sort_keys=True)}
    return {key: held(tensor.contiguous()) for key, tensor in tensors.items()}, metadata


def write(deltas: Mapping[str, Delta], style: str) -> tuple[dict[str, Stored], dict[str, str]]:
    """(tensors, metadata) of a LoRA file in a style. Its scale is 1, because alpha is the rank everywhere."""
    if style == "diffusers":
        return as_lora(deltas)
    tensors: dict[str, torch.Tensor] = {}
    down, up = _WRITTEN[style]
    for layer, delta in _merged(deltas).items():
        name = _PREFIX[style] + (layer.replace(".", "_") if style == "kohya" else layer)
        tensors |= {f"{name}.{down}": delta.a, f"{name}.{up}": delta.b}
        tensors[f"{name}.alpha"] = torch.tensor(float(delta.a.shape[0]))
        if delta.bias is not None:
            tensors[f"{name}.diff_b"] = delta.bias
        if delta.magnitude is not None:
            tensors[f"{name}.dora_scale"] = delta.magnitude
        if layer == original.INPUT:
            tensors[f"{name}.reshape_weight"] = torch.tensor([delta.b.shape[0], delta.a.shape[1]])
    return {key: held(tensor.contiguous()) for key, tensor in tensors.items()}, {}


def _merged(deltas: Mapping[str, Delta]) -> dict[str, Delta]:
    """The deltas by Black Forest Labs' layers. UserError that lists the layers without a name there."""
    groups: dict[str, dict[str, Delta]] = {}
    unknown = []
    for name, delta in deltas.items():
        layer = original.original_of(name)
        if layer is None:
            unknown.append(name)
        else:
            groups.setdefault(layer, {})[name] = delta
    if unknown:
        raise UserError(
            "lora_unsupported",
            f"{len(unknown)} layers have no name in this style: {some(sorted(unknown))}. Write lora-diffusers instead.",
        )
    return {layer: _joined(layer, parts) for layer, parts in groups.items()}


def _joined(layer: str, parts: Mapping[str, Delta]) -> Delta:
    """One of Black Forest Labs' layers from its parts. Rows of missing parts are zero."""
    names = original.layers_of(layer)
    if layer == original.MODULATION:
        return parts[names[0]].turned()
    if len(names) == 1:
        return parts[names[0]]
    there = [parts[name] for name in names if name in parts]  # in the order of the rows
    dora = [delta.magnitude for delta in there if delta.magnitude is not None]
    if dora and (len(dora) < len(names) or any(magnitude.shape[1] != 1 for magnitude in dora)):
        raise UserError(
            "lora_unsupported",
            f"{layer} is one layer in this style, and only {len(dora)} of its {len(names)} parts ({', '.join(names)}) "
            "have DoRA magnitudes by rows. Write lora-diffusers, or fuse it into the weights.",
        )
    rank, width = there[0].a.shape
    shared = all(torch.equal(delta.a, there[0].a) for delta in there)
    biased = any(delta.bias is not None for delta in there)
    blocks, biases = [], []
    for name in names:
        delta, height = parts.get(name), _MLP * width if name.endswith("proj_mlp") else width
        b = torch.zeros(height, rank if shared else 0) if delta is None else delta.b.float()
        blocks.append(b)
        biases.append(torch.zeros(len(b)) if delta is None or delta.bias is None else delta.bias.float())
    a = there[0].a if shared else torch.cat([delta.a.float() for delta in there])
    b = torch.cat(blocks) if shared else torch.block_diag(*blocks)
    return Delta(a, b, torch.cat(biases) if biased else None, torch.cat(dora) if dora else None)
