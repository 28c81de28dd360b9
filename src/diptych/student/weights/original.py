"""Single files: Black Forest Labs' own keys as diffusers' keys, and a FLUX config read off the tensors' shapes.

diffusers' own converter fixes the width at 3072; this one takes it from the tensors, and works on tensors that are
still on disk. Black Forest Labs keep q, k and v (and, in single blocks, the MLP's first linear) in one matrix,
which is cut by rows, and order shift and scale of the last modulation the other way round.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from diptych.errors import UserError
from diptych.student.weights.tensors import Stored

PREFIXES = ("model.diffusion_model.", "diffusion_model.")  # what other programs put before a transformer's keys
FLUX_AXES = {128: (16, 56, 56)}  # head width: how FLUX.1 divides its rotary embedding among the three position ids

_TOP = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
# One name, or those that its rows are cut into: all but the last as high as the model is wide.
_BLOCKS: dict[str, dict[str, tuple[str, ...]]] = {
    "double_blocks": {
        "img_mod.lin": ("norm1.linear",),
        "txt_mod.lin": ("norm1_context.linear",),
        "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        "img_attn.norm.query_norm": ("attn.norm_q",),
        "img_attn.norm.key_norm": ("attn.norm_k",),
        "txt_attn.norm.query_norm": ("attn.norm_added_q",),
        "txt_attn.norm.key_norm": ("attn.norm_added_k",),
        "img_attn.proj": ("attn.to_out.0",),
        "txt_attn.proj": ("attn.to_add_out",),
        "img_mlp.0": ("ff.net.0.proj",),
        "img_mlp.2": ("ff.net.2",),
        "txt_mlp.0": ("ff_context.net.0.proj",),
        "txt_mlp.2": ("ff_context.net.2",),
    },
    "single_blocks": {
        "modulation.lin": ("norm.linear",),
        "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
        "linear2": ("proj_out",),
        "norm.query_norm": ("attn.norm_q",),
        "norm.key_norm": ("attn.norm_k",),
    },
}
_FOLDERS = {"double_blocks": "transformer_blocks", "single_blocks": "single_transformer_blocks"}
_BLOCK_KEY = re.compile(r"^(double_blocks|single_blocks)\.(\d+)\.(.+)\.(weight|bias|scale)$")


INPUT = "img_in"
MODULATION = "final_layer.adaLN_modulation.1"  # shift and scale the other way round


def layer_names(blocks: str = "") -> Iterable[str]:
    """Names of the layers in a kind of block, as its owner writes them (`double_blocks`, `transformer_blocks`, …); or
    of those outside of blocks, in both spellings."""
    if blocks in _BLOCKS:
        return _BLOCKS[blocks]
    theirs = next((name for name, folder in _FOLDERS.items() if folder == blocks), None)
    return [name for names in _BLOCKS[theirs].values() for name in names] if theirs else [*_TOP, *_TOP.values()]


def folder_of(blocks: str) -> str:
    """diffusers' name of a kind of block."""
    return _FOLDERS[blocks]


def layers_of(layer: str) -> tuple[str, ...]:
    """diffusers' layers for one of Black Forest Labs', in the order of its rows; none if there is no such layer."""
    if layer in _TOP:
        return (_TOP[layer],)
    blocks, _, rest = layer.partition(".")
    number, _, inner = rest.partition(".")
    if blocks not in _BLOCKS or not number.isdecimal():
        return ()
    return tuple(f"{_FOLDERS[blocks]}.{number}.{name}" for name in _BLOCKS[blocks].get(inner, ()))


def original_of(layer: str) -> str | None:
    """Black Forest Labs' layer that one of diffusers' is, or is a part of; None if there is no such layer."""
    for theirs, ours in _TOP.items():
        if ours == layer:
            return theirs
    folder, _, rest = layer.partition(".")
    number, _, inner = rest.partition(".")
    for blocks, here in _FOLDERS.items():
        if here == folder:
            found = next((theirs for theirs, names in _BLOCKS[blocks].items() if inner in names), None)
            return found and f"{blocks}.{number}.{found}"
    return None


