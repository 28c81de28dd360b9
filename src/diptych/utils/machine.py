"""The machine and the software that made something: beside every number and every file. Imports nothing heavy."""

from __future__ import annotations

import os
import platform
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import wraps
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from diptych.errors import UsageError

if TYPE_CHECKING:
    import torch

VERSION = "0.1.0"  # as in pyproject.toml
PACKAGES = ("diptych", "torch", "diffusers", "transformers", "pyarrow", "pillow", "numpy")


def versions() -> dict[str, str]:
    """The installed versions of what bytes and numbers depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = VERSION if name == "diptych" else "not installed"  # run from a checkout
    return found


def machine() -> dict[str, Any]:
    """System, processor and cores."""
    return {"system": platform.platform(), "processor": processor(), "cores": os.cpu_count()}


def processor() -> str:
    """The CPU's name, as near as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def reset_peak(device: str) -> None:
    """Forgets the most memory that was held: of a GPU what torch took, else (on Linux) of this process."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.reset_peak_memory_stats(torch.device(device))
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak(device: str) -> int | None:
    """The most bytes held since `reset_peak`; None where the system does not tell."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated(torch.device(device))
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return None


def thread_variables(threads: int) -> dict[str, str]:
    """Environment variables by which torch, when it is loaded, uses `threads` CPU threads: the three that
    `torch.set_num_threads` itself decides."""
    return {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "MKL_DYNAMIC": "FALSE"}


def device_name(device: str) -> str:
    """The GPU's own name for `cuda` and `cuda:N`, else `device` as it is."""
    if device.startswith("cuda"):
        import torch

        if torch.cuda.is_available():
            return torch.cuda.get_device_name(torch.device(device))
    return device


_BUILDING = threading.RLock()
Given = ParamSpec("Given")
Made = TypeVar("Made")


def alone(function: Callable[Given, Made]) -> Callable[Given, Made]:
    """Calls of all functions marked so wait for each other, except for calls within one of them."""

    @wraps(function)
    def waits(*args: Given.args, **kwargs: Given.kwargs) -> Made:
        with _BUILDING:
            return function(*args, **kwargs)

    return waits


# What the forward pass computes in, and how, on the machine at hand. Every automatic choice says why it was made.


def pick_device(device: str | torch.device | None) -> torch.device:
    """The device asked for; for None or "auto" the accelerator this machine has, else the CPU."""
    import torch

    if device is not None and str(device) != "auto":
        try:
            return torch.device(device)
        except RuntimeError as error:
            raise UsageError(f"unknown device '{device}': auto, cpu, cuda, cuda:0, mps, …") from error
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def check_device(device: str | torch.device | None) -> None:
    """UsageError for an accelerator that this machine does not have, before a model is read for it."""
    import torch

    kind = pick_device(device).type
    there = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
    if kind in there and not there[kind]():
        raise UsageError(
            f"device '{device}': this machine, or this installation of torch, has none; leave the device out"
        )


def pick_precision(asked: str, device: torch.device) -> tuple[str, str]:
    """`"float32"` or `"bfloat16"` for what a recipe asks (`"auto"` chooses), and the reason in words."""
    import torch

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
    import torch

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
    import torch

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
