"""The audit: samples with known weights, and reports that are right where truth is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from diptych.apps import audit, precision
from diptych.data import records
from diptych.data.store import Dataset
from known_truth import STEPS, at
from raising import raises


def test_the_population_is_what_reached_the_judge_once_a_pair(known: tuple[Path, dict[str, str]]) -> None:
    sample = audit.draw(known[0], 1000, 0)
    assert sample.population == len(sample.pairs) == 200 and sample.left_out == 20
    assert {pair.id for pair in sample.pairs} == {id for id in known[1] if id.endswith("-01")}
    assert sum(band.size for band in sample.bands if band.kept) == 100
    assert all(band.sampled == band.size for band in sample.bands)


def test_a_sample_is_dense_near_the_threshold_and_its_weights_are_known(known: tuple[Path, dict[str, str]]) -> None:
    sample = audit.draw(known[0], 80, 0)
    drawn = {(band.kept, band.name): (band.size, band.sampled) for band in sample.bands}
    assert sum(count for _, count in drawn.values()) == len(sample.pairs) == 80
    for kept in (True, False):
        near, far = drawn[kept, "near"], drawn[kept, "far"]
        assert near == (25, 20) and far[0] == 50 and far[1] == 10
    for pair in sample.pairs:
        band = sample.bands[pair.stratum]
        assert band.low <= pair.similarity <= band.high and band.kept == (pair.similarity >= 0.5)
        inside = [s for s, _ in STEPS if band.low <= s <= band.high]
        assert len(inside) == band.size and pair.above == sum(s >= pair.similarity for s in inside)


def test_a_seed_gives_the_same_sample_and_a_larger_one_contains_the_smaller(known: tuple[Path, dict[str, str]]) -> None:
    def ids(size: int, seed: int) -> list[str]:
        return [pair.id for pair in audit.draw(known[0], size, seed).pairs]

    assert ids(40, 0) == ids(40, 0) and set(ids(40, 0)) < set(ids(90, 0)) and set(ids(40, 0)) != set(ids(40, 1))
    assert ids(40, 0) != sorted(ids(40, 0))  # the order tells nothing


def test_the_two_orders_of_a_grid_count_separately_where_the_judge_differs(known: tuple[Path, Any]) -> None:
    data = Dataset(known[0] / "candidates", records.schema(records.PAIR))
    rows = data.read_shard(0)
    rows[1] |= {"kept": False, "reason": "undecided: two yes, two no", "similarity": None}
    data.write_shard(0, rows)
    sample = audit.draw(known[0], 1000, 0)
    assert sample.population == 201 and sample.bands[-1].name == "undecided" and sample.bands[-1].size == 1
    assert rows[1]["id"] in {pair.id for pair in sample.pairs}


def test_allocation_grows_and_takes_no_more_than_there_is() -> None:
    before = [0, 0, 0]
    for size in range(1, 40):
        counts = audit.allocate(size, [3, 10, 20], [0.5, 0.25, 0.25])
        assert sum(counts) == min(size, 33) and counts[0] <= 3 and counts[1] <= 10
        assert all(new >= old for new, old in zip(counts, before, strict=True))
        before = counts


def test_with_every_pair_labelled_the_numbers_are_exact(known: tuple[Path, dict[str, str]]) -> None:
    sample = audit.draw(known[0], 1000, 0)
    result = precision.report(sample, [{"me": known[1]}], wanted=0.85)
    p, r = at(0.5)
    exact = {"value": round(p, 4), "ci95": [round(p, 4)] * 2}, {"value": round(r, 4), "ci95": [round(r, 4)] * 2}
    assert (result["threshold"]["precision"], result["threshold"]["recall"]) == exact
    least = min(s for s, _ in STEPS if at(s)[0] >= 0.85)
    better = result["wanted"]["threshold"]
    assert better["same"] == pytest.approx(least, abs=1e-6) and better["same"] <= least and least > 0.5
    assert better["precision"]["value"] == round(at(least)[0], 4)
    assert better["recall"]["value"] == round(at(least)[1], 4)
    assert better["recall"]["ci95"] == [better["recall"]["value"]] * 2


def test_a_lower_threshold_is_suggested_when_less_precision_is_enough(known: tuple[Path, dict[str, str]]) -> None:
    result = precision.report(audit.draw(known[0], 1000, 0), [{"me": known[1]}], wanted=0.6)
    least = min(s for s, _ in STEPS if at(s)[0] >= 0.6)
    assert result["wanted"]["threshold"]["same"] == pytest.approx(least, abs=1e-6) and least < 0.5
    # The best possible: from 0.955 on none is different. Without labels there is no threshold.
    result = precision.report(audit.draw(known[0], 1000, 0), [{"me": known[1]}], wanted=1)
    assert result["wanted"]["threshold"]["same"] == pytest.approx(0.955, abs=1e-6)
    assert precision.report(audit.draw(known[0], 1000, 0), [], wanted=0.5)["wanted"]["threshold"] is None


def test_two_labellers_are_compared_and_their_disputes_left_out(known: tuple[Path, dict[str, str]]) -> None:
    sample = audit.draw(known[0], 1000, 0)
    first, *rest = [pair.id for pair in sample.pairs]
    other = {**known[1], first: "different" if known[1][first] == "same" else "same", rest[0]: "unsure"}
    result = precision.report(sample, [{"me": known[1]}, {"me": other}])
    (agreed,) = result["agreement"]
    assert (agreed["a"], agreed["b"], agreed["pairs"]) == ("me", "me (file 2)", 200)
    assert agreed["agree"] == round(198 / 200, 4) and 0.9 < agreed["kappa"] < 1
    counts = {key: result["labels"][key] for key in ("used", "unsure", "disputed", "missing", "outside")}
    assert counts == {"used": 199, "unsure": 0, "disputed": 1, "missing": 0, "outside": 200}


def test_a_run_without_judged_pairs_says_what_comes_first(known: tuple[Path, Any]) -> None:
    for part in (known[0] / "candidates").iterdir():
        part.unlink()
    with raises("run_incomplete", known[0], "diptych curate"):
        audit.draw(known[0], 10, 0)
