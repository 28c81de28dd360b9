"""One image on several GPUs: diffusers' context parallelism (Ulysses), with one process for each GPU under `torchrun`.

Every process has the whole model and runs the same sampler on the same CPU noise. Inside the transformer, each has a
share of the tokens and of the attention heads. An image is generated faster, but with the same memory on each GPU.
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
    from diptych.student.reference_pipeline import ReferencePipeline


def processes() -> int:
    """The number of processes that `torchrun` started. 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process writes files and messages."""
    return os.environ.get("RANK", "0") == "0"


def reports(error: UserError) -> bool:
    """Whether this process reports an error to the user: the first one reports errors that all have, and each one
    reports its other errors.

    Before the processes are connected, and for a wrong request, all have the same error.
    """
    dist = sys.modules.get("torch.distributed")
    connected = dist is not None and dist.is_initialized()
    return is_first() or (connected and not error.shared and not isinstance(error, UsageError))


def join(device: str | torch.device | None = None, patience: timedelta | None = None) -> torch.device:
    """Connects to the other processes and returns this process's GPU. UsageError if there are too few GPUs.

    `patience` is how long one process may make the others wait. Defaults to torch's timeout.
    """
    import torch
    import torch.distributed as dist

    local, here = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    count = torch.accelerator.device_count()
    if count < here:
        raise UsageError(
            "device_unavailable",
            f"torchrun started {here} processes, and this machine has {count} GPUs. Start one process for each GPU.",
        )
    wanted = torch.accelerator.current_accelerator() if device in (None, "auto") else torch.device(device)
    assert wanted is not None  # there are devices
    if wanted.type == "cpu":
        used, backend = wanted, "gloo"
    else:
        used, backend = torch.device(wanted.type, local), "cpu:gloo,cuda:nccl"
        torch.accelerator.set_device_index(local)
    if not dist.is_initialized():
        dist.init_process_group(backend, timeout=patience)
    return used


def split(pipe: ReferencePipeline) -> None:
    """Makes the pipeline's transformer share its tokens with the other processes. UsageError if its heads do not
    divide.

    A text length that does not divide uses diffusers' slower way, which exchanges sizes at every attention.
    """
    from diffusers import ContextParallelConfig

    number, heads = processes(), int(pipe.transformer.config.num_attention_heads)
    if heads % number:
        divisors = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise UsageError(
            "option_invalid",
            f"{number} processes cannot share {heads} attention heads. Start one of these numbers: {divisors}.",
        )
    if pipe.settings.reference_attention == "self":
        raise UsageError(
            "option_unsuited",
            "A student with reference_attention self cannot share an image over several GPUs, because each would add "
            "the reference's keys and values. Use one GPU.",
        )
    uneven = pipe.text_length % number != 0 or pipe.conditioning == "tokens"  # a reference has any number of tokens
    pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=number, ulysses_anything=uneven))


def check(pipe: ReferencePipeline, canvas: Canvas) -> None:
    """UsageError if the processes of a pipeline that was split cannot share the canvas's tokens evenly."""
    config = getattr(getattr(pipe.transformer, "_parallel_config", None), "context_parallel_config", None)
    if config is not None and not config.ulysses_anything and canvas.tokens % config.ulysses_degree:
        raise UsageError(
            "size_invalid",
            f"{config.ulysses_degree} processes cannot share the {canvas.tokens} tokens of {canvas.panel_width}×"
            f"{canvas.panel_height} panels evenly. Make one side a multiple of "
            f"{2 * canvas.factor * config.ulysses_degree} pixels.",
        )


def leave() -> None:
    """Ends the connection that `join` made, if it did."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
