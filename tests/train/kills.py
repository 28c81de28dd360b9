"""Trainings in processes of their own, some of them killed with SIGKILL: forked from a server that has torch loaded."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny_run

MODULES = (
    "diffusers.pipelines.flux.pipeline_flux_control",
    "transformers.models.clip.modeling_clip",
    "transformers.models.t5.modeling_t5",
    "torch.distributed.fsdp",
    "peft",
    "diptych.train.distill",
    "diptych.train.loop",
)
"""What a training imports, diffusers' and transformers' lazy ones by name."""
WAIT = 900.0  # seconds until a training that does not get anywhere fails the test


def context() -> Any:
    """A fork server that imports what a training needs once."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload([*MODULES])
    return server


def start(work: Path, out: Path, *sets: str) -> Any:
    """A training of `work`'s world into `out`, under way."""
    process = context().Process(target=tiny_run.main, args=(str(work), str(out), *sets))
    process.start()
    return process


def script(path: str, args: list[str], environment: dict[str, str], told: str) -> None:
    """What `python PATH ARGS` does in this environment; what it says goes to TOLD.out and TOLD.err."""
    os.environ.update(environment)
    for number, end in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{told}.{end}", os.O_WRONLY | os.O_CREAT), number)
    sys.argv = [path, *args]
    runpy.run_path(path, run_name="__main__")


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
