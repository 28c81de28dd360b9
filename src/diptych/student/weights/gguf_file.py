"""GGUF files: read with the `gguf` package, run by diffusers' own GGUF layers, or dequantized exactly.

Opened as a student, quantized matrices stay quantized and diffusers' `GGUFLinear` dequantizes each when it is used (in
half precision: its scales are). The input layer, biases and norms are dequantized at once. Converted, every tensor is
dequantized in float32 by the `gguf` package, the reference: the two differ by half-precision rounding.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from diptych.errors import UserError
from diptych.student.weights.fold import INPUT_LAYERS, stock_config
from diptych.student.weights.tensors import Stored, damaged

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
