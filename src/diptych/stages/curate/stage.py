"""Stage 3, curate: grids are cut into panels, the panels compared, and every ordered pair gets its verdict.

For each grid: cut it where its seams are (`seams`), look at each panel alone (`screens`), lay its panels over one
another (`alignment`), let the judge say how alike their subjects are, and put the pair into words. Nothing is thrown
away: a refused pair is a row with its reason, and all numbers stay, so that other thresholds need no new look at any
picture. docs/curation.md has all tests in their order.

The judge is the embedding model; or, with `curate.vlm`, a vision-language model, asked once about each two panels that
all other tests let through, the embedding model's among them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diptych.data import records
from diptych.data.engine import Failure, Row, Work
from diptych.data.images import image_cell, open_image
from diptych.errors import UserError
from diptych.recipe import tasks
from diptych.stages.curate import alignment, duplicates, screens, seams
from diptych.stages.curate.duplicates import pack, panel_hash
from diptych.stages.write import grammar

if TYPE_CHECKING:
    from PIL.Image import Image

    from diptych.judges.embedding import EmbeddingJudge
    from diptych.judges.vlm import Judgement, VlmJudge
    from diptych.recipe.schema import Recipe, Thresholds

# For tasks whose panels show the same spot at the same pixel. Not thresholds of the recipe: a pair off by more than a
# pixel and a half of 64, which at the border is what a twentieth of scale makes, is not aligned in any sense, and
# unrelated scenes do not match.
ALIGNED_SHIFT = 1.5 / alignment.FINE
ALIGNED_MATCH = 0.25
MISALIGNED = "alignment"
UNCHANGED = "unchanged"
PREFILTER = "prefilter"


@dataclass(frozen=True)
class Comparison:
    """What is known of two panels, in whichever order."""

    similarity: float  # the deciding judge's; NaN where it gave none
    copy: alignment.Alignment
    structure: alignment.Structure | None
    change: float | None = None  # of the whole picture; None where panels need not align
    least_change: float = 0.0  # the task's
    unjudged: str = ""  # the reason to refuse it if no other test does: why the judge gave none
    votes: tuple[dict[str, Any], ...] = ()
    embedding: float | None = None  # similarity by the embedding model, where a vision-language model decides
    screen: str = ""  # the first screen that one of the panels fails
    likeness: dict[str, float] | None = None  # what tells a copy besides pixels; None where the recipe does not ask
    copied: str = ""  # the first of its tests that says copy

    @property
    def aligned(self) -> bool:
        """True where nobody asked."""
        return self.structure is None or (
            self.structure.shift <= ALIGNED_SHIFT
            and self.structure.scale == 1
            and self.structure.match >= ALIGNED_MATCH
        )

    @property
    def changed(self) -> bool:
        """True where nobody asked."""
        return self.change is None or self.change >= self.least_change

    def judged(self, judgement: Judgement) -> Comparison:
        """With the judgement of a vision-language model."""
        unjudged = f"undecided: {judgement.reason}" if judgement.verdict == "undecided" else ""
        return replace(self, similarity=judgement.score, unjudged=unjudged, votes=judgement.votes)


@dataclass(frozen=True)
class Compared:
    """A grid, cut, and what is known of every two of its panels."""

    row: Row
    cut: seams.Cut
    cells: list[dict[str, Any]]
    pairs: dict[tuple[int, int], Comparison]
    scores: list[dict[str, float]]  # of each panel, by screen; empty where the recipe has no screens
    hashes: list[str]  # of each panel; empty where the recipe looks for no duplicates
    embeddings: list[str]  # of each panel, packed; as the hashes


class Curate:
    """Grid rows to candidate rows: both orders of every two panels.

    `answers` is where a vision-language model's answers are kept: nothing is asked twice, in this run or after a kill.
    """

    name = "curate"

    def __init__(self, recipe: Recipe, answers: Path | None = None) -> None:
        self.recipe = recipe
        self.answers = answers
        self.batch_size = recipe.curate.batch_size
        self.task = tasks.load(recipe.task)
        self.thresholds = self.task.thresholds(recipe.curate.thresholds)
        self.screens = recipe.curate.screens
        self.bounds = records.Bounds.of(recipe.curate)

    def load(self) -> Work:
        """Opens the judges."""
        import torch

        from diptych.judges.embedding import EmbeddingJudge

        if self.recipe.threads is not None:
            torch.set_num_threads(self.recipe.threads)
        judge = EmbeddingJudge.load(self.recipe.curate.judge, "curator", self.recipe.device)
        looking = self.screens.classifiers if self.screens else ()
        classifiers = [screens.PanelClassifier.load(settings, self.recipe.device) for settings in looking]
        return self.work(judge, self._vlm(), classifiers)

    def work(
        self, judge: EmbeddingJudge, vlm: VlmJudge | None, classifiers: Sequence[screens.PanelClassifier] = ()
    ) -> Work:
        """The stage with its judges, and the classifiers of its screens."""
        return lambda rows: self._judge(rows, judge, vlm, classifiers)

    def _vlm(self) -> VlmJudge | None:
        settings = self.recipe.curate.vlm
        if settings is None:
            return None
        from diptych.judges.vlm import VlmJudge
        from diptych.llm.client import open_model

        cache = settings.cache or self.answers
        model = open_model(settings.endpoint, settings.local, settings.vllm, cache=cache, device=self.recipe.device)
        return VlmJudge(model, self.task, settings.votes)

    def _judge(
        self,
        rows: list[Row],
        judge: EmbeddingJudge,
        vlm: VlmJudge | None,
        classifiers: Sequence[screens.PanelClassifier],
    ) -> list[list[Row] | Failure]:
        # A broken grid becomes a Failure here and not an exception: the rest must stay one batch, the same bits.
        cuts = [_open(row) for row in rows]
        panels = [panel for cut in cuts if isinstance(cut, seams.Cut) for panel in cut.panels]
        scores = iter(screens.scores(panels, classifiers) if self.screens else ())
        embeddings = iter(judge.embed(panels) if panels else ())
        compared: list[Compared | Failure] = []
        for row, cut in zip(rows, cuts, strict=True):
            if isinstance(cut, Failure):
                compared.append(cut)
            else:
                own = np.stack([next(embeddings) for _ in cut.panels])
                seen = [next(scores) for _ in cut.panels] if self.screens else []
                compared.append(self._compare(row, cut, own, judge, seen))
        if vlm is not None:
            compared = self._asked(vlm, compared)
        results = [grid if isinstance(grid, Failure) else self._pairs(grid, judge) for grid in compared]
        if vlm is not None and self.recipe.curate.vlm is not None and self.recipe.curate.vlm.captions:
            results = self._captioned(vlm, results)
        return [result if isinstance(result, Failure) else [_final(pair) for pair in result] for result in results]

    def _compare(
        self,
        row: Row,
        cut: seams.Cut,
        embeddings: np.ndarray,
        judge: EmbeddingJudge,
        scores: list[dict[str, float]],
    ) -> Compared:
        kind = self.recipe.curate.format
        cells = [image_cell(panel, f"{row['id']}-{n}.{kind}", kind.upper()) for n, panel in enumerate(cut.panels)]
        hashes, packed = [], []
        if self.recipe.curate.duplicates:
            hashes, packed = [panel_hash(panel) for panel in cut.panels], [pack(own) for own in embeddings]
        looks = [duplicates.look(panel) for panel in cut.panels] if self.bounds.copies is not None else []
        pairs = {}
        for a, b in combinations(range(len(cut.panels)), 2):
            similarity = float(judge.similarity(embeddings[a : a + 1], embeddings[b : b + 1])[0])
            pair = compare(cut.panels[a], cut.panels[b], similarity, self.task)
            if self.bounds.screens:
                pair = replace(pair, screen=records.failed_screen((scores[a], scores[b]), self.bounds.screens))
            if self.bounds.copies is not None:
                likeness = duplicates.measure(looks[a], looks[b], similarity)
                copied = records.failed_copy(likeness, self.bounds.copies)
                pair = replace(pair, likeness=likeness, copied=copied)
            pairs[a, b] = pair
        return Compared(row, cut, cells, pairs, scores, hashes, packed)

    def _asked(self, vlm: VlmJudge, grids: list[Compared | Failure]) -> list[Compared | Failure]:
        """The grids with the vision-language model's judgement in the place of the embedding model's. A grid with a
        question that got no reply is a failure, to be tried again."""
        asked: dict[str, tuple[Compared, tuple[int, int]]] = {}
        for grid in grids:
            if isinstance(grid, Failure):
                continue
            for panels, pair in grid.pairs.items():
                grid.pairs[panels] = waiting = replace(pair, similarity=math.nan, embedding=pair.similarity)
                passes, _ = verdict(replace(waiting, similarity=math.inf), grid.cut.strength, self.thresholds)
                if not pair.similarity >= self._prefilter:
                    grid.pairs[panels] = replace(waiting, unjudged=PREFILTER)
                elif passes:
                    asked[records.pair_id(grid.row["id"], *panels)] = (grid, panels)
        pictures = ((name, grid.cells[a]["bytes"], grid.cells[b]["bytes"]) for name, (grid, (a, b)) in asked.items())
        lost: dict[str, Failure] = {}
        for name, judgement in vlm.decide(pictures).items():
            grid, panels = asked[name]
            grid.pairs[panels] = grid.pairs[panels].judged(judgement)
            if judgement.verdict == "lost":
                lost[grid.row["id"]] = Failure(judgement.reason, lost=True)
        return [lost.get(grid.row["id"], grid) if isinstance(grid, Compared) else grid for grid in grids]

    @property
    def _prefilter(self) -> float:
        return self.recipe.curate.vlm.prefilter if self.recipe.curate.vlm else -math.inf

    def _captioned(self, vlm: VlmJudge, results: list[list[Row] | Failure]) -> list[list[Row] | Failure]:
        """The kept pairs in the model's words. A grid with a pair that got no reply is a failure, to be tried again."""
        from diptych.stages.curate.captioning import caption

        kept = [pair for result in results if isinstance(result, list) for pair in result if pair["kept"]]
        written = caption(vlm.model, self.task, kept)

        def one(result: list[Row] | Failure) -> list[Row] | Failure:
            if isinstance(result, Failure):
                return result
            pairs = [written.get(pair["id"], pair) for pair in result]
            return next((pair for pair in pairs if isinstance(pair, Failure)), None) or [
                pair for pair in pairs if not isinstance(pair, Failure)
            ]

        return [one(result) for result in results]

    def _pairs(self, grid: Compared, judge: EmbeddingJudge) -> list[Row]:
        pairs = []
        for (a, b), compared in grid.pairs.items():
            pairs += [self._pair(grid, compared, order, judge) for order in ((a, b), (b, a))]
        return sorted(pairs, key=lambda pair: pair["id"])

    def _pair(self, grid: Compared, compared: Comparison, order: tuple[int, int], judge: EmbeddingJudge) -> Row:
        reference, target = order
        row, cut, cells = grid.row, grid.cut, grid.cells
        name = records.pair_id(row["id"], reference, target)
        seed = records.seed_of(self.recipe.seed, name, "curate")
        caption = row["panels"][target]
        words = grammar.instruction(self.task, row["subject"], caption, np.random.default_rng(seed))
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
        if compared.change is not None:
            evidence["change"] = {"whole": round(compared.change, 4), "least": compared.least_change}
        if compared.embedding is not None:
            evidence["prefilter"] = {"similarity": compared.embedding, "least": self._prefilter}
            evidence["vlm"] = {"votes": compared.votes}
        if self.screens is not None:
            seen = {"reference": grid.scores[reference], "target": grid.scores[target]}
            evidence["screens"] = {**seen, "limits": self.bounds.screens}
        if compared.likeness is not None:
            evidence["copies"] = {**compared.likeness, "limits": self.bounds.copies}
        if grid.hashes:
            evidence["hashes"] = {"reference": grid.hashes[reference], "target": grid.hashes[target]}
            evidence["embeddings"] = {"reference": grid.embeddings[reference], "target": grid.embeddings[target]}
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
            "evidence": evidence,
        }


