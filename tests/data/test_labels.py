"""Labels survive a cut line; a sheet runs nothing."""

from __future__ import annotations

from pathlib import Path

from diptych.data import labels
from diptych.errors import UsageError
from raising import raises


def test_a_cut_line_is_mended_and_a_wrong_one_named(tmp_path: Path) -> None:
    path = tmp_path / "labels.jsonl"
    labels.Labels(path).add("a", "same", "me")
    whole = path.read_bytes()
    for cut, kept in ((b'{"id": "b", "la', 1), (whole.replace(b'"a"', b'"b"').rstrip(b"\n"), 2)):
        path.write_bytes(whole + cut)
        assert len(labels.read(path)["me"]) == kept
        labels.Labels(path).add("c", "unsure", "me")
        assert len(labels.read(path)["me"]) == kept + 1 and path.read_bytes().endswith(b"\n")
    path.write_bytes(b"{\n" + whole)
    with raises("labels_invalid", path, "line 1", kind=UsageError):
        labels.read(path)
    path.write_bytes(whole.replace(b'"same"', b'"smae"'))
    with raises("labels_invalid", path, "line 1", "'smae'", "did you mean 'same'"):
        labels.read(path)


def test_the_last_label_of_a_labeller_holds(tmp_path: Path) -> None:
    file = labels.Labels(tmp_path / "labels.jsonl")
    for label, who in (("same", "me"), ("different", "me"), ("same", "ben")):
        file.add("a", label, who)
    assert labels.read(file.path) == {"me": {"a": "different"}, "ben": {"a": "same"}}


def test_a_sheet_runs_no_formula(tmp_path: Path) -> None:
    path = tmp_path / "sheet.csv"
    labels.write_sheet(
        path, [["c-1", "", '=HYPERLINK("http://x")', "a.png", "b.png"], ["c-2", "same", "a\u2028b", "", ""]]
    )
    assert "'=HYPERLINK" in path.read_text("utf-8-sig")
    assert labels.read_sheet(path) == {"c-2": "same"}
