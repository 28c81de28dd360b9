"""The machine and the software that made something: beside every number and every file. Imports nothing heavy."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

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
    """Environment variables by which torch, when it is loaded, uses so many CPU threads: the three that
    `torch.set_num_threads` itself decides."""
    return {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "MKL_DYNAMIC": "FALSE"}


def device_name(device: str) -> str:
    """The GPU's own name for `cuda` and `cuda:N`, else `device` as it is."""
    if device.startswith("cuda"):
        import torch

        if torch.cuda.is_available():
            return torch.cuda.get_device_name(torch.device(device))
    return device
