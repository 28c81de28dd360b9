"""Single files of other programs: transformers in .safetensors or .gguf, in diffusers' or Black Forest Labs' keys, in
scaled fp8, alone or in an all-in-one checkpoint with the VAE and the text encoders.

    model.diffusion_model.double_blocks.0.img_attn.qkv.weight       the transformer
    vae.decoder.conv_in.weight                                      the VAE, in the keys of the latent diffusion code
    text_encoders.clip_l.transformer.text_model.…                   CLIP-L and T5, in the keys of transformers
    text_encoders.t5xxl.transformer.encoder.block.…

Every key has a place in a part, or the file is refused. The transformer's config is read off its tensors' shapes; the
other parts' configs are those of the base.

GGUF files are read with the `gguf` package. Opened as a student, quantized matrices stay quantized and diffusers'
`GGUFLinear` dequantizes each when it is used (in half precision: its scales are). The input layer, biases and norms are
dequantized at once. Converted, every tensor is dequantized in float32 by the `gguf` package, the reference: the two
differ by half-precision rounding.
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

FLUX_AXES = {128: (16, 56, 56)}  # head width: how FLUX.1 divides its rotary embedding among the three position ids
_PREFIXES = {
    "transformer": ("model.diffusion_model.", "diffusion_model."),
    "vae": ("vae.", "first_stage_model."),
    "text_encoder": ("text_encoders.clip_l.",),
    "text_encoder_2": ("text_encoders.t5xxl.",),
}
_SCALES = (".scale_weight", ".weight_scale")  # ComfyUI's older and newer name
_INPUT_SCALES = (".scale_input", ".input_scale")  # for computing in fp8, which is not done here
_FORMATS = ("float8_e4m3fn", "float8_e5m2")
_QUANTIZED = (
    ("bitsandbytes", re.compile(r"\.(absmax|quant_map|quant_state\..+)$")),
    ("nunchaku", re.compile(r"\.(qweight|wscales|wzeros)$")),
)
_PLAIN = ("F32", "F16", "BF16")  # float types: torch has them, so nothing is gained by keeping GGUF's bytes


def open_file(
    path: Path, base: Path | None, dtype: torch.dtype | None
) -> tuple[Folded, dict[str, dict[str, Stored]], bool]:
    """A single file of either kind, in diffusers', the released or Black Forest Labs' keys: its transformer, its other
    parts, and whether it was in scaled fp8."""
    tensors, metadata = (open_gguf(path), {}) if path.suffix == ".gguf" else open_safetensors(path)
    written, bias_split = files.read_header(metadata)
    scaled = any(key.endswith(_SCALES) for key in tensors)
    parts = split(tensors, path)
    tensors = parts.pop("transformer", {})
    if original.is_original(tensors):
        tensors = original.from_original(tensors)
    # Input layers of a quantized file are dequantized: folding joins them, and quantizing them costs most quality.
    state = {
        key: (dequantized(tensor) if key.rpartition(".")[0] in INPUT_LAYERS else tensor).to(dtype)
        for key, tensor in tensors.items()
    }
    config = infer_config(state, _hints(written, path, base), str(path))
    config |= {KEY: written[KEY]} if KEY in written else {}
    return files.fold_stored(state, config, bias_split, str(path)), parts, scaled


def _hints(written: Mapping[str, Any], path: Path, base: Path | None) -> list[Mapping[str, Any]]:
    """Configs that may say what shapes do not: the file's own, one beside it, the base's transformer's."""
    roots = [path.parent] + [base / name for name in TRANSFORMER_FOLDERS if base is not None] + ([base] if base else [])
    found = [files.read_json(root / "config.json") for root in roots if (root / "config.json").is_file()]
    return [written, *found]


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
        **count_blocks(tensors),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": text,
        "pooled_projection_dim": tensors[pooled].shape[1],
        "guidance_embeds": any(key.startswith("time_text_embed.guidance_embedder.") for key in tensors),
        "axes_dims_rope": list(axes),
    }


def split(tensors: Mapping[str, Stored], path: Path) -> dict[str, dict[str, Stored]]:
    """The tensors of each part of a file, without its prefix, scaled fp8 dequantized; of most files there is only a
    transformer. UserError for keys that belong to no part, or are quantized in another way."""
    for name, keys in _QUANTIZED:
        if found := [key for key in tensors if keys.search(key)]:
            raise UserError(
                f"the weights in {path} are quantized by {name} ({some(sorted(found), 3)}); give those they were made "
                "from (--memory quantizes them again), or a GGUF file"
            )
    parts: dict[str, dict[str, Stored]] = {}
    strays: list[str] = []
    whole = any(key.startswith(p) for key in tensors for part in list(_PREFIXES)[1:] for p in _PREFIXES[part])
    for key, tensor in tensors.items():
        place = _place(key)
        if not whole and place is None:
            place = "transformer", key
        if place is not None:
            parts.setdefault(place[0], {})[place[1]] = tensor
        elif not key.endswith("scaled_fp8"):
            strays.append(key)
    if strays:
        raise UserError(
            f"{path} holds several models ({', '.join(sorted(parts))}), and {len(strays)} keys that belong to none of "
            f"them: {some(sorted(strays))}. Nothing was loaded; save the transformer alone"
        )
    return {part: plain(state, path) for part, state in parts.items()}


def _place(key: str) -> tuple[str, str] | None:
    """(part, the key within it)."""
    for part, prefixes in _PREFIXES.items():
        for prefix in prefixes:
            if key.startswith(prefix):
                return part, key.removeprefix(prefix)
    return None


def plain(tensors: Mapping[str, Stored], path: Path) -> dict[str, Stored]:
    """The same with weights in scaled fp8 multiplied by their scales, in float32."""
    out: dict[str, Stored] = {}
    scales = {key: next(end for end in _SCALES if key.endswith(end)) for key in tensors if key.endswith(_SCALES)}
    weights = {f"{key.removesuffix(end)}.weight": key for key, end in scales.items()}
    if lost := sorted(key for weight, key in weights.items() if weight not in tensors):
        raise UserError(f"{path} is damaged: there is no weight to {some(lost)}. Nothing was loaded; fetch it again")
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
            f"{path}: the scale of {key} is {scale.shape} for a weight of {weight.shape}: neither one number nor one "
            "for each row, which is not supported. Give a file in bfloat16, or in fp8 with one scale for each weight"
        )

    def read() -> torch.Tensor:
        factor = scale.read().float().reshape(-1, *[1] * (len(weight.shape) - 1))
        return weight.read().float() * factor

    return Stored(weight.shape, torch.float32, read)


def _check_format(key: str, stored: Stored, path: Path) -> None:
    try:
        said = parse_json(bytes(stored.read().tolist()))["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: {key} does not say how its layer is quantized; fetch it again") from error
    if said not in _FORMATS:
        raise UserError(
            f"the weights in {path} are quantized as {said} ({key}); only {' and '.join(_FORMATS)} are read. Give a "
            "file in bfloat16 or fp8"
        )


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
