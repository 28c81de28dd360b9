"""A LoRA file, in any style of keys, read whole: what it does to each layer, or why it is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diptych.errors import UserError
from diptych.student.weights import original
from diptych.student.weights.delta import Delta, turned
from diptych.student.weights.files import read_json
from diptych.student.weights.fold import INPUT, some
from diptych.student.weights.lora_keys import COMPONENTS, PEFT_PREFIX, Layer, account, no_layer
from diptych.student.weights.tensors import open_safetensors
from diptych.utils.documents import parse_json

RELEASED_LORA = "pytorch_lora_weights.safetensors"
PEFT_LORA = "adapter_model.safetensors"
SUFFIXES = (".safetensors", ".sft")
# The (in, out) features of a linear, by `component.layer`, and whether it has a bias; None if there is none.
Widths = Callable[[str], "tuple[int, int, bool] | None"]


def lora_file(path: Path) -> Path:
    """The safetensors file that `path` names, whole: itself, or the usual name in a folder."""
    if path.is_dir():
        path = next(
            (found for name in (RELEASED_LORA, PEFT_LORA) if (found := path / name).is_file()), path / RELEASED_LORA
        )
    if not path.is_file():
        raise UserError(f"there is no LoRA {path}; check the path")
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path} is not a safetensors file; only safetensors LoRAs are opened")
    open_safetensors(path)  # says what is wrong with a damaged file
    return path


def read_lora(path: Path) -> dict[str, Delta]:
    """What a LoRA file does to each layer, by `component.layer` (`lora_keys.COMPONENTS`), at scale 1.

    Every key of the file is in it. Raises UserError, naming the keys, when any of them has no place or does not fit the
    others.
    """
    stored, header = open_safetensors(path)
    if not stored:
        raise UserError(f"{path} holds no LoRA tensors")
    layers = account(stored, path)
    settings = LoraSettings.read(path, header, stored)
    deltas: dict[str, Delta] = {}
    for layer, keys in layers.items():
        parts = {part: stored[key].read() for part, key in keys.items()}
        if not {"a", "b"} <= parts.keys():
            raise _damaged(path, f"A and B of {layer.name} are not both there")
        whole = _assemble(path, layer, keys, parts, settings)
        deltas |= _cut(layer, whole, path)
    return deltas


def _assemble(
    path: Path, layer: Layer, keys: Mapping[str, str], parts: Mapping[str, torch.Tensor], settings: LoraSettings
) -> Delta:
    """The delta of a layer as the file has it, from its parts."""
    a, b = parts["a"], parts["b"]
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
        shapes = " and ".join(f"{keys[part]} {tuple(parts[part].shape)}" for part in "ab")
        raise _damaged(path, f"A and B of {layer.name} are not two matrices of one rank ({shapes})")
    alpha = parts.get("alpha")
    if alpha is not None and alpha.numel() != 1:
        raise _damaged(path, f"{keys['alpha']} is {tuple(alpha.shape)}, not one number")
    scale = settings.scale(layer.targets[0], a.shape[0], None if alpha is None else float(alpha))
    out, width = b.shape[0], a.shape[1]
    for part, key in keys.items():
        if part in ("bias", "b_bias") and parts[part].shape != (out,):
            raise _damaged(path, f"{key} is {tuple(parts[part].shape)}, not ({out},)")
        if part == "shape" and parts[part].tolist() != [out, width]:
            raise _damaged(path, f"{key} says {parts[part].tolist()}, and A and B are for ({out}, {width})")
    magnitude = parts.get("magnitude")
    if magnitude is not None:
        magnitude = magnitude[:, None] if magnitude.ndim == 1 else magnitude
        if magnitude.shape not in ((out, 1), (1, width)):
            raise _damaged(path, f"{keys['magnitude']} is {tuple(magnitude.shape)}, not ({out}, 1) or (1, {width})")
    elif settings.is_dora(layer.targets[0]):
        raise _damaged(path, f"it is a DoRA by its settings and holds no magnitudes for {layer.name}")
    biases = [parts["b_bias"].float() * scale] if "b_bias" in parts else []
    biases += [parts["bias"]] if "bias" in parts else []
    return Delta(a, b if scale == 1 else b.float() * scale, sum(biases[1:], biases[0]) if biases else None, magnitude)


def _damaged(path: Path, what: str) -> UserError:
    return UserError(f"{path} is damaged: {what}. Nothing was loaded; fetch it again")


def _cut(layer: Layer, delta: Delta, path: Path) -> dict[str, Delta]:
    """A layer of the file as the layers of ours: the rows of B, of the bias, and of the magnitudes."""
    rows, width = delta.b.shape[0], delta.a.shape[1]
    if len(layer.targets) == 1 and layer.name != original.MODULATION:
        return {layer.targets[0]: delta}
    if delta.magnitude is not None and delta.magnitude.shape[1] != 1:
        raise UserError(
            f"{path}: the DoRA magnitudes of {layer.name} are of its columns, {tuple(delta.magnitude.shape)}, and "
            "this layer is kept in parts that cannot share them. Nothing was loaded; train with magnitudes of the "
            "output (LyCORIS: wd_on_output=True), or merge it into the base with the program that trained it"
        )
    if layer.name == original.MODULATION:
        return {layer.targets[0]: turned(delta)}
    # All parts but the MLP's of a single block are as high as the model is wide.
    equal = not layer.targets[-1].endswith("proj_mlp")
    if rows <= width * (len(layer.targets) - 1) or (equal and rows != width * len(layer.targets)):
        raise UserError(
            f"{path} is for another model: {layer.name} has {rows} rows for {len(layer.targets)} layers of {width}"
        )
    ends = [*(width * i for i in range(len(layer.targets))), rows]
    return {n: delta.rows(start, stop) for n, start, stop in zip(layer.targets, ends[:-1], ends[1:], strict=True)}


def check_widths(deltas: Mapping[str, Delta], path: Path, widths: Widths) -> None:
    """UserError, naming the layers, unless each of them exists, is as wide as its delta, and has a bias to change."""
    strays, shapes = [], []
    for layer, delta in deltas.items():
        got, wide = (delta.a.shape[1], delta.b.shape[0]), widths(layer)
        if wide is None:
            strays.append(layer)
        elif got != wide[:2] and not (layer == f"transformer.{INPUT}" and (2 * got[0], got[1]) == wide[:2]):
            which = 0 if got[0] != wide[0] else 1
            shapes.append(f"{'AB'[which]} of {layer} has width {got[which]}, its layer {wide[which]}")
        elif delta.bias is not None and not wide[2]:
            shapes.append(f"the bias of {layer} is adapted, and it has none")
    if strays:
        raise UserError(no_layer(path, strays))
    if shapes:
        raise UserError(
            f"{path} is for another model: {some(sorted(shapes))}. Nothing was loaded; give one that was trained on "
            "this student's base"
        )


# The scale of a LoRA file: alpha over rank, from its header or from the `adapter_config.json` beside it.

HEADER = "lora_adapter_metadata"  # diffusers' key: JSON of one peft config for each component
CONFIG_FILE = "adapter_config.json"  # what peft itself writes beside `adapter_model.safetensors`
# How peft's settings say that more than B A is added: by how the adapters began, and by their kind.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")
_VARIANTS = ("use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config", "velora_config", "kasa_config")


@dataclass(frozen=True)
class LoraSettings:
    """peft's settings of each component that a file adapts; none where it says nothing, so that its scale is 1."""

    path: Path
    by_component: Mapping[str, Mapping[str, Any]]

    @classmethod
    def read(cls, path: Path, header: Mapping[str, str], keys: Iterable[str]) -> LoraSettings:
        """The settings of a LoRA file with these keys; UserError if they are damaged, or say that it is no LoRA."""
        beside = path.parent / CONFIG_FILE
        try:
            said: dict[str, Any] = parse_json(header.get(HEADER, "{}"))
            by_component = {name: _of(said, name) for name in COMPONENTS}
        except (ValueError, AttributeError) as error:
            raise UserError(f"the '{HEADER}' metadata of {path} is damaged ({error}); fetch it again") from error
        if beside.is_file() and (path.stem == "adapter_model" or any(key.startswith(PEFT_PREFIX) for key in keys)):
            by_component = dict.fromkeys(COMPONENTS, read_json(beside))
        for settings in by_component.values():
            _check(path, settings)
        return cls(path, by_component)

    def scale(self, target: str, rank: int, alpha: float | None) -> float:
        """What B A is multiplied by: alpha / r, or alpha / √r with rank-stabilized LoRA; 1 where neither is stated.

        `alpha` is the layer's, from its tensor. UserError if the settings state another one.
        """
        component, _, layer = target.partition(".")
        settings = self.by_component[component]
        said = None
        if settings.get("r") or settings.get("lora_alpha"):
            rank = int(_chosen(settings, "rank", layer, settings.get("r") or rank)) if alpha is None else rank
            said = float(_chosen(settings, "alpha", layer, settings.get("lora_alpha", rank)))
        if alpha is not None and said is not None and alpha != said:
            raise UserError(
                f"{self.path} states two alphas for {target}: {alpha:g} in its tensors and {said:g} in its settings. "
                "Nothing was loaded; remove the one that is wrong"
            )
        alpha = said if alpha is None else alpha
        return 1.0 if alpha is None else alpha / (rank**0.5 if settings.get("use_rslora") else rank)

    def is_dora(self, target: str) -> bool:
        """Whether the settings say that the layer has magnitudes."""
        return bool(self.by_component[target.partition(".")[0]].get("use_dora"))


