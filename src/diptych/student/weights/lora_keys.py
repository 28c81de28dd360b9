"""The keys of a LoRA file: which layer of which component each of them belongs to, or why it is refused.

A key is a prefix, the name of a layer, and a part:

    transformer.        transformer_blocks.0.attn.to_q      .lora_A.weight         diffusers
    diffusion_model.    double_blocks.0.img_attn.qkv        .lora_A.weight         ComfyUI
    lora_unet_          double_blocks_0_img_attn_qkv        .lora_down.weight      kohya
    lora_transformer_   transformer_blocks_0_attn_to_q      .dora_scale            OneTrainer
    transformer.        double_blocks.0.img_attn.qkv.0      .lora_down.weight      OneTrainer, its newer style
    base_model.model.   transformer_blocks.0.attn.to_q      .lora_A.default.weight peft
                        double_blocks.0.processor.qkv_lora1 .down.weight           XLabs
    lora_te1_           text_model_encoder_layers_0_mlp_fc1 .alpha                 kohya, CLIP

Prefixes, names and parts are read independently of each other, so every combination is understood. Nothing here reads
a tensor. `account` places every key of a file or raises: no key is ever skipped.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from diptych.errors import UserError
from diptych.student.weights import original
from diptych.student.weights.fold import some

COMPONENTS: tuple[str, ...] = (
    "transformer",
    "text_encoder",
    "text_encoder_2",
)  # FLUX.1's text encoders are CLIP-L and T5
_TRANSFORMER, _CLIP, _T5 = ((name,) for name in COMPONENTS)
# The first that fits; with the components that it can stand for.
_PREFIXES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("model.diffusion_model.", _TRANSFORMER),
    ("diffusion_model.", _TRANSFORMER),
    ("transformer.", _TRANSFORMER),
    ("text_encoders.clip_l.transformer.", _CLIP),
    ("text_encoders.t5xxl.transformer.", _T5),
    ("clip_l.transformer.", _CLIP),
    ("t5xxl.transformer.", _T5),
    ("clip_l.", _CLIP),
    ("t5.", _T5),
    ("text_encoder_2.", _T5),
    ("text_encoder.", _CLIP),
    ("lora_unet_", _TRANSFORMER),
    ("lora_transformer_", _TRANSFORMER),
    ("lora_te1_", _CLIP),
    ("lora_te2_", _T5),
    ("lora_te3_", _T5),
    ("lora_te_", (*_CLIP, *_T5)),
    ("lycoris_", COMPONENTS),
    ("", COMPONENTS),
)
PEFT_PREFIX = "base_model.model."  # what peft itself puts before the names, alone or behind another prefix

_ADAPTER = r"(?:\.(?!weight$|bias$)[^.]+)?"  # an adapter's name: lora_A.default.weight, lora_A.default_0.weight
_PARTS = {
    "a": rf"lora_A{_ADAPTER}(?:\.weight)?|lora_down{_ADAPTER}\.weight|(?:lora|lora_linear_layer)\.down\.weight",
    "b": rf"lora_B{_ADAPTER}(?:\.weight)?|lora_up{_ADAPTER}\.weight|(?:lora|lora_linear_layer)\.up\.weight",
    "b_bias": rf"(?:lora_B|lora_up){_ADAPTER}\.bias",  # scaled with B
    "bias": r"diff_b",  # not scaled
    "alpha": r"alpha",
    "magnitude": rf"dora_scale|lora_magnitude_vector{_ADAPTER}(?:\.weight)?",
    "shape": r"reshape_weight",  # of a widened input layer: ComfyUI's
}
_KEY = re.compile(r"^(?P<layer>.+?)\.(?:" + "|".join(f"(?P<{name}>{part})" for name, part in _PARTS.items()) + r")$")
_XLABS = re.compile(r"^(?P<layer>.+\.processor\.\w+)\.(?:(?P<a>down)|(?P<b>up))\.weight$")

_MERGE = "merge them into the base with the program that trained them"
# What is recognized and not supported: (what it is, the keys, what to do).
_OTHERS: tuple[tuple[str, re.Pattern[str], str], ...] = (
    (
        "OneTrainer's bundled embeddings",
        re.compile(r"^bundle_emb\."),
        "export the LoRA again without embeddings (OneTrainer: Bundle Embeddings off)",
    ),
    ("LoHa", re.compile(r"\.hada_[wt]\d(_[ab])?$"), _MERGE),
    ("LoKr", re.compile(r"\.lokr_[wt]\d(_[ab])?$"), _MERGE),
    ("OFT", re.compile(r"\.(oft_(blocks|diag|R|r)(\..+)?|boft_.+)$"), _MERGE),
    ("GLoRA", re.compile(r"\.[ab][12]\.weight$"), _MERGE),
    ("IA3", re.compile(r"\.(on_input|ia3_l.*)$"), _MERGE),
    ("Tucker-decomposed LoRA", re.compile(r"\.lora_mid\.weight$"), _MERGE),
    ("embedding LoRA", re.compile(r"\.lora_embedding_[AB](\..+)?$"), _MERGE),
    ("changes of whole weights", re.compile(r"\.(diff|set_weight|w_norm|b_norm)$"), _MERGE),
)

_CLIP_INNER = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")
_T5_INNER = (
    *(f"SelfAttention.{letter}" for letter in "qkvo"),
    *(f"DenseReluDense.{name}" for name in ("wi", "wi_0", "wi_1", "wo")),
)
_BLOCK = re.compile(r"^(double_blocks|single_blocks|transformer_blocks|single_transformer_blocks)_(\d+)_(.+)$")
_XLABS_QKV = "processor_qkv_lora"  # of a single block only the rows of q, k and v
_OTHER_NAMES: dict[str, dict[str, str]] = {
    "": {"img_in_proj": "img_in"},  # OneTrainer
    "double_blocks": {
        "processor_qkv_lora1": "img_attn.qkv",
        "processor_qkv_lora2": "txt_attn.qkv",
        "processor_proj_lora1": "img_attn.proj",
        "processor_proj_lora2": "txt_attn.proj",
    },
    "single_blocks": {_XLABS_QKV: "linear1", "processor_proj_lora": "linear2"},
}
_NUMBERED = re.compile(r"^(?:text_model_)?([A-Za-z_]+?)_(\d+)_(.+)$")


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
    return any((match := _match(key)) and match[1] in ("a", "b") for key in keys) or any(
        pattern.search(key) for key in keys for _, pattern, _ in _OTHERS[1:6]
    )


def account(keys: Iterable[str], path: Path) -> dict[Layer, dict[str, str]]:
    """The key of each part (`a`, `b`, `alpha`, …) of each layer; UserError, naming them, for keys without a place."""
    found: dict[Layer, dict[str, str]] = {}
    strays: list[str] = []
    others: dict[int, list[str]] = {}
    twice: list[str] = []
    for key in keys:
        kind = next((i for i, (_, pattern, _) in enumerate(_OTHERS) if pattern.search(key)), None)
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
        raise UserError(_refusal(path, strays, {_OTHERS[kind]: named for kind, named in others.items()}))
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


def no_layer(path: Path, keys: list[str]) -> str:
    """The message about keys that belong to no layer."""
    return _refusal(path, keys, {})


def _refusal(path: Path, strays: list[str], others: dict[tuple[str, re.Pattern[str], str], list[str]]) -> str:
    faults, cures = [], []
    if strays:
        faults.append(f"{len(strays)} keys match no layer: {some(sorted(strays))}")
        cures.append("give a LoRA that is made for FLUX.1")
    for (what, _, cure), keys in others.items():
        faults.append(f"{len(keys)} keys are {what}, which is not supported: {some(sorted(keys))}")
        cures.append(cure)
    return f"{path}: {'; '.join(faults)}. Nothing was loaded; {'; '.join(dict.fromkeys(cures))}"


def _match(key: str) -> tuple[str, str] | None:
    """(prefix and name, part) of a key; None if it ends in no part that is known."""
    match = _KEY.match(key) or _XLABS.match(key)
    return (match["layer"], str(match.lastgroup)) if match else None


def layer_of(name: str) -> Layer | None:
    """The layer with this prefix and name; None if there is none."""
    name = name.removeprefix(PEFT_PREFIX)
    prefix, components = next((p, c) for p, c in _PREFIXES if name.startswith(p))
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
    return names | _OTHER_NAMES.get(blocks, {})


def _text_layer(flat: str) -> Layer | None:
    """A linear of CLIP-L or of T5, by its name with underscores; CLIP's under the name that transformers 5 has."""
    match = _NUMBERED.match(flat)
    if match and match[1] == "encoder_layers":
        inner = next((name for name in _CLIP_INNER if name.replace(".", "_") == match[3]), None)
        name = inner and f"text_encoder.encoder.layers.{match[2]}.{inner}"
    elif match and match[1] == "encoder_block" and (part := re.match(r"layer_(\d)_(.+)$", match[3])):
        inner = next((name for name in _T5_INNER if name.replace(".", "_") == part[2]), None)
        name = inner and f"text_encoder_2.encoder.block.{match[2]}.layer.{part[1]}.{inner}"
    else:
        return None
    return Layer(name, (name,)) if name else None
