"""People's own verdicts on pairs. What they said of a run, and which of it a run's `pairs/` follows.

`audit/decisions.jsonl` is only ever added to, and changes nothing of its run: `accept` takes a pair whatever its
numbers say, `reject` keeps it out, and `judge` leaves it to the judge and the thresholds again. The last line about two
panels holds, and it holds for both of their orders, (a, b) and (b, a). `diptych data recurate RUN --out NEW` makes a
run that follows them. They are then fixed in its `decisions.json`, which its fingerprint names, as its recipe is fixed
in `recipe.yaml`; so what people say of a run later cannot make its pairs others than those it was trained on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from diptych.data import records
from diptych.data.labels import Labels
from diptych.data.store import Dataset, write_atomic
from diptych.errors import UsageError, UserError
from diptych.utils.documents import parse_json
from diptych.utils.paths import place

VERDICTS = ("accept", "reject", "judge")
FIXED = "decisions.json"


def path(run_dir: str | Path) -> Path:
    """The file of what people said of a run."""
    return place(run_dir) / "audit" / "decisions.jsonl"


def add(run_dir: str | Path, id: str, verdict: str, who: str) -> None:
    """One decision, on the disk when this returns."""
    Labels(path(run_dir), VERDICTS).add(id, verdict, who)


def read(run_dir: str | Path) -> dict[str, bool]:
    """`{pair: accepted}` of the pairs that people decided on, each under the one of its two ids that was named last;
    empty if there is no file. UserError for a wrong line."""
    file, found = path(run_dir), {}
    lines = file.read_bytes().split(b"\n") if file.is_file() else []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
            id, verdict = str(row["id"]), row["label"]
        except (ValueError, KeyError, TypeError):
            if number == len(lines):
                break  # cut by a kill; the next decision mends it
            raise UserError(f"{file} line {number}: not a decision, {{id, label, labeller, time}}") from None
        for same in (id, *records.mirrors(id)):
            found.pop(same, None)
        if verdict != "judge":
            found[id] = verdict == "accept"
    return found


def both_ways(decided: Mapping[str, bool]) -> dict[str, bool]:
    """Decisions under the ids of both orders of the panels."""
    return {one: accepted for id, accepted in decided.items() for one in (id, *records.mirrors(id))}


def counts(decided: Mapping[str, bool]) -> dict[str, int]:
    """How many decisions accept and how many reject two panels."""
    return {"accepted": sum(decided.values()), "rejected": len(decided) - sum(decided.values())}


def applied(run_dir: str | Path) -> dict[str, bool]:
    """`{pair: accepted}` of the decisions that a run's `pairs/` follows; empty for a run that was made without."""
    file = place(run_dir) / FIXED
    try:
        return json.loads(file.read_bytes()) if file.is_file() else {}
    except ValueError:
        raise UserError(f"{file} is not valid JSON; make the run again in another --out") from None


def fix(out: Path, decided: Mapping[str, bool]) -> None:
    """Makes a new run follow `decided`, before its `pairs/` is made. UsageError if the folder follows others."""
    if applied(out) == decided:
        return
    if (out / FIXED).exists() or Dataset(out / "pairs").shards():
        raise UsageError(f"{out} holds a run that was made with other decisions of people; choose another --out")
    write_atomic(out / FIXED, json.dumps(dict(sorted(decided.items())), indent=1).encode() + b"\n")


def copy(run_dir: Path, out: Path) -> None:
    """What people said of a run, for a new run of the same grids, unless they said something of that already."""
    if read(run_dir) and not path(out).exists():
        path(out).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path(out), path(run_dir).read_bytes())
