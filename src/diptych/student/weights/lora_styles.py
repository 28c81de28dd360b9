"""LoRA files written in the three key styles that people exchange: diffusers', ComfyUI's and kohya's.

    transformer.transformer_blocks.0.attn.to_q.lora_A.weight        diffusers
    diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight      ComfyUI
    lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight         kohya

The last two name Black Forest Labs' layers (`original`), in which q, k and v are one. Cutting such a layer apart is
exact: all parts share A. Putting several together is too: the ranks add up, unless they share A. The change of a bias
is `diff_b`, the magnitudes of a DoRA `dora_scale`; the input layer, which a student has widened, says its shape in
`reshape_weight`, as ComfyUI's own control-LoRAs do.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from diptych.errors import UserError
from diptych.student.weights import original
from diptych.student.weights.delta import Delta, turned
from diptych.student.weights.deltas import as_lora, lora_deltas
from diptych.student.weights.files import HEADER_KEY
from diptych.student.weights.fold import some
from diptych.student.weights.tensors import Stored, held, open_safetensors, write_safetensors

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