def _final(pair: Row) -> Row:
    return {**pair, "evidence": json.dumps(pair["evidence"], ensure_ascii=False, sort_keys=True)}


def _open(row: Row) -> seams.Cut | Failure:
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
    return seams.cut(image, rows, cols, size)


def compare(a: Image, b: Image, similarity: float, task: tasks.Task) -> Comparison:
    """Two panels side by side; the judge's similarity is given."""
    copy = alignment.copy_distance(a, b)
    if task.geometry != "aligned":
        return Comparison(similarity, copy, None)
    structure, change = alignment.structural_fit(a, b), alignment.whole_change(a, b)
    return Comparison(similarity, copy, structure, change, task.curation.thresholds.get("change", 0.0))


def verdict(compared: Comparison, seam: float, limits: Thresholds) -> tuple[bool, str]:
    """Whether a pair is kept, and "kept" or why not. Whatever the thresholds say, panels that should align and do not
    are refused, and those that do but show no change; and so is what a vision-language model was not asked, or could
    not decide."""
    if not compared.aligned:
        return False, MISALIGNED
    if not compared.changed:
        return False, UNCHANGED
    if compared.unjudged:
        passes, reason = _tested(compared, math.inf, seam, limits)
        return False, compared.unjudged if passes else reason
    return _tested(compared, compared.similarity, seam, limits)


def _tested(compared: Comparison, similarity: float, seam: float, limits: Thresholds) -> tuple[bool, str]:
    return records.verdict(similarity, compared.copy.distance, seam, limits, compared.screen, compared.copied)
