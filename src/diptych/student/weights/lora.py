"""LoRA files on top of a student: every key must match a layer, or nothing is loaded.

`lora_file` reads the files, and peft's layers store them, so that diffusers' methods (`set_adapters`, `disable_lora`,
`unload_lora_weights`) work. Alpha is the rank in each layer (B includes the file's scale), because peft computes
`alpha / r` again whenever a scale is set.

Several LoRAs add up: each one, a DoRA too, adds to the weights what it adds alone, in any order. For this, a DoRA (Liu
et al. 2024) has a variant of peft's LoRA layer here. peft's variant computes the norm of every adapted weight again in
each forward pass, supports only rows, and multiplies what earlier adapters add.

The released LoRA was trained with two input layers. One on `x_embedder` reads only the noisy canvas, so zero columns
are appended to its A for the folded layer, which is exact. One on `c_embedder` has no counterpart and is an error.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import LoraVariant

from diptych.errors import UserError
from diptych.student.weights.lora_delta import Delta, factor, ranks_of
from diptych.student.weights.lora_file import COMPONENTS, check_widths, lora_file, read_lora

if TYPE_CHECKING:
    from diptych.student.reference_pipeline import ReferencePipeline


def apply_lora(pipe: ReferencePipeline, path: Path, scale: float = 1.0, *, name: str | None = None) -> str:
    """Loads a LoRA file onto `pipe`, in addition to active ones, and returns its adapter name.

    UserError that names the keys, if any of them has no layer.
    """
    path = lora_file(Path(path))
    deltas = read_lora(path)
    named = dict.fromkeys(layer.partition(".")[0] for layer in deltas)
    if absent := [component for component in named if getattr(pipe, component, None) is None]:
        raise UserError(
            "lora_mismatch",
            f"{path} adapts {' and '.join(absent)}, which this student does not have. Nothing was loaded; pass a base "
            "with text encoders.",
        )
    check_widths(deltas, path, lambda layer: _widths(pipe, layer))
    name = name or _free_name(pipe, path)
    for component in COMPONENTS:
        inside = {key.partition(".")[2]: delta for key, delta in deltas.items() if key.startswith(f"{component}.")}
        if inside:
            model = getattr(pipe, component)
            _add(model, {_module_name(model, layer): delta for layer, delta in inside.items()}, name, scale)
    return name


def fuse_loras(pipe: ReferencePipeline) -> None:
    """Adds the active LoRAs, at their scales, to the weights of every component and removes the adapter layers. This is
    faster, and required before quantizing or saving.

    LoRAs on quantized weights (GGUF) stay separate, with the same result.
    """
    for component in COMPONENTS:
        model: Any = getattr(pipe, component, None)
        if not getattr(model, "peft_config", None) or getattr(model, "hf_quantizer", None) is not None:
            continue
        with torch.no_grad():
            for layer in _adapted(model):
                _fuse_layer(layer)
        _unload(model)


def _fuse_layer(layer: Any) -> None:
    base: Any = layer.get_base_layer()
    start = base.weight.data.float()
    weight, bias = start.clone(), None if base.bias is None else base.bias.data.float()
    for name in layer.active_adapters:
        if name not in layer.lora_A:
            continue
        a, b, scale = layer.lora_A[name].weight, layer.lora_B[name], layer.scaling[name]
        magnitude = layer.lora_magnitude_vector[name].weight if name in layer.lora_magnitude_vector else None
        weight += Delta(a, b.weight, None, magnitude).change(start, scale)
        if b.bias is not None:
            bias = bias + b.bias.float() * scale
    base.weight.data = weight.to(base.weight.dtype)
    if base.bias is not None and bias is not None:
        base.bias.data = bias.to(base.bias.dtype)


def _add(model: Any, deltas: Mapping[str, Delta], name: str, scale: float) -> None:
    """Wraps the named linear layers of `model` in adapter layers and activates these in addition to active ones."""
    active = next((list(layer.active_adapters) for layer in _adapted(model)), [])
    names = "|".join(map(re.escape, deltas))  # an expression: in a list, `proj_out` would match that of every block
    config = LoraConfig(**ranks_of(deltas), target_modules=names, inference_mode=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several adapters are intended
        inject_adapter_in_model(config, model, adapter_name=name, low_cpu_mem_usage=True)
    model._hf_peft_config_loaded = True
    for target, delta in deltas.items():
        layer = model.get_submodule(target)
        weight = layer.get_base_layer().weight
        dtype = weight.dtype if weight.dtype.is_floating_point else torch.float32

        def frozen(tensor: torch.Tensor, weight: Any = weight, dtype: torch.dtype = dtype) -> torch.nn.Parameter:
            return torch.nn.Parameter(tensor.to(weight.device, dtype), requires_grad=False)

        layer.lora_A[name].weight = frozen(delta.padded(layer.in_features).a)
        layer.lora_B[name].weight = frozen(delta.b)
        if delta.bias is not None:
            layer.lora_B[name].bias, layer.lora_bias[name] = frozen(delta.bias), True
        if delta.magnitude is not None:
            layer.lora_magnitude_vector[name] = Magnitude(frozen(delta.magnitude.float(), dtype=torch.float32))
            layer.lora_variant[name], layer.use_dora[name] = Dora(), True
    for layer in _adapted(model):
        layer.set_adapter([*active, name], inference_mode=True)
        layer.set_scale(name, scale)


def _adapted(model: Any) -> Iterator[Any]:
    return (module for module in model.modules() if isinstance(module, LoraLayer))


def _unload(model: Any) -> None:
    from diffusers.utils import recurse_remove_peft_layers

    recurse_remove_peft_layers(model)
    del model.peft_config
    model._hf_peft_config_loaded = False


def _module_name(model: Any, layer: str) -> str:
    """The module's name in this model. transformers before version 5 has CLIP's layers inside `text_model`."""
    return f"text_model.{layer}" if hasattr(model, "text_model") else layer


def _widths(pipe: ReferencePipeline, layer: str) -> tuple[int, int, bool] | None:
    """(in features, out features, has a bias) of a linear layer of the pipeline, or of the layer that an adapter wraps.
    None if there is no such layer."""
    component, _, name = layer.partition(".")
    model = getattr(pipe, component, None)
    try:
        module: Any = model.get_submodule(_module_name(model, name)) if model is not None else None
    except AttributeError:
        return None
    module = getattr(module, "base_layer", module)
    if not hasattr(module, "in_features"):
        return None
    return module.in_features, module.out_features, module.bias is not None


def _free_name(pipe: ReferencePipeline, path: Path) -> str:
    stem = "".join(c if c.isalnum() else "_" for c in path.stem) or "lora"
    taken = {name for component in COMPONENTS for name in getattr(getattr(pipe, component, None), "peft_config", ())}
    names = [stem, *(f"{stem}_{i}" for i in range(2, len(taken) + 3))]
    return next(name for name in names if name not in taken)


class Magnitude(torch.nn.Module):
    """The magnitudes of one DoRA adapter of one layer, (out, 1) or (1, in)."""

    def __init__(self, weight: torch.nn.Parameter) -> None:
        super().__init__()
        self.weight = weight
        self._factor: torch.Tensor | None = None
        self._scale: float | None = None

    def factor(self, layer: Any, name: str) -> torch.Tensor:
        """m / ‖W + s B A‖, float32, for the current scale s."""
        scale = layer.scaling[name]
        if self._factor is None or self._scale != scale:
            a, b = (x.weight.float() for x in (layer.lora_A[name], layer.lora_B[name]))
            weight = _dense(layer.get_base_layer())[:, : a.shape[1]].to(a.device)
            self._factor, self._scale = factor(weight + scale * (b @ a), self.weight.to(a.device)), scale
        return self._factor


class Dora(LoraVariant):
    """peft's hook for a layer's forward."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **_: Any) -> torch.Tensor:
        a, b, scale = module.lora_A[active_adapter], module.lora_B[active_adapter], module.scaling[active_adapter]
        scaled = module.lora_magnitude_vector[active_adapter].factor(module, active_adapter).to(x.device)
        x = x[..., : a.weight.shape[1]]  # the release's x_embedder has no condition
        base = module.get_base_layer()
        if scaled.shape[1] == 1:
            rows = scaled[:, 0]
            added = (rows - 1).to(x) * _product(base, x, result.dtype) + rows.to(x) * F.linear(a(x), b.weight) * scale
        else:
            columns = scaled[0]
            added = F.linear(a(columns.to(x) * x), b.weight) * scale
            added = added + _product(base, (columns - 1).to(x) * x, result.dtype)
        if b.bias is not None:
            added = added + b.bias * scale
        return result + added.to(result.dtype)

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        raise UserError(
            "lora_unsupported",
            f"peft cannot fuse the DoRA {active_adapter}. Load it with fuse=True, or call "
            "diptych.student.weights.lora.fuse_loras(pipe).",
        )

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: torch.Tensor) -> None:
        Dora.merge_safe(module, active_adapter, orig_weight)

    unmerge = merge_safe


def _product(base: Any, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """W x, computed by the layer, whose W may be quantized. Zeros are appended to an x with fewer columns than W."""
    y = base(F.pad(x, (0, base.in_features - x.shape[-1])).to(dtype))
    return y if base.bias is None else y - base.bias.to(y.dtype)


def _dense(base: Any) -> torch.Tensor:
    """A layer's weight in float32, dequantized if it is quantized."""
    weight = base.weight.data if base.weight.dtype.is_floating_point else base.weight
    if hasattr(weight, "quant_type"):
        from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

        return dequantize_gguf_tensor(weight).float()
    return weight.float()
