"""Single files: Black Forest Labs' own keys as diffusers' keys, and a FLUX config read off the tensors' shapes.

diffusers' own converter fixes the width at 3072; this one takes it from the tensors, and works on tensors that are
still on disk. Black Forest Labs keep q, k and v (and, in single blocks, the MLP's first linear) in one matrix,
which is cut by rows, and order shift and scale of the last modulation the other way round.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from diptych.errors import UserError
from diptych.student.weights.fold import INPUT_LAYERS, stock_config
from diptych.student.weights.tensors import Stored, damaged

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


# GGUF files: read with the `gguf` package, run by diffusers' own GGUF layers, or dequantized exactly. Opened as a
# student, quantized matrices stay quantized and diffusers' `GGUFLinear` dequantizes each when it is used (in half
# precision: its scales are). The input layer, biases and norms are dequantized at once. Converted, every tensor is
# dequantized in float32 by the `gguf` package, the reference: the two differ by half-precision rounding.

_PLAIN = ("F32", "F16", "BF16")  # float types: torch has them, so nothing is gained by keeping GGUF's bytes


def open_gguf(path: Path) -> dict[str, Stored]:
    """Every tensor of a GGUF file, unread; `shape` is that of the weights, not of their bytes.

    Floating-point tensors are plain; a quantized one has dtype uint8 and is read as a `GGUFParameter`, which keeps its
    type through slicing and joining rows. UserError if the file is missing, cut short or damaged.
    """
    try:
        import gguf
    except ImportError as error:
        raise UserError(f"{path}: reading GGUF needs the gguf package: pip install gguf") from error
    if not path.is_file():
        raise UserError(f"{path} is missing")
    try:
        tensors = gguf.GGUFReader(path).tensors
    except (ValueError, OSError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise damaged(path, "GGUF", error) from error
    return {tensor.name: _stored(tensor) for tensor in tensors}


def _stored(tensor: Any) -> Stored:
    shape = tuple(int(n) for n in reversed(tensor.shape))
    kind = tensor.tensor_type
    if kind.name == "BF16":
        return Stored(shape, torch.bfloat16, lambda: _copy(tensor).view(torch.bfloat16).reshape(shape))
    if kind.name in _PLAIN:
        dtype = torch.float32 if kind.name == "F32" else torch.float16
        return Stored(shape, dtype, lambda: _copy(tensor).reshape(shape))

    def read() -> torch.Tensor:
        from diffusers.quantizers.gguf.utils import GGUFParameter

        return GGUFParameter(_copy(tensor), quant_type=kind)  # pyright: ignore[reportCallIssue]

    return Stored(shape, torch.uint8, read, packed=int(tensor.n_bytes))


def _copy(tensor: Any) -> torch.Tensor:
    """The tensor's data in memory of its own: the file is mapped read-only."""
    return torch.from_numpy(tensor.data.copy())


def dequantized(stored: Stored) -> Stored:
    """The same weights as plain float32, if they are quantized; exact, by the `gguf` package."""
    if stored.dtype != torch.uint8:
        return stored
    return Stored(stored.shape, torch.float32, lambda: _dequantize(stored.read()).reshape(stored.shape))


def _dequantize(value: Any) -> torch.Tensor:
    import gguf

    data = value.as_tensor().contiguous().numpy()
    return torch.from_numpy(gguf.dequantize(data, value.quant_type))


def build_quantized(config: Mapping[str, Any], tensors: Mapping[str, Stored], dtype: torch.dtype, where: Path) -> Any:
    """A stock transformer whose quantized matrices stay quantized, computing in `dtype`.

    By diffusers' `from_single_file` with `GGUFQuantizationConfig`, given our config, so that any width works. UserError
    for a type that diffusers cannot compute with.
    """
    from diffusers import FluxTransformer2DModel, GGUFQuantizationConfig
    from diffusers.quantizers.gguf.utils import SUPPORTED_GGUF_QUANT_TYPES, GGUFParameter

    state: dict[str, torch.Tensor] = {}
    for key, stored in tensors.items():
        layer, _, part = key.rpartition(".")
        keep = stored.dtype == torch.uint8 and part == "weight" and len(stored.shape) == 2 and layer not in INPUT_LAYERS
        value = stored.read() if keep else dequantized(stored).read().to(dtype)
        if isinstance(value, GGUFParameter) and value.quant_type not in SUPPORTED_GGUF_QUANT_TYPES:
            raise UserError(
                f"{where}: {key} is of type {value.quant_type.name}, which diffusers cannot compute with; "
                "dequantize it first: diptych convert FILE FOLDER --to folded --dtype bfloat16"
            )
        state[key] = value
    with tempfile.TemporaryDirectory() as folder:
        text = json.dumps({"_class_name": "FluxTransformer2DModel", **stock_config(config)})
        (Path(folder) / "config.json").write_text(text, "utf8")
        return FluxTransformer2DModel.from_single_file(
            state,  # pyright: ignore[reportArgumentType]
            config=folder,
            quantization_config=GGUFQuantizationConfig(compute_dtype=dtype),
            torch_dtype=dtype,
            local_files_only=True,
        )
