"""Two methods on the same samples, of one evaluation or of two: differences, intervals, p-values.

compare("evaluations/a:student", "evaluations/b:student")
compare("runs/first:student", "runs/second:tuned-0.002-200")      # runs that were scored, as well
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diptych.errors import UsageError, UserError, nearest
from diptych.evaluate.config import FILE
from diptych.evaluate.scoring import metrics, summary
from diptych.utils.documents import parse_json

SAME = ("suite", "version")


def compare(a: str, b: str, out: Path | None = None, times: int = 1000) -> dict[str, Any]:
    """`a` minus `b`: each is `FOLDER:METHOD`, a folder with one model, or a method of the folder `out`. A folder is an
    evaluation's or a run's.

    UsageError if they were not asked the same, or scored by the same judge; UserError for a folder that is not scored.
    """
    (one, first), (other, second) = (_find(text, out) for text in (a, b))
    left, right = (_read(folder) for folder in (one, other))
    for key in SAME:
        if left.get(key) != right.get(key):
            raise UsageError(
                f"{a} and {b} cannot be compared: {key} {left.get(key)} there and {right.get(key)} here; "
                "evaluate both on one suite"
            )
    if _judge(left) != _judge(right):
        raise UsageError(f"{a} and {b} were scored by different judges; numbers are not portable between them")
    found = summary.compare(_lines(one), _lines(other), _known(first, left), _known(second, right), times)
    return {"a": f"{one}:{first}", "b": f"{other}:{second}", "suite": left["suite"], "scores": found}


def lines(found: dict[str, Any]) -> list[str]:
    """A comparison for people."""
    scores = found["scores"]
    n = scores["cp_pf"]["n"]
    told = [f"{found['a']} − {found['b']} on the same {n} pictures of {found['suite']}", ""]
    names = {"cp": "CP", "pf": "PF", "cp_pf": "CP·PF", "copy_rate": "copy rate"}
    for key, c in scores.items():
        low, high = c["ci95"]
        told.append(f"{names[key]:<10} {c['difference']:+.3f}  95 % {low:+.3f} to {high:+.3f}  p {metrics.p_said(c)}")
    return [*told, "", "p: permutation test over references, two-sided; differences of 0 are the null hypothesis"]


def _find(text: str, out: Path | None) -> tuple[Path, str]:
    folder, _, method = text.rpartition(":")
    if folder and _is_scored(Path(folder)):
        return Path(folder), method
    if _is_scored(Path(text)):
        found = _read(Path(text))
        names = list(found["settings"]["models"] if (Path(text) / FILE).is_file() else found["methods"])
        if len(names) != 1:
            raise UsageError(f"{text} has {len(names)} methods ({', '.join(names)}); name one: {text}:NAME")
        return Path(text), names[0]
    if out is not None and _is_scored(out):
        return out, text
    raise UserError(
        f"{text}: no scored evaluation; write FOLDER:METHOD (the folder of a run or of `diptych evaluate --suite`), or "
        "METHOD with --out FOLDER"
    )


def _is_scored(folder: Path) -> bool:
    return (folder / "report" / "metrics.json").is_file()


def _read(folder: Path) -> dict[str, Any]:
    path = folder / "report" / "metrics.json"
    try:
        return parse_json(path.read_text("utf8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); score it again") from error


def _judge(found: dict[str, Any]) -> Any:
    judges = found.get("judges", {})
    return judges.get("judge") or [judges.get(role, {}).get("fingerprint") for role in ("scorer", "reader")]


def _known(method: str, found: dict[str, Any]) -> str:
    names = [*found.get("methods", {}), *found.get("anchors", {})]
    if method not in names:
        raise UsageError(f"unknown method '{method}'; scored are {', '.join(names)}{nearest(method, names)}")
    return method


def _lines(folder: Path) -> list[dict[str, Any]]:
    path = folder / "samples" / "scores.jsonl"
    try:
        found = [parse_json(line) for line in path.read_text("utf8").splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); score it again") from error
    return [line for line in found if line.get("cp") is not None and line.get("pf") is not None]
