"""What the tests of the audit share: a judged run, on the disk, whose truth is known."""

from __future__ import annotations

from pathlib import Path

import pytest

import judged_run
from known_truth import STEPS


@pytest.fixture
def known(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A run and the truth about its pairs."""
    return tmp_path / "run", judged_run.make(tmp_path / "run", STEPS, copies=6, seamless=4)
