"""A repeated image is detected, whatever its size or compression; others, one grid and drifts are left alone."""

from __future__ import annotations

import io
import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageFilter

import judged_run
from diptych.data.store import Dataset
from diptych.recipe.schema import Duplicates, Thresholds
from diptych.stages.curate import duplicates
from diptych.stages.curate.duplicates import HashTable, Vectors, alike, pack, panel_hash, unpack
from raising import raises

LIMITS = Thresholds(same=0.5, near_copy=0, seam=-1)
CODES = st.integers(0, 2**64 - 1)


def picture(seed: int, side: int = 128) -> Image.Image:
    """Soft shapes."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)


def differing(a: str, b: str) -> int:
    return (int(a, 16) ^ int(b, 16)).bit_count()


def compressed(image: Image.Image) -> Image.Image:
    out = io.BytesIO()
    image.save(out, "JPEG", quality=60)
    return Image.open(io.BytesIO(out.getvalue()))


def row(grid: int, a: int, b: int, reference: int, target: int, similarity: float = 0.9) -> dict[str, Any]:
    made = judged_run.candidate(grid, a, b, similarity, 0.3, 1.0)
    hashes = {"reference": f"{reference:016x}", "target": f"{target:016x}"}
    return {**made, "evidence": json.dumps({"hashes": hashes})}


def found(folder: Path, rows: list[dict[str, Any]], bits: int = 4) -> dict[str, str]:
    data = judged_run.save(folder / "candidates", judged_run.records.PAIR, rows)
    again = duplicates.find(data, Duplicates(hash=bits), LIMITS)
    assert {repeat.test for repeat in again.values()} <= {"hash"}
    return {name: repeat.of for name, repeat in again.items()}


def seen(grid: int, a: int, b: int, reference: np.ndarray, target: np.ndarray, code: int = 0) -> dict[str, Any]:
    """A candidate with embeddings, and with hashes that are equal where `code` is."""
    made = row(grid, a, b, code, code)
    codes = {"reference": pack(reference), "target": pack(target)}
    return {**made, "evidence": json.dumps(json.loads(made["evidence"]) | {"embeddings": codes})}


def found_by(folder: Path, rows: list[dict[str, Any]], **tests: Any) -> dict[str, tuple[str, str]]:
    data = judged_run.save(folder / "candidates", judged_run.records.PAIR, rows)
    again = duplicates.find(data, Duplicates(**tests), LIMITS)
    return {name: (repeat.of, repeat.test) for name, repeat in again.items()}


def turned(vector: np.ndarray, cosine: float, seed: int) -> np.ndarray:
    """A vector of length 1 with this cosine to one of length 1."""
    other = np.random.default_rng(seed).normal(size=len(vector))
    other -= vector * (other @ vector)
    return cosine * vector + np.sqrt(1 - cosine**2) * other / np.linalg.norm(other)


def flipped(code: int, bits: int, seed: int = 0) -> int:
    for bit in np.random.default_rng(seed).choice(64, bits, replace=False):
        code ^= 1 << int(bit)
    return code


# ---- hashes


def test_the_same_image_keeps_its_hash_and_others_are_far() -> None:
    for seed in range(20):
        image = picture(seed)
        same = [image.resize((300, 300)), compressed(image), image.filter(ImageFilter.GaussianBlur(1))]
        same += [ImageEnhance.Brightness(image).enhance(0.9)]
        assert max(differing(panel_hash(image), panel_hash(other)) for other in same) <= 4, seed
        assert min(differing(panel_hash(image), panel_hash(picture(other))) for other in range(20) if other != seed) > 8


def test_even_panels_have_one_hash_and_no_random_bits() -> None:
    hashes = {panel_hash(Image.new("RGB", (side, side), colour)) for side in (8, 64) for colour in ("red", "#123456")}
    assert hashes == {"8" + "0" * 15}


# ---- the table


@given(st.integers(0, 8), CODES, CODES, st.integers(0, 2**32), st.integers(0, 8), st.integers(0, 8))
def test_no_near_pair_is_missed_and_no_far_one_reported(
    bits: int, reference: int, target: int, seed: int, one: int, two: int
) -> None:
    table = HashTable(bits)
    table.add("a", reference, target)
    near = one <= bits and two <= bits
    assert table.first(flipped(reference, one, seed), flipped(target, two, seed + 1)) == ("a" if near else None)


def test_of_several_near_pairs_the_earliest_is_named() -> None:
    table = HashTable(3)
    for number in range(3000):
        table.add(str(number), number << 40, 0)
    assert len(table) == 3000
    assert table.first(1 | 2999 << 40, 0) == next(str(n) for n in range(3000) if (n ^ 2999).bit_count() <= 2)


def test_it_finds_what_comparing_every_two_finds() -> None:
    rng = np.random.default_rng(5)
    ideas = [int(code) for code in rng.integers(0, 2**63, 40)]
    codes = [
        tuple(flipped(ideas[i], int(rng.integers(0, 4)), int(rng.integers(2**31))) for i in rng.integers(0, 40, 2) % 6)
        for _ in range(400)
    ]
    table, kept = HashTable(4), []
    for number, (reference, target) in enumerate(codes):
        near = [
            i for i in kept if (codes[i][0] ^ reference).bit_count() <= 4 and (codes[i][1] ^ target).bit_count() <= 4
        ]
        assert table.first(reference, target) == (str(near[0]) if near else None)
        if not near:
            kept.append(number)
            table.add(str(number), reference, target)
    assert 36 <= len(kept) < 400


# ---- a run


def test_the_first_stays_and_the_later_name_it(tmp_path: Path) -> None:
    rows = [row(0, 0, 1, 7 << 30, 5), row(0, 1, 0, 5, 7 << 30), row(1, 0, 1, 999 << 40, 31 << 20)]
    rows += [row(2, 0, 1, flipped(5, 4), 7 << 30), row(2, 1, 0, 7 << 30, flipped(5, 4))]  # the other way round
    rows += [row(3, 0, 1, 7 << 30, flipped(5, 5)), row(4, 0, 1, 7 << 30, 0xFFFF << 40)]  # one panel shared is no repeat
    assert found(tmp_path, rows) == {"c-000002-01": "c-000000-10", "c-000002-10": "c-000000-01"}


def test_panels_of_one_grid_never_repeat_each_other(tmp_path: Path) -> None:
    rows = [row(0, a, b, 5, 5) for a in range(4) for b in range(4) if a != b] + [row(1, 0, 1, 5, 5)]
    assert found(tmp_path, rows) == {"c-000001-01": "c-000000-01"}


def test_only_pairs_that_thresholds_keep_can_be_repeated(tmp_path: Path) -> None:
    rows = [row(0, 0, 1, 5, 9, similarity=0.1), row(1, 0, 1, 5, 9), row(2, 0, 1, 5, 9)]
    assert found(tmp_path, rows) == {"c-000002-01": "c-000001-01"}


def test_a_drift_is_not_swallowed_and_every_repeat_has_a_twin_that_stays(tmp_path: Path) -> None:
    # Each differs from the one before in three bits: by single steps all would be one.
    codes = [(1 << 3 * step) - 1 for step in range(10)]
    again = found(tmp_path, [row(i, 0, 1, code, 0) for i, code in enumerate(codes)])
    assert again == {f"c-{i:06d}-01": f"c-{i - 1:06d}-01" for i in range(1, 10, 2)}
    assert not set(again) & set(again.values())


def test_candidates_without_hashes_are_an_error(tmp_path: Path) -> None:
    with raises("run_mismatch", "c-000000-01", "hashes", "curate.duplicates"):
        found(tmp_path, [judged_run.candidate(0, 0, 1, 0.9, 0.3, 1.0)])


def test_memory_is_a_few_bytes_per_pair_and_none_for_images(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    data = Dataset(tmp_path / "candidates", judged_run.records.schema(judged_run.records.PAIR))
    peaks = []
    for shards in (2, 8):
        for shard in range(shards):
            codes = rng.integers(0, 2**63, (1000, 2)).tolist()
            rows = [row(1000 * shard + i, 0, 1, *codes[i]) for i in range(1000)]
            big = {"bytes": b"x" * 20_000, "path": None}
            data.write_shard(shard, [{**one, "conditioning": big} for one in rows])
        tracemalloc.start()
        assert duplicates.find(data, Duplicates(hash=4), LIMITS) == {}
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # Until its buckets are all there, a table takes more for a pair than it will: 5 bands here, 4,096 buckets in each.
    assert peaks[1] - peaks[0] < 6000 * 600, peaks


# ---- embeddings


@pytest.mark.parametrize("size", [128, 768, 1536])
def test_a_packed_embedding_keeps_its_cosines(size: int) -> None:
    rng = np.random.default_rng(size)
    for seed, cosine in enumerate((0.3, 0.8, 0.9, 0.95, 0.99, 0.999)):
        one = rng.normal(size=size)
        one /= np.linalg.norm(one)
        a, b = (unpack(pack(v)).astype(float) for v in (one, 3 * turned(one, cosine, seed)))
        assert len(a) == size and a @ b / np.linalg.norm(a) / np.linalg.norm(b) == pytest.approx(cosine, abs=0.002)
    assert len(pack(rng.normal(size=size))) <= 4 * (size + 2) // 3 + 1


def test_an_embedding_without_length_or_number_is_like_none() -> None:
    odd = [np.zeros(4), np.full(4, np.nan), np.array([np.inf, 1, 0, 0])]
    codes = np.stack([unpack(pack(vector)) for vector in odd])
    assert not codes.any() and not alike(codes, codes, 0.1).any()


def test_vectors_find_what_comparing_every_two_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diptych.stages.curate.duplicates.ROWS", 64)
    rng = np.random.default_rng(2)
    codes = rng.integers(-127, 128, (2, 400, 3)).astype(np.int8)  # three numbers: many are alike
    table = Vectors(0.9)
    for reference, target in zip(*codes, strict=True):
        table.add(reference, target)
    both = alike(codes[0], codes[0], 0.9) & alike(codes[1], codes[1], 0.9)
    asked = slice(0, 150)
    assert table.first(codes[0, asked], codes[1, asked]).tolist() == [int(row.argmax()) for row in both[asked]]
    later = [int(row[200:].argmax()) + 200 if row[200:].any() else -1 for row in both[asked]]
    assert table.first(codes[0, asked], codes[1, asked], since=200).tolist() == later and -1 in later
    assert len(table) == 400


@pytest.mark.parametrize("block", [1, 3, 512])
def test_the_same_content_generated_again_is_a_repeat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(duplicates, "BLOCK", block)
    a, b, c = np.eye(64)[:3]
    near, far = turned(a, 0.97, 1), turned(a, 0.93, 2)
    rows = [seen(0, 0, 1, a, b), seen(0, 1, 0, b, a), seen(1, 0, 1, near, b), seen(2, 0, 1, far, b)]
    rows += [seen(3, 0, 1, a, c), seen(4, 0, 1, b, near)]  # one panel alone is no repeat; the other way round
    again = found_by(tmp_path, rows, hash=None, embedding=0.95)
    assert again == {"c-000001-01": ("c-000000-01", "embedding"), "c-000004-01": ("c-000000-10", "embedding")}


@pytest.mark.parametrize("block", [2, 512])
def test_an_embedding_never_repeats_its_grid_and_has_a_twin_that_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(duplicates, "BLOCK", block)
    axis = np.eye(64)[0]
    rows = [seen(0, a, b, axis, axis) for a in range(3) for b in range(3) if a != b]
    assert found_by(tmp_path, rows, hash=None, embedding=0.9) == {}
    # Each turned a little from the one before: by single steps all would be one.
    angles = [np.array([np.cos(step), np.sin(step)]) for step in np.arange(10) * 0.3]
    steps = [seen(i, 0, 1, angle, angle) for i, angle in enumerate(angles)]
    again = found_by(tmp_path / "drift", steps, hash=None, embedding=float(np.cos(0.4)))
    assert again == {f"c-{i:06d}-01": (f"c-{i - 1:06d}-01", "embedding") for i in range(1, 10, 2)}


def test_each_test_is_named_and_both_can_be_off(tmp_path: Path) -> None:
    a, b = np.eye(64)[:2]
    rows = [seen(0, 0, 1, a, b, 7), seen(1, 0, 1, b, a, 7), seen(2, 0, 1, a, b, 99 << 30), seen(3, 0, 1, a, b, 7)]
    both = found_by(tmp_path, rows, hash=2, embedding=0.9)
    assert both == {
        "c-000001-01": ("c-000000-01", "hash"),
        "c-000002-01": ("c-000000-01", "embedding"),
        "c-000003-01": ("c-000000-01", "hash"),
    }
    assert found_by(tmp_path / "off", rows, hash=None) == {}


def test_candidates_without_embeddings_are_an_error(tmp_path: Path) -> None:
    with raises("run_mismatch", "c-000000-01", "embeddings", "curate.duplicates"):
        found_by(tmp_path, [row(0, 0, 1, 1, 1)], hash=4, embedding=0.9)
