"""Plain stages for tests of the run itself: real rows and pictures, no models. Slow enough to be killed in the middle.

`install(delay)` puts them where `run.runner` looks for the real ones; as a script (RECIPE OUT DELAY) it runs them.
"""

from __future__ import annotations

import json
import sys
import time
import types
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import diptych
from diptych.data import records, verdicts
from diptych.data.engine import Failure, Row, Work
from diptych.data.images import image_cell
from diptych.data.store import Dataset
from diptych.utils.io import write_atomic

DELAY = [0.0]
CALLS: list[str] = []


class Stage:
    """What the three row stages share."""

    name = ""
    batch_size = 2

    def __init__(self, recipe: Any, *_: Any) -> None:
        self.recipe = recipe
        self.delay = DELAY[0]  # goes with the stage to a worker

    def load(self) -> Work:
        CALLS.append(f"load {self.name}")

        def work(rows: list[Row]) -> list[list[Row] | Failure]:
            time.sleep(self.delay)
            return [self.one(row) for row in rows]

        return work

    def one(self, row: Row) -> list[Row] | Failure:
        raise NotImplementedError


class WriteStage(Stage):
    """Prompts that say their number."""

    name = "write"

    def one(self, row: Row) -> list[Row] | Failure:
        text = f"number {row['index']}"
        return [
            {
                "id": row["id"],
                "prompt": text,
                "panels": [text, text],
                "subject": "cat",
                "task": self.recipe.task,
                "seed": row["seed"],
            }
        ]


class PaintStage(Stage):
    """Two plain panels in colours of the seed; every seventh grid fails."""

    name = "paint"

    def one(self, row: Row) -> list[Row] | Failure:
        if int(row["id"][2:]) % 7 == 6:
            return Failure("out of paint")
        image = Image.new("RGB", (16, 8), tuple(row["seed"].to_bytes(8, "big")[-3:]))
        shared = {key: row[key] for key in ("prompt", "panels", "subject", "task", "seed")}
        grid = {"id": records.grid_id(row["id"]), "image": image_cell(image), "prompt_id": row["id"], **shared}
        return [{**grid, "rows": 1, "cols": 2, "panel_size": 8, "model": "x"}]


class CurateStage(Stage):
    """Both orders of the two panels, judged by the seed's last bits."""

    name = "curate"

    def one(self, row: Row) -> list[Row] | Failure:
        pairs = []
        for reference, target in ((0, 1), (1, 0)):
            numbers = (row["seed"] % 100 / 100, 1.0, 1.0)
            kept, reason = verdicts.verdict(*numbers, self.recipe.curate.thresholds)
            pair = {"conditioning": row["image"], "image": row["image"], "caption": row["panels"][target]}
            pair |= {"instruction": "", "id": records.pair_id(row["id"], reference, target), "grid_id": row["id"]}
            pair |= {"reference_caption": "", "task": row["task"], "subject": "cat", "reference_panel": reference}
            pair |= {"target_panel": target, "seed": row["seed"], "similarity": numbers[0], "copy_distance": 1.0}
            pairs.append({**pair, "seam": 1.0, "kept": kept, "reason": reason, "judge": "j", "evidence": "{}"})
        return pairs


def distill(recipe: Any, pairs: Dataset, out: Path, progress: Any, **_: Any) -> dict[str, Any]:
    """A student that is the sum of its pairs."""
    CALLS.append("distill")
    for step in range(3):
        time.sleep(DELAY[0])
        progress(step + 1, 3, "loss 1")
    out.mkdir(exist_ok=True)
    write_atomic(out / "student.json", json.dumps([row["id"] for row in pairs]).encode())
    return {"steps": 3, "loss": 1.0}


def evaluate(recipe: Any, run_dir: Path, progress: Any, engine: Any = None, **_: Any) -> None:
    """Scores of nothing."""
    CALLS.append("evaluate")
    progress(1, 1)
    (run_dir / "report").mkdir(exist_ok=True)
    write_atomic(run_dir / "report" / "metrics.json", b"{}\n")


def write_report(recipe: Any, run_dir: Path) -> None:
    """A page."""
    (run_dir / "report").mkdir(exist_ok=True)
    write_atomic(run_dir / "report" / "report.html", b"<p>report</p>\n")


def use(monkeypatch: pytest.MonkeyPatch, **classes: type) -> None:
    """These stages in place of the real ones for one test; `classes` (Paint=…, Curate=…) in place of these."""
    for name, made in install().items():
        monkeypatch.setitem(sys.modules, name, made)
        for stage, own in classes.items():
            if stage in vars(made):
                monkeypatch.setattr(made, stage, own)
    for name in ("evaluate", "stages"):
        monkeypatch.delattr(diptych, name, raising=False)
    CALLS.clear()


def data(folder: Path) -> dict[str, bytes]:
    """Every file of a run that must not differ between two runs of one recipe."""
    skip = {"log.jsonl", ".lock"}
    found = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file() and p.name not in skip}
    assert not [name for name in found if name.endswith(".tmp")], "leftovers of a killed writer"
    return {name: path.read_bytes() for name, path in found.items()}


def install(delay: float = 0.0) -> dict[str, types.ModuleType]:
    """Modules to put into sys.modules in place of the real stages."""
    DELAY[0] = delay
    report = module("diptych.evaluate.report.run_report", write=write_report)
    suite = module("diptych.evaluate.harness", evaluate_run=evaluate)
    writing = module("diptych.stages.write.stage", WriteStage=WriteStage, words_digest=lambda recipe: "")
    curating = module("diptych.stages.curate.stage", CurateStage=CurateStage)
    distilling = module("diptych.train.distill", distill=distill)
    modules = [
        package("diptych.stages.write", stage=writing),
        package("diptych.stages.curate", stage=curating),
        package("diptych.train", distill=distilling),
        package("diptych.evaluate", harness=suite),
        package("diptych.evaluate.report", run_report=report),
        module("diptych.stages.paint", PaintStage=PaintStage),
        module("diptych.run.ready", check=lambda *_: None),
        writing,
        curating,
        distilling,
        suite,
        report,
    ]
    return {m.__name__: m for m in modules}


def judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str = "a") -> Path:
    """A small run by these stages, curated to its end, in `tmp_path`/`name`."""
    from diptych.recipe import load
    from diptych.run.runner import run
    from diptych.utils.console import Display

    use(monkeypatch)
    for model in ("teacher", "judge"):
        (tmp_path / f"a-{model}").mkdir()
        (tmp_path / f"a-{model}" / "config.json").write_text(json.dumps({"name": model}))
    recipe = tmp_path / "small.yaml"
    recipe.write_text(f"""
name: small
teacher: {tmp_path}/a-teacher
device: cpu
threads: 1
write: {{count: 23, shard_size: 5}}
paint: {{dtype: float32}}
curate: {{judge: {tmp_path}/a-judge, thresholds: {{same: 0.3}}}}
distill: {{precision: float32}}
""")
    run(load(recipe), tmp_path / name, stages=("write", "paint", "curate"), display=Display(quiet=True))
    return tmp_path / name


def module(name: str, **members: Any) -> types.ModuleType:
    """A module that holds `members`."""
    made = types.ModuleType(name)
    made.__dict__.update(members)
    return made


def package(name: str, **members: Any) -> types.ModuleType:
    """A package that holds `members`, and else what the real one holds."""
    return module(name, __path__=import_module(name).__path__, **members)


if __name__ == "__main__":
    sys.modules.update(install(float(sys.argv[3])))
    from diptych.cli.app import main

    main(["run", sys.argv[1], "--out", sys.argv[2], *sys.argv[4:]])
