"""The cost of checking every part against its sha256 when it is read.

    python benchmarks/integrity.py [--grids 256] [--steps 200]      # some minutes

It runs a whole pocket run, from prompts to scores, and counts the seconds spent on hashes: of parts when a stage,
training or evaluation reads them, and of cached latents when training opens them. Then it resumes the training for one
more step, which checks the cached latents again. `full_size` scales to FLUX.1 with this machine's rate of hashing, from
the bytes and hours of `diptych plan recipes/flux-subject.yaml`.
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring import about, write

from diptych import recipe as recipes
from diptych.data.store import Dataset
from diptych.run import runner
from diptych.train import cache
from diptych.utils.console import Display

RECIPE = """
name: integrity
task: subject
seed: 3
teacher: pocket
device: cpu
write: {count: %d, shard_size: 64}
distill: {steps: %d, schedule: constant, batch_size: 32, validate_every: 100, sample_every: 100}
evaluate: {suite: pocket, samples: 12, prompts: 2}
"""
GIGABYTES = {"paint": 0.5, "curate": 420.0, "distill": 370.0 + 231.0}  # read by each stage, of `diptych plan`
# Curation without its judge: 21.7 ms a pair, measured (results/curation-speed-jpeg-painted-webp-tests-….json).
HOURS = {"paint": 444.0, "curate": 1_000_000 * 0.02174 / 3600, "distill": 1629.0}
BOUND = 0.02


class Clock:
    """Seconds spent in a function."""

    def __init__(self) -> None:
        self.seconds, self.calls = 0.0, 0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*given: Any, **named: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*given, **named)
            finally:
                self.seconds += time.perf_counter() - began
                self.calls += 1

        return timed


def rate() -> float:
    """GB of sha256 a second on one core."""
    data = bytes(2**28)
    began = time.perf_counter()
    hashlib.sha256(data).hexdigest()
    return len(data) / 1e9 / (time.perf_counter() - began)


def measure(grids: int, steps: int, out: Path | None = None) -> dict[str, Any]:
    clock = Clock()
    Dataset.check = clock.around(Dataset.check)  # pyright: ignore[reportAttributeAccessIssue]
    cache.is_whole = clock.around(cache.is_whole)
    stages: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        path, folder = Path(scratch) / "recipe.yaml", Path(scratch) / "run"
        for name in ("write", "paint", "curate", "distill", "evaluate", "distill again"):
            path.write_text(RECIPE % (grids, steps + (name == "distill again")))
            before, calls, began = clock.seconds, clock.calls, time.perf_counter()
            runner.run(recipes.load(path), folder, [name.split()[0]], Display(quiet=True))
            whole = time.perf_counter() - began
            spent = clock.seconds - before
            stages[name] = {"seconds": round(whole, 2), "hashing": round(spent, 4), "share": round(spent / whole, 5)}
            print(f"{name:<14}{whole:8.1f} s, hashing {1000 * spent:7.1f} ms, {spent / whole:.3%}", flush=True)
            stages[name]["checks"] = clock.calls - calls
    speed = rate()
    scaled = {name: GIGABYTES[name] / speed / 3600 / HOURS[name] for name in HOURS}
    whole = sum(GIGABYTES.values()) / speed / 3600 / sum(HOURS.values())
    found = {
        "about": about(torch.device("cpu")),
        "grids": grids,
        "steps": steps,
        "stages": stages,
        "sha256_gb_per_second": round(speed, 3),
        "full_size": {name: round(share, 5) for name, share in scaled.items()} | {"whole": round(whole, 5)},
    }
    print(write("integrity", found, out))
    assert all(stage["share"] <= BOUND for name, stage in stages.items() if name != "write"), "over the bound"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grids", type=int, default=256)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    measure(given.grids, given.steps, given.out)


if __name__ == "__main__":
    main()
