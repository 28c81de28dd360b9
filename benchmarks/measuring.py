"""Shared functions of the benchmarks: alternating timing, peak memory, the work of a forward pass, and result files."""

from __future__ import annotations

import ctypes
import datetime
import gc
import json
import re
import statistics
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from diptych.utils.machine import device_name, machine, versions

RESULTS = Path(__file__).with_name("results")


def alternate(
    methods: Mapping[str, Callable[[int], torch.Tensor]], rounds: int, device: torch.device
) -> tuple[dict[str, list[float]], dict[str, torch.Tensor], dict[str, int]]:
    """Seconds, last outputs and peak bytes of each method. Every round calls all methods with the number of the round.

    One unmeasured round (number -1) warms everything up, including compilation. The order is reversed every round. A
    method may have a `prepare`, which is called outside the measured time.
    """
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    outputs: dict[str, torch.Tensor] = {}
    peaks = dict.fromkeys(methods, 0)
    for number in range(-1, rounds):
        names = list(methods) if number % 2 else list(methods)[::-1]
        for name in names:
            if (prepare := getattr(methods[name], "prepare", None)) is not None:
                prepare()
            rest = reset_peak(device)
            synchronize(device)
            started = time.perf_counter()
            outputs[name] = methods[name](number)
            synchronize(device)
            if number >= 0:
                seconds[name].append(time.perf_counter() - started)
                peaks[name] = max(peaks[name], peak(device) - rest)
    return seconds, outputs, peaks


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak(device: torch.device) -> int:
    """Resets the peak and returns the bytes in use now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    path = Path("/proc/self/clear_refs")
    if path.exists():
        ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back first, or it would hide what is taken next
        path.write_text("5")  # Linux: forget the high-water mark
    return status("VmRSS")


def peak(device: torch.device) -> int:
    """The peak bytes in use since `reset_peak`."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else status("VmHWM")


def status(field: str) -> int:
    """A field of /proc/self/status in bytes; 0 if it does not exist."""
    path = Path("/proc/self/status")
    found = re.search(rf"^{field}:\s+(\d+) kB", path.read_text() if path.exists() else "", re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def summary(seconds: list[float]) -> dict[str, Any]:
    """Median, minimum, maximum and number of values."""
    return {
        "median_s": round(statistics.median(seconds), 4),
        "min_s": round(min(seconds), 4),
        "max_s": round(max(seconds), 4),
        "n": len(seconds),
    }


def forward_flop(config: Any, image_tokens: int, text_tokens: int) -> float:
    """Floating-point operations of one forward of a FLUX transformer: the products of its blocks and its attention.

    A token costs 24·d² in a block (12·d² multiply-adds: 4 for attention's projections and 8 for the MLP; a single
    block has as many), and attention 4·N·d. FLUX.1 at 2048 + 512 tokens: 37.6 TFLOP.
    """
    d = config.num_attention_heads * config.attention_head_dim
    n = image_tokens + text_tokens
    return (config.num_layers + config.num_single_layers) * (24.0 * n * d**2 + 4.0 * n**2 * d)


def matrix_rate(device: torch.device, dtype: torch.dtype, side: int) -> float:
    """Operations a second of square matrix products on this machine, the best of several measurements."""
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        synchronize(device)
        started = time.perf_counter()
        a @ b
        synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2.0 * side**3 / best


def about(device: torch.device) -> dict[str, Any]:
    """Machine, software and date of a result."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine(),
        "device": device_name(str(device)),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


def write(name: str, result: dict[str, Any], out: Path | None) -> Path:
    """Writes a result to `results/NAME-DEVICE-DATE.json`, or to `out`."""
    device = re.sub(r"[^a-z0-9]+", "-", str(result["about"]["device"]).lower()).strip("-")
    path = out or RESULTS / f"{name}-{device}-{result['about']['date']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", "utf8")
    return path


class Sheet:
    """A result that is written after every line, so that measured lines remain if the process is cut off."""

    def __init__(self, name: str, path: Path, device: torch.device, seconds: float) -> None:
        self.path = path
        self.ends = time.monotonic() + seconds
        self.result: dict[str, Any] = {"benchmark": name, "about": about(device), "lines": {}}

    def left(self) -> float:
        """Seconds."""
        return self.ends - time.monotonic()

    def note(self, **facts: Any) -> None:
        """Facts beside the lines."""
        self.result |= facts
        self._write()

    def line(self, name: str, measure: Callable[[], dict[str, Any]], needs: float = 0.0) -> dict[str, Any]:
        """Records the result of `measure`, the reason if it fails, or that fewer than `needs` seconds were left."""
        started = time.monotonic()
        if self.left() < needs:
            found: dict[str, Any] = {"not_run": f"{self.left():.0f} s were left"}
        else:
            try:
                found = measure()
            except Exception as error:
                traceback.print_exc()
                found = {"failed": f"{type(error).__name__}: {error}"[:500]}
            found["all_s"] = round(time.monotonic() - started, 1)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.result["lines"][name] = found
        self._write()
        print(f"{self.result['benchmark']} {name}: {json.dumps(found)}", flush=True)
        return found

    def finish(self) -> None:
        """Records whether every line was run, and the names of those that were not."""
        left_out = [name for name, line in self.result["lines"].items() if "not_run" in line]
        self.note(complete=not left_out, not_run=left_out)

    def _write(self) -> None:
        partial = self.path.with_suffix(".tmp")
        partial.write_text(json.dumps(self.result, indent=1) + "\n", "utf8")
        partial.replace(self.path)


def clocked(call: Callable[[], Any], device: torch.device) -> tuple[Any, float, int, int]:
    """(result of `call`, seconds, peak bytes in use, bytes in use before)."""
    rest = reset_peak(device)
    synchronize(device)
    started = time.perf_counter()
    found = call()
    synchronize(device)
    return found, time.perf_counter() - started, peak(device), rest


def random_weights(model: Callable[[], Any], device: torch.device, dtype: torch.dtype) -> Any:
    """A module without buffers, made without weights and filled on `device`: norms 1, other values small and normal."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            made = model()
    finally:
        torch.set_default_dtype(before)
    made = made.to_empty(device=device).eval().requires_grad_(False)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.fill_(1.0) if "norm" in name and parameter.ndim == 1 else parameter.normal_(std=0.02)
    return made
