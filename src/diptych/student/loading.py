"""Opening and saving students: whichever layout the weights came in, one pipeline comes out.

Parts (transformer, VAE, text encoders, tokenizers, scheduler) are taken from the model's folder where it has them, else
from the base. Everything is checked before the pipeline exists, so nothing is ever half loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from diptych.errors import UsageError, UserError
from diptych.student.pipeline import DiptychPipeline
from diptych.student.runtime.applied import hold
from diptych.student.runtime.memory import Preset, prepare, shapes_in
from diptych.student.settings import of
from diptych.student.weights import files, single_file
from diptych.student.weights.fold import build
from diptych.student.weights.lora import apply_lora, fuse_loras
from diptych.student.weights.lora_file import lora_file
from diptych.student.weights.sources import (
    Source,
    check_family,
    check_parts,
    find_parts,
    locate,
    look_at,
    open_part,
    open_source,
    resolve,
)
from diptych.student.weights.tensors import open_safetensors
from diptych.utils import models
from diptych.utils.io import publish
from diptych.utils.machine import alone, pick_device

RELEASED_SIZES = ((512, 512),)  # the authors trained on squares and sample them alone
Loras = str | Path | tuple[str | Path, float] | Sequence[str | Path | tuple[str | Path, float]]


@alone
def load(
    model: str | Path,
    base: str | Path | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    lora: Loras = (),
    released_lora: bool = True,
    fuse: bool = False,
    memory: str | int | Preset | None = None,
) -> DiptychPipeline:
    """Opens a student as a pipeline.

    Args:
        model: `pocket`, a hub name, or a path. A folder: a whole diffusers pipeline; one with only `transformer/`; the
            released layout (`transformer/` or `transformers/` with `c_embedder`, and its LoRA file), folded exactly;
            or one with only a control-LoRA, which goes on the base's transformer, widened. A file: a transformer in
            .safetensors or .gguf, in diffusers' or Black Forest Labs' keys, or a control-LoRA.
        base: the teacher's folder, for what `model` lacks (VAE, scheduler, text encoders, tokenizers). Without text
            encoders the pipeline takes prompts as embeddings only.
        dtype: default float32 on a CPU; on an accelerator bfloat16 for weights stored so, else float32.
        device: `cpu`, `cuda`, …; None or `auto` takes the accelerator if there is one.
        lora: more LoRA files on top: a path, a (path, scale), or a list of those.
        released_lora: also load the folder's own `pytorch_lora_weights.safetensors`, as the release does.
        fuse: add the LoRAs into the weights (faster; needed before `save`). Quantized weights (GGUF) keep them beside.
        memory: GiB to fit into (8, 12, 16, 24, 48, 80), `auto`, or a `memory.Preset`; see `memory`.

    Raises:
        UserError, UsageError: what is missing, damaged or of another family, and what to do. Nothing is half loaded.
    """
    device = pick_device(device)
    preset = prepare(memory, device) if memory is not None else None
    path, base_folder = resolve(model, base)
    layout, weights_place, _ = locate(path, base_folder)
    models.note_licence(str(model), weights_place)
    places = find_parts(path, base_folder)
    check_parts(places, path, base_folder)
    given = [(lora_file(Path(one)), scale) for one, scale in scaled(lora)]

    dtype = dtype or pick_dtype(weights_place, device)
    source = open_source(path, base_folder, dtype)
    own = source.lora if released_lora or layout == "control-lora" else None
    loras = [*([(lora_file(own), 1.0)] if own else []), *given]
    if preset is not None:
        quantized = sum(tensor.nbytes for tensor in source.tensors.values() if tensor.dtype == torch.uint8)
        preset.settle(shapes_in(source.folded.config, places, quantized), dtype, places)
        preset.check([lora for lora, _ in loras], fuse)
    later = preset.waiting if preset is not None else ()
    if inside := [part for part in later if part in source.parts]:
        raise UsageError(
            f"{path} holds {' and '.join(inside)}, which --memory {preset.name if preset else ''} opens again for "
            "prompts from a folder; use another preset, or save it as a folder first (diptych.student.save)"
        )
    for part in later:
        look_at(part, places[part])
    if lacking := sorted(source.parts.keys() - places.keys()):
        raise UserError(
            f"{path} holds {' and '.join(lacking)}, and the base has no such folder with its config; give a whole base"
        )
    given_parts = {part: place for part, place in places.items() if part not in later}
    parts = {part: open_part(part, place, dtype, source.parts.get(part)) for part, place in given_parts.items()}
    check_family(source.folded.config, parts, path, base_folder)
    pipe = DiptychPipeline(transformer=_read(source, dtype), **parts)
    pipe.settings = of(source.folded.config)
    pipe.bias_split = source.folded.split
    pipe.ignored_adapters = source.folded.adapters
    pipe.loaded_from = (path, *([base_folder] if base_folder else []))
    pipe.loras = tuple(given)
    if source.layout == "released" and pipe.settings.sizes is None:
        pipe.settings = replace(pipe.settings, sizes=RELEASED_SIZES)
    for one, scale in loras:
        apply_lora(pipe, one, scale)
    if fuse:
        fuse_loras(pipe)
    if preset is None:
        return pipe.to(device)
    hold(pipe, preset)
    return pipe


def _read(source: Source, dtype: torch.dtype) -> Any:
    """The transformer, its tensors read; a GGUF file's quantized matrices stay quantized."""
    if source.layout == "gguf" and any(tensor.dtype == torch.uint8 for tensor in source.tensors.values()):
        return single_file.build_quantized(source.folded.config, source.tensors, dtype, source.place)
    return build(source.folded.config, {key: tensor.read() for key, tensor in source.tensors.items()})