def ranks_of(deltas: Mapping[str, Delta]) -> dict[str, Any]:
    """peft's settings of adapters with these ranks, whose scale is 1: alpha is the rank everywhere."""
    ranks = {layer: delta.a.shape[0] for layer, delta in deltas.items()}
    most = max(ranks.values(), key=list(ranks.values()).count)
    # peft looks for the end of a name: `proj_out` would be that of every block, too.
    ends = {layer for layer in ranks if any(other.endswith(f".{layer}") for other in ranks)}
    pattern = {f"^{layer}" if layer in ends else layer: rank for layer, rank in ranks.items() if rank != most}
    return {"r": most, "lora_alpha": most, "rank_pattern": pattern, "alpha_pattern": dict(pattern)}


def _of(said: Mapping[str, Any], component: str) -> dict[str, Any]:
    return {key.removeprefix(f"{component}."): v for key, v in said.items() if key.startswith(f"{component}.")}


def _chosen(settings: Mapping[str, Any], kind: str, layer: str, default: float) -> float:
    from peft.utils.other import get_pattern_key

    pattern = settings.get(f"{kind}_pattern") or {}
    return pattern.get(get_pattern_key(list(pattern), layer), default)


def _check(path: Path, settings: Mapping[str, Any]) -> None:
    kind, start = str(settings.get("peft_type") or "LORA"), str(settings.get("init_lora_weights"))
    odd = [name for name in _VARIANTS if settings.get(name)]
    odd += [f"init_lora_weights={start}"] if start.lower().startswith(_CHANGES_BASE) else []
    odd += [f"peft_type={kind}"] if not kind.endswith("LORA") else []
    if odd:
        raise UserError(
            f"{path} is no plain LoRA: its settings say {', '.join(odd)}, which changes more than the layers it adds "
            "to. Nothing was loaded; convert it to a LoRA with peft, or merge it into the base there"
        )
