"""What a model's path holds: its layout, and its weights as a folded student whose tensors are still on disk.

`open_source` is the one reader of every layout. Loading reads all its tensors; converting writes them one by one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from diptych import recipe as recipes
from diptych.errors import UsageError, UserError
from diptych.student import settings
from diptych.student.settings import TRANSFORMER_FOLDERS, Settings
from diptych.student.weights import files, single_file
from diptych.student.weights.fold import INPUT, Folded, stock_config
from diptych.student.weights.lora_file import RELEASED_LORA, SUFFIXES, account, is_lora
from diptych.student.weights.tensors import Stored, held, open_safetensors
from diptych.utils import models


@dataclass(frozen=True)
class Source:
    """A student's weights as they lie on disk."""

    layout: str  # a layout of `directions.yaml`
    folded: Folded  # `state_dict` holds `Stored`s; of a control-LoRA, the teacher's, widened. `config` has its settings
    lora: Path | None  # the LoRA file that belongs to it
    place: Path  # the folder or file that holds the transformer's weights
    parts: Mapping[str, Mapping[str, Stored]] = field(default_factory=dict)  # of an all-in-one file: what else it holds
    scaled: bool = False  # the weights were in scaled fp8, and are dequantized

    @property
    def tensors(self) -> dict[str, Stored]:
        return self.folded.state_dict


def resolve(model: str | Path, base: str | Path | None) -> tuple[Path, Path | None]:
    """(path, base's folder) of a model by name; a built-in model brings its own base, and a run's LoRA its teacher."""
    name = str(model)
    path = models.resolve(name, "student")
    if base is None and (run := models.run_of(name)) is not None and lora_alone(path) is not None:
        base = recipes.load(run / "recipe.yaml").teacher
    if base is None:
        return path, models.resolve(name, "teacher") if name in models.BUILT_IN else None
    base_folder = models.resolve(str(base), "teacher")
    if not base_folder.is_dir():
        raise UsageError(
            f"the base {base} is a file; give the teacher's folder: it also brings the VAE and the scheduler"
        )
    return path, base_folder


def open_source(model: Path, base: Path | None, dtype: torch.dtype | None = None) -> Source:
    """The student at `model`, its tensors cast to `dtype` when read; UserError or UsageError if there is none.

    `base` is the teacher's folder: needed by a control-LoRA, and asked for what a single file cannot say of itself.
    """
    layout, place, lora = locate(model, base)
    found = read_settings(model, base)
    parts: dict[str, dict[str, Stored]] = {}
    scaled = False
    if layout in ("file", "gguf"):
        folded, parts, scaled = single_file.open_file(place, base, dtype)
    elif layout == "control-lora":
        assert base is not None and lora is not None
        folded = _widened(place, lora, dtype)
    else:
        state = {key: tensor.to(dtype) for key, tensor in files.open_state(place).items()}
        layout = "released" if files.is_released(state) else "folded"
        folded = files.fold_stored(state, files.read_config(place), files.read_split(place), str(place))
    if found != Settings() or settings.KEY in folded.config:  # weights that say nothing stay as they are
        folded = replace(folded, config={**folded.config, settings.KEY: found.values()})
    return Source(layout, folded, lora, place, parts, scaled)


def read_settings(model: Path, base: Path | None) -> Settings:
    """What the student at `model` needs to be run right, without its weights: what they say of themselves, else what
    lies beside them, else, for a model that says nothing, what its base says. UserError if that is not valid."""
    layout, place, lora = "control-lora", model, lora_alone(model)
    if lora is None:
        layout, place, lora = locate(model, base)
    place = lora if layout == "control-lora" and lora is not None else place
    said: dict[str, Any] = {}
    if layout == "folded":
        said = files.read_config(place)
    elif layout != "gguf":
        said = files.read_header(open_safetensors(place)[1])[0]
    places = [model, *([base] if base is not None else [])]
    return settings.resolve(said.get(settings.KEY), places, f"'{settings.KEY}' in {place}")


def locate(model: Path, base: Path | None) -> tuple[str, Path, Path | None]:
    """(layout, where the transformer's weights lie, the LoRA that belongs to them), by looking only at names and keys.

    `folded` stands for `released` too: which of the two it is, the weights say.
    """
    if model.is_file():
        if model.suffix == ".gguf":
            return "gguf", model, None
        if model.suffix not in SUFFIXES:
            raise UsageError(
                f"{model} is neither a .safetensors nor a .gguf file; give one, or the folder of a student"
            )
        if not is_lora(open_safetensors(model)[0]):
            return "file", model, None
        return "control-lora", _teacher(model, base), model
    own = model / RELEASED_LORA
    lora = own if own.is_file() else None
    for name in TRANSFORMER_FOLDERS:
        if (model / name).is_dir():
            return "folded", model / name, lora
    if lora is not None and (base is not None or not (model / "config.json").is_file()):
        return "control-lora", _teacher(model, base), lora
    if (model / "config.json").is_file():
        return "folded", model, lora
    single = next(iter(sorted(path for kind in (".gguf", *SUFFIXES) for path in model.glob(f"*{kind}"))), None)
    instead = "is the download complete?" if single is None else f"give its file, {single}"
    raise UserError(f"{model} holds no transformer/ folder, so it is no student; {instead}")


def lora_alone(model: Path) -> Path | None:
    """The LoRA file that a path is, or that is all the weights a folder has; None if there is more, or none."""
    if model.is_file():
        return model if model.suffix in SUFFIXES and is_lora(open_safetensors(model)[0]) else None
    others = [*TRANSFORMER_FOLDERS, "config.json"]
    found = model / RELEASED_LORA
    return found if found.is_file() and not any((model / name).exists() for name in others) else None


def teacher_state(base: Path) -> tuple[dict[str, Stored], dict[str, Any]]:
    """(tensors, config) of a teacher's transformer; UserError if it is no teacher."""
    place = transformer_folder(base)
    config = stock_config(files.read_config(place))
    if config["in_channels"] != (config.get("out_channels") or config["in_channels"]):
        raise UserError(f"{place} is widened already; the base must be the text-to-image teacher")
    return files.open_state(place), config


def transformer_folder(folder: Path) -> Path:
    """The folder that holds a pipeline's transformer: `transformer/`, `transformers/`, or `folder` itself."""
    for name in TRANSFORMER_FOLDERS:
        if (folder / name).is_dir():
            return folder / name
    if (folder / "config.json").is_file():
        return folder
    raise UserError(f"{folder} holds no transformer/ folder; is the download complete?")


def _teacher(model: Path, base: Path | None) -> Path:
    if base is None:
        raise UsageError(
            f"{model} is a LoRA, which needs the teacher that it goes on: give the teacher's folder as base"
        )
    return transformer_folder(base)


def _widened(place: Path, lora: Path, dtype: torch.dtype | None) -> Folded:
    """The teacher's weights with zero columns for the condition; UserError if the LoRA would never use them."""
    if not any(f"transformer.{INPUT}" in layer.targets for layer in account(open_safetensors(lora)[0], lora)):
        raise UserError(f"{lora} does not adapt {INPUT}, so a student made from it would never see the reference")
    state, config = teacher_state(place)
    state = {key: tensor.to(dtype) for key, tensor in state.items()}
    weight = state[f"{INPUT}.weight"].read()
    state[f"{INPUT}.weight"] = held(torch.cat([weight, torch.zeros_like(weight)], dim=1))
    channels = config["in_channels"]
    wide = {**config, "in_channels": 2 * channels, "out_channels": channels}
    return files.fold_stored(state, wide, None, str(place))
