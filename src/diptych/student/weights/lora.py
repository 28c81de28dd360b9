"""LoRA files on top of a student: every key must find its layer, or nothing is loaded.

`lora_file` reads the files; peft's layers hold them, so that diffusers' own calls (`set_adapters`, `disable_lora`,
`unload_lora_weights`) work on them. Alpha is the rank in each of them (the file's own scale is inside B), because peft
computes `alpha / r` again whenever a scale is set: it then is the scale that was given and nothing else.

Several LoRAs add up: each adds to the weights what it adds alone, a DoRA too, whatever their order.

The released LoRA was trained beside two input layers. One on `x_embedder` sees the noisy canvas only, so for the folded
layer its input side is padded with zero columns: exact. One on `c_embedder` has no counterpart and is refused by name.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diptych.errors import UserError
from diptych.student.weights.lora_file import check_widths, lora_file, ranks_of, read_lora
from diptych.student.weights.lora_keys import COMPONENTS

if TYPE_CHECKING:
    import torch

    from diptych.student.pipeline import DiptychPipeline
    from diptych.student.weights.delta import Delta


def apply_lora(pipe: DiptychPipeline, path: Path, scale: float = 1.0, *, name: str | None = None) -> str:
    """Loads one LoRA file onto `pipe`, beside those that are active, and returns its adapter name.

    Raises UserError, naming the keys, when any of them finds no layer.
    """
    path = lora_file(Path(path))
    deltas = read_lora(path)
    named = dict.fromkeys(layer.partition(".")[0] for layer in deltas)
    if lacking := [component for component in named if getattr(pipe, component, None) is None]:
        raise UserError(
            f"{path} adapts {' and '.join(lacking)}, which this student does not have. Nothing was loaded; give a base "
            "with text encoders"
        )
    check_widths(deltas, path, lambda layer: _widths(pipe, layer))
    name = name or _free_name(pipe, path)
    for component in COMPONENTS:
        inside = {key.partition(".")[2]: delta for key, delta in deltas.items() if key.startswith(f"{component}.")}
        if inside:
            model = getattr(pipe, component)
            _add(model, {_module_name(model, layer): delta for layer, delta in inside.items()}, name, scale)
    return name


def fuse_loras(pipe: DiptychPipeline) -> None:
    """Adds the active LoRAs, at their scales, into the weights of every component and takes the adapter layers away:
    faster, and needed before quantizing or saving.

    Weights that are quantized already (GGUF) cannot take them; there they stay beside the weights, which computes the
    same.
    """
    import torch

    for component in COMPONENTS:
        model: Any = getattr(pipe, component, None)
        if not getattr(model, "peft_config", None) or getattr(model, "hf_quantizer", None) is not None:
            continue
        with torch.no_grad():
            for layer in _adapted(model):
                _fuse_layer(layer)
        _unload(model)


def _fuse_layer(layer: Any) -> None:
    from diptych.student.weights.delta import Delta

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
    """Puts adapter layers around the named linears of `model` and makes them active beside those that are."""
    import torch
    from peft import LoraConfig, inject_adapter_in_model

    from diptych.student.weights.delta import put_magnitude

    active = next((list(layer.active_adapters) for layer in _adapted(model)), [])
    names = "|".join(map(re.escape, deltas))  # whole: in a list, `proj_out` would be that of every block, too
    config = LoraConfig(**ranks_of(deltas), target_modules=names, inference_mode=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several adapters are meant
        inject_adapter_in_model(config, model, adapter_name=name, low_cpu_mem_usage=True)
    model._hf_peft_config_loaded = True
    for target, delta in deltas.items():
        layer = model.get_submodule(target)
        weight = layer.get_base_layer().weight
        dtype = weight.dtype if weight.dtype.is_floating_point else torch.float32

        def held(tensor: torch.Tensor, weight: Any = weight, dtype: torch.dtype = dtype) -> torch.nn.Parameter:
            return torch.nn.Parameter(tensor.to(weight.device, dtype), requires_grad=False)

        layer.lora_A[name].weight = held(delta.padded(layer.in_features).a)
        layer.lora_B[name].weight = held(delta.b)
        if delta.bias is not None:
            layer.lora_B[name].bias, layer.lora_bias[name] = held(delta.bias), True
        if delta.magnitude is not None:
            put_magnitude(layer, name, held(delta.magnitude.float(), dtype=torch.float32))
    for layer in _adapted(model):
        layer.set_adapter([*active, name], inference_mode=True)
        layer.set_scale(name, scale)


def _adapted(model: Any) -> Iterator[Any]:
    from peft.tuners.lora import LoraLayer

    return (module for module in model.modules() if isinstance(module, LoraLayer))


def _unload(model: Any) -> None:
    from diffusers.utils import recurse_remove_peft_layers

    recurse_remove_peft_layers(model)
    del model.peft_config
    model._hf_peft_config_loaded = False


def _module_name(model: Any, layer: str) -> str:
    """The module's name in this model: transformers before version 5 had CLIP's layers inside `text_model`."""
    return f"text_model.{layer}" if hasattr(model, "text_model") else layer


def _widths(pipe: DiptychPipeline, layer: str) -> tuple[int, int, bool] | None:
    """(in, out) features of a linear of the pipeline and whether it has a bias, looked at through an adapter that wraps
    it already; None if there is none."""
    component, _, name = layer.partition(".")
    model = getattr(pipe, component, None)
    try:
        module: Any = model.get_submodule(_module_name(model, name)) if model is not None else None
    except AttributeError:
        return None
    module = getattr(module, "base_layer", module)
    return (
        (module.in_features, module.out_features, module.bias is not None) if hasattr(module, "in_features") else None
    )


def _free_name(pipe: DiptychPipeline, path: Path) -> str:
    stem = "".join(c if c.isalnum() else "_" for c in path.stem) or "lora"
    taken = {name for component in COMPONENTS for name in getattr(getattr(pipe, component, None), "peft_config", ())}
    names = [stem, *(f"{stem}_{i}" for i in range(2, len(taken) + 3))]
    return next(name for name in names if name not in taken)