def to_original(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """diffusers' keys as Black Forest Labs': the way back of `from_original`, bit for bit."""
    out: dict[str, Stored] = {}
    for key, tensor in tensors.items():
        layer, _, part = key.rpartition(".")
        theirs = original_of(layer)
        assert theirs is not None, key
        names = layers_of(theirs)
        if theirs == MODULATION:
            tensor = _swapped(tensor)
        elif len(names) > 1:
            tensor = _stacked([tensors[f"{name}.{part}"] for name in names])
        scale = part == "weight" and theirs.endswith(("query_norm", "key_norm"))
        out[f"{theirs}.{'scale' if scale else part}"] = tensor
    return out


def is_original(keys: Iterable[str]) -> bool:
    """Whether these are Black Forest Labs' own keys."""
    return "img_in.weight" in keys


def from_original(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """Black Forest Labs' keys as diffusers' keys. A key of neither keeps its name, to be refused by it later."""
    width = tensors["img_in.weight"].shape[0]
    out: dict[str, Stored] = {}
    for key, tensor in tensors.items():
        layer, _, part = key.rpartition(".")
        if layer in _TOP:
            out[f"{_TOP[layer]}.{part}"] = _swapped(tensor) if _TOP[layer] == "norm_out.linear" else tensor
            continue
        match = _BLOCK_KEY.match(key)
        names = _BLOCKS[match[1]].get(match[3]) if match else None
        if match is None or names is None:
            out[key] = tensor
            continue
        part = "weight" if match[4] == "scale" else match[4]
        ends = [width * i for i in range(len(names))] + [tensor.shape[0]]
        for name, start, stop in zip(names, ends[:-1], ends[1:], strict=True):
            piece = tensor if len(names) == 1 else tensor.rows(start, stop)
            out[f"{_FOLDERS[match[1]]}.{match[2]}.{name}.{part}"] = piece
    return out


def infer_config(tensors: Mapping[str, Stored], hints: Iterable[Mapping[str, Any]], where: str) -> dict[str, Any]:
    """The config of a FLUX transformer with these tensors (diffusers' keys, folded or released).

    Shapes tell everything but how the rotary embedding divides a head's width: that comes from the first of `hints`
    (configs) whose heads are as wide, else from FLUX.1 itself. UserError if a tensor that tells is not there.
    """
    wanted = ("x_embedder.weight", "context_embedder.weight", "proj_out.weight")
    pooled = "time_text_embed.text_embedder.linear_1.weight"
    norm = next((key for key in tensors if key.endswith("attn.norm_q.weight")), None)
    absent = [key for key in (*wanted, pooled) if key not in tensors] + (["attn.norm_q.weight"] if norm is None else [])
    if absent or norm is None:
        raise UserError(f"{where} holds no FLUX transformer: it lacks {', '.join(absent)}")
    (width, channels), (_, text), (out, _) = (tensors[key].shape for key in wanted)
    head = tensors[norm].shape[0]
    axes = next((h["axes_dims_rope"] for h in hints if h.get("attention_head_dim") == head and "axes_dims_rope" in h),
                FLUX_AXES.get(head))  # fmt: skip
    if axes is None:
        raise UserError(
            f"{where}: its heads are {head} wide, and nothing says how their rotary embedding is divided; "
            "give as base a teacher whose transformer/config.json is there"
        )
    return {
        "patch_size": 1,
        "in_channels": channels,
        "out_channels": out,
        "num_layers": _count(tensors, "transformer_blocks"),
        "num_single_layers": _count(tensors, "single_transformer_blocks"),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": text,
        "pooled_projection_dim": tensors[pooled].shape[1],
        "guidance_embeds": any(key.startswith("time_text_embed.guidance_embedder.") for key in tensors),
        "axes_dims_rope": list(axes),
    }


def _count(keys: Iterable[str], blocks: str) -> int:
    found = (re.match(rf"{blocks}\.(\d+)\.", key) for key in keys)
    return max((int(match[1]) for match in found if match), default=-1) + 1


def _stacked(parts: list[Stored]) -> Stored:
    """Several tensors on top of each other."""
    rows = sum(part.shape[0] for part in parts)
    return Stored((rows, *parts[0].shape[1:]), parts[0].dtype, lambda: torch.cat([part.read() for part in parts]))


def _swapped(tensor: Stored) -> Stored:
    """[shift; scale] as [scale; shift]."""
    half = tensor.shape[0] // 2

    def read() -> torch.Tensor:
        value = tensor.read()
        return torch.cat([value[half:], value[:half]])

    return Stored(tensor.shape, tensor.dtype, read)
