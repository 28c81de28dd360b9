"""The funnel counts every row once, at the step where it was lost, and reads no image."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import judged_run
from diptych.cli import app
from diptych.data import funnel, records
from diptych.data.funnel import CELL, Distribution
from diptych.data.store import Dataset
from diptych.errors import UsageError
from raising import raises


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """60 grids judged (20 of them under the threshold), 8 copies, 4 without a seam, 3 unreadable, 2 not painted."""
    judged = [(0.9, True)] * 40 + [(0.2, False)] * 20
    judged_run.make(tmp_path / "run", judged, copies=8, seamless=4)
    return tmp_path / "run"


def steps(run: Path) -> dict[str, Any]:
    return {step["name"]: step for step in funnel.measure(run)["steps"]}


def test_every_lost_row_is_counted_once_where_it_was_lost(run: Path) -> None:
    result = steps(run)
    assert list(result) == ["prompted", "painted", "cut", "pre-filtered", "judged", "kept"]
    counts = [(step["of"], step["count"], step["lost"]) for step in result.values()]
    assert counts == [
        (77, 77, {}),
        (77, 75, {"out of memory": 2}),
        (75, 68, {"seam": 4, "the picture is cut short": 3}),
        (136, 120, {"near_copy": 16}),
        (120, 120, {}),
        (120, 80, {"different": 40}),
    ]
    assert [step["share"] for step in result.values()] == [1, 0.974, 0.9067, 0.8824, 1, 0.6667]
    assert not any(step["waiting"] for step in result.values())
    assert all(step["of"] == step["count"] + sum(step["lost"].values()) for step in result.values())


def test_a_reason_of_a_later_day_has_its_step(run: Path) -> None:
    data = Dataset(run / "candidates", records.schema(records.PAIR))
    rows = data.read_shard(0)
    for row, reason in zip(rows, ("text in the image", "undecided: no JSON", "undecided: no JSON"), strict=False):
        row |= {"kept": False, "reason": reason, "similarity": None}
    data.write_shard(0, rows)
    result = steps(run)
    assert result["pre-filtered"]["lost"] == {"near_copy": 16, "text in the image": 1}
    assert result["judged"]["lost"] == {"undecided: no JSON": 2} and result["kept"]["count"] == 77
    assert funnel.measure(run)["numbers"]["similarity"]["missing"] == 3


def test_an_unfinished_run_says_what_still_waits(run: Path) -> None:
    Dataset(run / "candidates").drop_shard(1)
    Dataset(run / "candidates").unpublish()
    for part in (run / "pairs").iterdir():
        part.unlink()
    result = funnel.measure(run)
    cut = result["steps"][2]
    assert cut["name"] == "cut" and cut["count"] == 50 and cut["waiting"] == 75 - 50 - 3
    assert result["complete"] == {"prompts": True, "grids": True, "candidates": False, "pairs": False}
    text = funnel.format_report(result)
    assert "incomplete: candidates, pairs" in text[0] and "22 to come" in "\n".join(text)


def test_a_run_that_has_only_prompts_is_measured(run: Path) -> None:
    for name in ("grids", "candidates", "pairs"):
        for part in (run / name).iterdir():
            part.unlink()
    result = funnel.measure(run)
    assert [step["count"] for step in result["steps"]] == [77, 0, 0, 0, 0, 0] and result["numbers"] == {}
    assert result["steps"][1]["waiting"] == 75 and result["steps"][3]["share"] is None
    assert funnel.format_report(result)


def test_numbers_and_balance_are_those_of_the_rows(run: Path) -> None:
    result = funnel.measure(run)
    similarity = result["numbers"]["similarity"]
    assert similarity["n"] == 144 and similarity["threshold"] == 0.5
    assert similarity["quantiles"]["min"] == 0.2 and similarity["quantiles"]["max"] == 0.99
    assert sum(similarity["histogram"]["all"]) == 144 and sum(similarity["histogram"]["kept"]) == 80
    rows = Dataset(run / "candidates").columns("subject", "kept")
    by_name = result["balance"]["subject"]["by_name"]
    assert {name: row["kept"] for name, row in by_name.items()} == {
        kind: sum(row["kept"] for row in rows if row["subject"] == kind) for kind in judged_run.KINDS
    }
    assert result["balance"]["subject"]["even"] == pytest.approx(3, abs=0.01)
    assert result["balance"]["task"]["by_name"] == {"subject": {"pairs": 144, "kept": 80, "share": 0.5556}}


def test_prompts_are_counted_by_the_grids_drawn_of_each(run: Path) -> None:
    text = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(text.replace("  images: 1\n", "  images: 2\n"))
    painted = steps(run)["painted"]
    assert (painted["of"], painted["count"], painted["lost"], painted["waiting"]) == (154, 75, {"out of memory": 4}, 75)


def test_too_many_kinds_are_counted_together(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(funnel, "MAX_NAMES", 2)
    by_name = funnel.measure(run)["balance"]["subject"]["by_name"]
    assert len(by_name) == 3 and sum(row["pairs"] for row in by_name.values()) == 144
    assert by_name[funnel.OTHERS]["pairs"] == 48


def test_memory_does_not_grow_with_the_rows(run: Path) -> None:
    row = {**judged_run.candidate(0, 0, 1, 0.7, 0.3, 1.0), "conditioning": {"bytes": b"x" * 20_000, "path": None}}
    data = Dataset(run / "candidates", records.schema(records.PAIR))
    peaks = []
    for shards in (2, 12):
        for shard in range(shards):
            data.write_shard(shard, [{**row, "similarity": i / 1000, "grid_id": f"{shard}-{i}"} for i in range(1000)])
        tracemalloc.start()
        funnel.measure(run)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] * 1.2 and peaks[1] < 4e6, peaks


def test_images_are_not_read(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: set[str] = set()
    real = funnel.batches

    def noted(data: Dataset, *columns: str) -> Any:
        asked.update(columns)
        return real(data, *columns)

    monkeypatch.setattr(funnel, "batches", noted)
    funnel.measure(run)
    assert asked and not asked & {"conditioning", "image", "evidence"}


def test_a_models_words_reach_the_terminal_without_control_characters(run: Path) -> None:
    data = Dataset(run / "candidates", records.schema(records.PAIR))
    data.write_shard(0, [{**row, "subject": "\x1b[31mcat\n"} for row in data.read_shard(0)])
    text = funnel.format_report(funnel.measure(run))
    assert "�[31mcat�" in "\n".join(text) and not any("\x1b" in line or "\n" in line for line in text)


@given(
    st.lists(st.floats(-2, 2) | st.none() | st.just(float("nan")), min_size=1).filter(
        lambda values: any(value is not None and value == value for value in values)
    ),
    st.floats(0, 1),
)
def test_quantiles_lie_between_the_neighbours_of_the_exact_rank(values: list[float | None], share: float) -> None:
    spread = Distribution()
    for start in range(0, len(values), 3):
        spread.add(values[start : start + 3])
    known = np.array([value for value in values if value is not None and value == value])
    (result,) = spread.quantiles(share)
    low, high = np.quantile(known, share, method="lower"), np.quantile(known, share, method="higher")
    assert low - CELL <= result <= high + CELL
    assert spread.count == len(known) and spread.missing == len(values) - len(known)
    assert sum(spread.histogram(spread.edges(7))) == len(known)


# ---- the command


def test_the_command_prints_the_funnel_and_json(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.call(["data", "stats", str(run)]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "painted 75 77 97.4 % grids; lost: 2 out of memory" in text
    assert app.call(["data", "stats", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == funnel.measure(run)


def test_wrong_folders_are_one_line_and_wrong_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other").mkdir()
    for folder, fact in (("none", "none"), ("other", "recipe.yaml")):
        assert app.call(["data", "stats", str(tmp_path / folder)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error[run_not_found]: ") and fact in error and len(error.splitlines()) == 1


def test_a_run_without_rows_says_what_comes_first(run: Path) -> None:
    for name in ("prompts", "candidates"):
        for part in (run / name).iterdir():
            part.unlink()
    with raises("run_empty", "diptych write", kind=UsageError):
        funnel.measure(run)
