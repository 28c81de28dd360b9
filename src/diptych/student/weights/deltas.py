"""LoRA as arithmetic: a LoRA file added to a transformer's weights, and a control-LoRA found as the difference of two.

The trained input layer of a control-LoRA is kept the one way that stock diffusers loads it: as a LoRA on `x_embedder`
of rank 2C, A the identity, B the change of the weight, `lora_B.bias` the change of the bias. That is exact.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from diptych.errors import UserError
from diptych.student.weights import original
from diptych.student.weights.delta import Delta, turned
from diptych.student.weights.files import HEADER_KEY
from diptych.student.weights.fold import INPUT, some
from diptych.student.weights.lora_file import check_widths, ranks_of, read_lora
from diptych.student.weights.tensors import Stored, held, open_safetensors, write_safetensors

ROUNDING = 1e-6  # a change this much smaller than the weights, in spectral norm, is float32 rounding


def read_deltas(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Delta]:
    """What a LoRA file adds to each layer of a folded transformer with these `shapes`, at scale 1.

    Raises UserError, naming the keys, when any of them finds no layer there.
    """

    def widths(layer: str) -> tuple[int, int, bool] | None:
        name = layer.removeprefix("transformer.")
        shape = shapes.get(f"{name}.weight", ())
        return (shape[1], shape[0], f"{name}.bias" in shapes) if len(shape) == 2 else None

    deltas = lora_deltas(path)
    check_widths({f"transformer.{layer}": delta for layer, delta in deltas.items()}, path, widths)
    return {layer: delta.padded(shapes[f"{layer}.weight"][1]) for layer, delta in deltas.items()}


def lora_deltas(path: Path) -> dict[str, Delta]:
    """What a LoRA file adds to each layer of a transformer, whatever transformer that is, at scale 1.

    Raises UserError, naming the layers, for those that are no transformer's.
    """
    deltas = read_lora(path)
    if odd := [layer for layer in deltas if not layer.startswith("transformer.")]:
        raise UserError(
            f"{path} adapts text encoders in {len(odd)} layers: {some(sorted(odd))}. Only layers of the transformer "
            "can be used here; remove those layers from the file, or pass it as --lora when generating"
        )
    return {layer.removeprefix("transformer."): delta for layer, delta in deltas.items()}


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


# LoRA files written in the three key styles that people exchange: diffusers', ComfyUI's and kohya's.
# transformer.transformer_blocks.0.attn.to_q.lora_A.weight diffusers
# diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight ComfyUI
# lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight kohya The last two name Black Forest Labs' layers
# (`original`), in which q, k and v are one. Cutting such a layer apart is exact: all parts share A. Putting several
# together is too: the ranks add up, unless they share A. The change of a bias is `diff_b`, the magnitudes of a DoRA
# `dora_scale`; the input layer, which a student has widened, says its shape in `reshape_weight`, as ComfyUI's own
# control-LoRAs do.

STYLES = ("diffusers", "comfyui", "kohya")
_PREFIX = {"comfyui": "diffusion_model.", "kohya": "lora_unet_"}
_WRITTEN = {"comfyui": ("lora_A.weight", "lora_B.weight"), "kohya": ("lora_down.weight", "lora_up.weight")}
_MLP = 4  # FLUX's MLPs are four times as wide as the model


def rewrite(path: Path, out: Path, style: str, dtype: torch.dtype | None, extra: Mapping[str, str]) -> None:
    """A LoRA file in another style of keys; `extra` goes into its header, beside what the file said of itself."""
    _, said = open_safetensors(path)
    tensors, metadata = write(lora_deltas(path), style)
    kept = {HEADER_KEY: said[HEADER_KEY]} if HEADER_KEY in said else {}
    write_safetensors(out, {key: t.to(dtype) for key, t in tensors.items()}, {**metadata, **kept, **extra})


def write(deltas: Mapping[str, Delta], style: str) -> tuple[dict[str, Stored], dict[str, str]]:
    """(tensors, metadata) of a LoRA file in a style; its scale is 1: alpha is the rank everywhere."""
    if style == "diffusers":
        return as_lora(deltas)
    tensors: dict[str, torch.Tensor] = {}
    down, up = _WRITTEN[style]
    for layer, delta in _joined(deltas).items():
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


def _joined(deltas: Mapping[str, Delta]) -> dict[str, Delta]:
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
    names = original.layers_of(layer)
    if layer == original.MODULATION:
        return turned(parts[names[0]])  # turning halves twice gives them back
    if len(names) == 1:
        return parts[names[0]]
    there = [parts[name] for name in names if name in parts]  # in the order of the rows
    dora = [delta.magnitude for delta in there if delta.magnitude is not None]
    if dora and (len(dora) < len(names) or any(magnitude.shape[1] != 1 for magnitude in dora)):
        raise UserError(
            f"{layer} is one layer in this style, and a DoRA must have magnitudes for all its rows; here "
            f"{len(dora)} of {', '.join(names)} have them. Write lora-diffusers, or fuse it into the weights"
        )
    first = there[0]
    width = first.a.shape[1]
    heights = [width] * (len(names) - 1) + [width if len(names) == 3 else _MLP * width]
    heights = [parts[name].b.shape[0] if name in parts else height for name, height in zip(names, heights, strict=True)]
    shared = all(torch.equal(delta.a, first.a) for delta in there)
    a = first.a if shared else torch.cat([delta.a.float() for delta in there])
    b = torch.zeros(sum(heights), a.shape[0])
    biased = any(delta.bias is not None for delta in there)
    bias = torch.zeros(sum(heights)) if biased else None
    row = column = 0
    for name, height in zip(names, heights, strict=True):
        if (delta := parts.get(name)) is not None:
            rank = delta.a.shape[0]
            start = 0 if shared else column
            b[row : row + height, start : start + rank] = delta.b.float()
            column += rank
            if bias is not None and delta.bias is not None:
                bias[row : row + height] = delta.bias.float()
        row += height
    return Delta(a, b, bias, torch.cat(dora) if dora else None)
