"""LoRA files on top of a student: every key must find its layer, or nothing is loaded.

diffusers reads the formats (its own keys, kohya, XLabs, …) and peft adds the layers; but both only log keys that match
nothing. Here a key without a layer, or of a shape that does not fit, is a UserError that names it.

The released LoRA was trained beside two input layers. One on `x_embedder` sees the noisy canvas only, so for the folded
layer its input side is padded with zero columns: exact. One on `c_embedder` has no counterpart and is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diptych.documents import parse_json
from diptych.errors import UserError
from diptych.student.tensors import open_safetensors
from diptych.student.weights import some

if TYPE_CHECKING:
    import torch
    from diffusers import FluxControlPipeline

RELEASED_LORA = "pytorch_lora_weights.safetensors"
INPUT = "x_embedder"
Widths = Callable[[str], "tuple[int, int] | None"]  # `component.layer` of a linear: its (in, out) features, or None
_MARKS = (".lora_A.", ".lora_B.", ".lora_down.", ".lora_up.", ".lora.down.", ".lora.up.")


def apply_lora(
    pipe: FluxControlPipeline, path: Path, scale: float = 1.0, *, name: str | None = None, fuse: bool = False
) -> str:
    """Loads one LoRA file onto `pipe` and returns its adapter name.

    `fuse` adds it into the weights and removes the adapter layers: faster, and needed before quantizing or saving.
    Weights that are quantized already cannot take it; there the adapter stays beside them, which computes the same.
    Raises UserError, naming the keys, when any of them finds no layer.
    """
    path = lora_file(Path(path))
    state, alphas, metadata = read_lora(path)
    check_lora(state, path, lambda layer: _widths(pipe, layer))
    name = name or _free_name(pipe, path)
    rest = {"network_alphas": alphas, "adapter_name": name, "metadata": metadata, "_pipeline": pipe}
    try:
        pipe.load_lora_into_transformer(_pad_input(pipe, state), transformer=pipe.transformer, **rest)
        if any(key.startswith("text_encoder.") for key in state):
            pipe.load_lora_into_text_encoder(state, text_encoder=pipe.text_encoder, prefix="text_encoder", **rest)
    except (ValueError, RuntimeError, NotImplementedError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be loaded as a LoRA for this student: {error}") from error
    _check_loaded(pipe, state, path, name)
    if fuse and getattr(pipe.transformer, "hf_quantizer", None) is None:
        pipe.set_adapters([name], [scale])
        pipe.fuse_lora(components=["transformer"], adapter_names=[name])
        pipe.unload_lora_weights()
    else:
        _activate(pipe, name, scale)
    return name


def lora_file(path: Path) -> Path:
    """The safetensors file that `path` names, whole: itself, or the released name in a folder."""
    path = path / RELEASED_LORA if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"there is no LoRA {path}; check the path")
    if path.suffix != ".safetensors":
        raise UserError(f"{path} is not a safetensors file; only safetensors LoRAs are opened")
    open_safetensors(path)  # says what is wrong with a damaged file; diffusers would go on to look for a pickle
    return path


def read_lora(path: Path) -> tuple[dict[str, torch.Tensor], Any, Any]:
    """(tensors in diffusers' keys, alphas, adapter metadata) of a LoRA file: ComfyUI's and kohya's keys as `lora_keys`
    reads them, every other format as diffusers does."""
    from diffusers import FluxControlPipeline

    from diptych.student import lora_keys
    from diptych.student.deltas import as_lora

    stored = open_safetensors(path)[0]
    if (style := lora_keys.style_of(stored)) is not None:
        tensors, header = as_lora(lora_keys.read({key: t.read() for key, t in stored.items()}, style, path))
        return {key: t.read() for key, t in tensors.items()}, None, parse_json(header["lora_adapter_metadata"])
    # From the file, not from its tensors: the header may hold ranks and alphas.
    try:
        return FluxControlPipeline.lora_state_dict(
            str(path.parent),
            weight_name=path.name,
            local_files_only=True,
            return_alphas=True,
            return_lora_metadata=True,
        )  # pyright: ignore[reportReturnType]
    except (ValueError, RuntimeError, KeyError, TypeError, OSError) as error:
        line = (str(error) or type(error).__name__).splitlines()[0][:300]
        raise UserError(f"{path} is no LoRA that diffusers can read ({line})") from error


def is_lora(keys: Iterable[str]) -> bool:
    """Whether these are keys of a LoRA file and not of a transformer that carries adapter tensors."""
    keys = list(keys)
    return any(mark in key for key in keys for mark in _MARKS) and not any(
        key in (f"{INPUT}.weight", "img_in.weight") for key in keys
    )


def _pad_input(pipe: FluxControlPipeline, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`state` with a LoRA on the release's x_embedder made one on the folded layer: no effect on the condition."""
    import torch

    key = "transformer.x_embedder.lora_A.weight"
    width = pipe.transformer.config.in_channels
    if key not in state or state[key].shape[1] == width:
        return state
    return {**state, key: torch.nn.functional.pad(state[key], (0, width - state[key].shape[1]))}


def check_lora(state: Mapping[str, torch.Tensor], path: Path, widths: Widths) -> None:
    """Every key must be `<component>.<layer>.lora_A|lora_B…` of a layer that exists and has that width; A and B of a
    layer must both be there, of one rank."""
    strays, shapes = [], []
    ranks: dict[str, dict[str, int]] = {}
    for key, tensor in state.items():
        layer, found, part = key.partition(".lora_")
        wide = widths(layer) if found else None
        if wide is None:
            strays.append(key)
        elif tensor.ndim == 2:
            ranks.setdefault(layer, {})[part[:1]] = tensor.shape[0 if part.startswith("A") else 1]
            width = wide[0] if part.startswith("A") else wide[1]
            got = tensor.shape[1] if part.startswith("A") else tensor.shape[0]
            padded = layer == f"transformer.{INPUT}" and part.startswith("A") and 2 * got == width
            if got != width and not padded:
                shapes.append(f"{key} has width {got}, its layer {width}")
    if not state:
        raise UserError(f"{path} holds no LoRA tensors")
    if any(".c_embedder." in f".{key}" for key in strays):
        raise UserError(
            f"{path} adapts c_embedder ({some([k for k in strays if 'c_embedder' in k])}), which a folded student does "
            "not have; merge that LoRA into the released weights first. Nothing was loaded"
        )
    if strays:
        raise UserError(no_layer(path, strays))
    if shapes:
        raise UserError(
            f"{path} is for another model: {some(sorted(shapes))}. Nothing was loaded; give one that was trained on "
            "this student's base"
        )
    odd = [layer for layer, both in ranks.items() if len(both) != 2 or len(set(both.values())) != 1]
    if odd:
        raise UserError(
            f"{path} is damaged: A and B of {some(sorted(odd))} are not both there, or not of one rank. Nothing was "
            "loaded; fetch it again"
        )


def no_layer(path: Path, keys: list[str]) -> str:
    """What is said of keys that belong to no layer."""
    named = some(sorted(keys))
    return f"{path}: {len(keys)} keys match no layer: {named}. Nothing was loaded; give a LoRA that is made for FLUX.1"


def _widths(pipe: FluxControlPipeline, layer: str) -> tuple[int, int] | None:
    """Widths of a linear of the pipeline, looked at through an adapter that wraps it already; None if there is none."""
    component, _, name = layer.partition(".")
    model = getattr(pipe, component, None) if component in ("transformer", "text_encoder") else None
    try:
        module: Any = model.get_submodule(name) if model is not None else None
    except AttributeError:
        return None
    module = getattr(module, "base_layer", module)
    return (module.in_features, module.out_features) if hasattr(module, "in_features") else None


def _check_loaded(pipe: FluxControlPipeline, state: dict[str, torch.Tensor], path: Path, name: str) -> None:
    wanted = {key.removeprefix("transformer.") for key in state if key.startswith("transformer.")}
    have = {key.replace(f".{name}.", ".") for key in pipe.transformer.state_dict() if f".{name}." in key}
    if lost := sorted(wanted - have):
        pipe.delete_adapters(name)
        raise UserError(f"{path}: {len(lost)} keys were not taken up: {some(lost)}. Nothing was loaded")


def _free_name(pipe: FluxControlPipeline, path: Path) -> str:
    stem = "".join(c if c.isalnum() else "_" for c in path.stem) or "lora"
    taken = set(getattr(pipe.transformer, "peft_config", {}))
    names = [stem, *(f"{stem}_{i}" for i in range(2, len(taken) + 3))]
    return next(name for name in names if name not in taken)


def _activate(pipe: FluxControlPipeline, name: str, scale: float) -> None:
    """Adds `name` to the active adapters; loading a second one would otherwise leave only the newest active."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    names, scales = [name], [scale]
    for other in getattr(pipe.transformer, "peft_config", {}):
        if other == name:
            continue
        layers = (m for m in pipe.transformer.modules() if isinstance(m, BaseTunerLayer))
        layer: Any = next(m for m in layers if other in getattr(m, "scaling", {}))
        names.append(other)
        scales.append(layer.scaling[other] * layer.r[other] / layer.lora_alpha[other])
    pipe.set_adapters(names, scales)