def save(pipe: DiptychPipeline, folder: str | Path, *, overwrite: bool = False) -> Path:
    """Writes the student as an ordinary diffusers folder, which the stock pipeline of its conditioning opens.

    Written under a temporary name and renamed, so a cut save is never taken for a student. A pipeline without text
    encoders is saved without them; stock diffusers then needs `text_encoder=None, …` passed explicitly.

    Raises:
        UserError: `folder` exists (and not `overwrite`), or a LoRA is still unfused.
    """
    folder = Path(folder)
    files.check_free(folder, overwrite, "pass overwrite=True")
    with publish(folder) as partial:
        pipe.save_pretrained(partial)
        for path in partial.rglob("*.json"):
            if (clean := models.without_places(data := path.read_bytes())) != data:
                path.write_bytes(clean)
        split = pipe.bias_split
        if split is not None and split.of(pipe.transformer.x_embedder.bias.detach().cpu()):
            files.write_split(split, partial / "transformer")
    return folder


def pick_dtype(weights: Path, device: torch.device) -> torch.dtype:
    """float32 on a CPU; on an accelerator bfloat16 for weights stored so or in 8 bits or less, else float32.

    `weights` is a folder or a file. float16 is storage only.
    """
    if device.type == "cpu":
        return torch.float32
    if weights.suffix == ".gguf":
        return torch.bfloat16
    first = weights if weights.is_file() else next(iter(sorted(weights.glob("*.safetensors"))), None)
    if first is None:
        return torch.float32
    try:
        stored = {tensor.dtype for tensor in open_safetensors(first)[0].values()}
    except UserError:
        return torch.float32  # reading the weights says what is wrong with the file
    return torch.bfloat16 if stored & {torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2} else torch.float32


def scaled(lora: Loras) -> list[tuple[Path, float]]:
    """(path, scale) of each LoRA; one path, or one (path, scale), need no list around it."""
    if isinstance(lora, (str, Path)):
        return [(Path(lora), 1.0)]
    if isinstance(lora, tuple) and len(lora) == 2 and isinstance(lora[1], (int, float)):
        lora = [lora]  # pyright: ignore[reportAssignmentType]
    pairs: list[Any] = [given if isinstance(given, tuple) else (given, 1.0) for given in lora]  # pyright: ignore
    return [(Path(path), float(scale)) for path, scale in pairs]
