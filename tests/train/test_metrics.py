"""The log has each step once, and the guard stops what goes wrong and nothing else."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from diptych.train.metrics import LossGuard, Metrics, read, report
from raising import raises


def test_opening_at_a_step_drops_later_lines_and_one_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": s, "loss": 1.0}) + "\n" for s in range(1, 8)) + '{"step": 8, "lo')
    metrics = Metrics(path, 5)
    metrics.write({"step": 6, "loss": 2.0})
    metrics.close()
    assert [line["step"] for line in read(path)] == [1, 2, 3, 4, 5, 6]
    assert read(path)[-1]["loss"] == 2.0


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (1.0, math.inf)])
def test_a_step_that_is_not_finite_stops_at_once_and_says_what_to_do(loss: float, norm: float) -> None:
    with raises("training_diverged", "Step 7", "lower the rate"):
        LossGuard([]).check(7, loss, norm, "lower the rate")


def test_one_high_loss_is_let_pass_three_in_a_row_are_not() -> None:
    guard = LossGuard([1.0] * 30)
    guard.check(1, 20.0, 1.0, "")
    guard.check(2, 1.0, 1.0, "")
    guard.check(3, 20.0, 1.0, "")
    guard.check(4, 20.0, 1.0, "")
    with raises("training_diverged", "Step 5", "do this"):
        guard.check(5, 20.0, 1.0, "do this")


def test_a_guard_that_goes_on_remembers_the_spikes_before() -> None:
    with raises("training_diverged", "3 steps in a row"):
        LossGuard([1.0] * 30, spikes=2).check(5, 20.0, 1.0, "")


def test_the_first_steps_are_never_spikes() -> None:
    guard = LossGuard([])
    for step in range(1, 10):
        guard.check(step, 10.0**step, 1.0, "")


def test_progress_may_be_a_function_or_an_object() -> None:
    seen: list[tuple[int, int, str]] = []

    class Bar:
        def update(self, step: int, total: int, text: str) -> None:
            seen.append((step, total, text))

    report(Bar(), 1, 2, "a")
    report(lambda *news: seen.append(news), 2, 2, "b")
    report(None, 3, 3, "c")
    assert seen == [(1, 2, "a"), (2, 2, "b")]
