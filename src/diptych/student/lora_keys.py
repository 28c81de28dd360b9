"""LoRA files in the three key styles that people exchange: diffusers', ComfyUI's and kohya's.

    transformer.transformer_blocks.0.attn.to_q.lora_A.weight        diffusers
    diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight      ComfyUI
    lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight         kohya

The last two name Black Forest Labs' layers (`original`), in which q, k and v are one. Cutting such a layer apart is
exact: all parts share A. Putting several together is too: the ranks add up, unless they share A. The change of a bias
is `diff_b`; the input layer, which a student has widened, says its shape in `reshape_weight`, as ComfyUI's own
control-LoRAs do. diffusers' readers drop `diff_b` with a log line, so both styles are read here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from diptych.errors import UserError
from diptych.student import original
from diptych.student.deltas import Delta, as_lora, lora_deltas
from diptych.student.files import HEADER_KEY
from diptych.student.lora import no_layer
from diptych.student.tensors import Stored, held, open_safetensors, write_safetensors
from diptych.student.weights import some

STYLES = ("diffusers", "comfyui", "kohya")
PREFIX = {"comfyui": "diffusion_model.", "kohya": "lora_unet_"}
_PARTS = {
    "lora_A.weight": "a",
    "lora_down.weight": "a",
    "lora_B.weight": "b",
    "lora_up.weight": "b",
    "alpha": "alpha",
    "diff_b": "bias",
    "reshape_weight": "shape",
}
_WRITTEN = {"comfyui": ("lora_A.weight", "lora_B.weight"), "kohya": ("lora_down.weight", "lora_up.weight")}
_KEY = re.compile(rf"^(.+?)\.({'|'.join(map(re.escape, _PARTS))})$")
_KOHYA_BLOCK = re.compile(r"^(double_blocks|single_blocks)_(\d+)_(.+)$")
_MLP = 4  # FLUX's MLPs are four times as wide as the model


def style_of(keys: Iterable[str]) -> str | None:
    """`comfyui` or `kohya` for a file of this transformer's layers in that style; None for what diffusers reads.

    Files that also hold a text encoder's layers are diffusers' to read.
    """
    keys = list(keys)
    return next((style for style, prefix in PREFIX.items() if keys and all(k.startswith(prefix) for k in keys)), None)


def read(state: Mapping[str, torch.Tensor], style: str, path: Path) -> dict[str, Delta]:
    """What each layer, by diffusers' name, is given. UserError that lists the keys that belong to no layer."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    strays = []
    for key, tensor in state.items():
        match = _KEY.match(key.removeprefix(PREFIX[style]))
        layer = _dotted(match[1]) if match and style == "kohya" else match[1] if match else None
        if match is None or layer is None or not original.layers_of(layer):
            strays.append(key)
        else:
            found.setdefault(layer, {})[_PARTS[match[2]]] = tensor
    strays += [layer for layer, parts in found.items() if not {"a", "b"} <= parts.keys()]
    if strays:
        raise UserError(no_layer(path, strays))
    deltas: dict[str, Delta] = {}
    for layer, parts in found.items():
        deltas |= _cut(layer, _delta(parts), path)
    return deltas


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
        name = PREFIX[style] + (layer.replace(".", "_") if style == "kohya" else layer)
        tensors |= {f"{name}.{down}": delta.a, f"{name}.{up}": delta.b}
        tensors[f"{name}.alpha"] = torch.tensor(float(delta.a.shape[0]))
        if delta.bias is not None:
            tensors[f"{name}.diff_b"] = delta.bias
        if layer == original.INPUT:
            tensors[f"{name}.reshape_weight"] = torch.tensor([delta.b.shape[0], delta.a.shape[1]])
    return {key: held(tensor.contiguous()) for key, tensor in tensors.items()}, {}


def _dotted(name: str) -> str | None:
    """kohya's name of a layer with its dots back; None if it is none of ours."""
    if block := _KOHYA_BLOCK.match(name):
        inner = next((known for known in original.layer_names(block[1]) if known.replace(".", "_") == block[3]), None)
        return inner and f"{block[1]}.{block[2]}.{inner}"
    return next((known for known in original.layer_names() if known.replace(".", "_") == name), None)


def _delta(parts: Mapping[str, torch.Tensor]) -> Delta:
    """A, B with its scale inside, and the bias's change."""
    a, b = parts["a"], parts["b"]
    scale = float(parts["alpha"]) / a.shape[0] if "alpha" in parts else 1.0
    return Delta(a, b if scale == 1 else b.float() * scale, parts.get("bias"))


def _cut(layer: str, delta: Delta, path: Path) -> dict[str, Delta]:
    """A layer of theirs as the layers that diffusers has for it: the rows of B, and of the bias."""
    names = original.layers_of(layer)
    if layer == original.MODULATION:
        half = delta.b.shape[0] // 2
        turned = None if delta.bias is None else torch.cat([delta.bias[half:], delta.bias[:half]])
        return {names[0]: Delta(delta.a, torch.cat([delta.b[half:], delta.b[:half]]), turned)}
    width, rows = delta.a.shape[1], delta.b.shape[0]
    if len(names) > 1 and rows <= width * (len(names) - 1):
        raise UserError(f"{path} is for another model: {layer} has {rows} rows for {len(names)} layers of {width}")
    ends = [*(width * i for i in range(len(names))), rows]
    return {
        name: Delta(delta.a, delta.b[start:stop], None if delta.bias is None else delta.bias[start:stop])
        for name, start, stop in zip(names, ends[:-1], ends[1:], strict=True)
    }


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
        return _cut(layer, parts[names[0]], Path())[names[0]]  # turning halves twice gives them back
    if len(names) == 1:
        return parts[names[0]]
    there = [parts[name] for name in names if name in parts]  # in the order of the rows
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
    return Delta(a, b, bias)
