"""Training is what it was: the committed loss curve of the shipped pocket teacher."""

from __future__ import annotations

import json

import golden
import pytest


def test_the_losses_are_the_committed_ones() -> None:
    """To renew them on purpose: `python tests/train/golden.py`, and say why in the commit."""
    wanted, got = json.loads(golden.FILE.read_text()), golden.curve()
    assert len(wanted["right"]) == golden.STEPS and got.keys() == wanted.keys()
    for name, values in wanted.items():
        assert got[name] == pytest.approx(values, rel=golden.TOLERANCE), name
