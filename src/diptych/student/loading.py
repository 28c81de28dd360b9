"""Opening and saving students: a pipeline from weights in any layout.

Parts (transformer, VAE, text encoders, tokenizers, scheduler) are taken from the model's folder if it has them, else
from the base. Everything is checked before the pipeline is built, so nothing is half loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from diptych.errors import UsageError, UserError
from diptych.student.families.flux1 import FLUX1
from diptych.student.pipeline import DiptychPipeline, ReferencePipeline
from diptych.student.runtime.applied import apply_memory
from diptych.student.runtime.memory import Preset, prepare, shapes_in
from diptych.student.settings import of
from diptych.student.stock_students import family_at, open_student
from diptych.student.weights import files, single_file
from diptych.student.weights.fold import build
from diptych.student.weights.lora import apply_lora, fuse_loras
from diptych.student.weights.lora_file import lora_file
from diptych.student.weights.sources import (
    StudentSource,
    check_family,
    check_part,
    check_parts,
    find_parts,
    locate,
    open_part,
    open_source,
    resolve,
)
from diptych.student.weights.tensors import open_safetensors
from diptych.utils import licenses, models
from diptych.utils.io import publish
from diptych.utils.machine import alone, pick_device

RELEASED_SIZES = ((512, 512),)  # the authors trained on squares and sample them alone
Loras = str | Path | tuple[str | Path, float] | Sequence[str | Path | tuple[str | Path, float]]


# One thread at a time: diffusers and transformers patch torch for the whole process while they read weights, so that a
# module that another thread builds meanwhile has no values. A server with one worker for each device has such threads.
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
) -> ReferencePipeline:
    """Opens a student as a pipeline.

    Args:
        model: `pocket`, a hub name, or a path. A folder has a complete diffusers pipeline; or only `transformer/`; or
            the released layout (`transformer/` or `transformers/` with `c_embedder`, and its LoRA file), which is
            folded exactly; or only a control-LoRA for the base's widened transformer. A file has a transformer in
            .safetensors or .gguf, in diffusers' or Black Forest Labs' keys, or a control-LoRA.
        base: the teacher's folder, for the parts that `model` lacks (VAE, scheduler, text encoders, tokenizers).
            Without text encoders, the pipeline accepts prompts only as embeddings.
        dtype: defaults to float32 on a CPU; on an accelerator to bfloat16 for weights stored in it, else float32.
        device: `cpu`, `cuda`, …; None or `auto` uses the accelerator if there is one.
        lora: further LoRA files: a path, a (path, scale), or a list of those.
        released_lora: also load the folder's `pytorch_lora_weights.safetensors`, as the release does.
        fuse: add the LoRAs to the weights, which is faster and required before `save`. Quantized weights (GGUF) keep
            them separate.
        memory: memory preset in GiB (8, 12, 16, 24, 48, 80), `auto`, or a `memory.Preset`; see `memory`.

    Raises:
        UserError, UsageError: a part is missing, damaged or of another family. Nothing is half loaded.

    A student of another family than FLUX.1 is a complete folder, or a LoRA with its base; it takes no memory preset.
    """
    device = pick_device(device)
    path, base_folder = resolve(model, base)
    if (family := family_at(path, base_folder)) is not FLUX1:
        if memory is not None:
            raise UsageError("option_unsuited", f"Memory presets are for FLUX.1, not for {family.transformer}.")
        given = [(lora_file(Path(one)), scale) for one, scale in scaled(lora)]
        weights = path if (path / "transformer").is_dir() else base_folder or path
        dtype = dtype or pick_dtype(weights / "transformer", device)
        return open_student(path, base_folder, dtype, device, given, fuse)
    preset = prepare(memory, device) if memory is not None else None
    layout, weights_place, _ = locate(path, base_folder)
    licenses.note(str(model), weights_place)
    places = find_parts(path, base_folder)
    check_parts(places, path, base_folder)
    given = [(lora_file(Path(one)), scale) for one, scale in scaled(lora)]

    dtype = dtype or pick_dtype(weights_place, device)
    source = open_source(path, base_folder, dtype)
    part = source.lora if released_lora or layout == "control-lora" else None
    loras = [*([(lora_file(part), 1.0)] if part else []), *given]
    if preset is not None:
        quantized = sum(tensor.nbytes for tensor in source.tensors.values() if tensor.dtype == torch.uint8)
        preset.resolve(shapes_in(source.folded.config, places, quantized), dtype, places)
        preset.check([lora for lora, _ in loras], fuse)
    later = preset.waiting if preset is not None else ()
    if inside := [part for part in later if part in source.parts]:
        raise UsageError(
            "option_unsuited",
            f"--memory {preset.name if preset else ''} loads text encoders from a folder for each prompt, and {path} "
            f"has {' and '.join(inside)} in one file. Use another preset, or save it as a folder first "
            "(diptych.student.save).",
        )
    for part in later:
        check_part(part, places[part])
    if absent := sorted(source.parts.keys() - places.keys()):
        raise UserError(
            "model_incomplete",
            f"{path} has {' and '.join(absent)}, but the base has no folder for it. Pass a complete base.",
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
    apply_memory(pipe, preset)
    return pipe


def _read(source: StudentSource, dtype: torch.dtype) -> Any:
    """The transformer with its weights. Quantized matrices of a GGUF file stay quantized."""
    if source.layout == "gguf" and any(tensor.dtype == torch.uint8 for tensor in source.tensors.values()):
        return single_file.build_quantized(source.folded.config, source.tensors, dtype, source.place)
    return build(source.folded.config, {key: tensor.read() for key, tensor in source.tensors.items()})


def save(pipe: ReferencePipeline, folder: str | Path, *, overwrite: bool = False) -> Path:
    """Writes the student as an ordinary diffusers folder, which the stock pipeline of its conditioning opens.

    The folder is written under a temporary name and renamed, so that an interrupted save leaves no partial student. A
    pipeline without text encoders is saved without them; stock diffusers then needs `text_encoder=None, …`.

    Raises:
        UserError: `folder` exists (without `overwrite`), or a LoRA is not fused.
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
        return torch.float32  # reading the weights reports the damage
    return torch.bfloat16 if stored & {torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2} else torch.float32


def scaled(lora: Loras) -> list[tuple[Path, float]]:
    """(path, scale) of each LoRA, from a path, a (path, scale), or a list of these."""
    if isinstance(lora, (str, Path)):
        return [(Path(lora), 1.0)]
    if isinstance(lora, tuple) and len(lora) == 2 and isinstance(lora[1], (int, float)):
        lora = [lora]  # pyright: ignore[reportAssignmentType]
    pairs: list[Any] = [given if isinstance(given, tuple) else (given, 1.0) for given in lora]  # pyright: ignore
    return [(Path(path), float(scale)) for path, scale in pairs]
