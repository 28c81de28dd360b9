"""Precision and recall of curation are right where the truth is known, and estimates are corrected by known errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diptych.data import records
from diptych.data.store import Dataset
from diptych.evaluate.scoring import curation, truth
from diptych.evaluate.scoring.curation import RenderedPairs, Witness, curve
from diptych.evaluate.suites import Prior
from diptych.recipe.schema import Thresholds


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 6), st.booleans(), st.integers(1, 4)), min_size=2, max_size=20).filter(
        lambda rows: any(same for _, same, _ in rows)
    ),
    st.integers(0, 7),
)
def test_precision_and_recall_are_counted_right(rows: list[tuple[int, bool, int]], threshold: int) -> None:
    similarity, same, weight = (np.array(column) for column in zip(*rows, strict=True))
    precision, recall = curve(similarity.astype(float), same.astype(bool), weight.astype(float)).at(threshold)
    kept = similarity >= threshold
    if kept.any():
        assert precision == pytest.approx((weight * same)[kept].sum() / weight[kept].sum())
    else:
        assert precision is None
    assert recall == pytest.approx((weight * same)[kept].sum() / (weight * same).sum())


def test_the_threshold_for_a_precision_keeps_as_much_as_it_can() -> None:
    similarity = np.array([0.9, 0.8, 0.7, 0.6, 0.5])
    same = np.array([True, True, False, True, False])
    found = curve(similarity, same, np.ones(5))
    assert found.threshold_for(0.95) == 0.8 and found.threshold_for(0.75) == 0.6
    assert curve(similarity, ~same, np.ones(5)).threshold_for(0.95) is None


def test_pairs_count_by_the_prior_and_not_by_their_number() -> None:
    prior = Prior(same=0.5, drifted=0.3, other=0.2)
    weights = curation.weigh(["same", "same", "same", "drifted", "other", "other"], prior)
    assert weights.tolist() == pytest.approx([0.5 / 3] * 3 + [0.3] + [0.1] * 2)


def vectors(images: Any) -> np.ndarray:
    """The color of a plain image as a direction."""
    rows = np.array([np.asarray(image, float)[0, 0] for image in images]) + 1e-9
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def plain(color: tuple[int, int, int]) -> Image.Image:
    return Image.new("RGB", (8, 8), color)


def known_pairs(count: int = 60) -> RenderedPairs:
    """Colors: the same, a near one, an opposite one."""
    rng = np.random.default_rng(0)
    first, second, label, identity = [], [], [], []
    for i in range(count):
        a = tuple(int(v) for v in rng.integers(60, 255, 3))
        near = tuple(int(np.clip(v + d, 0, 255)) for v, d in zip(a, rng.integers(-60, 60, 3), strict=True))
        for other, name in ((a, "same"), (near, "drifted"), (a[::-1], "other")):
            first.append(plain(a))  # pyright: ignore[reportArgumentType]
            second.append(plain(other))  # pyright: ignore[reportArgumentType]
            label.append(name)
            identity.append(i)
    weight = curation.weigh(label, Prior(same=0.5, drifted=0.35, other=0.15))
    return RenderedPairs(first, second, label, weight, np.array(identity))


def test_a_judge_is_measured_at_the_recipes_threshold() -> None:
    found = curation.on_renders(known_pairs(), vectors, Thresholds(same=0.9999))
    assert found["precision"] == pytest.approx(1, abs=0.05) and found["recall"] == 1
    assert found["auc"]["other"] > 0.95 and found["prior"] == {"same": 0.5, "drifted": 0.35, "other": 0.15}
    all_kept = curation.on_renders(known_pairs(), vectors, Thresholds(same=-1))
    assert all_kept["precision"] == pytest.approx(0.5) and all_kept["recall"] == 1
    assert all_kept["threshold_for_95"] == found["threshold_for_95"]


def test_the_witness_finds_a_good_threshold_and_tells_its_errors_on_other_subjects() -> None:
    found = curation.witness(known_pairs(), vectors)
    assert found.hit > 0.9 and found.false_alarm < 0.2


def test_an_estimate_is_corrected_by_the_witness_errors() -> None:
    reader = Witness(threshold=0.5, hit=0.8, false_alarm=0.1)
    for true in (0.0, 0.3, 1.0):
        assert reader.corrected(true * 0.8 + (1 - true) * 0.1) == pytest.approx(true)
    assert Witness(0.5, hit=0.5, false_alarm=0.45).corrected(0.5) is None


def test_the_runs_pairs_are_counted_and_estimated(pair_rows: list[dict[str, Any]], tmp_path: Path) -> None:
    from diptych.data.images import image_cell

    rows = []
    for i in range(20):
        kept = i < 10
        red, other = image_cell(plain((200, 60, 60))), image_cell(plain((60, 60, 200)))
        numbers = {"id": f"c-{i:06d}-01", "kept": kept, "reason": "kept" if kept else "different"}
        rows.append({**pair_rows[0], "conditioning": red, "image": red if kept and i else other, **numbers})
        rows.append({**rows[-1], "id": f"c-{i:06d}-10", "reference_panel": 1, "target_panel": 0})
    data = Dataset(tmp_path / "candidates", records.schema(records.PAIR))
    data.write_shard(0, rows)
    found = curation.on_grids(tmp_path, vectors, Witness(0.9, hit=1.0, false_alarm=0.0))
    assert found is not None
    assert found["candidates"] == 40 and found["keep_rate"] == 0.5 and found["reasons"] == {"kept": 20, "different": 20}
    assert found["reader"]["pairs"] == 20
    assert found["reader"]["kept"]["corrected"] == pytest.approx(0.9)
    assert found["reader"]["rejected"]["corrected"] == 0


def test_a_run_without_candidates_has_nothing_to_estimate(tmp_path: Path) -> None:
    assert curation.on_grids(tmp_path, vectors, Witness(0.5, 1.0, 0.0)) is None


def test_check_pairs_hold_the_three_truths_and_go_through_the_vae(suite: Any) -> None:
    seen = []

    def through(images: Any) -> list[Image.Image]:
        seen.extend(images)
        return [image.transpose(Image.Transpose.FLIP_TOP_BOTTOM) for image in images]

    pairs = truth.check_pairs(suite, through)
    counts = {name: pairs.truth.count(name) for name in curation.TRUTHS}
    assert counts == {"same": 20, "drifted": 20, "other": 20} and len(seen) == 60
    assert pairs.weight[[t == "same" for t in pairs.truth]].sum() == pytest.approx(suite.check.prior.same)
    assert pairs.first[0].tobytes() != seen[0].tobytes()
