"""Activations that are computed twice change memory and time, and no number: in either precision and mode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kills
import pytest
import tiny_run

from diptych.train.distill import distill


@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_gradient_checkpointing_is_the_same_training(world: Any, tmp_path: Path, precision: str, mode: str) -> None:
    found = []
    for again in (False, True):
        values = {"precision": precision, "mode": mode, "rank": 4, "gradient_checkpointing": again, "steps": 4}
        distill(tiny_run.make_recipe(world.teacher, **values), world.pairs, tmp_path / str(again))
        found.append(kills.result(tmp_path / str(again), mode))
    assert found[0] == found[1]
