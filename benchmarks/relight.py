"""Relighting against the truth: a student compared with copy, color transfer and text only, on held-out pocket scenes.

    python benchmarks/relight.py                                  # the packaged student
    python benchmarks/relight.py runs/pocket-relight              # a run's student, evaluated first if necessary
    python benchmarks/relight.py runs/pocket-both --scenes 300

Writes `results/relight-DEVICE-DATE.json` and prints the table. After an interruption, the same command resumes
(`--work`).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import measuring
import torch

from diptych import recipe as recipes
from diptych.evaluate import relighting
from diptych.evaluate.report import run_report
from diptych.evaluate.report.gather import Run
from diptych.run.resolve import resolve_auto
from diptych.utils.console import Display


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=Path, help="a run's folder [default: the student in the package]")
    parser.add_argument("--scenes", type=int, default=None, help="held-out scenes [default: the recipe's, or 150]")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("runs/relight-benchmark"),
        help="folder of the packaged student's images",
    )
    parser.add_argument("--out", type=Path, default=None, help="another result file")
    given = parser.parse_args()
    recipe = recipes.load(given.run / "recipe.yaml" if given.run else "pocket-relight")
    scenes = given.scenes or recipe.evaluate.relight or 150
    chosen: dict[str, Any] = {"relight": scenes}
    wanted = "student" if given.run else "student_shipped"
    if not given.run or wanted not in recipe.evaluate.methods:  # else the run's own result is this one
        chosen["methods"] = [wanted]
    recipe = resolve_auto(recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update=chosen)}))
    folder = given.run or given.work
    folder.mkdir(parents=True, exist_ok=True)
    with Display().stage("relight", "images") as report:
        found = relighting.evaluate(recipe, folder, report)
    result = {
        **found,
        "student": str(given.run.name) if given.run else "pocket",
        "about": measuring.about(torch.device(recipe.device)),
    }
    print(run_report.markdown(Run(recipe, folder)))
    print(measuring.write("relight", result, given.out))


if __name__ == "__main__":
    main()
