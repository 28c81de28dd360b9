"""Estimates from a stratified sample: intervals that hold the truth, weights that count, agreement."""

from __future__ import annotations

import numpy as np
import pytest

from diptych.apps import precision
from diptych.apps.precision import Labelled, Stratum


def test_the_intervals_hold_the_truth_and_the_estimates_are_not_skewed() -> None:
    rng = np.random.default_rng(1)
    held, points, rounds = {"precision": 0, "recall": 0}, [], 200
    sizes, drawn, rates = [300, 600, 2000, 4000], [40, 25, 30, 40], [0.8, 0.97, 0.35, 0.02]
    for _ in range(rounds):
        whole = [rng.random(n) < rate for n, rate in zip(sizes, rates, strict=True)]
        strata = [
            Stratum(i < 2, len(all_), 0.0, tuple(Labelled(0.5, bool(s), 1) for s in rng.permutation(all_)[:n]))
            for i, (all_, n) in enumerate(zip(whole, drawn, strict=True))
        ]
        result = precision.estimate(strata)
        same = [int(all_.sum()) for all_ in whole]
        truth = {"precision": sum(same[:2]) / 900, "recall": sum(same[:2]) / sum(same)}
        assert result.precision is not None and result.recall is not None
        for name, measured in (("precision", result.precision), ("recall", result.recall)):
            held[name] += measured.low <= truth[name] <= measured.high
        points.append([result.precision.value - truth["precision"], result.recall.value - truth["recall"]])
    assert all(0.9 <= n / rounds <= 0.995 for n in held.values()), held
    assert np.abs(np.mean(points, axis=0)).max() < 0.02


def test_the_weights_matter() -> None:
    few = Stratum(True, 900, 0.6, tuple(Labelled(0.7, True, 1) for _ in range(10)))
    many = Stratum(True, 100, 0.5, tuple(Labelled(0.5, False, 1) for _ in range(50)))
    result = precision.estimate([few, many]).precision
    assert result is not None and result.value == pytest.approx(0.9) and result.low < 0.9 < result.high


def test_labels_of_one_side_only_say_nothing_of_recall() -> None:
    kept = Stratum(True, 10, 0.6, (Labelled(0.7, True, 3),))
    result = precision.estimate([kept, Stratum(False, 10, 0.1)])
    assert result.precision is not None and result.recall is None
    assert precision.estimate([Stratum(True, 10, 0.6)]).precision is None


def test_kappa_is_cohens() -> None:
    # The textbook's table: both yes 20, both no 15, 5 and 10 apart.
    a = ["same"] * 25 + ["different"] * 25
    b = ["same"] * 20 + ["different"] * 5 + ["same"] * 10 + ["different"] * 15
    assert precision.kappa(a, b) == (pytest.approx(0.7), pytest.approx(0.4))
    assert precision.kappa(["same"] * 3, ["same"] * 3) == (1, None)
