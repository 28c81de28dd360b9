"""A student's transformer on disk: reading and writing either layout, complete or not at all.

A folder has `config.json` and safetensors, in one file or in shards with an index; a single file has both in one. A
file that is missing, truncated or of another family is a UserError that names it, before any model is built.
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
RATIOS_FILE = "speed.json"  # calibration of a student's step cache (`runtime.caches`)
SPLIT_FILE = "released_biases.safetensors"
HEADER_KEY = "diptych"  # key in a single file's metadata: JSON with `config` and, if there is one, the bias `split`
_FLUX = 3072  # width of FLUX.1
_IMPLEMENTATIONS = {
    "diffusers": "diffusers",
    "comfyui": "https://github.com/black-forest-labs/flux",
    "kohya": "https://github.com/black-forest-labs/flux",
}
_SPLIT_KEYS = ("x_embedder.bias", "c_embedder.bias")


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a transformer folder. UserError if it is missing, unreadable or not of a FLUX transformer."""
    path = folder / "config.json"
    config = read_json(path)
    name = str(config.get("_class_name", ""))
    if not name.startswith("FluxTransformer2D"):
        raise UserError(
            "model_unsupported", f"{path} describes a {name or 'model without a class'}, not a FLUX transformer."
        )
    if not isinstance(config.get("in_channels"), int):
        raise UserError("file_damaged", f"{path} has no in_channels. The file is damaged; fetch it again.")
    if quantized := config.get("quantization_config"):
        method = quantized.get("quant_method", "an unknown method") if isinstance(quantized, dict) else quantized
        raise quantized_weights(folder, str(method))
    return config


def quantized_weights(path: Path, method: str) -> UserError:
    """The error for weights that were saved quantized in a way that is not read."""
    return UserError(
        "model_quantized",
        f"The weights in {path} are quantized by {method}. Pass the original weights, which --memory can quantize, or "
        "a GGUF file.",
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from disk. UserError if the file is missing or damaged."""
    if not path.is_file():
        raise UserError("model_incomplete", f"File not found: {path}. Check that the folder is complete.")
    try:
        value = parse_json(path.read_text("utf8"))
        if not isinstance(value, dict):
            raise ValueError("not an object")
    except (OSError, ValueError) as error:
        raise UserError("json_invalid", f"{path} is not valid JSON ({error}). Fetch the file again.") from error
    return value


def open_state(folder: Path, name: str = WEIGHTS_FILE) -> dict[str, Stored]:
    """All tensors of a model's folder, unread: from the file `name`, from the shards of its index, or from the one
    variant (`fp16`, …) that the folder has instead."""
    file, index = folder / name, folder / f"{name}.index.json"
    if variant := variant_of(folder, name):
        file, index = (folder / spelled for spelled in variant_names(name, variant))
    if file.is_file() or not index.is_file():
        if not file.is_file() and list(folder.glob("*.bin")):
            raise UserError(
                "model_unsafe",
                f"{folder} has only pickled weights (*.bin), which can run code. Convert them to safetensors.",
            )
        return open_safetensors(file)[0]
    shards = read_json(index).get("weight_map", {})
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise UserError("file_damaged", f"{index} has no weight_map of tensors to files. Fetch it again.")
    state: dict[str, Stored] = {}
    for name in sorted(set(shards.values())):
        state.update(open_safetensors(folder / plain_name(name))[0])
    if absent := sorted(shards.keys() - state.keys()):
        raise UserError("model_incomplete", f"The shards of {index} lack {fold.some(absent)}. Fetch them again.")
    return state


def copy_plain(source: Path, target: Path, name: str) -> None:
    """Copies a model's folder. Weights of a variant get their plain names, so that it opens without `variant=`."""
    for path in files_inside(source):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    if variant := variant_of(source, name):
        for spelled, plain in zip(variant_names(name, variant), (name, f"{name}.index.json"), strict=True):
            if (target / spelled).is_file():
                (target / spelled).rename(target / plain)


def is_released(keys: Iterable[str]) -> bool:
    """Whether these are keys of the released layout, which has a `c_embedder`."""
    return any(key.startswith("c_embedder.") for key in keys)


def fold_stored(state: Mapping[str, Stored], config: Mapping[str, Any], split: BiasSplit | None, where: str) -> Folded:
    """A student of either layout, folded, its tensors `Stored`. UserError if keys do not match or it is not a
    student."""
    if is_released(state):
        # Only the input layers are read, because they change. The others stay on disk.
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
    """The bias split beside folded weights. None for a student that never had one."""
    path = folder / SPLIT_FILE
    if not path.is_file():
        return None
    parts = open_safetensors(path)[0]
    if absent := [key for key in _SPLIT_KEYS if key not in parts]:
        raise UserError(
            "model_incomplete",
            f"{path} lacks {', '.join(absent)}. Delete it; only converting to the released layout uses it.",
        )
    return BiasSplit(*(parts[key].read() for key in _SPLIT_KEYS))


def write_split(split: BiasSplit, folder: Path) -> None:
    """Writes the bias split beside folded weights in `folder`."""
    parts: dict[str, Stored] = dict(zip(_SPLIT_KEYS, (held(split.x), held(split.c)), strict=True))
    write_safetensors(folder / SPLIT_FILE, parts)


def header_of(config: Mapping[str, Any], split: BiasSplit | None) -> dict[str, str]:
    """The metadata of a single file: its config and its bias split."""
    value: dict[str, Any] = {"config": dict(config)}
    if split is not None:
        dtype = str(split.x.dtype).removeprefix("torch.")
        value["split"] = {"dtype": dtype, **{key: _base64(part) for key, part in (("x", split.x), ("c", split.c))}}
    return {HEADER_KEY: json.dumps(value, sort_keys=True)}


def read_header(metadata: Mapping[str, str]) -> tuple[dict[str, Any], BiasSplit | None]:
    """(config, split) from a single file's metadata. The config is empty if diptych did not write the file."""
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
            "file_damaged", f"The '{HEADER_KEY}' metadata of the file is damaged ({error}). Convert the weights again."
        ) from error


def _base64(tensor: torch.Tensor) -> str:
    return base64.b64encode(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()).decode()


_HINTS = {
    "diptych": "the input has twice the channels: the noisy canvas, and the latents of [reference | black]",
    "channel": "the input has twice the channels: the noisy image, and the latents of the reference",
    "tokens": "the latents of the reference follow the noisy image's in the sequence, as in FLUX.1 Kontext",
}


def modelspec(
    title: str, style: str, *, lora: bool, width: int, guidance: bool | None = None, conditioning: str = "diptych"
) -> dict[str, str]:
    """The header that model managers read: https://github.com/Stability-AI/ModelSpec, version 1.0.1. It has no `date`,
    so that equal weights give equal bytes.

    `width` is the model's width. `guidance` is whether the model embeds distilled guidance, None if unknown.
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
    """UserError if `target` exists and is not an empty folder. `how` says how to replace it."""
    if target.exists() and not overwrite and (not target.is_dir() or any(target.iterdir())):
        raise UserError("output_exists", f"{target} already exists. Choose another name, or {how}.")
