"""The audit's command: a sheet goes out and comes back with labels, and wrong use is one line."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest

from diptych.cli import app
from diptych.data import labels
from diptych.data.store import Dataset


def command(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    code = app.call(["data", "audit", *args])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_a_sheet_is_written_filled_in_and_read_back(
    known: tuple[Path, dict[str, str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, truth = known
    sheet = tmp_path / "sheet.csv"
    asked = (str(run), "--sample", "30", "--csv", str(sheet))
    assert command(capsys, *asked)[0] == 0
    code, _, error = command(capsys, *asked)
    assert code == 1 and "error[labels_invalid]" in error and "sheet.csv" in error
    with sheet.open(encoding="utf-8-sig", newline="") as stream:
        rows: list[dict[str, Any]] = list(csv.DictReader(stream))
    assert len(rows) == 30 and set(rows[0]) == set(labels.SHEET)
    stored = {row["id"]: row for row in Dataset(run / "candidates")}
    for row in rows:
        assert (tmp_path / row["reference"]).read_bytes() == stored[row["id"]]["conditioning"]["bytes"]
        assert (tmp_path / row["target"]).read_bytes() == stored[row["id"]]["image"]["bytes"]
        row["label"] = truth[row["id"]][0].upper()
    with sheet.open("w", encoding="utf-8-sig", newline="") as stream:  # as a German spreadsheet saves it
        writer = csv.DictWriter(stream, list[str](labels.SHEET), delimiter=";")
        writer.writeheader()
        writer.writerows(rows)
    code, out, _ = command(capsys, *asked, "--labeller", "ana", "--json")
    assert code == 0 and json.loads(out)["labels"]["used"] == 30
    file = run / "audit" / "labels.jsonl"
    before = file.read_bytes()
    assert labels.read(file)["ana"] == {row["id"]: truth[row["id"]] for row in rows}
    assert command(capsys, *asked, "--labeller", "ana")[0] == 0 and file.read_bytes() == before
    sheet.write_text(sheet.read_text("utf-8-sig").replace(";S;", ";smae;", 1), "utf8")
    code, _, error = command(capsys, *asked)
    assert file.read_bytes() == before
    assert code == 2 and re.search(r"error\[labels_invalid\]: .*sheet\.csv line \d+: 'smae'", error)
    assert len(error.splitlines()) == 1


def test_a_sheet_of_another_sample_is_an_error(
    known: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels.write_sheet(tmp_path / "sheet.csv", [["c-999999-01", "same", "cat", "", ""]])
    code, _, error = command(capsys, str(known[0]), "--csv", str(tmp_path / "sheet.csv"))
    assert code == 2 and "error[labels_invalid]" in error and "sheet.csv" in error
    assert not (known[0] / "audit").exists()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--serve", "--csv", "x.csv"], "--serve and --csv"),
        (["--labeller", " "], "--labeller is empty"),
        (["--serve", "--labels", "a", "--labels", "b"], "2 --labels"),
        (["--labels", "none.jsonl"], "none.jsonl"),
        (["--sample", "0"], "--sample"),
        (["--precision", "1.5"], "--precision"),
    ],
)
def test_wrong_use_is_one_line(
    known: tuple[Path, Any], capsys: pytest.CaptureFixture[str], args: list[str], words: str
) -> None:
    code, _, error = command(capsys, str(known[0]), *args)
    assert code == 2 and words in error and len(error.splitlines()) == 1


def test_a_run_without_labels_says_what_comes_first(
    known: tuple[Path, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, error = command(capsys, str(known[0]))
    assert code == 1 and "error[labels_invalid]" in error and "diptych data audit" in error
