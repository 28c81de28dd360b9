"""Single files of other programs: transformers in .safetensors or .gguf, in diffusers' or Black Forest Labs' keys or in
scaled fp8, alone or in an all-in-one checkpoint with the VAE and the text encoders.

    model.diffusion_model.double_blocks.0.img_attn.qkv.weight       the transformer
    vae.decoder.conv_in.weight                                      the VAE, in the keys of the latent diffusion code
    text_encoders.clip_l.transformer.text_model.…                   CLIP-L and T5, in the keys of transformers
    text_encoders.t5xxl.transformer.encoder.block.…

Every key belongs to a part; an unknown key is an error. The transformer's config follows from the shapes of its
tensors. The configs of the other parts are those of the base.

GGUF files are read with the `gguf` package. In a loaded student, quantized matrices stay quantized and diffusers'
`GGUFLinear` dequantizes each when it is used, in half precision like its scales. The input layer, biases and norms are
dequantized when they are read. A conversion dequantizes every tensor in float32 with the `gguf` package, the reference.
The two differ by half-precision rounding.
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
from diptych.student.settings import KEY, TRANSFORMER_FOLDERS
from diptych.student.weights import files, original
from diptych.student.weights.fold import INPUT_LAYERS, Folded, count_blocks, some, stock_config
from diptych.student.weights.tensors import Stored, damaged, open_safetensors
from diptych.utils.documents import parse_json

FLUX_AXES = {128: (16, 56, 56)}  # head width: FLUX.1's division of the rotary embedding among three position ids
_PREFIXES = {
    "transformer": ("model.diffusion_model.", "diffusion_model."),
    "vae": ("vae.", "first_stage_model."),
    "text_encoder": ("text_encoders.clip_l.",),
    "text_encoder_2": ("text_encoders.t5xxl.",),
}
_SCALES = (".scale_weight", ".weight_scale")  # ComfyUI's older and newer name
_INPUT_SCALES = (".scale_input", ".input_scale")  # needed only for computing in fp8
_FORMATS = ("float8_e4m3fn", "float8_e5m2")
_QUANTIZED = (
    ("bitsandbytes", re.compile(r"\.(absmax|quant_map|quant_state\..+)$")),
    ("nunchaku", re.compile(r"\.(qweight|wscales|wzeros)$")),
)
_PLAIN = ("F32", "F16", "BF16")  # float types, which are read as torch tensors and not as GGUF's bytes


def open_file(
    path: Path, base: Path | None, dtype: torch.dtype | None
) -> tuple[Folded, dict[str, dict[str, Stored]], bool]:
    """A single file in diffusers', the released or Black Forest Labs' keys: its transformer, its other parts, and
    whether it was in scaled fp8."""
    tensors, metadata = (open_gguf(path), {}) if path.suffix == ".gguf" else open_safetensors(path)
    written, bias_split = files.read_header(metadata)
    scaled = any(key.endswith(_SCALES) for key in tensors)
    parts = split(tensors, path)
    tensors = parts.pop("transformer", {})
    if original.is_original(tensors):
        tensors = original.from_original(tensors)
    # Input layers of a quantized file are dequantized: folding joins them, and quantizing them costs the most quality.
    state = {
        key: (dequantized(tensor) if key.rpartition(".")[0] in INPUT_LAYERS else tensor).to(dtype)
        for key, tensor in tensors.items()
    }
    # Configs that may have what shapes do not show: the one in the file, one beside it, and those of the base.
    roots = [path.parent, *([base / name for name in (*TRANSFORMER_FOLDERS, "")] if base is not None else [])]
    beside = [files.read_json(root / "config.json") for root in roots if (root / "config.json").is_file()]
    config = infer_config(state, [written, *beside], str(path))
    config |= {KEY: written[KEY]} if KEY in written else {}
    return files.fold_stored(state, config, bias_split, str(path)), parts, scaled


def infer_config(tensors: Mapping[str, Stored], hints: Iterable[Mapping[str, Any]], where: str) -> dict[str, Any]:
    """The config of a FLUX transformer with these tensors (diffusers' keys, folded or released).

    Everything follows from the shapes, except how the rotary embedding divides the width of a head. That is taken from
    the first of `hints` (configs) whose heads have this width, else from FLUX.1. UserError if a tensor is missing.
    """
    wanted = ("x_embedder.weight", "context_embedder.weight", "proj_out.weight")
    pooled = "time_text_embed.text_embedder.linear_1.weight"
    norm = next((key for key in tensors if key.endswith("attn.norm_q.weight")), None)
    absent = [key for key in (*wanted, pooled) if key not in tensors] + (["attn.norm_q.weight"] if norm is None else [])
    if absent or norm is None:
        raise UserError("model_unsupported", f"{where} is not a FLUX transformer: it lacks {', '.join(absent)}.")
    (width, channels), (_, text), (out, _) = (tensors[key].shape for key in wanted)
    head = tensors[norm].shape[0]
    axes = next((h["axes_dims_rope"] for h in hints if h.get("attention_head_dim") == head and "axes_dims_rope" in h),
                FLUX_AXES.get(head))  # fmt: skip
    if axes is None:
        raise UserError(
            "model_incomplete",
            f"{where}: axes_dims_rope is unknown for attention heads of width {head}. Pass as base a teacher with "
            "transformer/config.json.",
        )
    return {
        "patch_size": 1,
        "in_channels": channels,
        "out_channels": out,
        **count_blocks(tensors),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": text,
        "pooled_projection_dim": tensors[pooled].shape[1],
        "guidance_embeds": any(key.startswith("time_text_embed.guidance_embedder.") for key in tensors),
        "axes_dims_rope": list(axes),
    }


def split(tensors: Mapping[str, Stored], path: Path) -> dict[str, dict[str, Stored]]:
    """The tensors of each part of a file, without its prefix, scaled fp8 dequantized. Most files have only a
    transformer. UserError for keys that belong to no part, or are quantized in another way."""
    for name, keys in _QUANTIZED:
        if any(keys.search(key) for key in tensors):
            raise files.quantized_weights(path, name)
    parts: dict[str, dict[str, Stored]] = {}
    unknown: list[str] = []
    prefixes = [(part, prefix) for part, spellings in _PREFIXES.items() for prefix in spellings]
    several = any(key.startswith(prefix) for key in tensors for part, prefix in prefixes if part != "transformer")
    unmarked = ("" if several else "transformer", "")
    for key, tensor in tensors.items():
        part, prefix = next((pair for pair in prefixes if key.startswith(pair[1])), unmarked)
        if part:
            parts.setdefault(part, {})[key.removeprefix(prefix)] = tensor
        elif not key.endswith("scaled_fp8"):
            unknown.append(key)
    if unknown:
        raise UserError(
            "model_unsupported",
            f"{path} has several models ({', '.join(sorted(parts))}) and {len(unknown)} keys that belong to none of "
            f"them: {some(sorted(unknown))}. Nothing was loaded; save the transformer alone.",
        )
    return {part: unscaled(state, path) for part, state in parts.items()}


def unscaled(tensors: Mapping[str, Stored], path: Path) -> dict[str, Stored]:
    """The same tensors, weights in scaled fp8 multiplied by their scales in float32."""
    out: dict[str, Stored] = {}
    scales = {key: next(end for end in _SCALES if key.endswith(end)) for key in tensors if key.endswith(_SCALES)}
    weights = {f"{key.removesuffix(end)}.weight": key for key, end in scales.items()}
    if lost := sorted(key for weight, key in weights.items() if weight not in tensors):
        raise UserError(
            "weights_damaged", f"{path} is damaged: no weight for {some(lost)}. Nothing was loaded; fetch it again."
        )
    for key, tensor in tensors.items():
        if key.endswith(".comfy_quant"):
            _check_format(key, tensor, path)
        elif key in weights:
            out[key] = _scaled(key, tensor, tensors[weights[key]], path)
        elif key not in scales and not key.endswith(_INPUT_SCALES) and not key.endswith("scaled_fp8"):
            out[key] = tensor
    return out


def _scaled(key: str, weight: Stored, scale: Stored, path: Path) -> Stored:
    if scale.shape not in ((), (1,), (1, 1), (weight.shape[0],), (weight.shape[0], 1)):
        raise UserError(
            "model_unsupported",
            f"{path}: the scale of {key} has shape {scale.shape} for a weight of shape {weight.shape}. Only one number "
            "for each weight or each row is supported. Pass a file in bfloat16, or one with such scales.",
        )

    def read() -> torch.Tensor:
        factor = scale.read().float().reshape(-1, *[1] * (len(weight.shape) - 1))
        return weight.read().float() * factor

    return Stored(weight.shape, torch.float32, read)


def _check_format(key: str, stored: Stored, path: Path) -> None:
    try:
        kind = parse_json(bytes(stored.read().tolist()))["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            "weights_damaged", f"{path} is damaged: {key} is not a JSON object with a format. Fetch the file again."
        ) from error
    if kind not in _FORMATS:
        raise UserError(
            "model_quantized",
            f"The weights in {path} are quantized as {kind} ({key}). Pass a file in bfloat16, or in "
            f"{' or '.join(_FORMATS)}.",
        )


def open_gguf(path: Path) -> dict[str, Stored]:
    """Every tensor of a GGUF file, unread. `shape` is the shape of the weights, not of their bytes.

    Floating-point tensors are plain. A quantized one has dtype uint8 and is read as a `GGUFParameter`, which keeps its
    type when rows are sliced and joined. UserError if the file is truncated or damaged.
    """
    try:
        import gguf
    except ImportError as error:
        raise UserError("dependency_missing", f"{path}: GGUF files need the gguf package: pip install gguf") from error
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
    """A copy of the tensor's data, because the file is mapped read-only."""
    return torch.from_numpy(tensor.data.copy())


def dequantized(stored: Stored) -> Stored:
    """Quantized weights as float32, exactly as the `gguf` package dequantizes them. Others stay as they are."""
    if stored.dtype != torch.uint8:
        return stored

    def read() -> torch.Tensor:
        import gguf

        value: Any = stored.read()
        data = value.as_tensor().contiguous().numpy()
        return torch.from_numpy(gguf.dequantize(data, value.quant_type)).reshape(stored.shape)

    return Stored(stored.shape, torch.float32, read)


def build_quantized(config: Mapping[str, Any], tensors: Mapping[str, Stored], dtype: torch.dtype, where: Path) -> Any:
    """A stock transformer whose quantized matrices stay quantized, computing in `dtype`.

    Built by diffusers' `from_single_file` with `GGUFQuantizationConfig` and our config, so that any width works.
    UserError for a type that diffusers cannot compute with.
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
                "model_quantized",
                f"{where}: diffusers cannot compute with {value.quant_type.name}, the type of {key}. Dequantize the "
                "file first: diptych convert FILE FOLDER --to folded --dtype bfloat16",
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
