"""One tiny world for all training tests: a random teacher folder and its pairs."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # `tiny_run` is also what other processes import


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`folder`, `teacher` (a path) and `pairs` (12 grids, 24 pairs)."""
    import tiny_run

    folder: Path = tmp_path_factory.mktemp("world")
    return SimpleNamespace(
        folder=folder, teacher=tiny_run.make_teacher(folder / "teacher"), pairs=tiny_run.make_pairs(folder / "pairs")
    )


@pytest.fixture(scope="session")
def straight(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The undisturbed training that resumed ones must equal: `out` and `summary`."""
    import tiny_run

    from diptych.train.distill import distill

    out = tmp_path_factory.mktemp("straight") / "student"
    summary = distill(tiny_run.make_recipe(world.teacher), world.pairs, out)
    return SimpleNamespace(out=out, summary=summary)
