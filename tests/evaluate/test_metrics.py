"""Scores mean what they say: truth is near 1, copying and ignoring are near 0, and intervals hold what they should."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_world as tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diptych.evaluate.scoring import metrics
from diptych.evaluate.scoring.metrics import ScoreArrays


def outcome_of(cp: Any, pf: Any = 1.0, copied: Any = False, prompts: int = 1) -> ScoreArrays:
    cp = np.asarray(cp, dtype=float)
    identity = np.arange(len(cp)) // prompts
    return ScoreArrays(
        identity, cp, np.broadcast_to(np.asarray(pf, float), cp.shape), np.broadcast_to(copied, cp.shape)
    )


# ---- the whole way, with judges that know the truth


@pytest.fixture(scope="module")
def scored(suite: Any, oracle: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, ScoreArrays]:
    """Anchors and `copy`, generated and scored as in a run."""
    from diptych.evaluate import harness
    from diptych.evaluate.evaluation import Evaluation
    from diptych.evaluate.methods import build
    from diptych.evaluate.methods.common import Context
    from diptych.evaluate.scoring import judging, summary

    folder = tmp_path_factory.mktemp("scored")
    recipe = tiny.make_recipe(Path("none"), Path("none"))
    context = Context(recipe, folder, suite)
    names = ("truth", "other", "copy")
    samples = suite.samples(4, 2)
    methods = {own: method for name in names for own, method in build(name, context).items()}
    plan = harness.EvaluationPlan(
        Evaluation.of_run(recipe, folder), context, samples, methods, dict.fromkeys(names, "x")
    )
    plan.generate(None, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judging.VisionModels, "embed", lambda *_: oracle.embed)
        patch.setattr(judging.VisionModels, "reader", lambda *_: oracle)
        lines = harness.score_images(plan, [judging.pocket(plan.evaluation, suite, judging.VisionModels("cpu"))])
    return {n: summary.outcome(lines, n, "identities") for n in names}


def test_drawing_the_truth_scores_high(scored: dict[str, ScoreArrays]) -> None:
    means = scored["truth"].means()
    assert means["cp"] > 0.95 and means["pf"] == 1 and means["cp_pf"] > 0.95 and means["copy_rate"] <= 0.25


def test_ignoring_the_reference_scores_no_concept_preservation(scored: dict[str, ScoreArrays]) -> None:
    means = scored["other"].means()
    assert means["cp"] < 0.15 and means["pf"] == 1 and means["cp_pf"] < 0.15


def test_copying_the_reference_scores_no_prompt_following_and_is_called_copying(scored: dict[str, ScoreArrays]) -> None:
    means = scored["copy"].means()
    assert means["copy_rate"] == 1 and means["cp"] > 0.95 and means["cp_pf"] < 0.1


# ---- parts


def test_cp_is_zero_at_another_subject_one_at_the_same_and_no_more_than_one() -> None:
    scale = metrics.Scale(zero=0.2, one=0.8, copy_distance=0.1, pairs=10)
    assert np.allclose(scale.concept(np.array([0.2, 0.5, 0.8, 1.0])), [0, 0.5, 1, 1])
    blind = metrics.Scale(zero=0.5, one=0.5, copy_distance=0.1, pairs=10)
    assert not blind.concept(np.array([0.1, 0.9])).any()


def test_a_noisy_judge_pays_nothing_for_ignoring_the_reference() -> None:
    scale = metrics.Scale(zero=0.5, one=0.7, copy_distance=0.1, pairs=10)
    similarity = np.random.default_rng(0).normal(0.5, 0.15, 2000)
    assert outcome_of(scale.concept(similarity)).means()["cp"] < 0.02
    found = metrics.summary(outcome_of(scale.concept(similarity - 0.3)), 100)
    assert found["cp"] == 0 and found["ci95"]["cp"] == [0, 0]


def test_copying_half_of_the_time_does_not_make_up_for_missing_the_other_half() -> None:
    scale = metrics.Scale(zero=0.5, one=0.7, copy_distance=0.1, pairs=10)
    assert outcome_of(scale.concept(np.array([1.0, 0.5] * 20))).means()["cp"] == pytest.approx(0.5)


def test_following_counts_only_requested_attributes() -> None:
    met = metrics.following({"place": "moon", "pose": "jumping"}, {"place": "moon", "pose": "standing", "prop": "ball"})
    assert met == {"place": True, "pose": False}
    assert metrics.following({"place": "moon"}, {}) == {"place": False}


def noise_image(seed: int) -> Image.Image:
    """Smooth noise, so that a shift is not already far away in pixels."""
    small = np.random.default_rng(seed).integers(0, 255, (9, 9, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((64, 64), Image.Resampling.BICUBIC)


def test_a_shifted_mirrored_or_noisy_copy_is_nearer_than_another_picture() -> None:
    reference = noise_image(0)
    pixels = np.asarray(reference)
    shifted = Image.fromarray(np.roll(pixels, (6, -4), (0, 1)))
    mirrored = Image.fromarray(pixels[:, ::-1])
    grain = np.random.default_rng(1).normal(0, 6, pixels.shape)
    noisy = Image.fromarray(np.clip(pixels + grain, 0, 255).astype(np.uint8))
    copies = metrics.copy_distances([reference] * 4, [reference, shifted, mirrored, noisy])
    others = metrics.copy_distances([reference] * 4, [noise_image(i) for i in range(1, 5)])
    assert copies[:3].max() < 1e-4 and copies.max() < 0.02 < 0.1 < others.min()


def test_the_copy_threshold_is_below_all_but_the_nearest_hundredth() -> None:
    distances = np.random.default_rng(0).random(2000)
    assert (distances < metrics.copy_threshold(distances)).mean() == pytest.approx(0.01, abs=0.001)


def test_intervals_are_over_identities_and_so_wider_than_over_images() -> None:
    rng = np.random.default_rng(0)
    per_identity = np.repeat(rng.random(40), 5)  # five equal prompts each: 40 facts, not 200
    grouped = metrics.summary(outcome_of(per_identity, prompts=5), 2000)["ci95"]["cp"]
    loose = metrics.summary(outcome_of(per_identity), 2000)["ci95"]["cp"]
    assert (grouped[1] - grouped[0]) > 1.8 * (loose[1] - loose[0])


def test_about_95_of_100_intervals_hold_the_true_mean() -> None:
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(120):
        low, high = metrics.summary(outcome_of(np.clip(rng.normal(0.5, 0.2, 50), 0, 1)), 300)["ci95"]["cp"]
        held += low <= 0.5 <= high
    assert 0.88 <= held / 120 <= 0.995


def test_the_headline_is_a_product_of_means_and_its_interval_lies_around_it() -> None:
    cp, pf = np.array([1.0, 0.0, 1.0, 0.0]), np.array([0.0, 1.0, 0.0, 1.0])
    found = metrics.summary(outcome_of(cp, pf), 500)
    assert found["cp_pf"] == pytest.approx(0.25)
    low, high = found["ci95"]["cp_pf"]
    assert low <= 0.25 <= high


def test_a_paired_comparison_sees_a_small_steady_gain_that_separate_intervals_hide() -> None:
    rng = np.random.default_rng(2)
    base = np.clip(rng.normal(0.5, 0.2, 40), 0.05, 0.9)
    better, same = outcome_of(base + 0.03), outcome_of(base)
    compared = metrics.compare(better, same, 1000)
    assert compared["p"] < 0.01 and compared["ci95"][0] > 0 and not compared["intervals_apart"]
    assert metrics.compare(same, same, 1000)["p"] == 1.0


def test_equal_inputs_give_equal_numbers() -> None:
    cp = np.random.default_rng(3).random(30)
    assert metrics.summary(outcome_of(cp), 300) == metrics.summary(outcome_of(cp), 300)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=8), st.lists(st.integers(0, 5), min_size=1, max_size=8))
def test_auc_is_the_share_of_pairs_in_the_right_order(positive: list[int], negative: list[int]) -> None:
    counted = [1.0 if p > n else 0.5 if p == n else 0.0 for p in positive for n in negative]
    assert metrics.auc(np.array(positive, float), np.array(negative, float)) == pytest.approx(np.mean(counted))


def test_the_permutation_test_finds_nothing_where_nothing_is_and_its_p_is_even() -> None:
    rng = np.random.default_rng(4)
    found = []
    for _ in range(60):
        a, b = (outcome_of(np.clip(rng.normal(0.5, 0.2, 24), 0, 1), prompts=2) for _ in "ab")
        found.append(metrics.permuted(a, b, "cp_pf", 400))
    assert sum(p < 0.05 for p in found) <= 8 and 0.35 < np.mean(found) < 0.65


def test_the_permutation_test_exchanges_whole_identities() -> None:
    # Two identities of ten equal images are two facts, so no exchange of them has a probability below one half.
    better = outcome_of(np.full(20, 0.9), prompts=10)
    worse = outcome_of(np.full(20, 0.1), prompts=10)
    assert metrics.permuted(better, worse, "cp", 1000) == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize(("share", "low", "high"), [(1.0, 0.906, 1.0), (0.0, 0.0, 0.094)])
def test_a_share_of_none_or_all_has_an_interval_that_holds_at_the_edge(share: float, low: float, high: float) -> None:
    assert metrics.wilson(share, 37) == pytest.approx([low, high], abs=1e-3)
    found = metrics.summary(outcome_of([share] * 37, share, share == 1), 500)
    for name in metrics.NAMES[:2] + metrics.NAMES[3:]:
        assert found["ci95"][name] == pytest.approx([low, high], abs=1e-3), name
    assert found["ci95"]["cp_pf"] == pytest.approx([low**2, high**2], abs=2e-3)


def test_a_share_counts_dependent_images_once() -> None:
    rng = np.random.default_rng(5)
    identity, per = np.repeat(np.arange(30), 4), rng.random(30) < 0.4
    whole = metrics.share_interval(identity, np.repeat(per, 4))  # four equal answers each: thirty facts
    assert whole == pytest.approx(metrics.wilson(per.mean(), 30), abs=1e-3)
    loose = metrics.share_interval(identity, rng.random(120) < per.mean())
    assert loose[1] - loose[0] < 0.7 * (whole[1] - whole[0])


def test_about_95_of_100_intervals_of_a_rare_share_hold_it() -> None:
    rng = np.random.default_rng(6)
    found = [metrics.share_interval(np.arange(60), rng.random(60) < 0.03) for _ in range(300)]
    held = [low <= 0.03 <= high for low, high in found]
    assert 0.9 <= np.mean(held) <= 1


def test_two_references_prove_nothing() -> None:
    better, worse = outcome_of([0.9, 0.8]), outcome_of([0.1, 0.2])
    found = metrics.compare(better, worse, 1000)
    assert found["p"] == 0.5 and found["identities"] == 2 and "too few" in metrics.format_p(found)
    low, high = found["ci95"]
    assert low < 0 < found["difference"] < high and not found["intervals_apart"]
    low, high = metrics.summary(better, 1000)["ci95"]["cp_pf"]
    assert low < 0.3 and high > 0.95
    six = metrics.compare(outcome_of([0.9] * 6), outcome_of([0.1] * 6), 1000)
    assert six["p"] == pytest.approx(2**-5, abs=1e-4) and metrics.format_p(six).startswith("= 0.031")


def test_a_difference_of_all_and_none_is_not_known_to_the_last_digit() -> None:
    all_, none = (outcome_of(np.linspace(0.2, 0.8, 37), 1.0, copied) for copied in (True, False))
    low, high = metrics.compare(all_, none, 500, "copy_rate")["ci95"]
    assert 0.8 < low < 0.95 and high == 1
