"""Decisions of people on pairs make a new run, and leave the old one as it was trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import plain_stages as stages
from diptych.data import funnel, labels, records, verdicts
from diptych.data.store import Dataset
from diptych.errors import UsageError
from diptych.provenance.trace import trace
from diptych.recipe import load
from diptych.run import recurate
from diptych.run.derive import derive
from diptych.run.runner import run
from diptych.utils.console import Display
from raising import raises

QUIET = Display(quiet=True)
ROWS = ("write", "paint", "curate")


@pytest.fixture
def judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return stages.judged(tmp_path, monkeypatch)


def both(id: str) -> list[str]:
    """A pair of grids of two panels, and its mirror."""
    return [id, *records.mirrors(id)]


def ids(folder: Path) -> list[str]:
    return [row["id"] for row in Dataset(folder / "pairs")]


def test_accepted_and_rejected_pairs_come_and_go_in_a_new_run_with_their_mirrors(judged: Path, tmp_path: Path) -> None:
    run(load(judged / "recipe.yaml"), judged, stages=("distill",), display=QUIET)
    before, whole = ids(judged), stages.data(judged)
    refused = next(row["id"] for row in Dataset(judged / "candidates") if not row["kept"])
    labels.add(judged, before[0], "reject", "ana")
    labels.add(judged, refused, "accept", "ana")
    rows = recurate.recurate(judged, [], tmp_path / "b", QUIET)["pairs"]
    gone, come = (set(both(id)) for id in (before[0], refused))
    after = {row["id"]: row for row in Dataset(tmp_path / "b" / "pairs")}
    assert set(after) == {*before, *come} - gone and rows == len(after) and gone < set(before)
    assert {(after[id]["kept"], after[id]["reason"]) for id in come} == {(True, verdicts.ACCEPTED)}
    failed = list(Dataset(tmp_path / "b" / "failed" / "select"))
    assert {row["id"]: row["reason"] for row in failed} == dict.fromkeys(gone, verdicts.REJECTED)
    last = funnel.measure(tmp_path / "b")["steps"][-1]
    assert last["count"] == len(after) and last["lost"].get(verdicts.REJECTED) == 2
    # The run that was trained is as it was: every file of it, its numbers, its chain, and it goes on.
    assert {name: data for name, data in stages.data(judged).items() if not name.startswith("audit/")} == whole
    assert funnel.measure(judged)["steps"][-1]["count"] == len(before)
    assert trace(judged / "pairs")["verified"] and trace(tmp_path / "b" / "pairs")["verified"]
    for folder, wanted in ((judged, before), (tmp_path / "b", list(after))):
        run(load(folder / "recipe.yaml"), folder, stages=(*ROWS, "distill"), display=QUIET)
        assert json.loads((folder / "student" / "student.json").read_text()) == wanted == ids(folder)


def test_a_decision_on_one_order_is_taken_back_on_the_other(judged: Path, tmp_path: Path) -> None:
    first, second = both(ids(judged)[0])
    labels.add(judged, first, "reject", "ana")
    labels.add(judged, second, "accept", "ben")
    assert labels.decided(judged) == {second: True}
    labels.add(judged, first, "judge", "ben")
    assert labels.decided(judged) == {}
    with raises("option_missing", kind=UsageError):
        recurate.recurate(judged, [], tmp_path / "b", QUIET)
    assert not (tmp_path / "b").exists()


def test_a_new_run_keeps_to_the_decisions_it_was_made_with(judged: Path, tmp_path: Path) -> None:
    kept = ids(judged)
    labels.add(judged, kept[0], "reject", "ana")
    recurate.recurate(judged, [], tmp_path / "b", QUIET)
    made = stages.data(tmp_path / "b")
    recurate.recurate(judged, [], tmp_path / "b", QUIET)  # as after a kill
    assert stages.data(tmp_path / "b") == made
    labels.add(tmp_path / "b", kept[-1], "reject", "ben")
    run(load(tmp_path / "b" / "recipe.yaml"), tmp_path / "b", stages=ROWS, display=QUIET)
    assert kept[-1] in ids(tmp_path / "b")
    with raises("run_mismatch", judged, kind=UsageError):
        recurate.recurate(tmp_path / "b", [], judged, QUIET)
    recurate.recurate(tmp_path / "b", [], tmp_path / "c", QUIET)
    assert set(ids(tmp_path / "c")) == set(kept) - {*both(kept[0]), *both(kept[-1])}
    # A study's variants start from the run as it is, without later decisions.
    derive(judged, load(judged / "recipe.yaml"), tmp_path / "d", QUIET)
    derive(tmp_path / "b", load(judged / "recipe.yaml"), tmp_path / "e", QUIET)
    assert ids(tmp_path / "d") == kept and ids(tmp_path / "e") == ids(tmp_path / "b")


def test_other_thresholds_take_the_decisions_along(judged: Path, tmp_path: Path) -> None:
    kept = ids(judged)[0]
    labels.add(judged, kept, "reject", "ana")
    result = recurate.recurate(judged, ["same=0.2"], tmp_path / "b", QUIET)
    assert kept not in ids(tmp_path / "b") and labels.applied(tmp_path / "b") == {kept: False}
    assert result["decided"] == {"accepted": 0, "rejected": 1}


@pytest.mark.parametrize(
    ("pair", "wanted"),
    [
        ("c-000012-01", ["c-000012-10"]),
        ("c-000012.1-23", ["c-000012.1-32"]),
        ("c-000012-1015", ["c-000012-1510"]),
        ("c-000012-211", ["c-000012-112", "c-000012-121"]),  # panels 2 and 11, or 21 and 1
        ("x", []),
        ("c-1", []),
    ],
)
def test_a_mirror_is_the_other_order_of_the_same_panels(pair: str, wanted: list[str]) -> None:
    assert records.mirrors(pair) == wanted


def test_an_incomplete_last_line_is_not_a_decision_and_an_invalid_one_is_named(tmp_path: Path) -> None:
    labels.add(tmp_path, "c-000001-01", "accept", "ana")
    file = labels.path(tmp_path)
    whole = file.read_bytes()
    file.write_bytes(whole + b'{"id": "c-0000')
    assert labels.decided(tmp_path) == {"c-000001-01": True}
    labels.add(tmp_path, "c-000002-01", "reject", "ana")
    assert labels.decided(tmp_path) == {"c-000001-01": True, "c-000002-01": False}
    file.write_bytes(json.dumps({"id": "x"}).encode() + b"\n" + whole)
    with raises("labels_invalid", "line 1"):
        labels.decided(tmp_path)
