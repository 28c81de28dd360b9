"""The student: a stock FLUX-Control transformer that takes a reference image, and the pipeline around it.

`load` opens a student from any layout, `save` writes an ordinary diffusers folder. Beneath: `geometry` (canvas, panels,
fit), `weights` (widen, fold, unfold), `files`, `lora`, `pipeline` (the sampler). Nothing heavy is imported before use.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from diptych.student.pipeline import DiptychPipeline
    from diptych.student.runtime.memory import Preset
    from diptych.student.weights.loading import Loras

__all__ = ["load", "save"]


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
    from diptych.student.weights.loading import load as _load

    return _load(
        model, base, dtype=dtype, device=device, lora=lora, released_lora=released_lora, fuse=fuse, memory=memory
    )


def save(pipe: DiptychPipeline, folder: str | Path, *, overwrite: bool = False) -> Path:
    """Writes the student as an ordinary diffusers folder that stock `FluxControlPipeline.from_pretrained` opens.

    Written under a temporary name and renamed, so a cut save is never taken for a student. A pipeline without text
    encoders is saved without them; stock diffusers then needs `text_encoder=None, …` passed explicitly.

    Raises:
        UserError: `folder` exists (and not `overwrite`), or a LoRA is still unfused.
    """
    from diptych.student.weights.loading import save as _save

    return _save(pipe, folder, overwrite=overwrite)
