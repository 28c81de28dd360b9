"""Stage 3, curate: grids are cut into panels, the panels compared, and every ordered pair gets its verdict.

For each grid: cut it where its seams are (`geometry`), lay its panels over one another (`alignment`), let the judge say
how alike their subjects are, and put the pair into words. Nothing is thrown away: a refused pair is a row with its
reason, and all numbers stay, so that other thresholds need no new look at any picture.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from diptych import tasks
from diptych.data import records
from diptych.data.engine import Failure, Row, Work
from diptych.data.images import image_cell, open_image
from diptych.errors import UserError
from diptych.stages import alignment, geometry, wording

if TYPE_CHECKING:
    from PIL.Image import Image

    from diptych.judges.embedding import EmbeddingJudge
    from diptych.recipe import Recipe, Thresholds

# For tasks whose panels show the same spot at the same pixel. Not thresholds of the recipe: a pair off by more than a
# pixel and a half of 64 is not aligned in any sense, and unrelated scenes do not match.
ALIGNED_SHIFT = 1.5 / alignment.FINE
ALIGNED_MATCH = 0.25
MISALIGNED = "alignment"


@dataclass(frozen=True)
class Comparison:
    """What is known of two panels, in whichever order."""

    similarity: float
    copy: alignment.Alignment
    structure: alignment.Structure | None

    @property
    def aligned(self) -> bool:
        """True where nobody asked."""
        return self.structure is None or (
            self.structure.shift <= ALIGNED_SHIFT and self.structure.match >= ALIGNED_MATCH
        )


class Curate:
    """Grid rows to candidate rows: both orders of every two panels."""

    name = "curate"

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.batch_size = recipe.curate.batch_size
        self.task = tasks.load(recipe.task)
        self.thresholds = self.task.thresholds(recipe.curate.thresholds)

    def load(self) -> Work:
        """Opens the judge."""
        import torch

        from diptych.judges.embedding import EmbeddingJudge

        if self.recipe.threads is not None:
            torch.set_num_threads(self.recipe.threads)
        judge = EmbeddingJudge.load(self.recipe.curate.judge, "curator", self.recipe.device)
        return lambda rows: self._judge(rows, judge)

    def _judge(self, rows: list[Row], judge: EmbeddingJudge) -> list[list[Row] | Failure]:
        # A broken grid becomes a Failure here and not an exception: the rest must stay one batch, the same bits.
        cuts = [_open(row) for row in rows]
        panels = [panel for cut in cuts if isinstance(cut, geometry.Cut) for panel in cut.panels]
        embeddings = iter(judge.embed(panels) if panels else ())
        results: list[list[Row] | Failure] = []
        for row, cut in zip(rows, cuts, strict=True):
            if isinstance(cut, Failure):
                results.append(cut)
            else:
                own = np.stack([next(embeddings) for _ in cut.panels])
                results.append(self._pairs(row, cut, own, judge))
        return results

    def _pairs(self, row: Row, cut: geometry.Cut, embeddings: np.ndarray, judge: EmbeddingJudge) -> list[Row]:
        cells = [image_cell(panel, f"{row['id']}-{number}.png") for number, panel in enumerate(cut.panels)]
        pairs = []
        for a, b in combinations(range(len(cut.panels)), 2):
            similarity = float(judge.similarity(embeddings[a : a + 1], embeddings[b : b + 1])[0])
            compared = compare(cut.panels[a], cut.panels[b], similarity, self.task)
            pairs += [self._pair(row, cut, cells, compared, order, judge) for order in ((a, b), (b, a))]
        return sorted(pairs, key=lambda pair: pair["id"])

    def _pair(
        self,
        row: Row,
        cut: geometry.Cut,
        cells: list[dict[str, Any]],
        compared: Comparison,
        order: tuple[int, int],
        judge: EmbeddingJudge,
    ) -> Row:
        reference, target = order
        name = records.pair_id(row["id"], reference, target)
        seed = records.seed_of(self.recipe.seed, name, "curate")
        caption = row["panels"][target]
        words = wording.instruction(self.task, row["subject"], caption, np.random.default_rng(seed))
        kept, reason = verdict(compared, cut.strength, self.thresholds)
        evidence = {
            "seams": cut.evidence(),
            "copy": compared.copy.evidence(),
            "structure": compared.structure.evidence() if compared.structure else None,
            "judge": self.recipe.curate.judge,
            "thresholds": {test: getattr(self.thresholds, test) for test in records.TESTS},
            "task_version": self.task.version,
            "grid_prompt": row["prompt"],
            "grid_seed": row["seed"],
            "teacher": row["model"],
        }
        return {
            "conditioning": cells[reference],
            "image": cells[target],
            "caption": caption,
            "instruction": words,
            "id": name,
            "grid_id": row["id"],
            "reference_caption": row["panels"][reference],
            "task": row["task"],
            "subject": row["subject"],
            "reference_panel": reference,
            "target_panel": target,
            "seed": seed,
            "similarity": compared.similarity,
            "copy_distance": compared.copy.distance,
            "seam": cut.strength,
            "kept": kept,
            "reason": reason,
            "judge": judge.fingerprint,
            "evidence": json.dumps(evidence, ensure_ascii=False, sort_keys=True),
        }


def _open(row: Row) -> geometry.Cut | Failure:
    """A grid's panels, or why there are none."""
    rows, cols, size = row["rows"], row["cols"], row["panel_size"]
    if len(row["panels"]) != rows * cols or rows * cols < 2:
        return Failure(f"{len(row['panels'])} captions for a grid of {rows}×{cols} panels")
    try:
        image = open_image(row["image"], name=row["id"])
    except UserError as error:
        return Failure(str(error))
    if image.size != (cols * size, rows * size):
        return Failure(f"{image.width}×{image.height} pixels are not {rows}×{cols} panels of {size}")
    return geometry.cut(image, rows, cols, size)


def compare(a: Image, b: Image, similarity: float, task: tasks.Task) -> Comparison:
    """Two panels side by side; the judge's similarity is given."""
    structure = alignment.structural_shift(a, b) if task.geometry == "aligned" else None
    return Comparison(similarity, alignment.copy_distance(a, b), structure)


def verdict(compared: Comparison, seam: float, limits: Thresholds) -> tuple[bool, str]:
    """Whether a pair is kept, and "kept" or why not. Misaligned panels are refused whatever the thresholds say."""
    if not compared.aligned:
        return False, MISALIGNED
    return records.verdict(compared.similarity, compared.copy.distance, seam, limits)
