"""`diptych run` on the packaged pocket weights, killed at random moments and started again: the lost work.

    python benchmarks/kills.py [--kills 20] [--out FILE]      # some minutes

One run is undisturbed, and a second one repeats it. Others are killed with SIGKILL once in each stage, at a random
moment, until the number of kills is reached. All must end with equal bytes of prompts, grids, candidates, pairs and
student.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

RECIPE = """
name: kills
task: subject
seed: 3
teacher: pocket
threads: 1
write: {writer: grammar, count: 96, shard_size: 8}
paint: {steps: 8, true_guidance: 2.0, batch_size: 8}
curate: {judge: pocket, batch_size: 8, thresholds: {same: -1.0}}
distill: {mode: lora, rank: 8, steps: 60, batch_size: 8, checkpoint_every: 5, validate_every: 20, validation_pairs: 4,
          sample_every: 0, sample_steps: 2, sample_pairs: 1}
evaluate: {suite: none}
"""
STAGES = ("prompts", "grids", "candidates", "pairs", "student")


def start(recipe: Path, out: Path) -> subprocess.Popen[bytes]:
    """`diptych run` in a separate process."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "diptych", "run", str(recipe), "--out", str(out), "--json"]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)


def finish(recipe: Path, out: Path) -> float:
    """Runs to the end and returns the seconds."""
    started = time.monotonic()
    if code := start(recipe, out).wait():
        raise RuntimeError(f"the run in {out} ended with exit code {code}")
    return time.monotonic() - started


def stage(out: Path) -> str:
    """The first stage of a run that is not finished."""
    for name in STAGES[:-1]:
        if not (out / name / "manifest.json").exists():
            return name
    return STAGES[-1]


def result(out: Path) -> dict[str, bytes]:
    """The rows and weights of a run by file, without logs, times and checkpoints."""
    rows = [path for name in STAGES[:-1] for path in (out / name).rglob("*") if path.is_file()]
    weights = list((out / "student").glob("*.safetensors"))
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted([*rows, *weights])}


def durations(out: Path) -> dict[str, float]:
    """Seconds of each stage in a run's log, by its output folder; the selection of pairs is a part of curation."""
    lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    seconds = {line["stage"]: line["seconds"] for line in lines if line["event"] == "stage"}
    parts = (("prompts", "write"), ("grids", "paint"), ("candidates", "curate"), ("student", "distill"))
    return {"pairs": 0.1, **{folder: seconds[name] for folder, name in parts}}


def run(kills: int, out: Path | None = None, seed: int = 0) -> dict[str, Any]:
    """Runs everything. AssertionError if a run ends with other bytes than the first."""
    import torch
    from measuring import about, write

    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        recipe = folder / "kills.yaml"
        recipe.write_text(RECIPE)
        seconds = finish(recipe, folder / "first")
        first = result(folder / "first")
        assert any(name.startswith("pairs/part") for name in first) and any(n.endswith(".safetensors") for n in first)
        finish(recipe, folder / "again")
        assert result(folder / "again") == first, "the same recipe twice did not give the same bytes"

        where: dict[str, int] = dict.fromkeys(STAGES, 0)
        takes = durations(folder / "first")
        begin = max(1.0, seconds - sum(takes.values()))  # of importing: a kill there is one, too
        ends = 0
        while sum(where.values()) < kills:
            killed = folder / f"killed-{ends}"
            for target in STAGES:
                process = start(recipe, killed)
                try:
                    while process.poll() is None and stage(killed) != target:
                        time.sleep(0.005)
                    process.wait(chance.uniform(0.3 * begin, begin + takes[target]))
                except subprocess.TimeoutExpired:
                    process.send_signal(signal.SIGKILL)
                    process.wait()
                    where[stage(killed)] += 1
                    print(f"kill {sum(where.values())}: in {stage(killed)}", flush=True)
            finish(recipe, killed)
            assert result(killed) == first, "a run that was killed ended otherwise"
            ends += 1
    found = {
        "about": about(torch.device("cpu")) | {"threads": 1},
        "kills": where,
        "runs_ended_the_same": ends,
        "files_compared": len(first),
        "seconds_undisturbed": round(seconds, 1),
    }
    print(write("kills", found, out))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    print(run(given.kills, given.out))


if __name__ == "__main__":
    main()
