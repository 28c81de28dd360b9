"""Twenty SIGKILLs at random moments of one training change nothing about how it ends.

make soak        (or: pytest -m soak -s tests/soak/test_kill_distill.py)
"""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
import kills  # pyright: ignore[reportMissingImports]
import tiny_run  # pyright: ignore[reportMissingImports]

KILLS = 20


@pytest.mark.soak
@pytest.mark.parametrize("mode", ["full", "lora"])
def test_twenty_kills_lose_nothing(tmp_path: Path, mode: str) -> None:
    tiny_run.make_teacher(tmp_path / "teacher")
    tiny_run.make_pairs(tmp_path / "pairs")
    # Short steps and a checkpoint every third: a good share of the kills lands in a save or a validation.
    sets = ["steps=150", "checkpoint_every=3", "validate_every=7", "sample_every=20", f"mode={mode}", "rank=4"]
    kills.finish(tmp_path, tmp_path / "straight", *sets)

    out = tmp_path / "killed"
    chance = random.Random(0)
    done, mid_save = 0, 0
    while done < KILLS:
        goal = kills.steps_logged(out) + chance.randint(0, 6)
        pause = chance.random() * 0.03

        def ready(goal: int = goal, pause: float = pause) -> bool:
            if kills.steps_logged(out) < goal:
                return False
            time.sleep(pause)
            return True

        assert kills.kill_when(kills.start(tmp_path, out, *sets), ready), "the training ended before the kills did"
        done += 1
        mid_save += bool(list((out / "training").glob(".step-*.tmp")))
    kills.finish(tmp_path, out, *sets)
    print(f"{mode}: {done} kills, {mid_save} of them during a save; steps {kills.steps_logged(out)}")
    lines, weights = kills.result(out, mode)
    assert [line["step"] for line in lines] == list(range(1, 151))
    assert (lines, weights) == kills.result(tmp_path / "straight", mode)
