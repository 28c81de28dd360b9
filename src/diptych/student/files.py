"""A student's transformer on disk: reading either layout whole or not at all, writing, and converting between them.

A folder holds `config.json` and safetensors, in one file or in shards with an index. What is missing, cut short or of
another family is a UserError that names the file, before any model is built.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from diptych.errors import UserError
from diptych.student import weights
from diptych.student.weights import BiasSplit

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
SPLIT_FILE = "released_biases.safetensors"


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a transformer folder; UserError unless it is there, readable and of a FLUX transformer."""
    path = folder / "config.json"
    config = read_json(path)
    name = str(config.get("_class_name", ""))
    if not name.startswith("FluxTransformer2D"):
        raise UserError(f"{path} describes a {name or 'model of no class'}, not a FLUX transformer")
    if not isinstance(config.get("in_channels"), int):
        raise UserError(f"{path} has no in_channels; the file is damaged, fetch it again")
    return config


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from disk; UserError if it is missing or damaged."""
    if not path.is_file():
        raise UserError(f"{path} is missing; is the folder complete?")
    try:
        value = json.loads(path.read_text("utf8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}); fetch the file again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object; fetch the file again")
    return value


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of one safetensors file; UserError if it is missing, truncated or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise UserError(f"{path} is missing; is the folder complete?")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{path} ({path.stat().st_size:,} bytes) is not a whole safetensors file ({error}); "
            "it was probably cut short while being copied: fetch it again"
        ) from error


def read_state(folder: Path, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """All tensors of a transformer folder, from one file or from its index's shards, cast to `dtype` if given."""
    state = _read_shards(folder)
    if dtype is None:
        return state
    return {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in state.items()}


def _read_shards(folder: Path) -> dict[str, torch.Tensor]:
    index = folder / f"{WEIGHTS_FILE}.index.json"
    if (folder / WEIGHTS_FILE).is_file() or not index.is_file():
        if not (folder / WEIGHTS_FILE).is_file() and list(folder.glob("*.bin")):
            raise UserError(f"{folder} holds only pickled weights (*.bin), never opened here; convert to safetensors")
        return read_tensors(folder / WEIGHTS_FILE)
    places = read_json(index).get("weight_map", {})
    state: dict[str, torch.Tensor] = {}
    for name in sorted(set(places.values())):
        state.update(read_tensors(folder / name))
    if absent := sorted(places.keys() - state.keys()):
        raise UserError(f"the shards of {index} lack {weights.some(absent)}; fetch them again")
    return state


def read_split(folder: Path) -> BiasSplit | None:
    """The bias split beside folded weights, or None when the student never had one."""
    path = folder / SPLIT_FILE
    if not path.is_file():
        return None
    parts = read_tensors(path)
    if absent := [key for key in ("x_embedder.bias", "c_embedder.bias") if key not in parts]:
        raise UserError(f"{path} lacks {', '.join(absent)}; delete it: only unfolding to the released layout uses it")
    return BiasSplit(x=parts["x_embedder.bias"], c=parts["c_embedder.bias"])


def write_split(split: BiasSplit, folder: Path) -> None:
    """Keeps the bias split beside folded weights in `folder`."""
    from safetensors.torch import save_file

    save_file({"x_embedder.bias": split.x.contiguous(), "c_embedder.bias": split.c.contiguous()}, folder / SPLIT_FILE)


def is_released(state_dict: Mapping[str, torch.Tensor]) -> bool:
    """Whether these are weights of the released layout: they have a `c_embedder`."""
    return any(key.startswith("c_embedder.") for key in state_dict)


def read_student(folder: Path, dtype: torch.dtype | None = None) -> weights.Folded:
    """A student's weights from a transformer folder of either layout, folded, cast to `dtype` if given."""
    config = read_config(folder)
    state = read_state(folder, dtype)  # cast before folding: bx + bc is then summed in the wider type
    if is_released(state):
        return weights.fold(state, config, where=str(folder))
    weights.student_channels(config, str(folder))
    weights.check_keys(state, weights.shapes_of(weights.stock_config(config)), str(folder))
    return weights.Folded(weights.stock_config(config), state, read_split(folder))


def fold_folder(released: Path, folder: Path) -> weights.Folded:
    """Converts a released transformer folder to a folded one, with its bias split; dtype and bits are kept."""
    state = read_state(released)
    if not is_released(state):
        raise UserError(f"{released} has no c_embedder: it is not of the released layout; nothing to fold")
    folded = weights.fold(state, read_config(released), where=str(released))
    assert folded.split is not None
    write_transformer(folder, folded.state_dict, {"_class_name": "FluxTransformer2DModel", **folded.config})
    write_split(folded.split, folder)
    return folded


def unfold_folder(folded: Path, folder: Path) -> None:
    """Converts a folded transformer folder to the released layout; bit-equal to the released one if it came from it."""
    state, config = weights.unfold(read_state(folded), read_config(folded), read_split(folded))
    write_transformer(folder, state, config)


def write_transformer(folder: Path, state_dict: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> None:
    """Writes `config.json` and one safetensors file; the weights last and by renaming, so a cut save shows."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(config), indent=2, sort_keys=True) + "\n", "utf8")
    partial = folder / f"{WEIGHTS_FILE}.tmp"
    save_file({k: v.contiguous() for k, v in state_dict.items()}, partial, metadata={"format": "pt"})
    partial.replace(folder / WEIGHTS_FILE)
