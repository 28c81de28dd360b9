"""The circumstances of an evaluation: time, machine, versions."""

from __future__ import annotations

import os
import platform
import statistics
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diptych import __version__
from diptych.data import log

if TYPE_CHECKING:
    from diptych.recipe import Recipe


def seconds_per_image(run_dir: Path) -> dict[str, float]:
    """Median over batches, from the log: what a picture took while drawing them in batches."""
    spent: dict[str, list[float]] = {}
    for event in log.read(run_dir):
        if event.get("event") == "drawn" and event["images"]:
            spent.setdefault(event["method"], []).append(event["seconds"] / event["images"])
    return {name: round(statistics.median(values), 5) for name, values in spent.items()}


def machine(recipe: Recipe) -> dict[str, Any]:
    """Where this ran."""
    import torch

    cuda = recipe.device.startswith("cuda") and torch.cuda.is_available()
    return {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if cuda else recipe.device,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def versions() -> dict[str, str]:
    """The installed versions of what the numbers depend on."""
    found = {"diptych": __version__, "python": platform.python_version()}
    for name in ("torch", "diffusers", "transformers", "numpy", "pillow"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
