"""Reading a LoRA file in any style of keys (`lora_keys`), completely: what it does to each layer.

The scale of a file is alpha over rank, from its tensors, its header, or the `adapter_config.json` beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diptych.errors import UserError
from diptych.student.weights import original
from diptych.student.weights.files import read_json
from diptych.student.weights.fold import INPUT, some
from diptych.student.weights.lora_delta import Delta
from diptych.student.weights.lora_keys import PEFT_PREFIX, Layer, account, no_layer
from diptych.student.weights.tensors import open_safetensors
from diptych.utils.documents import parse_json

RELEASED_LORA = "pytorch_lora_weights.safetensors"
PEFT_LORA = "adapter_model.safetensors"
SUFFIXES = (".safetensors", ".sft")
COMPONENTS: tuple[str, ...] = ("transformer", "text_encoder", "text_encoder_2")  # text encoders: CLIP-L and T5
HEADER = "lora_adapter_metadata"  # diffusers' key: JSON of one peft config for each component
CONFIG_FILE = "adapter_config.json"  # written by peft beside `adapter_model.safetensors`
# peft's settings of adapters that add more than B A: how they were initialized, and their kind.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")
_VARIANTS = ("use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config", "velora_config", "kasa_config")

_RETRY = "Nothing was loaded; fetch the file again."
# (in features, out features, has a bias) of a linear layer, by `component.layer`. None if there is no such layer.
Widths = Callable[[str], "tuple[int, int, bool] | None"]


def lora_file(path: Path) -> Path:
    """The readable safetensors file at `path`: the file itself, or the usual name in a folder."""
    if path.is_dir():
        inside = [path / RELEASED_LORA, path / PEFT_LORA]
        path = next((file for file in inside if file.is_file()), inside[0])
    if not path.is_file():
        raise UserError("lora_not_found", f"LoRA not found: {path}. Check the path.")
    if path.suffix not in SUFFIXES:
        raise UserError("file_format_unknown", f"{path} is not a .safetensors file, the only supported LoRA format.")
    open_safetensors(path)  # raises for a damaged file
    return path


def read_lora(path: Path) -> dict[str, Delta]:
    """What a LoRA file does to each layer, by `component.layer` (`COMPONENTS`), at scale 1.

    UserError that names the keys, if any key of the file belongs to no layer or does not match the others.
    """
    stored, header = open_safetensors(path)
    if not stored:
        raise UserError("file_damaged", f"{path} has no LoRA tensors. Fetch the file again.")
    layers = account(stored, path)
    settings = _PeftSettings.read(path, header, stored)
    deltas: dict[str, Delta] = {}
    for layer, keys in layers.items():
        parts = {part: stored[key].read() for part, key in keys.items()}
        if not {"a", "b"} <= parts.keys():
            raise _damaged(path, f"{layer.name} has only one of A and B")
        deltas |= _split(layer, _delta(path, layer, keys, parts, settings), path)
    return deltas


def _delta(
    path: Path, layer: Layer, keys: Mapping[str, str], parts: Mapping[str, torch.Tensor], settings: _PeftSettings
) -> Delta:
    """The delta of a layer of the file, from its parts."""
    a, b = parts["a"], parts["b"]
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
        shapes = " and ".join(f"{keys[part]} {tuple(parts[part].shape)}" for part in "ab")
        raise _damaged(path, f"A and B of {layer.name} are not two matrices of one rank ({shapes})")
    alpha = parts.get("alpha")
    if alpha is not None and alpha.numel() != 1:
        raise _damaged(path, f"{keys['alpha']} has shape {tuple(alpha.shape)}, not one number")
    scale = settings.scale(layer.targets[0], a.shape[0], None if alpha is None else float(alpha))
    out, width = b.shape[0], a.shape[1]
    for part, key in keys.items():
        if part in ("bias", "b_bias") and parts[part].shape != (out,):
            raise _damaged(path, f"{key} has shape {tuple(parts[part].shape)}, not ({out},)")
        if part == "shape" and parts[part].tolist() != [out, width]:
            raise _damaged(path, f"{key} is {parts[part].tolist()}, and A and B have shape ({out}, {width})")
    magnitude = parts.get("magnitude")
    if magnitude is not None:
        magnitude = magnitude[:, None] if magnitude.ndim == 1 else magnitude
        if magnitude.shape not in ((out, 1), (1, width)):
            raise _damaged(
                path, f"{keys['magnitude']} has shape {tuple(magnitude.shape)}, not ({out}, 1) or (1, {width})"
            )
    elif settings.is_dora(layer.targets[0]):
        raise _damaged(path, f"its settings have use_dora, and {layer.name} has no magnitudes")
    biases = [parts["b_bias"].float() * scale] if "b_bias" in parts else []
    biases += [parts["bias"]] if "bias" in parts else []
    return Delta(a, b if scale == 1 else b.float() * scale, sum(biases[1:], biases[0]) if biases else None, magnitude)


def _damaged(path: Path, what: str) -> UserError:
    return UserError("weights_damaged", f"{path} is damaged: {what}. {_RETRY}")


def _split(layer: Layer, delta: Delta, path: Path) -> dict[str, Delta]:
    """A layer of the file as diffusers' layers: the rows of B, of the bias, and of the magnitudes."""
    rows, width = delta.b.shape[0], delta.a.shape[1]
    if len(layer.targets) == 1 and layer.name != original.MODULATION:
        return {layer.targets[0]: delta}
    if delta.magnitude is not None and delta.magnitude.shape[1] != 1:
        raise UserError(
            "lora_unsupported",
            f"{path}: the DoRA magnitudes of {layer.name}, {tuple(delta.magnitude.shape)}, belong to its columns, "
            f"which the {len(layer.targets)} parts of this layer cannot share. Nothing was loaded; train with "
            "magnitudes of the output (LyCORIS: wd_on_output=True), or merge it into the base with its trainer.",
        )
    if layer.name == original.MODULATION:
        return {layer.targets[0]: delta.turned()}
    # All parts, except the MLP's of a single block, have as many rows as the model's width.
    equal = not layer.targets[-1].endswith("proj_mlp")
    if rows <= width * (len(layer.targets) - 1) or (equal and rows != width * len(layer.targets)):
        raise _other_model(path, f"{layer.name} has {rows} rows for {len(layer.targets)} layers of width {width}")
    ends = [*(width * i for i in range(len(layer.targets))), rows]
    return {n: delta.rows(start, stop) for n, start, stop in zip(layer.targets, ends[:-1], ends[1:], strict=True)}


