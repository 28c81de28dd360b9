"""LoRA as arithmetic: what a LoRA does to a linear layer, a student minus its teacher, and writing LoRA files.

The weight gets `scale · B A` and the bias `scale · b` (Hu et al. 2021, section 4.1). A DoRA also sets the norm of every
row or column: the weight becomes `m · (W + scale · B A) / ‖W + scale · B A‖` (Liu et al. 2024, equation 5), so what it
adds depends on the weight that it goes on.

The trained input layer of a control-LoRA is kept the one way that stock diffusers loads it: as a LoRA on `x_embedder`
of rank 2C, A the identity, B the change of the weight, `lora_B.bias` the change of the bias. That is exact.

Files are written in the three key styles that people exchange:

    transformer.transformer_blocks.0.attn.to_q.lora_A.weight        diffusers
    diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight      ComfyUI
    lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight         kohya

The last two name Black Forest Labs' layers (`original`), in which q, k and v are one. Cutting such a layer apart is
exact: all parts share A. Putting several together is too: the ranks add up, unless they share A. The change of a bias
is `diff_b`, the magnitudes of a DoRA `dora_scale`; the input layer, which a student has widened, says its shape in
`reshape_weight`, as ComfyUI's own control-LoRAs do.
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

ROUNDING = 1e-6  # a change this much smaller than the weights, in spectral norm, is float32 rounding
_PREFIX = {"comfyui": "diffusion_model.", "kohya": "lora_unet_"}
_WRITTEN = {"comfyui": ("lora_A.weight", "lora_B.weight"), "kohya": ("lora_down.weight", "lora_up.weight")}
_MLP = 4  # FLUX's MLPs are four times as wide as the model


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

    def turned(self) -> Delta:
        """The halves of the rows in the other order: the last modulation's shift and scale."""
        half = self.b.shape[0] // 2
        b, bias, magnitude = (
            None if x is None else torch.cat([x[half:], x[:half]]) for x in (self.b, self.bias, self.magnitude)
        )
        assert b is not None
        return Delta(self.a, b, bias, magnitude)


def factor(weight: torch.Tensor, magnitude: torch.Tensor) -> torch.Tensor:
    """m / ||W||, in the shape of `magnitude`: what a DoRA multiplies the rows or the columns of W = W0 + B A by
    (Liu et al. 2024, equation 5). A row or column of zeros stays one."""
    norm = torch.linalg.vector_norm(weight, dim=1 if magnitude.shape[1] == 1 else 0, keepdim=True)
    return torch.where(norm > 0, magnitude.float() / norm, torch.zeros_like(norm))


def fuse(
    tensors: Mapping[str, Stored], deltas: Mapping[str, Delta], dtype: torch.dtype | None = None
) -> dict[str, Stored]:
    """The tensors with the deltas added in float32, each when it is read, and then rounded to `dtype` or its own."""
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


def ranks_of(deltas: Mapping[str, Delta]) -> dict[str, Any]:
    """peft's settings of adapters with these ranks, whose scale is 1: alpha is the rank everywhere."""
    ranks = {layer: delta.a.shape[0] for layer, delta in deltas.items()}
    most = max(ranks.values(), key=list(ranks.values()).count)
    # peft looks for the end of a name: `proj_out` would be that of every block, too.
    ends = {layer for layer in ranks if any(other.endswith(f".{layer}") for other in ranks)}
    pattern = {f"^{layer}" if layer in ends else layer: rank for layer, rank in ranks.items() if rank != most}
    return {"r": most, "lora_alpha": most, "rank_pattern": pattern, "alpha_pattern": dict(pattern)}


def as_lora(deltas: Mapping[str, Delta]) -> tuple[dict[str, Stored], dict[str, str]]:
    """(tensors, metadata) of a LoRA file in diffusers' keys; alpha is rank everywhere, so its scale is 1.

    UserError for what one peft config cannot say: a DoRA of some layers only, of columns, or beside changed biases.
    """
    from peft import LoraConfig

    tensors: dict[str, torch.Tensor] = {}
    biased = any(delta.bias is not None for delta in deltas.values())
    dora = [layer for layer, delta in deltas.items() if delta.magnitude is not None]
    if dora and (biased or len(dora) < len(deltas) or any(deltas[x].magnitude.shape[1] != 1 for x in dora)):  # pyright: ignore
        raise UserError(
            f"diffusers' keys have DoRA for all layers or for none, by rows, and without biases; here {len(dora)} of "
            f"{len(deltas)} layers have it: {some(sorted(dora))}. Write another style, or fuse it into the weights"
        )
    for layer, delta in deltas.items():
        tensors[f"transformer.{layer}.lora_A.weight"] = delta.a
        tensors[f"transformer.{layer}.lora_B.weight"] = delta.b
        if delta.magnitude is not None:
            tensors[f"transformer.{layer}.lora_magnitude_vector"] = delta.magnitude[:, 0]
        if biased:  # one file has biases on all adapters or on none (peft's `lora_bias` is one switch)
            zero = torch.zeros(delta.b.shape[0])
            tensors[f"transformer.{layer}.lora_B.bias"] = zero if delta.bias is None else delta.bias
    config = LoraConfig(
        **ranks_of(deltas), target_modules=sorted(deltas), lora_bias=biased, use_dora=bool(dora)
    ).to_dict()
    plain = {f"transformer.{k}": sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    metadata = {"lora_adapter_metadata": json.dumps(plain, sort_keys=True)}
    return {key: held(tensor.contiguous()) for key, tensor in tensors.items()}, metadata


def write(deltas: Mapping[str, Delta], style: str) -> tuple[dict[str, Stored], dict[str, str]]:
    """(tensors, metadata) of a LoRA file in a style; its scale is 1: alpha is the rank everywhere."""
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
    """The same by their layers. UserError that lists the layers that theirs have no name for."""
    groups: dict[str, dict[str, Delta]] = {}
    strays = []
    for name, delta in deltas.items():
        layer = original.original_of(name)
        if layer is None:
            strays.append(name)
        else:
            groups.setdefault(layer, {})[name] = delta
    if strays:
        raise UserError(f"{len(strays)} layers have no name in this style: {some(sorted(strays))}")
    return {layer: _together(layer, parts) for layer, parts in groups.items()}


def _together(layer: str, parts: Mapping[str, Delta]) -> Delta:
    """One of their layers from those of ours that are there; rows of the others stay zero."""
    names = original.layers_of(layer)
    if layer == original.MODULATION:
        return parts[names[0]].turned()  # turning halves twice gives them back
    if len(names) == 1:
        return parts[names[0]]
    there = [parts[name] for name in names if name in parts]  # in the order of the rows
    dora = [delta.magnitude for delta in there if delta.magnitude is not None]
    if dora and (len(dora) < len(names) or any(magnitude.shape[1] != 1 for magnitude in dora)):
        raise UserError(
            f"{layer} is one layer in this style, and a DoRA must have magnitudes for all its rows; here "
            f"{len(dora)} of {', '.join(names)} have them. Write lora-diffusers, or fuse it into the weights"
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
