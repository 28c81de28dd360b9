"""The golden loss curve: 50 steps of the shipped pocket teacher on sixteen rendered pairs, in float32 on one thread.

    python tests/train/golden.py        # writes golden_loss.json anew: after the shipped weights, or the draws, changed

`test_golden.py` trains again and compares, so that no refactoring changes what training does without being seen.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

FILE = Path(__file__).parent / "golden_loss.json"
STEPS, BATCH, GRIDS = 50, 4, 8
TOLERANCE = 5e-3  # relative, of each number: libraries and machines round differently, and 50 steps add that up


def rendered_pairs(folder: Path) -> Any:
    """Both orders of two renders of eight subjects, at the pocket panel's size."""
    import numpy as np
    from PIL import Image

    from diptych.data import records
    from diptych.data.images import image_cell
    from diptych.data.store import Dataset
    from diptych.pocket import captions, world
    from diptych.pocket.render import render

    rows = []
    for number in range(GRIDS):
        rng = np.random.default_rng([50, number])
        subject = world.sample_identity(rng)
        scenes = [world.sample_scene(rng) for _ in range(2)]
        panels = [image_cell(Image.fromarray(render(subject, scene))) for scene in scenes]
        told = [captions.caption(subject.kind, scene, rng) for scene in scenes]
        grid = f"g-{number:06d}"
        for reference, target in ((0, 1), (1, 0)):
            values: dict[str, Any] = dict.fromkeys(records.PAIR, "")
            values |= {"conditioning": panels[reference], "image": panels[target], "caption": told[target]}
            values |= {"reference_caption": told[reference], "id": records.pair_id(grid, reference, target)}
            values |= {"grid_id": grid, "task": "subject", "subject": subject.kind, "seed": number, "kept": True}
            values |= {"reference_panel": reference, "target_panel": target, "evidence": "{}", "reason": "kept"}
            rows.append(values | {"similarity": 1.0, "copy_distance": 1.0, "seam": 1.0})
    data = Dataset(folder, records.schema(records.PAIR))
    data.write_shard(0, rows, "golden")
    data.publish({"fingerprint": "golden"})
    return data


def curve() -> dict[str, list[float]]:
    """`left`, `right` and `grad_norm` of every step, and the `validation` losses."""
    from diptych.recipe.schema import Recipe
    from diptych.train.distill import distill
    from diptych.train.metrics import read

    settings = {"steps": STEPS, "batch_size": BATCH, "precision": "float32", "warmup": 10, "learning_rate": 3e-4}
    settings |= {"validate_every": 25, "validation_pairs": 2, "sample_pairs": 1, "sample_steps": 1, "sample_every": 0}
    settings |= {"checkpoint_every": STEPS, "ema": 0.9}
    values = {"name": "golden", "teacher": "pocket", "seed": 0, "device": "cpu", "threads": 1, "distill": settings}
    with tempfile.TemporaryDirectory() as folder:
        distill(Recipe.model_validate(values), rendered_pairs(Path(folder) / "pairs"), Path(folder) / "out")
        lines = read(Path(folder) / "out" / "training" / "metrics.jsonl")
    found = {name: [round(line[name], 6) for line in lines] for name in ("left", "right", "grad_norm")}
    return found | {"validation": [round(line["validation"]["loss"], 6) for line in lines if "validation" in line]}


if __name__ == "__main__":
    FILE.write_text(json.dumps(curve(), indent=1) + "\n")
    print(f"wrote {FILE}")
