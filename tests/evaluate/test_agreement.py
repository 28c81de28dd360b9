"""Agreement is Krippendorff's, a judge that sees agrees, one that guesses does not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych.cli import app
from diptych.evaluate.scoring import agreement
from raising import raises

# Krippendorff's own example of four observers and twelve units (Computing Krippendorff's Alpha-Reliability, 2011).
OBSERVERS = (
    "1 2 3 3 2 1 4 1 2 . . .",
    "1 2 3 3 2 2 4 1 2 5 . 3",
    ". 3 3 3 2 3 4 2 2 5 1 .",
    "1 2 3 3 2 4 4 1 2 5 1 .",
)


def test_the_published_example_gives_the_published_alpha() -> None:
    ratings = [
        {str(unit): float(value) for unit, value in enumerate(line.split()) if value != "."} for line in OBSERVERS
    ]
    assert agreement.alpha(ratings) == pytest.approx(0.849, abs=5e-4)


def slow(ratings: list[dict[str, float]]) -> float:
    """The definition, pair by pair."""
    units: dict[str, list[float]] = {}
    for rater in ratings:
        for item, value in rater.items():
            units.setdefault(item, []).append(value)
    kept = [values for values in units.values() if len(values) > 1]
    pooled = [value for values in kept for value in values]
    observed = sum(sum((a - b) ** 2 for a in v for b in v) / (len(v) - 1) for v in kept) / len(pooled)
    expected = sum((a - b) ** 2 for a in pooled for b in pooled) / (len(pooled) * (len(pooled) - 1))
    return 1 - observed / expected


@given(st.lists(st.lists(st.integers(0, 4), min_size=6, max_size=6), min_size=2, max_size=4))
def test_alpha_is_its_definition(values: list[list[int]]) -> None:
    ratings = [{str(i): float(value) for i, value in enumerate(row)} for row in values]
    found = agreement.alpha(ratings)
    if found is None:
        assert len({value for row in values for value in row}) == 1
    else:
        assert found == pytest.approx(slow(ratings))


def test_a_judge_that_sees_agrees_and_one_that_guesses_does_not() -> None:
    rng = np.random.default_rng(0)
    truth = {f"m/{i}": float(rng.integers(0, 5)) for i in range(200)}
    people = {name: {k: float(np.clip(v + rng.integers(-1, 2), 0, 4)) for k, v in truth.items()} for name in "ab"}
    cosine = {k: 0.3 + 0.1 * v + rng.normal(0, 0.01) for k, v in truth.items()}
    sees = agreement.check(people, cosine, "sees")
    guesses = agreement.check(people, {k: float(rng.random()) for k in truth}, "guesses")
    assert sees["mapped_by_rank"] and sees["alpha"] > 0.7 and sees["ci95"][0] > 0.6
    assert abs(guesses["alpha"]) < 0.2 < sees["alpha_among_raters"]
    assert agreement.check(people, cosine, "sees") == sees


def test_values_that_are_labels_are_taken_as_they_are() -> None:
    people = {"a": {"m/1": 0.0, "m/2": 4.0, "m/3": 4.0}}
    assert agreement.check(people, {"m/1": 4.0, "m/2": 0.0, "m/3": 0.0}, "contrary")["alpha"] < 0
    assert agreement.by_rank({"a": 0.9, "b": 0.1, "c": 0.1}, [0, 2, 4]) == {"a": 4, "b": 1, "c": 1}


def test_the_command_reads_ratings_and_audit_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "e" / "samples").mkdir(parents=True)
    lines = [{"method": "m", "id": str(i), "cp": i / 10, "kind": "x"} for i in range(10)]
    (tmp_path / "e" / "samples" / "scores.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    rows = [{"id": f"m/{i}", "rater": "ann", "value": i // 2} for i in range(10)]
    rows += [{"id": f"m/{i}", "labeller": "bob", "label": "same" if i > 5 else "different"} for i in range(10)]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(x) + "\n" for x in rows))
    command = ["data", "judge-check", str(tmp_path / "r.jsonl"), "--scores", str(tmp_path / "e")]
    assert app.call(command) == 0
    out = capsys.readouterr().out
    assert "with ann" in out and "with bob" in out and "GPT-4o .50" in out
    assert app.call([*command, "--score", "pf"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error[name_unknown]") and "'pf'" in error and "cp" in error
    assert app.call(["data", "judge-check"]) == 2


@pytest.mark.parametrize("line", ['{"id": "a"}', "no json", '{"id": "a", "value": "perhaps"}', "[]"])
def test_a_line_that_is_not_a_rating_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(f'{{"id": "a", "value": 1}}\n{line}\n')
    with raises("labels_invalid", path, "line 2"):
        agreement.read_ratings(path)


def test_on_renders_the_oracle_knows_the_truth_and_the_shipped_scorer_sees_some_of_it() -> None:
    labels, judged = agreement.oracle("pocket", 40)
    assert set(labels["renderer"].values()) == {0.0, 2.0, 4.0} and labels["renderer"].keys() == judged.keys()
    perfect = agreement.check(labels, labels["renderer"], "the truth")
    assert perfect["alpha"] == 1.0
    assert 0.1 < agreement.check(labels, judged, "pocket")["alpha"] < 1.0
