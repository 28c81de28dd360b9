"""Keys of LoRA files, in any style: the layer and the part that each key stands for.

A key is a prefix, the name of a layer, and a part:

    transformer.        transformer_blocks.0.attn.to_q      .lora_A.weight         diffusers
    diffusion_model.    double_blocks.0.img_attn.qkv        .lora_A.weight         ComfyUI
    lora_unet_          double_blocks_0_img_attn_qkv        .lora_down.weight      kohya
    lora_transformer_   transformer_blocks_0_attn_to_q      .dora_scale            OneTrainer
    transformer.        double_blocks.0.img_attn.qkv.0      .lora_down.weight      OneTrainer, its newer style
    base_model.model.   transformer_blocks.0.attn.to_q      .lora_A.default.weight peft
                        double_blocks.0.processor.qkv_lora1 .down.weight           XLabs
    lora_te1_           text_model_encoder_layers_0_mlp_fc1 .alpha                 kohya, CLIP

Prefixes, names and parts (`lora_keys.yaml`) are parsed independently of each other, so every combination is supported.
`account` assigns every key of a file to a layer or raises; no key is skipped.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from diptych.errors import UserError
from diptych.student.weights import original
from diptych.student.weights.fold import some
from diptych.utils.documents import facts

PEFT_PREFIX = "base_model.model."  # peft's prefix of names, alone or behind another prefix

_TABLE: Mapping[str, Any] = facts(__file__)
_ADAPTER = r"(?:\.(?!weight$|bias$)[^.]+)?"
_PARTS = "|".join(f"(?P<{name}>{part.replace('ADAPTER', _ADAPTER)})" for name, part in _TABLE["parts"].items())
_KEY = re.compile(rf"^(?P<layer>.+?)\.(?:{_PARTS})$")
_XLABS = re.compile(r"^(?P<layer>.+\.processor\.\w+)\.(?:(?P<a>down)|(?P<b>up))\.weight$")
_XLABS_QKV = "processor_qkv_lora"  # in a single block, it has only the rows of q, k and v
_MERGE = "merge them into the base with the program that trained them"
_BLOCK = re.compile(r"^(double_blocks|single_blocks|transformer_blocks|single_transformer_blocks)_(\d+)_(.+)$")
_CLIP_LAYER = re.compile(r"^(?:text_model_)?encoder_layers_(\d+)_(.+)$")
_T5_LAYER = re.compile(r"^(?:text_model_)?encoder_block_(\d+)_layer_(\d)_(.+)$")


@dataclass(frozen=True)
class Layer:
    """A layer that a file names. `targets` are diffusers' layers, `component.layer`, in the order of its rows: one, or
    the parts of a fused layer of Black Forest Labs."""

    name: str
    targets: tuple[str, ...]


def is_lora(keys: Iterable[str]) -> bool:
    """Whether these are keys of a LoRA file (of any kind of adapter) and not of a transformer that has adapters."""
    keys = list(keys)
    if any(key.endswith(("x_embedder.weight", f"{original.INPUT}.weight")) for key in keys):
        return False
    adapters = [other["keys"] for other in _TABLE["others"] if other.get("adapter")]
    return any((match := _match(key)) and match[1] in ("a", "b") for key in keys) or any(
        re.search(pattern, key) for key in keys for pattern in adapters
    )


def account(keys: Iterable[str], path: Path) -> dict[Layer, dict[str, str]]:
    """The key of each part (`a`, `b`, `alpha`, …) of each layer. UserError that names the keys without a layer."""
    layers: dict[Layer, dict[str, str]] = {}
    unknown: list[str] = []
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
            unknown.append(key)
        elif match[1] in (parts := layers.setdefault(layer, {})):
            twice += [parts[match[1]], key]
        else:
            parts[match[1]] = key
    if released := [key for key in unknown if "c_embedder" in key]:
        raise UserError(
            "lora_unsupported",
            f"{path} adapts c_embedder ({some(released)}), which a folded student does not have. Nothing was loaded; "
            "merge that LoRA into the released weights first.",
        )
    if unknown or others:
        raise no_layer(path, unknown, others)
    owners: dict[str, Layer] = {}
    for layer, parts in layers.items():
        for target in layer.targets:
            other = owners.setdefault(target, layer)
            twice += [] if other == layer else [*layers[other].values(), *parts.values()]
    if twice:
        raise UserError(
            "lora_unsupported",
            f"{path} adapts a layer twice, under several names: {some(sorted(dict.fromkeys(twice)))}. Nothing was "
            "loaded; use a file with one adapter.",
        )
    return layers


def no_layer(path: Path, unknown: list[str], others: Mapping[str, list[str]]) -> UserError:
    """The error for `unknown` keys, which belong to no layer, and for keys of `others` in the table, by kind."""
    faults, remedies = [], []
    if unknown:
        faults.append(f"{len(unknown)} keys match no layer: {some(sorted(unknown))}")
        remedies.append("pass a LoRA for FLUX.1")
    known = {other["what"]: other.get("remedy", _MERGE) for other in _TABLE["others"]}
    for what, keys in others.items():
        faults.append(f"{len(keys)} keys are {what}, which is not supported: {some(sorted(keys))}")
        remedies.append(known[what])
    return UserError(
        "lora_mismatch" if unknown else "lora_unsupported",
        f"{path}: {'; '.join(faults)}. Nothing was loaded; {'; '.join(dict.fromkeys(remedies))}.",
    )


def _match(key: str) -> tuple[str, str] | None:
    """(prefix and name, part) of a key. None if it ends in no known part."""
    match = _KEY.match(key) or _XLABS.match(key)
    return (match["layer"], str(match.lastgroup)) if match else None


def layer_of(name: str) -> Layer | None:
    """The layer with this prefix and name. None if there is none."""
    name = name.removeprefix(PEFT_PREFIX)
    prefix, components = next((p, c) for p, c in _TABLE["prefixes"].items() if name.startswith(p))
    flat = name.removeprefix(prefix).removeprefix(PEFT_PREFIX).replace(".", "_")
    layer = _transformer_layer(flat) or _text_layer(flat)
    return layer if layer and layer.targets[0].partition(".")[0] in components else None


def _transformer_layer(flat: str) -> Layer | None:
    """A layer of the transformer, by its name with underscores instead of dots."""
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
    """The layers in a kind of block ("": outside of blocks), by their names with underscores."""
    names = {name.replace(".", "_"): name for name in original.layer_names(blocks)}
    for name in list(names.values()):  # OneTrainer names the parts of a fused layer: img_attn.qkv.0, linear1.3
        parts = original.layers_of(f"{blocks}.0.{name}") if blocks else ()
        if len(parts) > 1:
            names |= {f"{name}.{i}".replace(".", "_"): part.split(".", 2)[2] for i, part in enumerate(parts)}
    return names | _TABLE["names"].get(blocks, {})


def _text_layer(flat: str) -> Layer | None:
    """A linear layer of CLIP-L or T5, by its name with underscores; CLIP's has the name of transformers 5."""
    if match := _CLIP_LAYER.match(flat):
        inner = next((name for name in _TABLE["clip"] if name.replace(".", "_") == match[2]), None)
        name = inner and f"text_encoder.encoder.layers.{match[1]}.{inner}"
    elif match := _T5_LAYER.match(flat):
        inner = next((name for name in _TABLE["t5"] if name.replace(".", "_") == match[3]), None)
        name = inner and f"text_encoder_2.encoder.block.{match[1]}.layer.{match[2]}.{inner}"
    else:
        return None
    return Layer(name, (name,)) if name else None
