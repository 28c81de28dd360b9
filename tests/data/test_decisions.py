"""People's own verdicts on pairs change `pairs/` and nothing else, and a run goes on from them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import plain_stages as stages
from diptych import recurate
from diptych.console import Display
from diptych.data import decisions, funnel, records
from diptych.data.store import Dataset
from diptych.errors import UserError
from diptych.recipe import load
from diptych.run import run

QUIET = Display(quiet=True)
ROWS = ("write", "paint", "curate")


@pytest.fixture
def judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return stages.judged(tmp_path, monkeypatch)


def ids(folder: Path) -> list[str]:
    return [row["id"] for row in Dataset(folder / "pairs")]


def test_accepted_and_rejected_pairs_come_and_go(judged: Path) -> None:
    before, candidates = ids(judged), (judged / "candidates" / "part-00000.parquet").read_bytes()
    refused = next(row["id"] for row in Dataset(judged / "candidates") if not row["kept"])
    decisions.add(judged, before[0], "reject", "ana")
    decisions.add(judged, refused, "accept", "ana")
    assert ids(judged) == before
    rows = recurate.reselect(judged)
    after = {row["id"]: row for row in Dataset(judged / "pairs")}
    assert set(after) == {*before[1:], refused} and rows == len(after)
    assert after[refused]["kept"] and after[refused]["reason"] == records.ACCEPTED
    assert (judged / "candidates" / "part-00000.parquet").read_bytes() == candidates
    assert [row["reason"] for row in Dataset(judged / "failed" / "select")] == [records.REJECTED]
    last = funnel.measure(judged)["steps"][-1]
    assert last["count"] == len(after) and last["lost"].get(records.REJECTED) == 1
    # The run goes on as it is; and what people say again, goes back.
    run(load(judged / "recipe.yaml"), judged, stages=ROWS, display=QUIET)
    assert set(ids(judged)) == set(after)
    for id in (before[0], refused):
        decisions.add(judged, id, "judge", "ben")
    recurate.reselect(judged)
    assert ids(judged) == before and decisions.read(judged) == {}


def test_other_thresholds_take_the_decisions_along(judged: Path, tmp_path: Path) -> None:
    kept = ids(judged)[0]
    decisions.add(judged, kept, "reject", "ana")
    recurate.reselect(judged)
    recurate.recurate(judged, ["same=0.2"], tmp_path / "b", QUIET)
    assert kept not in ids(tmp_path / "b") and decisions.read(tmp_path / "b") == {kept: False}


def test_a_cut_last_line_is_no_decision_and_a_wrong_one_is_named(tmp_path: Path) -> None:
    decisions.add(tmp_path, "c-000001-01", "accept", "ana")
    file = decisions.path(tmp_path)
    whole = file.read_bytes()
    file.write_bytes(whole + b'{"id": "c-0000')
    assert decisions.read(tmp_path) == {"c-000001-01": True}
    decisions.add(tmp_path, "c-000002-01", "reject", "ana")
    assert decisions.read(tmp_path) == {"c-000001-01": True, "c-000002-01": False}
    file.write_bytes(json.dumps({"id": "x"}).encode() + b"\n" + whole)
    with pytest.raises(UserError, match="line 1"):
        decisions.read(tmp_path)
