"""`make demo` in a fresh clone: minutes from the clone to the report, with installation, and memory; then one image.

    python benchmarks/demo.py [--out FILE]      # some minutes; needs git and make

`peak_mib` is the peak memory of its largest process, since the stages run in one. `picture_s` is the time of a whole
`diptych generate` process with the packaged student.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import tempfile
import time
from pathlib import Path

import measuring
import torch

ROOT = Path(__file__).parents[1]
ASKED = ["--reference", "examples/references/cat.png", "--prompt", "a cat on the beach", "--out", "cat.png"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        clone = Path(scratch) / "diptych"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        started = time.perf_counter()
        subprocess.run(["make", "demo"], cwd=clone, check=True)
        seconds = time.perf_counter() - started
        started = time.perf_counter()
        subprocess.run([".venv/bin/diptych", "generate", "--model", "pocket", *ASKED], cwd=clone, check=True)
        picture = time.perf_counter() - started
        run = clone / "runs" / "demo"
        lines = map(json.loads, (run / "log.jsonl").read_text("utf8").splitlines())
        stages = {line["stage"]: line["seconds"] for line in lines if line["event"] == "stage"}
        report = (run / "report" / "report.html").stat().st_size
    result = {
        "about": measuring.about(torch.device("cpu")),
        "seconds": round(seconds, 1),
        "stages": stages,
        "picture_s": round(picture, 1),
        "peak_mib": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024),
        "report_bytes": report,
    }
    print(measuring.write("demo", result, arguments.out))
    print(f"{seconds / 60:.1f} minutes, {result['peak_mib']} MiB; a picture {picture:.1f} s")


if __name__ == "__main__":
    main()
