"""A student's transformer on disk: reading either layout whole or not at all, and writing.

A folder holds `config.json` and safetensors, in one file or in shards with an index; a single file holds both in one.
What is missing, cut short or of another family is a UserError that names the file, before any model is built.
"""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from diptych.errors import UserError
from diptych.student.weights import fold
from diptych.student.weights.fold import INPUT_LAYERS, BiasSplit, Folded
from diptych.student.weights.tensors import Stored, held, open_safetensors, write_safetensors
from diptych.utils.documents import parse_json
from diptych.utils.machine import VERSION
from diptych.utils.opening import variant_names, variant_of
from diptych.utils.paths import files_inside, plain_name

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
RATIOS_FILE = "speed.json"  # a student's step-cache calibration (`runtime.caches`)
SPLIT_FILE = "released_biases.safetensors"
HEADER_KEY = "diptych"  # in a single file's metadata: JSON with its `config` and, if there is one, its bias `split`
_FLUX = 3072  # width of FLUX.1
_IMPLEMENTATIONS = {
    "diffusers": "diffusers",
    "comfyui": "https://github.com/black-forest-labs/flux",
    "kohya": "https://github.com/black-forest-labs/flux",
}
_SPLIT_KEYS = ("x_embedder.bias", "c_embedder.bias")


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a transformer folder; UserError unless it is there, readable and of a FLUX transformer."""
    path = folder / "config.json"
    config = read_json(path)
    name = str(config.get("_class_name", ""))
    if not name.startswith("FluxTransformer2D"):
        raise UserError(f"{path} describes a {name or 'model of no class'}, not a FLUX transformer")
    if not isinstance(config.get("in_channels"), int):
        raise UserError(f"{path} has no in_channels; the file is damaged, fetch it again")
    if quantized := config.get("quantization_config"):
        method = quantized.get("quant_method", "some quantizer") if isinstance(quantized, dict) else quantized
        raise UserError(
            f"the weights in {folder} were saved quantized by {method}; give those they were made from (--memory "
            "quantizes them again), or a GGUF file"
        )
    return config


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from disk; UserError if it is missing or damaged."""
    if not path.is_file():
        raise UserError(f"{path} is missing; is the folder complete?")
    try:
        value = parse_json(path.read_text("utf8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}); fetch the file again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object; fetch the file again")
    return value


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of one safetensors file; UserError if it is missing, truncated or damaged."""
    return {key: tensor.read() for key, tensor in open_safetensors(path)[0].items()}


def open_state(folder: Path, name: str = WEIGHTS_FILE) -> dict[str, Stored]:
    """All tensors of a model's folder, unread: from the file `name`, from its index's shards, or from the one variant
    (`fp16`, …) that the folder has instead."""
    file, index = folder / name, folder / f"{name}.index.json"
    if variant := variant_of(folder, name):
        file, index = (folder / spelled for spelled in variant_names(name, variant))
    if file.is_file() or not index.is_file():
        if not file.is_file() and list(folder.glob("*.bin")):
            raise UserError(f"{folder} holds only pickled weights (*.bin), never opened here; convert to safetensors")
        return open_safetensors(file)[0]
    places = read_json(index).get("weight_map", {})
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise UserError(f"{index} does not say which file holds which tensor; fetch it again")
    state: dict[str, Stored] = {}
    for name in sorted(set(places.values())):
        state.update(open_safetensors(folder / plain_name(name))[0])
    if absent := sorted(places.keys() - state.keys()):
        raise UserError(f"the shards of {index} lack {fold.some(absent)}; fetch them again")
    return state


def copy_plain(source: Path, target: Path, name: str) -> None:
    """Copies a model's folder; the weights of a variant get their plain names, so that it opens without `variant=`."""
    for path in files_inside(source):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    if variant := variant_of(source, name):
        for spelled, plain in zip(variant_names(name, variant), (name, f"{name}.index.json"), strict=True):
            if (target / spelled).is_file():
                (target / spelled).rename(target / plain)


def is_released(keys: Iterable[str]) -> bool:
    """Whether these are keys of the released layout: there is a `c_embedder`."""
    return any(key.startswith("c_embedder.") for key in keys)


def fold_stored(state: Mapping[str, Stored], config: Mapping[str, Any], split: BiasSplit | None, where: str) -> Folded:
    """A student of either layout, folded, its tensors `Stored`; UserError for keys that do not fit or no student."""
    if is_released(state):
        # Only the input layers are read: they change. All else stays on disk.
        mixed = {k: t.read() if k.rpartition(".")[0] in INPUT_LAYERS else t for k, t in state.items()}
        folded = fold.fold(mixed, config, where=where)
        stored = {k: t if isinstance(t, Stored) else held(t) for k, t in folded.state_dict.items()}
        return Folded(folded.config, stored, folded.split, folded.adapters)
    fold.student_channels(config, where)
    stock = fold.stock_config(config)
    fold.check_layers(stock, state, where)
    fold.check_keys(state, fold.shapes_of(stock), where)
    return Folded(stock, dict(state), split)


def read_split(folder: Path) -> BiasSplit | None:
    """The bias split beside folded weights, or None when the student never had one."""
    path = folder / SPLIT_FILE
    if not path.is_file():
        return None
    parts = read_tensors(path)
    if absent := [key for key in _SPLIT_KEYS if key not in parts]:
        raise UserError(f"{path} lacks {', '.join(absent)}; delete it: only unfolding to the released layout uses it")
    return BiasSplit(*(parts[key] for key in _SPLIT_KEYS))


def write_split(split: BiasSplit, folder: Path) -> None:
    """Keeps the bias split beside folded weights in `folder`."""
    parts: dict[str, Stored] = dict(zip(_SPLIT_KEYS, (held(split.x), held(split.c)), strict=True))
    write_safetensors(folder / SPLIT_FILE, parts)


def header_of(config: Mapping[str, Any], split: BiasSplit | None) -> dict[str, str]:
    """A single file's metadata: its config and its bias split."""
    value: dict[str, Any] = {"config": dict(config)}
    if split is not None:
        dtype = str(split.x.dtype).removeprefix("torch.")
        value["split"] = {"dtype": dtype, **{key: _text(part) for key, part in (("x", split.x), ("c", split.c))}}
    return {HEADER_KEY: json.dumps(value, sort_keys=True)}


def read_header(metadata: Mapping[str, str]) -> tuple[dict[str, Any], BiasSplit | None]:
    """(config, split) from a single file's metadata; an empty config if diptych did not write the file."""
    try:
        value = parse_json(metadata.get(HEADER_KEY, "{}"))
        config, split = value.get("config", {}), value.get("split")
        if split is None:
            return config, None
        dtype = getattr(torch, split["dtype"])
        parts = (torch.frombuffer(bytearray(base64.b64decode(split[key])), dtype=dtype) for key in ("x", "c"))
        return config, BiasSplit(*parts)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(
            f"the file's '{HEADER_KEY}' metadata is damaged ({error}); convert the weights again"
        ) from error


def _text(tensor: torch.Tensor) -> str:
    return base64.b64encode(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()).decode()


_HINTS = {
    "diptych": "the input has twice the channels: the noisy canvas, and the latents of [reference | black]",
    "channel": "the input has twice the channels: the noisy image, and the latents of the reference",
    "tokens": "the latents of the reference follow the noisy image's in the sequence, as in FLUX.1 Kontext",
}


def modelspec(
    title: str, style: str, *, lora: bool, width: int, guidance: bool | None = None, conditioning: str = "diptych"
) -> dict[str, str]:
    """The header that model managers read: https://github.com/Stability-AI/ModelSpec, version 1.0.1. Without its
    `date`: equal weights make equal bytes here.

    `width` is the model's, `guidance` whether it has FLUX.1-dev's embedding, if that is known.
    """
    family = "flux-1" if width != _FLUX else "flux-1-schnell" if guidance is False else "flux-1-dev"
    kind = "lora" if lora else "kontext" if conditioning == "tokens" else "control"
    fields: dict[str, Any] = {
        "sai_model_spec": "1.0.1",
        "architecture": f"{family}/{kind}",
        "implementation": _IMPLEMENTATIONS[style],
        "title": title,
        "description": f"Diffusion Self-Distillation (arXiv 2411.18616), written by diptych {VERSION}",
        "usage_hint": _HINTS[conditioning],
    }
    return {f"modelspec.{key}": value for key, value in fields.items()}


def write_transformer(
    folder: Path,
    state: Mapping[str, Stored],
    config: Mapping[str, Any],
    report: Callable[[int, int], None] | None = None,
) -> None:
    """Writes `config.json` and one safetensors file, tensor by tensor."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(config), indent=2, sort_keys=True) + "\n", "utf8")
    write_safetensors(folder / WEIGHTS_FILE, state, report=report)


def check_free(target: Path, overwrite: bool, how: str) -> None:
    """UserError if something lies at `target` already that is not an empty folder; `how` says how to replace it."""
    if target.exists() and not overwrite and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists already; choose another name or {how}")
