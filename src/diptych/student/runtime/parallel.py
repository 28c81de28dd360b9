"""One picture on several GPUs: diffusers' context parallelism (Ulysses), one process for each GPU under `torchrun`.

Every process holds the whole model and runs the same sampler on the same CPU noise; inside the transformer each has its
share of the tokens, and of the attention heads. So a picture is drawn faster, not with less memory.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from diptych.errors import UsageError, UserError

if TYPE_CHECKING:
    from datetime import timedelta

    import torch

    from diptych.student.canvas import Canvas
    from diptych.student.pipeline import DiptychPipeline


def processes() -> int:
    """How many processes `torchrun` started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this is the process that writes and speaks."""
    return os.environ.get("RANK", "0") == "0"


def says(error: UserError) -> bool:
    """Whether this process tells the user of an error: the first one of what all have, and each of its own.

    Before they have met, and of what was asked wrongly, all have the same.
    """
    dist = sys.modules.get("torch.distributed")
    met = dist is not None and dist.is_initialized()
    return is_first() or (met and not error.shared and not isinstance(error, UsageError))


def join(device: str | torch.device | None = None, patience: timedelta | None = None) -> torch.device:
    """Meets the other processes; this process's own GPU. UsageError if there are too few.

    `patience` is how long one may keep the others waiting; None is torch's own.
    """
    import torch
    import torch.distributed as dist

    local, here = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    count = torch.accelerator.device_count()
    if count < here:
        raise UsageError(f"torchrun started {here} processes and this machine has {count} GPUs: one for each is needed")
    asked = torch.accelerator.current_accelerator() if device in (None, "auto") else torch.device(device)
    assert asked is not None  # there are devices
    if asked.type == "cpu":
        own, backend = asked, "gloo"
    else:
        own, backend = torch.device(asked.type, local), "cpu:gloo,cuda:nccl"
        torch.accelerator.set_device_index(local)
    if not dist.is_initialized():
        dist.init_process_group(backend, timeout=patience)
    return own


def split(pipe: DiptychPipeline) -> None:
    """Lets the pipeline's transformer share its tokens with the other processes. UsageError if its heads do not divide.

    A text length that does not divide takes diffusers' slower way, which exchanges sizes at every attention.
    """
    from diffusers import ContextParallelConfig

    number, heads = processes(), int(pipe.transformer.config.num_attention_heads)
    if heads % number:
        fitting = [n for n in range(1, heads + 1) if heads % n == 0]
        raise UsageError(f"{number} processes cannot share {heads} attention heads; start {_or(fitting)}")
    if pipe.settings.reference_attention == "self":
        raise UsageError(
            "option_unsuited",
            "a student with reference_attention self cannot share an image over several GPUs, because each would add "
            "the reference's keys and values; use one GPU",
        )
    uneven = pipe.text_length % number != 0 or pipe.conditioning == "tokens"  # a reference has any number of tokens
    pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=number, ulysses_anything=uneven))


def check(pipe: DiptychPipeline, canvas: Canvas) -> None:
    """UsageError if the canvas's tokens cannot be shared out evenly over the processes of a pipeline that was split."""
    config = getattr(getattr(pipe.transformer, "_parallel_config", None), "context_parallel_config", None)
    if config is not None and not config.ulysses_anything and canvas.tokens % config.ulysses_degree:
        raise UsageError(
            f"{config.ulysses_degree} processes cannot share the {canvas.tokens} tokens of {canvas.panel_width}×"
            f"{canvas.panel_height} panels evenly; make one side a multiple of "
            f"{2 * canvas.factor * config.ulysses_degree} pixels"
        )


def leave() -> None:
    """Ends what `join` began, if it did."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _or(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:-1])) + f" or {numbers[-1]}" if len(numbers) > 1 else str(numbers[0])