def _other_model(path: Path, reason: str) -> UserError:
    return UserError(
        "lora_mismatch",
        f"{path} is for another model: {reason}. Nothing was loaded; pass a LoRA that was trained on this student's "
        "base.",
    )


def check_widths(deltas: Mapping[str, Delta], path: Path, widths: Widths) -> None:
    """UserError that names the layers, unless each one exists, is as wide as its delta, and has the bias it changes."""
    absent, faults = [], []
    for layer, delta in deltas.items():
        got, wide = (delta.a.shape[1], delta.b.shape[0]), widths(layer)
        if wide is None:
            absent.append(layer)
        elif got != wide[:2] and not (layer == f"transformer.{INPUT}" and (2 * got[0], got[1]) == wide[:2]):
            which = 0 if got[0] != wide[0] else 1
            faults.append(f"{'AB'[which]} of {layer} has width {got[which]}, its layer {wide[which]}")
        elif delta.bias is not None and not wide[2]:
            faults.append(f"it adapts the bias of {layer}, which has none")
    if absent:
        raise no_layer(path, absent, {})
    if faults:
        raise _other_model(path, some(sorted(faults)))


def read_deltas(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Delta]:
    """What a LoRA file adds to each layer of a folded transformer with these `shapes`, at scale 1.

    UserError that names the keys, if any of them has no layer there.
    """

    def widths(layer: str) -> tuple[int, int, bool] | None:
        name = layer.removeprefix("transformer.")
        shape = shapes.get(f"{name}.weight", ())
        return (shape[1], shape[0], f"{name}.bias" in shapes) if len(shape) == 2 else None

    deltas = lora_deltas(path)
    check_widths({f"transformer.{layer}": delta for layer, delta in deltas.items()}, path, widths)
    return {layer: delta.padded(shapes[f"{layer}.weight"][1]) for layer, delta in deltas.items()}


