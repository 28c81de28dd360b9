"""A LoRA file, in any style of keys, read whole: what it does to each layer, or why it is refused.

A key is a prefix, the name of a layer, and a part:

    transformer.        transformer_blocks.0.attn.to_q      .lora_A.weight         diffusers
    diffusion_model.    double_blocks.0.img_attn.qkv        .lora_A.weight         ComfyUI
    lora_unet_          double_blocks_0_img_attn_qkv        .lora_down.weight      kohya
    lora_transformer_   transformer_blocks_0_attn_to_q      .dora_scale            OneTrainer
    transformer.        double_blocks.0.img_attn.qkv.0      .lora_down.weight      OneTrainer, its newer style
    base_model.model.   transformer_blocks.0.attn.to_q      .lora_A.default.weight peft
                        double_blocks.0.processor.qkv_lora1 .down.weight           XLabs
    lora_te1_           text_model_encoder_layers_0_mlp_fc1 .alpha                 kohya, CLIP

Prefixes, names and parts (`lora_file.yaml`) are read independently of each other, so every combination is understood.
`account` places every key of a file or raises: no key is ever skipped. The scale of a file is alpha over rank, from its
tensors, its header, or the `adapter_config.json` beside it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from diptych.errors import UserError
from diptych.student.weights import original
from diptych.student.weights.files import read_json
from diptych.student.weights.fold import INPUT, some
from diptych.student.weights.lora_delta import Delta
from diptych.student.weights.tensors import open_safetensors
from diptych.utils.documents import facts, parse_json

RELEASED_LORA = "pytorch_lora_weights.safetensors"
PEFT_LORA = "adapter_model.safetensors"
SUFFIXES = (".safetensors", ".sft")
COMPONENTS: tuple[str, ...] = ("transformer", "text_encoder", "text_encoder_2")  # text encoders: CLIP-L and T5
HEADER = "lora_adapter_metadata"  # diffusers' key: JSON of one peft config for each component
CONFIG_FILE = "adapter_config.json"  # what peft itself writes beside `adapter_model.safetensors`
PEFT_PREFIX = "base_model.model."  # what peft itself puts before the names, alone or behind another prefix
# How peft's settings say that more than B A is added: by how the adapters began, and by their kind.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")
_VARIANTS = ("use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config", "velora_config", "kasa_config")

_TABLE: Mapping[str, Any] = facts(__file__)
_ADAPTER = r"(?:\.(?!weight$|bias$)[^.]+)?"
_PARTS = "|".join(f"(?P<{name}>{part.replace('ADAPTER', _ADAPTER)})" for name, part in _TABLE["parts"].items())
_KEY = re.compile(rf"^(?P<layer>.+?)\.(?:{_PARTS})$")
_XLABS = re.compile(r"^(?P<layer>.+\.processor\.\w+)\.(?:(?P<a>down)|(?P<b>up))\.weight$")
_XLABS_QKV = "processor_qkv_lora"  # of a single block only the rows of q, k and v
_MERGE = "merge them into the base with the program that trained them"
_BLOCK = re.compile(r"^(double_blocks|single_blocks|transformer_blocks|single_transformer_blocks)_(\d+)_(.+)$")
_CLIP_LAYER = re.compile(r"^(?:text_model_)?encoder_layers_(\d+)_(.+)$")
_T5_LAYER = re.compile(r"^(?:text_model_)?encoder_block_(\d+)_layer_(\d)_(.+)$")
# The (in, out) features of a linear, by `component.layer`, and whether it has a bias; None if there is none.
Widths = Callable[[str], "tuple[int, int, bool] | None"]


def lora_file(path: Path) -> Path:
    """The safetensors file that `path` names, whole: itself, or the usual name in a folder."""
    if path.is_dir():
        path = next(
            (found for name in (RELEASED_LORA, PEFT_LORA) if (found := path / name).is_file()), path / RELEASED_LORA
        )
    if not path.is_file():
        raise UserError(f"LoRA not found: {path}. Check the path")
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path} is not a safetensors file; only safetensors LoRAs are opened")
    open_safetensors(path)  # says what is wrong with a damaged file
    return path


def read_lora(path: Path) -> dict[str, Delta]:
    """What a LoRA file does to each layer, by `component.layer` (`COMPONENTS`), at scale 1.

    Every key of the file is in it. Raises UserError, naming the keys, when any of them has no place or does not fit the
    others.
    """
    stored, header = open_safetensors(path)
    if not stored:
        raise UserError(f"{path} holds no LoRA tensors")
    layers = account(stored, path)
    settings = _Settings.read(path, header, stored)
    deltas: dict[str, Delta] = {}
    for layer, keys in layers.items():
        parts = {part: stored[key].read() for part, key in keys.items()}
        if not {"a", "b"} <= parts.keys():
            raise _damaged(path, f"A and B of {layer.name} are not both there")
        whole = _assemble(path, layer, keys, parts, settings)
        deltas |= _cut(layer, whole, path)
    return deltas


def _assemble(
    path: Path, layer: Layer, keys: Mapping[str, str], parts: Mapping[str, torch.Tensor], settings: _Settings
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
        return {layer.targets[0]: delta.turned()}
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
        raise _refusal(path, strays, {})
    if shapes:
        raise UserError(
            f"{path} is for another model: {some(sorted(shapes))}. Nothing was loaded; give one that was trained on "
            "this student's base"
        )


def read_deltas(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Delta]:
    """What a LoRA file adds to each layer of a folded transformer with these `shapes`, at scale 1.

    Raises UserError, naming the keys, when any of them finds no layer there.
    """

    def widths(layer: str) -> tuple[int, int, bool] | None:
        name = layer.removeprefix("transformer.")
        shape = shapes.get(f"{name}.weight", ())
        return (shape[1], shape[0], f"{name}.bias" in shapes) if len(shape) == 2 else None

    deltas = lora_deltas(path)
    check_widths({f"transformer.{layer}": delta for layer, delta in deltas.items()}, path, widths)
    return {layer: delta.padded(shapes[f"{layer}.weight"][1]) for layer, delta in deltas.items()}


def lora_deltas(path: Path) -> dict[str, Delta]:
    """What a LoRA file adds to each layer of a transformer, whatever transformer that is, at scale 1.

    Raises UserError, naming the layers, for those that are no transformer's.
    """
    deltas = read_lora(path)
    if odd := [layer for layer in deltas if not layer.startswith("transformer.")]:
        raise UserError(
            f"{path} adapts text encoders in {len(odd)} layers: {some(sorted(odd))}. Only layers of the transformer "
            "can be used here; remove those layers from the file, or pass it as --lora when generating"
        )
    return {layer.removeprefix("transformer."): delta for layer, delta in deltas.items()}


@dataclass(frozen=True)
class Layer:
    """A layer that a file names. `targets` are ours, `component.layer`, in the order of its rows: one, or the parts
    that a fused layer of Black Forest Labs is cut into."""

    name: str
    targets: tuple[str, ...]


def is_lora(keys: Iterable[str]) -> bool:
    """Whether these are keys of a LoRA file (of any kind of adapter) and not of a transformer that carries adapters."""
    keys = list(keys)
    if any(key.endswith(("x_embedder.weight", f"{original.INPUT}.weight")) for key in keys):
        return False
    adapters = [other["keys"] for other in _TABLE["others"] if other.get("adapter")]
    return any((match := _match(key)) and match[1] in ("a", "b") for key in keys) or any(
        re.search(pattern, key) for key in keys for pattern in adapters
    )


def account(keys: Iterable[str], path: Path) -> dict[Layer, dict[str, str]]:
    """The key of each part (`a`, `b`, `alpha`, …) of each layer; UserError, naming them, for keys without a place."""
    found: dict[Layer, dict[str, str]] = {}
    strays: list[str] = []
    others: dict[str, list[str]] = {}
    twice: list[str] = []
    for key in keys:
        kind = next((other["what"] for other in _TABLE["others"] if re.search(other["keys"], key)), None)
        if kind is not None:
            others.setdefault(kind, []).append(key)
            continue
        match = _match(key)
        layer = match and layer_of(match[0])
        if not match or not layer:
            strays.append(key)
        elif match[1] in (parts := found.setdefault(layer, {})):
            twice += [parts[match[1]], key]
        else:
            parts[match[1]] = key
    if any("c_embedder" in key for key in strays):
        raise UserError(
            f"{path} adapts c_embedder ({some([k for k in strays if 'c_embedder' in k])}), which a folded student does "
            "not have; merge that LoRA into the released weights first. Nothing was loaded"
        )
    if strays or others:
        raise _refusal(path, strays, others)
    owners: dict[str, Layer] = {}
    for layer, parts in found.items():
        for target in layer.targets:
            other = owners.setdefault(target, layer)
            twice += [] if other == layer else [*found[other].values(), *parts.values()]
    if twice:
        raise UserError(
            f"{path} adapts a layer twice, under several names: {some(sorted(dict.fromkeys(twice)))}. Nothing was "
            "loaded; keep one adapter in a file"
        )
    return found


def _refusal(path: Path, strays: list[str], others: Mapping[str, list[str]]) -> UserError:
    """The error about keys that belong to no layer, and about those of `others` in the table, by what they are."""
    faults, cures = [], []
    if strays:
        faults.append(f"{len(strays)} keys match no layer: {some(sorted(strays))}")
        cures.append("give a LoRA that is made for FLUX.1")
    known = {other["what"]: other.get("cure", _MERGE) for other in _TABLE["others"]}
    for what, keys in others.items():
        faults.append(f"{len(keys)} keys are {what}, which is not supported: {some(sorted(keys))}")
        cures.append(known[what])
    return UserError(f"{path}: {'; '.join(faults)}. Nothing was loaded; {'; '.join(dict.fromkeys(cures))}")


def _match(key: str) -> tuple[str, str] | None:
    """(prefix and name, part) of a key; None if it ends in no part that is known."""
    match = _KEY.match(key) or _XLABS.match(key)
    return (match["layer"], str(match.lastgroup)) if match else None


def layer_of(name: str) -> Layer | None:
    """The layer with this prefix and name; None if there is none."""
    name = name.removeprefix(PEFT_PREFIX)
    prefix, components = next((p, c) for p, c in _TABLE["prefixes"].items() if name.startswith(p))
    flat = name.removeprefix(prefix).removeprefix(PEFT_PREFIX).replace(".", "_")
    layer = _transformer_layer(flat) or _text_layer(flat)
    return layer if layer and layer.targets[0].partition(".")[0] in components else None


def _transformer_layer(flat: str) -> Layer | None:
    """A layer of the transformer, by its name with underscores in the place of dots."""
    block = _BLOCK.match(flat)
    inner = _names(block[1] if block else "").get(block[3] if block else flat)
    if inner is None:
        return None
    name = inner
    if block:  # a part of a fused layer has diffusers' name, and their folder
        ours = inner not in original.layer_names(block[1])
        name = f"{original.folder_of(block[1]) if ours else block[1]}.{block[2]}.{inner}"
    targets = [f"transformer.{target}" for target in original.layers_of(name) or (name,)]
    if block and block[3] == _XLABS_QKV:
        targets = targets[:3]
    return Layer(name, tuple(targets))


@cache
def _names(blocks: str) -> dict[str, str]:
    """The layers of a kind of block, or of those outside of blocks (""), by their names with underscores."""
    names = {name.replace(".", "_"): name for name in original.layer_names(blocks)}
    for name in list(names.values()):  # OneTrainer's names of the parts of a fused layer: img_attn.qkv.0, linear1.3
        parts = original.layers_of(f"{blocks}.0.{name}") if blocks else ()
        if len(parts) > 1:
            names |= {f"{name}.{i}".replace(".", "_"): part.split(".", 2)[2] for i, part in enumerate(parts)}
    return names | _TABLE["names"].get(blocks, {})


def _text_layer(flat: str) -> Layer | None:
    """A linear of CLIP-L or of T5, by its name with underscores; CLIP's under the name that transformers 5 has."""
    if match := _CLIP_LAYER.match(flat):
        inner = next((name for name in _TABLE["clip"] if name.replace(".", "_") == match[2]), None)
        name = inner and f"text_encoder.encoder.layers.{match[1]}.{inner}"
    elif match := _T5_LAYER.match(flat):
        inner = next((name for name in _TABLE["t5"] if name.replace(".", "_") == match[3]), None)
        name = inner and f"text_encoder_2.encoder.block.{match[1]}.layer.{match[2]}.{inner}"
    else:
        return None
    return Layer(name, (name,)) if name else None


@dataclass(frozen=True)
class _Settings:
    """peft's settings of each component that a file adapts; none where it says nothing, so that its scale is 1."""

    path: Path
    by_component: Mapping[str, Mapping[str, Any]]

    @classmethod
    def read(cls, path: Path, header: Mapping[str, str], keys: Iterable[str]) -> _Settings:
        """The settings of a LoRA file with these keys; UserError if they are damaged or no LoRA's."""
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
