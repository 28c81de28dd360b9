"""A run's log: `log.jsonl`, one JSON object a line, only ever added to.

It holds what must not be in the data, because it differs between two runs of one recipe: times, machine, attempts.
"""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from diptych.utils.documents import parse_json
from diptych.utils.paths import is_remote, place, refuse_link

LOG = "log.jsonl"


def append(run_dir: str | Path, event: str, **values: Any) -> None:
    """Adds one line: the time, the event's name, and `values`."""
    line = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "event": event, **values}
    path = place(run_dir) / LOG
    if is_remote(path):  # no file there can be added to; the run's one process writes it anew
        before = path.read_bytes() if path.exists() else b""
        path.write_bytes(before + json.dumps(line, ensure_ascii=False).encode() + b"\n")
        return
    with refuse_link(path).open("ab+") as stream:
        # A process killed in mid-line leaves no newline: begin a new line, so that only that line is lost.
        if stream.seek(0, os.SEEK_END) and (stream.seek(-1, os.SEEK_END), stream.read(1))[1] != b"\n":
            stream.write(b"\n")
        stream.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")


def read(run_dir: str | Path) -> list[dict[str, Any]]:
    """All whole lines, in order; none if there is no log."""
    path = place(run_dir) / LOG
    events = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            events.append(parse_json(line))
        except ValueError:
            continue  # cut by a kill; see append
    return events


def seconds(run_dir: str | Path) -> dict[str, float]:
    """Seconds spent in each stage, over all attempts that reached its end."""
    spent: dict[str, float] = {}
    for event in read(run_dir):
        if event.get("event") == "stage" and "seconds" in event:
            spent[event["stage"]] = round(spent.get(event["stage"], 0.0) + event["seconds"], 2)
    return spent