def lora_deltas(path: Path) -> dict[str, Delta]:
    """What a LoRA file adds to each layer of any FLUX transformer, at scale 1.

    UserError that names the layers, if any of them belongs to a text encoder.
    """
    deltas = read_lora(path)
    if others := [layer for layer in deltas if not layer.startswith("transformer.")]:
        raise UserError(
            "lora_unsupported",
            f"{path} adapts {len(others)} layers of text encoders: {some(sorted(others))}. Only layers of the "
            "transformer can be used here. Remove the others from the file, or pass it as --lora when generating.",
        )
    return {layer.removeprefix("transformer."): delta for layer, delta in deltas.items()}


@dataclass(frozen=True)
class _PeftSettings:
    """peft's settings of each component that a file adapts. Empty settings mean a scale of 1."""

    path: Path
    by_component: Mapping[str, Mapping[str, Any]]

    @classmethod
    def read(cls, path: Path, header: Mapping[str, str], keys: Iterable[str]) -> _PeftSettings:
        """The settings of a LoRA file with these keys. UserError if they are damaged or not those of a plain LoRA."""
        beside = path.parent / CONFIG_FILE
        try:
            values: dict[str, Any] = parse_json(header.get(HEADER, "{}"))
            by_component = {name: _of(values, name) for name in COMPONENTS}
        except (ValueError, AttributeError) as error:
            raise UserError(
                "file_damaged", f"The '{HEADER}' metadata of {path} is damaged ({error}). Fetch the file again."
            ) from error
        if beside.is_file() and (path.stem == "adapter_model" or any(key.startswith(PEFT_PREFIX) for key in keys)):
            by_component = dict.fromkeys(COMPONENTS, read_json(beside))
        for settings in by_component.values():
            _check(path, settings)
        return cls(path, by_component)

    def scale(self, target: str, rank: int, alpha: float | None) -> float:
        """The factor of B A: alpha / r, or alpha / √r with rank-stabilized LoRA. 1 if neither is stated.

        `alpha` is the one in the layer's tensor. UserError if the settings state another one.
        """
        component, _, layer = target.partition(".")
        settings = self.by_component[component]
        stated = None
        if settings.get("r") or settings.get("lora_alpha"):
            rank = int(_for_layer(settings, "rank", layer, settings.get("r") or rank)) if alpha is None else rank
            stated = float(_for_layer(settings, "alpha", layer, settings.get("lora_alpha", rank)))
        if alpha is not None and stated is not None and alpha != stated:
            raise UserError(
                "file_damaged",
                f"{self.path} has two alphas for {target}: {alpha:g} in its tensors and {stated:g} in its settings. "
                "Nothing was loaded; remove the wrong one.",
            )
        alpha = stated if alpha is None else alpha
        return 1.0 if alpha is None else alpha / (rank**0.5 if settings.get("use_rslora") else rank)

    def is_dora(self, target: str) -> bool:
        """Whether the layer has magnitudes according to the settings."""
        return bool(self.by_component[target.partition(".")[0]].get("use_dora"))


def _of(values: Mapping[str, Any], component: str) -> dict[str, Any]:
    return {key.removeprefix(f"{component}."): v for key, v in values.items() if key.startswith(f"{component}.")}


def _for_layer(settings: Mapping[str, Any], kind: str, layer: str, default: float) -> float:
    from peft.utils.other import get_pattern_key

    pattern = settings.get(f"{kind}_pattern") or {}
    return pattern.get(get_pattern_key(list(pattern), layer), default)


def _check(path: Path, settings: Mapping[str, Any]) -> None:
    kind, start = str(settings.get("peft_type") or "LORA"), str(settings.get("init_lora_weights"))
    variants = [name for name in _VARIANTS if settings.get(name)]
    variants += [f"init_lora_weights={start}"] if start.lower().startswith(_CHANGES_BASE) else []
    variants += [f"peft_type={kind}"] if not kind.endswith("LORA") else []
    if variants:
        raise UserError(
            "lora_unsupported",
            f"{path} is not a plain LoRA: its settings have {', '.join(variants)}. Nothing was loaded; convert it to a "
            "LoRA with peft, or merge it into the base there.",
        )
