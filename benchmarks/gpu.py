"""All measurements that need a GPU, in one unattended run: each part in a separate process, with a time limit.

    python benchmarks/gpu.py --out results --seconds 240      # golden, inference, training, memory: a GPU of 80 GB
    python benchmarks/gpu.py --out results --parts training   # some parts; --limits training=90 gives it 90 s
    python benchmarks/gpu.py --out /tmp/r --small             # the same code on the CPU, with a tiny model; a minute

A part writes OUT/gpu-PART.json after every measured line, so a part that is cut off keeps its results. All parts import
their libraries at the same time and then wait for their turn, since only one part uses the device. No file is
downloaded.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

LIMITS = {"golden": 20.0, "inference": 105.0, "training": 75.0, "memory": 60.0}  # seconds, in this order
GRACE = 4.0  # a part stops taking up lines this long before it is killed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--parts", default=",".join(LIMITS), help="of golden, inference, training, memory, in order")
    parser.add_argument("--limits", default="", help="PART=SECONDS,… instead of the usual")
    parser.add_argument("--seconds", type=float, default=280.0, help="for all parts together")
    parser.add_argument("--small", action="store_true", help="a tiny model on the CPU")
    parser.add_argument("--part", choices=LIMITS, help=argparse.SUPPRESS)  # the process of one part
    parser.add_argument("--ready", type=int, help=argparse.SUPPRESS)  # the pipe it closes once it has imported
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.part:
        one(arguments)
        return
    parts = [part.strip() for part in arguments.parts.split(",")]
    given = dict(pair.split("=") for pair in arguments.limits.split(",") if pair)
    if unknown := sorted({*parts, *given} - set(LIMITS)):
        parser.error(f"unknown parts {', '.join(unknown)}; known are {', '.join(LIMITS)}")
    sys.exit(run(parts, {**LIMITS, **{part: float(text) for part, text in given.items()}}, arguments))


def run(parts: list[str], limits: dict[str, float], arguments: argparse.Namespace) -> int:
    """Starts all parts and gives each its turn. Returns the number of parts that failed."""
    ends = time.monotonic() + arguments.seconds
    environment = {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"} | os.environ
    flags = ["--out", str(arguments.out), *(["--small"] if arguments.small else [])]
    started, ready = {}, {}
    for part in parts:
        ready[part], writing = os.pipe()
        started[part] = subprocess.Popen(
            [sys.executable, __file__, "--part", part, "--ready", str(writing), *flags],
            stdin=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,  # compilers' helpers end with it
            pass_fds=[writing],
        )
        os.close(writing)
    failed = 0
    try:
        for part, process in started.items():
            select.select([ready[part]], [], [], max(0.0, ends - time.monotonic()))
            limit = min(limits[part], ends - time.monotonic())
            began = time.monotonic()
            try:
                if limit <= GRACE:
                    raise subprocess.TimeoutExpired(part, 0)
                process.communicate(f"{limit - GRACE}\n", timeout=limit)
                end = f"ended with {process.returncode}"
            except subprocess.TimeoutExpired:
                end = f"stopped at its {max(0.0, limit):.0f} s"
            except BrokenPipeError:
                end = "died before its turn"
            finally:
                kill(process)
            failed += process.returncode != 0
            print(f"== {part} {end} after {time.monotonic() - began:.1f} s", flush=True)
    finally:
        for process in started.values():
            kill(process)
    return failed


def kill(process: subprocess.Popen[str]) -> None:
    """Ends a part and its child processes, and waits until the device is free."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def one(arguments: argparse.Namespace) -> None:
    """Imports, waits for its seconds on stdin, and measures."""
    began, part, small = time.monotonic(), arguments.part, arguments.small
    import importlib

    import measuring
    import torch

    for name in ("diffusers.loaders.peft", "peft", "torch._inductor.compile_fx", "diptych.student.pipeline"):
        importlib.import_module(name)
    for name in ("AutoencoderKL", "FluxTransformer2DModel", "FluxControlPipeline", "FlowMatchEulerDiscreteScheduler"):
        getattr(importlib.import_module("diffusers"), name)
    for name in ("CLIPTextModel", "T5EncoderModel"):
        getattr(importlib.import_module("transformers"), name)
    module = importlib.import_module(f"gpu_{part}")
    imported = time.monotonic() - began
    os.close(arguments.ready)
    line = sys.stdin.readline()
    if not line:
        return  # whoever started it is gone
    device = torch.device("cpu" if small else "cuda")
    torch.manual_seed(0)
    torch.zeros(1, device=device)  # CUDA begins here, not while another part has the device
    sheet = measuring.Sheet(f"gpu-{part}", arguments.out / f"gpu-{part}.json", device, float(line))
    sheet.note(small=small, import_s=round(imported, 1))
    try:
        module.run(sheet, device, small)
    except BaseException:
        traceback.print_exc()
        sheet.note(broken=traceback.format_exc(limit=-3))
        raise
    sheet.finish()


if __name__ == "__main__":
    main()
