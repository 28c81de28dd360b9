"""Students of families other than FLUX.1: folders and LoRA files of stock diffusers, without layouts of their own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from diptych.errors import UsageError, UserError
from diptych.student import settings
from diptych.student.families import family_in
from diptych.student.families.base import Family
from diptych.student.families.flux1 import FLUX1
from diptych.student.pipeline import as_student
from diptych.student.weights.files import read_header
from diptych.student.weights.fold import some
from diptych.student.weights.lora_file import RELEASED_LORA
from diptych.student.weights.sources import lora_alone
from diptych.student.weights.tensors import open_safetensors
from diptych.utils.opening import INDEX, open_pipeline


def family_at(path: Path, base: Path | None) -> Family:
    """The family of a student, by the classes in its folder or, for a LoRA, in its base's. FLUX.1 if they do not tell,
    as for a single file."""
    alone = not path.is_dir() or lora_alone(path) is not None
    folder = base if alone else path
    if folder is None or not (folder / INDEX).is_file():
        return FLUX1
    try:
        return family_in(folder)
    except UsageError:
        return FLUX1  # whose loader reports what is wrong


def open_student(
    path: Path,
    base: Path | None,
    dtype: torch.dtype,
    device: torch.device,
    loras: Sequence[tuple[Path, float]] = (),
    fuse: bool = False,
) -> Any:
    """The pipeline of the student at `path`: a complete folder, or a LoRA for the teacher in `base`. `loras` are
    further LoRA files with their scales.

    UserError if it is not a student, or if a LoRA does not fit.
    """
    alone = lora_alone(path)
    if alone is not None:
        assert base is not None, "otherwise it has no family"
        loras = [(alone, 1.0), *loras]
    folder = path if alone is None else base
    assert folder is not None
    stock = open_pipeline(folder, dtype, "student" if alone is None else "base")
    if alone is not None:
        values = read_header(open_safetensors(alone)[1])[0].get(settings.KEY)
        settings.register(stock.transformer, settings.resolve(values, [path, folder], f"'{settings.KEY}' in {alone}"))
    pipe = as_student(stock, stock.transformer)
    pipe.loaded_from = (path, *([base] if base is not None else []))
    pipe.loras = tuple(loras[1:] if alone is not None else loras)
    pipe.set_progress_bar_config(disable=False)
    names = [apply(pipe, lora) for lora, _ in loras]
    if names:
        pipe.set_adapters(names, [scale for _, scale in loras])
    if names and fuse:
        pipe.fuse_lora(adapter_names=names)
        pipe.unload_lora_weights()
    return pipe.to(device)


def apply(pipe: Any, file: Path, name: str | None = None) -> str:
    """Loads a LoRA file with the stock loader, and returns its adapter name. UserError if it adapts layers that the
    transformer does not have, which the stock loader would skip."""
    file = file / RELEASED_LORA if file.is_dir() else file
    layers = {key.partition(".lora_")[0] for key in open_safetensors(file)[0] if key.startswith("transformer.")}
    known = {f"transformer.{layer}" for layer, _ in pipe.transformer.named_modules()}
    if unknown := sorted(layers - known):
        raise UserError(
            "lora_mismatch",
            f"{file} adapts layers that {pipe.family.transformer} does not have: {some(unknown)}. Nothing was loaded; "
            "use a LoRA of this teacher.",
        )
    taken = getattr(pipe.transformer, "peft_config", {})
    name = name or f"student_{len(taken)}"
    try:
        pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=name, local_files_only=True)
    except (KeyError, ValueError, RuntimeError, TypeError) as error:
        raise UserError(
            "lora_mismatch", f"{file} does not fit {pipe.family.transformer} ({str(error)[:200]}). Use a LoRA of it."
        ) from error
    return name
