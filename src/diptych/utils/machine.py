"""Versions, devices, precision, and peak memory of this machine. Imports nothing heavy."""

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
    """The versions of Python and of the packages that results depend on."""
    installed = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            installed[name] = VERSION if name == "diptych" else "not installed"  # run from a checkout
    return installed


def machine() -> dict[str, Any]:
    """System, processor and cores."""
    return {"system": platform.platform(), "processor": processor(), "cores": os.cpu_count()}


def processor() -> str:
    """The CPU's name, or the architecture if the system does not report it."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def reset_peak(device: str) -> None:
    """Resets the peak memory counter: of torch on a GPU, else (on Linux) of this process."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.reset_peak_memory_stats(torch.device(device))
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak(device: str) -> int | None:
    """Peak memory in bytes since `reset_peak`; None if the system does not report it."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated(torch.device(device))
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return None


def thread_variables(threads: int) -> dict[str, str]:
    """Environment variables that make torch use `threads` CPU threads when it is loaded, as `torch.set_num_threads`
    would."""
    return {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "MKL_DYNAMIC": "FALSE"}


def device_name(device: str) -> str:
    """The GPU's model name for `cuda` and `cuda:N`, else `device` as it is."""
    if device.startswith("cuda"):
        import torch

        if torch.cuda.is_available():
            return torch.cuda.get_device_name(torch.device(device))
    return device


_BUILDING = threading.RLock()
P = ParamSpec("P")
R = TypeVar("R")


def alone(function: Callable[P, R]) -> Callable[P, R]:
    """Makes calls of all decorated functions wait for each other, except for calls within one of them."""

    @wraps(function)
    def waits(*args: P.args, **kwargs: P.kwargs) -> R:
        with _BUILDING:
            return function(*args, **kwargs)

    return waits


def pick_device(device: str | torch.device | None) -> torch.device:
    """The requested device; for None or "auto" the accelerator of this machine, else the CPU."""
    import torch

    if device is not None and str(device) != "auto":
        try:
            return torch.device(device)
        except RuntimeError as error:
            message = f"Unknown device '{device}'. Use auto, cpu, cuda, cuda:0, or mps."
            raise UsageError("device_unavailable", message) from error
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def check_device(device: str | torch.device | None) -> None:
    """UsageError if this machine does not have the accelerator. Call it before a model is loaded."""
    import torch

    kind = pick_device(device).type
    there = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
    if kind in there and not there[kind]():
        raise UsageError(
            "device_unavailable",
            f"Device '{device}' is not available on this machine or in this torch installation. Choose cpu or auto.",
        )


def pick_precision(precision: str, device: torch.device) -> tuple[str, str]:
    """`"float32"` or `"bfloat16"` for a recipe's `precision` (`"auto"` selects), and the reason."""
    import torch

    if precision != "auto":
        return precision, "the recipe sets it"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported():
            return "bfloat16", "this GPU supports it"
        return "float32", "this GPU has no bfloat16"
    if device.type == "cpu" and torch.cpu._is_amx_tile_supported():
        return "bfloat16", "this CPU has AMX, which multiplies bfloat16 matrices several times faster"
    if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported():
        return "bfloat16", "this CPU multiplies bfloat16 matrices faster (AVX-512 BF16)"
    return "float32", f"bfloat16 is not faster on this {device.type}"


@contextmanager
def computing(precision: str, device: torch.device) -> Iterator[None]:
    """The context of a training forward pass: autocast, and the attention kernel of `attending`. Weights keep their
    type. Casts are not cached, because a forward pass uses each weight once."""
    import torch

    if precision == "float32":
        yield
        return
    with torch.autocast(device.type, torch.bfloat16, cache_enabled=False), attending(precision, device):
        yield


@contextmanager
def attending(precision: str, device: torch.device) -> Iterator[None]:
    """Selects the attention kernel for training in bfloat16; in float32 torch selects it.

    Run the backward pass inside as well, without autocast. Gradient checkpointing repeats the forward pass there,
    restores autocast itself, and needs the same kernel as the first pass.

    On a GPU, cuDNN's kernel is excluded: the first backward pass of a pocket student on an H100 (torch 2.11) gave NaN
    from a finite loss. On a CPU, the math kernel is selected: the bfloat16 backward pass of torch's flash attention is
    four times slower there than plain matrix products. In float32 flash is faster.
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
            # Despite its name it also applies to the CPU's math kernel, which otherwise converts bfloat16 to float32.
            torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
            stack.callback(torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp, before)
        # Query and key norms keep float32 weights under autocast, and torch warns about it on every call.
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
        yield
