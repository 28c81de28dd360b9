"""A small judged run with a known truth, for tests of what reads a run's evidence: real parquet, real PNGs, no models.

As a script (FOLDER) it writes the run that docs/evidence.md shows, and the labels of two people who know the truth.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diptych.data import records, verdicts
from diptych.data.engine import failed_row
from diptych.data.labels import Labels
from diptych.data.store import Dataset
from diptych.recipe.schema import Recipe, Thresholds

SHARD = 50  # grids
KINDS = ("cat", "robot", "teapot")


def make(folder: Path, judged: list[tuple[float, bool]], copies: int = 0, seamless: int = 0) -> dict[str, str]:
    """Writes a complete run of 1×2 grids and returns `{candidate id: "same" | "different"}` of what reached the judge.

    `judged` is (similarity, truth) of each grid; then come near copies, grids without a seam, three grids that curation
    could not read and two prompts that could not be painted. The threshold is 0.5.
    """
    recipe = Recipe(name=folder.name, device="cpu", threads=1)
    total = len(judged) + copies + seamless
    recipe = recipe.model_copy(update={"write": recipe.write.model_copy(update={"count": total + 5})})
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(recipe.dump())
    prompts = [prompt(i) for i in range(total + 5)]
    save(folder / "prompts", records.PROMPT, prompts)
    save(folder / "grids", records.GRID, [grid(row) for row in prompts[:-2]])
    failures = [failed_row("paint", row, "out of memory") for row in prompts[-2:]]
    save(folder / "failed" / "paint", records.FAILED, failures)
    failures = [failed_row("curate", grid(row), "the picture is cut short") for row in prompts[-5:-2]]
    save(folder / "failed" / "curate", records.FAILED, failures)
    truth, candidates = {}, []
    numbers = [(similarity, 0.3, 1.0) for similarity, _ in judged]
    numbers += [(0.99, 0.01, 1.0)] * copies + [(0.4, 0.3, -0.5)] * seamless
    for i, (similarity, distance, seam) in enumerate(numbers):
        for a, b in ((0, 1), (1, 0)):
            row = candidate(i, a, b, similarity, distance, seam)
            candidates.append(row)
            if i < len(judged):
                truth[row["id"]] = "same" if judged[i][1] else "different"
    save(folder / "candidates", records.PAIR, candidates)
    save(folder / "pairs", records.PAIR, [row for row in candidates if row["kept"]])
    return truth


def prompt(i: int) -> dict[str, Any]:
    kind = KINDS[i % len(KINDS)]
    row = {"id": records.prompt_id(i), "prompt": "two panels", "panels": ["left", "right"], "subject": kind}
    return {**row, "task": "subject", "seed": i}


def grid(row: dict[str, Any]) -> dict[str, Any]:
    shared = {key: row[key] for key in ("prompt", "panels", "subject", "task", "seed")}
    made = {"id": records.grid_id(row["id"]), "image": cell(1, 2), "prompt_id": row["id"], **shared}
    return {**made, "rows": 1, "cols": 2, "panel_size": 8, "model": "m"}


def candidate(i: int, a: int, b: int, similarity: float, distance: float, seam: float) -> dict[str, Any]:
    of = records.grid_id(records.prompt_id(i))
    kept, reason = verdicts.verdict(similarity, distance, seam, Thresholds())
    row = {"conditioning": cell(i, a), "image": cell(i, b), "caption": f"a {KINDS[i % len(KINDS)]}"}
    row |= {"instruction": "", "id": records.pair_id(of, a, b), "grid_id": of, "reference_caption": ""}
    row |= {"task": "subject", "subject": KINDS[i % len(KINDS)], "reference_panel": a, "target_panel": b, "seed": i}
    row |= {"similarity": similarity, "copy_distance": distance, "seam": seam, "kept": kept, "reason": reason}
    return {**row, "judge": "j", "evidence": "{}"}


def cell(i: int, panel: int) -> dict[str, Any]:
    """A picture that is no other grid's or panel's."""
    out = io.BytesIO()
    Image.new("RGB", (8, 8), (i % 256, i // 256, 100 * panel)).save(out, "PNG")
    return {"bytes": out.getvalue(), "path": None}


def save(folder: Path, columns: dict[str, str], rows: list[dict[str, Any]], publish: bool = True) -> Dataset:
    data = Dataset(folder, records.schema(columns))
    for shard, start in enumerate(range(0, len(rows), 2 * SHARD)):
        data.write_shard(shard, rows[start : start + 2 * SHARD], "f")
    if publish:
        data.publish({"fingerprint": "f"})
    return data


def noisy(count: int, seed: int = 0) -> list[tuple[float, bool]]:
    """A judge that is right more often the farther it is from 0.5."""
    rng = np.random.default_rng(seed)
    similarity = rng.beta(2, 1.5, count)
    return list(zip(similarity.tolist(), (rng.random(count) < similarity**1.5 * 1.1).tolist(), strict=True))


if __name__ == "__main__":
    place = Path(sys.argv[1])
    known = make(place, noisy(400), copies=30, seamless=20)
    chance = np.random.default_rng(7)
    for who in ("ana", "ben"):
        file = Labels(place / "audit" / f"{who}.jsonl")
        for name, answer in known.items():
            slip = chance.random()
            said = "unsure" if slip < 0.03 else answer if slip > 0.08 else "same"
            file.add(name, said, who)
