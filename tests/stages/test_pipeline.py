"""write → paint → curate → pairs for real, on tiny random models; killed in the middle, it ends with the same bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from diptych.data.images import open_image
from diptych.data.store import Dataset
from diptych.recipe import load
from diptych.run.runner import run
from diptych.utils.console import Display
from plain_stages import data

STAGES = ("write", "paint", "curate")
SCRIPT = Path(__file__).parent / "curation_models.py"


def kill_when(path: Path, recipe: Path, out: Path) -> None:
    """Starts a run and kills it as soon as `path` is there."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, str(SCRIPT), str(recipe), str(out)], env=environment)
    until = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None and time.monotonic() < until, "the run ended before it could be killed"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait(30) == -signal.SIGKILL


def test_a_killed_run_ends_with_the_rows_of_an_undisturbed_one(recipe: Any, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    summary = run(recipe, whole, STAGES, Display(quiet=True))
    assert summary["stages"]["curate"]["pairs"] == 24 and summary["stages"]["paint"]["failed"] == 0

    kill_when(killed / "grids/part-00000.parquet", tmp_path / "tiny.yaml", killed)
    assert not (killed / "grids/manifest.json").exists()
    run(load(tmp_path / "tiny.yaml"), killed, STAGES, Display(quiet=True))
    assert data(killed) == data(whole)

    candidates = list(Dataset(whole / "candidates"))
    assert [row["id"] for row in candidates[:3]] == ["c-000000-01", "c-000000-10", "c-000001-01"]
    prompts = {row["id"][1:]: row for row in Dataset(whole / "prompts")}
    for row in candidates:
        assert row["caption"] == prompts[row["grid_id"][1:]]["panels"][row["target_panel"]]
        assert open_image(row["conditioning"]).size == open_image(row["image"]).size == (64, 64)
    assert len({row["conditioning"]["bytes"] for row in candidates}) == 24
