"""The paper's claim on the pocket world: the student compared with zero-shot baselines, with per-subject tuning, and
with itself without its parts (`recipes/ablations/pocket.yaml`). Held-out identities and kinds, three trainings each.

    python benchmarks/ablations.py                       # two hours of two CPU cores
    python benchmarks/ablations.py --from runs/pocket    # on the pairs of an existing run

Writes `results/ablations-DEVICE-DATE.json` and the page as `.md`, and prints the page. It runs `diptych ablate`: after
an interruption, the same command resumes and trains nothing twice (`--work`).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import measuring

from diptych.evaluate import ablations
from diptych.run.ablate import ablate
from diptych.utils.machine import pick_device


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", default="pocket", help="a study's file, or the name of one that ships")
    parser.add_argument("--from", dest="base", type=Path, default=None, help="a curated run to share")
    parser.add_argument("--only", nargs="+", default=(), metavar="VARIANT", help="the rest is shown as far as it is")
    parser.add_argument("--work", type=Path, default=Path("runs/ablations"), help="the study's folder")
    parser.add_argument("--out", type=Path, default=None, help="another result file")
    given = parser.parse_args()
    found = ablate(given.study, given.work, base=given.base, only=given.only)
    path = measuring.write("ablations", {**found, "about": measuring.about(pick_device(None))}, given.out)
    page = ablations.markdown(found)
    path.with_suffix(".md").write_text(page, "utf8")
    print(page)
    print(path)


if __name__ == "__main__":
    main()
