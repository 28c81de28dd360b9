"""Quantization of a model that is in memory, with diffusers' quantizers. LoRAs are fused before.

One rule covers every transformer: linear layers inside numbered blocks are quantized, except those of modulation. Input
and output layers, embeddings and modulation keep their precision. They are 30 % of a FLUX (see `modulation`), and the
quantizers' skip lists match too many names (`proj_out`) or too few (`x_embedder`).
"""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diptych.errors import UserError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Quantization:
    """How a quantization stores weights.

    Attributes:
        bits: bits per weight, its scale included.
        row_bytes: additional bytes per output row.
        package: the package that implements it; empty for torch.
        biases: whether biases are stored like the weights.
        devices: device types that it runs on.
    """

    bits: float
    row_bytes: int = 0
    package: str = ""
    biases: bool = False
    devices: tuple[str, ...] = ("cuda", "cpu")


QUANTIZATIONS = {
    "none": Quantization(0, devices=("cuda", "cpu", "mps", "xpu")),
    # float8_e4m3fn storage, cast to the compute dtype layer by layer (diffusers' layerwise casting).
    "fp8": Quantization(8, biases=True),
    # One float32 scale for each output row (torchao's Int8WeightOnlyConfig).
    "int8": Quantization(8, row_bytes=4, package="torchao"),
    # NormalFloat4, blocks of 64, their scales in 8 bits with one float32 for 256 of them (Dettmers et al. 2023).
    "nf4": Quantization(4 + 8 / 64 + 32 / (64 * 256), package="bitsandbytes", devices=("cuda",)),
}

_MODULATION = re.compile(r"(^|\.)(norm\w*|\w*mod(ulation)?)\.(.*\.)?(linear|\d+)$")  # FLUX's, SD3's, Qwen-Image's


def problem(name: str, device: str) -> str:
    """The reason why quantization `name` cannot run on `device` here. Empty if it can. Imports nothing heavy."""
    kind = QUANTIZATIONS[name]
    if device not in kind.devices:
        return f"{name} does not run on {device} (only on {', '.join(kind.devices)})"
    if kind.package and importlib.util.find_spec(kind.package) is None:
        return f"{name} needs {kind.package}: pip install {kind.package}"
    return ""


def quantizable(model: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """The linear layers that are quantized (`takes`), by name."""
    import torch

    linears = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    return {name: module for name, module in linears.items() if takes(name)}


def takes(linear: str) -> bool:
    """Whether a linear layer of this name is quantized: those in numbered blocks of a transformer or a text encoder,
    except modulation and T5's `wo`.

    T5 casts the input of `wo` to the dtype in which that weight is stored.
    """
    numbered = any(part.isdecimal() for part in linear.split(".")[:-1])
    return numbered and not is_modulation(linear) and not linear.endswith(".wo")


def is_modulation(layer: str) -> bool:
    """Whether a layer's name is that of a linear layer of modulation."""
    return _MODULATION.search(layer) is not None


def is_quantized(model: Any) -> bool:
    """Whether the model is already quantized, by a library (a GGUF file) or by `quantize`."""
    return bool(getattr(model, "is_quantized", False) or getattr(model, "quantized_by_diptych", False))


def quantize(model: Any, name: str, device: str | torch.device, dtype: torch.dtype) -> None:
    """Quantizes `model`'s `quantizable` layers in place, for computing in `dtype`, and moves them to `device`.

    One layer at a time, so that there is no second copy of the model. UserError for an unfused LoRA.
    """
    import torch

    if name == "none" or is_quantized(model):
        return
    if getattr(model, "peft_config", None):
        raise UserError("lora_unsupported", "A LoRA must be fused before its base is quantized. Load with fuse=True.")
    linears = quantizable(model)
    if name == "fp8":
        from diffusers.hooks import apply_layerwise_casting

        for linear in linears.values():
            apply_layerwise_casting(linear, torch.float8_e4m3fn, dtype, None)  # pyright: ignore[reportArgumentType]
        model.quantized_by_diptych = True
        return

    from diffusers.quantizers import DiffusersAutoQuantizer

    quantizer: Any = DiffusersAutoQuantizer.from_config(_config(name, dtype), pre_quantized=False)
    quantizer.validate_environment()
    tensors = {layer: dict(linear.named_parameters()) for layer, linear in linears.items()}
    others = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n not in linears}
    quantizer.preprocess_model(model=model, device_map={"": device}, keep_in_fp32_modules=[])
    for layer, module in others.items():  # the quantizer replaces every linear layer that its skip list does not name
        if model.get_submodule(layer) is not module:
            model.set_submodule(layer, module)
    del linears
    for layer in list(tensors):
        for part, value in tensors.pop(layer).items():
            key = f"{layer}.{part}"
            if quantizer.check_if_quantized_param(model, value, key, {}, param_device=device):
                quantizer.create_quantized_param(model, value.detach(), key, device, {}, [])
    quantizer.postprocess_model(model)
    model.hf_quantizer = quantizer


def _config(name: str, dtype: torch.dtype) -> Any:
    if name == "int8":
        from diffusers import TorchAoConfig
        from torchao.quantization import Int8WeightOnlyConfig  # pyright: ignore[reportMissingImports]

        return TorchAoConfig(Int8WeightOnlyConfig())
    from diffusers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def quantized_bytes(name: str, linears: Iterable[Mapping[str, tuple[int, ...]]], dtype_bytes: int) -> int:
    """Bytes of quantized layers, from the shapes of their `weight` and, if they have one, `bias`."""
    kind = QUANTIZATIONS[name]
    bits = kind.bits if name != "none" else 8 * dtype_bytes
    total = 0.0
    for linear in linears:
        total += math.prod(linear["weight"]) * bits / 8 + linear["weight"][0] * kind.row_bytes
        total += math.prod(linear.get("bias", (0,))) * (bits / 8 if kind.biases else dtype_bytes)
    return round(total)
