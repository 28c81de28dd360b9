"""People's own verdicts on single pairs: `audit/decisions.jsonl`, which is only ever added to.

`accept` puts a pair among those to train on whatever its numbers say, `reject` keeps it out, and `judge` leaves it to
the judge and the thresholds again. The last line about a pair holds. Candidates stay as the judge left them; `pairs/`
follows when it is selected again (`recurate.reselect`), and its fingerprint names what people decided.
"""

from __future__ import annotations

import json
from pathlib import Path

from diptych.data.labels import Labels
from diptych.errors import UserError
from diptych.paths import place

VERDICTS = ("accept", "reject", "judge")


def path(run_dir: str | Path) -> Path:
    """The file of a run."""
    return place(run_dir) / "audit" / "decisions.jsonl"


def add(run_dir: str | Path, id: str, verdict: str, who: str) -> None:
    """One decision, on the disk when this returns."""
    Labels(path(run_dir), VERDICTS).add(id, verdict, who)


def read(run_dir: str | Path) -> dict[str, bool]:
    """`{pair: accepted}` of the pairs that people decided on; empty if there is no file. UserError for a wrong line."""
    file, found = path(run_dir), {}
    lines = file.read_bytes().split(b"\n") if file.is_file() else []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            id, verdict = row["id"], row["label"]
        except (ValueError, KeyError, TypeError):
            if number == len(lines):
                break  # cut by a kill; the next decision mends it
            raise UserError(f"{file} line {number}: not a decision, {{id, label, labeller, time}}") from None
        found.pop(id, None)
        if verdict != "judge":
            found[id] = verdict == "accept"
    return found
