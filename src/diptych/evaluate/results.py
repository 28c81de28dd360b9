"""The result files of an evaluation: `report/metrics.json`, `report/relight.json` and `samples/scores.jsonl`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diptych.errors import UserError
from diptych.utils.documents import parse_json
from diptych.utils.io import write_atomic
from diptych.utils.paths import refuse_special

METRICS = "report/metrics.json"
SCORES = "samples/scores.jsonl"


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Writes a result as indented JSON. ValueError for a number that is not finite."""
    write_atomic(path, (json.dumps(result, indent=2, allow_nan=False, ensure_ascii=False) + "\n").encode())


def write_scores(path: Path, lines: list[dict[str, Any]]) -> None:
    """Writes one JSON object a line. ValueError for a number that is not finite."""
    text = "".join(json.dumps(line, allow_nan=False, ensure_ascii=False) + "\n" for line in lines)
    write_atomic(path, text.encode())


def find_json(path: Path, fingerprint: str | None = None) -> dict[str, Any] | None:
    """The JSON object in a file; None if it cannot be read, or has another `fingerprint` than the given one."""
    try:
        result = parse_json(refuse_special(path).read_text("utf8"))
    except (OSError, ValueError):
        return None
    matches = isinstance(result, dict) and fingerprint in (None, result.get("fingerprint"))
    return result if matches else None


def is_scored(folder: Path) -> bool:
    """Whether a folder holds the metrics of an evaluation or a run."""
    return (folder / METRICS).is_file()


def read_metrics(folder: Path) -> dict[str, Any]:
    """The metrics of an evaluation's or run's folder. UserError if they cannot be read."""
    return _read(folder / METRICS)[0]


def read_scores(folder: Path) -> list[dict[str, Any]]:
    """The line of scores of each image of an evaluation's or run's folder. UserError if they cannot be read."""
    return _read(folder / SCORES, lines=True)


def has_scores(line: dict[str, Any]) -> bool:
    """Whether the judge gave both CP and PF for the image of a line."""
    return line.get("cp") is not None and line.get("pf") is not None


def _read(path: Path, lines: bool = False) -> list[dict[str, Any]]:
    try:
        text = path.read_text("utf8")
        return [parse_json(each) for each in (text.splitlines() if lines else [text])]
    except (OSError, ValueError) as error:
        code = "json_invalid" if isinstance(error, ValueError) else "path_unreadable"
        raise UserError(code, f"Cannot read {path} ({error}). Score again with `diptych evaluate`.") from error
