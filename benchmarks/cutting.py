"""Accuracy of cutting on a thousand canvases with known panels, by kind of canvas.

    python benchmarks/cutting.py [--count 1000] [--seed 2026] [--out FILE]      # a minute; fails below 99 %

A grid counts as right if it is accepted and every panel's box is within `canvases.tolerance` of the truth, without
gutters and borders. An image that is not a grid counts as right if it is rejected. The threshold is the `seam` of
recipes. `canvases.py` makes the canvases. The constants of `diptych.stages.curate.seams` were chosen on other seeds.
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import canvases

from diptych.recipe.schema import Thresholds
from diptych.stages.curate import seams
from diptych.utils.machine import machine, versions

RESULTS = Path(__file__).with_name("results")
BAR = 0.99


def run(count: int, seed: int, out: Path | None = None) -> dict[str, Any]:
    """Makes and cuts the canvases; writes and returns the result."""
    threshold = Thresholds().seam
    drawn: Counter[str] = Counter()
    right: Counter[str] = Counter()
    sizes: dict[str, list[int]] = {str(size): [0, 0] for size in sorted(set(canvases.SIZES))}
    wrong: list[dict[str, Any]] = []
    seconds = 0.0
    for index in range(count):
        canvas = canvases.make(seed, index)
        started = time.perf_counter()
        cut = seams.cut(canvas.image, canvas.rows, canvas.cols, canvas.panel_size)
        seconds += time.perf_counter() - started
        fault = canvases.fault(canvas, cut.strength, cut.boxes, threshold)
        drawn[canvas.kind] += 1
        right[canvas.kind] += not fault
        of_size = sizes[str(canvas.panel_size)]
        of_size[0] += not fault
        of_size[1] += 1
        if fault:
            wrong.append(
                {
                    "index": index,
                    "kind": canvas.kind,
                    "grid": f"{canvas.rows}×{canvas.cols} of {canvas.panel_size}",
                    "finish": canvas.finish,
                    "fault": fault,
                    "strength": round(cut.strength, 3),
                }
            )
    found = {
        "about": {
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "machine": machine(),
            "versions": versions(),
        },
        "seed": seed,
        "threshold": threshold,
        "count": count,
        "right": sum(right.values()),
        "kinds": {kind: {"drawn": drawn[kind], "right": right[kind]} for kind in canvases.KINDS},
        "sizes": {size: {"drawn": of, "right": good} for size, (good, of) in sizes.items()},
        "wrong": wrong,
        "cut_ms": round(1000 * seconds / max(count, 1), 2),
    }
    path = out or RESULTS / f"cutting-{found['about']['date']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", "utf8")
    return found


def table(found: dict[str, Any]) -> str:
    """A result as the table of docs/cutting.md."""
    faults = {
        kind: Counter(w["fault"].split(" by ")[0] for w in found["wrong"] if w["kind"] == kind)
        for kind in found["kinds"]
    }
    lines = ["| canvas | drawn | right | wrong | how |", "|---|---|---|---|---|"]
    for kind, row in found["kinds"].items():
        how = ", ".join(f"{n} {fault}" for fault, n in faults[kind].most_common())
        lines.append(f"| {kind} | {row['drawn']} | {row['right']} | {row['drawn'] - row['right']} | {how} |")
    share = found["right"] / found["count"]
    lines.append(
        f"| all | {found['count']} | {found['right']} | {found['count'] - found['right']} | {share:.1%} right |"
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    found = run(given.count, given.seed, given.out)
    print(table(found))
    for row in found["wrong"]:
        print(row)
    if found["right"] < BAR * found["count"]:
        raise SystemExit(f"{found['right']} of {found['count']} are right: below {BAR:.0%}")


if __name__ == "__main__":
    main()
