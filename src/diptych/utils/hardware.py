"""What the forward pass computes in, and how, on the machine at hand. Every automatic choice says why it was made."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


def pick_precision(asked: str, device: torch.device) -> tuple[str, str]:
    """`"float32"` or `"bfloat16"` for what a recipe asks (`"auto"` chooses), and the reason in words."""
    if asked != "auto":
        return asked, "the recipe asks for it"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported():
            return "bfloat16", "this GPU computes in it"
        return "float32", "this GPU has no bfloat16"
    if device.type == "cpu" and torch.cpu._is_amx_tile_supported():
        return "bfloat16", "this CPU has AMX, which multiplies matrices several times faster in it"
    if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported():
        return "bfloat16", "this CPU multiplies matrices faster in it (AVX-512 BF16)"
    return "float32", f"this {device.type} gains nothing from bfloat16"


@contextmanager
def computing(precision: str, device: torch.device) -> Iterator[None]:
    """The context of a training forward pass: autocast, and the attention kernel of `attending`. Weights stay as they
    are: each is cast where it is used, and not kept, since a forward pass uses it once."""
    if precision == "float32":
        yield
        return
    with torch.autocast(device.type, torch.bfloat16, cache_enabled=False), attending(precision, device):
        yield


@contextmanager
def attending(precision: str, device: torch.device) -> Iterator[None]:
    """The attention kernel of training in bfloat16; elsewhere torch's own choice.

    A backward pass must run inside as well, without autocast: gradient checkpointing computes the forward pass there
    once more, restores autocast by itself, and needs the kernel that the first pass had.

    On a GPU any kernel but cuDNN's: the first backward pass of a pocket student on an H100 (torch 2.11) gave NaN there,
    from a finite loss. On a CPU the math kernel: torch's flash attention has a bfloat16 backward pass there that is
    four times slower than plain matrix products; in float32 flash is the faster one.
    """
    if precision == "float32":
        yield
        return
    with ExitStack() as stack:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        if device.type == "cuda":
            kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
            stack.enter_context(sdpa_kernel(kernels))
        if device.type == "cpu":
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            before = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
            # Despite its name it governs the CPU's math kernel as well: without it, bfloat16 goes through float32.
            torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
            stack.callback(torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp, before)
        # Query and key norms keep float32 weights under autocast; torch says each time that it has no fused kernel.
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
        yield
