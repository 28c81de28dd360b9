"""Trainings that are killed with SIGKILL: each runs in its own process, forked from a server that has torch loaded."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny_run

WAIT = 900.0  # seconds until a training that does not get anywhere fails the test


def context() -> Any:
    """A fork server that imports what a training needs once."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(
        ["tiny_run", "torch", "diffusers", "peft", "diptych.stages.distill", "diptych.train.loop"]
    )
    return server


def start(work: Path, out: Path, *sets: str) -> Any:
    """A training of `work`'s world into `out`, under way."""
    process = context().Process(target=tiny_run.main, args=(str(work), str(out), *sets))
    process.start()
    return process


def kill_when(process: Any, ready: Callable[[], bool]) -> bool:
    """SIGKILL as soon as `ready()`; False if the training ended before."""
    until = time.monotonic() + WAIT
    while process.is_alive() and not ready():
        assert time.monotonic() < until, "the training does not get anywhere"
        time.sleep(0.0005)
    killed = process.is_alive()
    process.kill()
    process.join()
    assert killed or process.exitcode == 0, f"the training failed with exit code {process.exitcode}"
    return killed


def finish(work: Path, out: Path, *sets: str) -> None:
    """Runs a training to its end."""
    process = start(work, out, *sets)
    process.join(WAIT)
    if process.is_alive():
        process.kill()
        raise AssertionError(f"the training took more than {WAIT:g} s")
    assert process.exitcode == 0, f"the training failed with exit code {process.exitcode}"


def steps_logged(out: Path) -> int:
    """Whole lines in the metrics so far."""
    try:
        return (out / "training" / "metrics.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def result(out: Path, mode: str = "full") -> tuple[list[dict[str, Any]], str]:
    """All that must be equal, bit for bit: the metrics without their times, and the student's weights."""
    lines = [json.loads(line) for line in (out / "training" / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("seconds")
    name = "pytorch_lora_weights.safetensors" if mode == "lora" else "transformer/diffusion_pytorch_model.safetensors"
    return lines, hashlib.sha256((out / name).read_bytes()).hexdigest()
