"""Stage 3, curate: cuts grids into panels, compares the panels, and gives every ordered pair a verdict.

Each grid is cut at its seams (`seams`). Each panel is screened (`screens`), each two panels are aligned (`alignment`)
and compared by the judge, and the pair gets a caption and an instruction. Nothing is deleted: a rejected pair is a row
with its reason, and all measurements are stored, so that other thresholds need no new evaluation of any image.
docs/curation.md has all tests in their order.

The judge is the embedding model or, with `curate.vlm`, a vision-language model. The latter judges each two panels that
pass all other tests, including the embedding model's, once.
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

from diptych.data import records, verdicts
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

# For tasks whose panels show the same spot at the same pixel. Not thresholds of the recipe: a pair that is off by more
# than 1.5 of 64 pixels (at the border, a change of scale of 1/20) is not aligned, and unrelated scenes do not match.
ALIGNED_SHIFT = 1.5 / alignment.FINE
ALIGNED_MATCH = 0.25
MISALIGNED = "alignment"
UNCHANGED = "unchanged"
PREFILTER = "prefilter"


@dataclass(frozen=True)
class Comparison:
    """The measurements of two panels, independent of their order."""

    similarity: float  # of the deciding judge; NaN without a judgement
    copy: alignment.Alignment
    structure: alignment.Structure | None
    change: float | None = None  # of the whole image; None where panels need not align
    least_change: float = 0.0  # the task's threshold
    unjudged: str = ""  # why there is no judgement; the reason for rejection if the pair passes all other tests
    votes: tuple[dict[str, Any], ...] = ()
    embedding: float | None = None  # similarity by the embedding model, where a vision-language model decides
    screen: str = ""  # the first screen that one of the panels fails
    likeness: dict[str, float] | None = None  # measurements for copies besides pixels; None without `curate.copies`
    copied: str = ""  # the first of these tests that detects a copy

    @property
    def aligned(self) -> bool:
        """Whether the panels align; True for tasks that do not need it."""
        return self.structure is None or (
            self.structure.shift <= ALIGNED_SHIFT
            and self.structure.scale == 1
            and self.structure.match >= ALIGNED_MATCH
        )

    @property
    def changed(self) -> bool:
        """Whether the image as a whole changed enough; True for tasks that do not need it."""
        return self.change is None or self.change >= self.least_change

    def judged(self, judgement: Judgement) -> Comparison:
        """Return the comparison with the judgement of a vision-language model."""
        unjudged = f"undecided: {judgement.reason}" if judgement.verdict == "undecided" else ""
        return replace(self, similarity=judgement.score, unjudged=unjudged, votes=judgement.votes)


@dataclass(frozen=True)
class Compared:
    """A grid that is cut, and the measurements of every two of its panels."""

    row: Row
    cut: seams.Cut
    cells: list[dict[str, Any]]
    pairs: dict[tuple[int, int], Comparison]
    scores: list[dict[str, float]]  # of each panel, by screen; empty if the recipe has no screens
    hashes: list[str]  # of each panel; empty if the recipe does not search for duplicates
    embeddings: list[str]  # of each panel, packed; empty like the hashes


class CurateStage:
    """Turns grid rows into candidate rows: both orders of every two panels.

    `answers` is the file that stores a vision-language model's answers, so that no question is sent twice, even after a
    kill.
    """

    name = "curate"

    def __init__(self, recipe: Recipe, answers: Path | None = None) -> None:
        self.recipe = recipe
        self.answers = answers
        self.batch_size = recipe.curate.batch_size
        self.task = tasks.load(recipe.task)
        self.thresholds = self.task.thresholds(recipe.curate.thresholds)
        self.screens = recipe.curate.screens
        self.bounds = verdicts.Bounds.of(recipe.curate)

    def load(self) -> Work:
        """Open the judges."""
        import torch

        from diptych.judges.embedding import EmbeddingJudge

        if self.recipe.threads is not None:
            torch.set_num_threads(self.recipe.threads)
        judge = EmbeddingJudge.load(self.recipe.curate.judge, "curator", self.recipe.device)
        settings = self.screens.classifiers if self.screens else ()
        classifiers = [screens.load(one, self.recipe.device) for one in settings]
        return self.work(judge, self._vlm(), classifiers)

    def work(
        self, judge: EmbeddingJudge, vlm: VlmJudge | None, classifiers: Sequence[screens.PanelScreen] = ()
    ) -> Work:
        """Return the stage with its judges and the classifiers of its screens."""
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
        classifiers: Sequence[screens.PanelScreen],
    ) -> list[list[Row] | Failure]:
        # A broken grid becomes a Failure and not an exception: the others must stay one batch, for the same bits.
        cuts = [_cut(row) for row in rows]
        panels = [panel for cut in cuts if isinstance(cut, seams.Cut) for panel in cut.panels]
        scores = iter(screens.scores(panels, classifiers) if self.screens else ())
        embeddings = iter(judge.embed(panels) if panels else ())
        compared: list[Compared | Failure] = []
        for row, cut in zip(rows, cuts, strict=True):
            if isinstance(cut, Failure):
                compared.append(cut)
            else:
                vectors = np.stack([next(embeddings) for _ in cut.panels])
                screened = [next(scores) for _ in cut.panels] if self.screens else []
                compared.append(self._compare(row, cut, vectors, judge, screened))
        if vlm is not None:
            compared = self._judged_by_vlm(vlm, compared)
        results = [grid if isinstance(grid, Failure) else self._pairs(grid, judge) for grid in compared]
        if vlm is not None and self.recipe.curate.vlm is not None and self.recipe.curate.vlm.captions:
            results = self._captioned(vlm, results)
        for result in results:
            for pair in result if isinstance(result, list) else ():
                pair["evidence"] = json.dumps(pair["evidence"], ensure_ascii=False, sort_keys=True)
        return results

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
            hashes, packed = [panel_hash(panel) for panel in cut.panels], [pack(vector) for vector in embeddings]
        both = [duplicates.hash_both(panel) for panel in cut.panels] if self.bounds.copies is not None else []
        pairs = {}
        for a, b in combinations(range(len(cut.panels)), 2):
            similarity = float(judge.similarity(embeddings[a : a + 1], embeddings[b : b + 1])[0])
            pair = compare(cut.panels[a], cut.panels[b], similarity, self.task)
            if self.bounds.screens:
                pair = replace(pair, screen=verdicts.failed_screen((scores[a], scores[b]), self.bounds.screens))
            if self.bounds.copies is not None:
                likeness = duplicates.measure(both[a], both[b], similarity)
                copied = verdicts.failed_copy(likeness, self.bounds.copies)
                pair = replace(pair, likeness=likeness, copied=copied)
            pairs[a, b] = pair
        return Compared(row, cut, cells, pairs, scores, hashes, packed)

    def _judged_by_vlm(self, vlm: VlmJudge, grids: list[Compared | Failure]) -> list[Compared | Failure]:
        """Return the grids with the vision-language model's judgement instead of the embedding model's.

        A grid with a question that got no reply is a failure, to be tried again.
        """
        questions: dict[str, tuple[Compared, tuple[int, int]]] = {}
        for grid in grids:
            if isinstance(grid, Failure):
                continue
            for panels, pair in grid.pairs.items():
                grid.pairs[panels] = waiting = replace(pair, similarity=math.nan, embedding=pair.similarity)
                passes, _ = verdict(replace(waiting, similarity=math.inf), grid.cut.strength, self.thresholds)
                if not pair.similarity >= self._prefilter:
                    grid.pairs[panels] = replace(waiting, unjudged=PREFILTER)
                elif passes:
                    questions[records.pair_id(grid.row["id"], *panels)] = (grid, panels)
        images = ((name, grid.cells[a]["bytes"], grid.cells[b]["bytes"]) for name, (grid, (a, b)) in questions.items())
        lost: dict[str, Failure] = {}
        for name, judgement in vlm.decide(images).items():
            grid, panels = questions[name]
            grid.pairs[panels] = grid.pairs[panels].judged(judgement)
            if judgement.verdict == "lost":
                lost[grid.row["id"]] = Failure(judgement.reason, lost=True)
        return [lost.get(grid.row["id"], grid) if isinstance(grid, Compared) else grid for grid in grids]

    @property
    def _prefilter(self) -> float:
        return self.recipe.curate.vlm.prefilter if self.recipe.curate.vlm else -math.inf

    def _captioned(self, vlm: VlmJudge, results: list[list[Row] | Failure]) -> list[list[Row] | Failure]:
        """Return the pairs, the accepted ones with the model's captions.

        A grid with a pair that got no reply is a failure, to be tried again.
        """
        from diptych.stages.curate.captioning import caption

        kept = [pair for result in results if isinstance(result, list) for pair in result if pair["kept"]]
        written = caption(vlm.model, self.task, kept)

        def one(result: list[Row] | Failure) -> list[Row] | Failure:
            if isinstance(result, Failure):
                return result
            pairs = [written.get(pair["id"], pair) for pair in result]
            lost = [pair for pair in pairs if isinstance(pair, Failure)]
            return lost[0] if lost else pairs  # pyright: ignore[reportReturnType]

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
        instruction = grammar.instruction(self.task, row["subject"], caption, np.random.default_rng(seed))
        kept, reason = verdict(compared, cut.strength, self.thresholds)
        evidence = {
            "seams": cut.evidence(),
            "copy": compared.copy.evidence(),
            "structure": compared.structure.evidence() if compared.structure else None,
            "judge": self.recipe.curate.judge,
            "thresholds": {test: getattr(self.thresholds, test) for test in verdicts.TESTS},
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
            scores = {"reference": grid.scores[reference], "target": grid.scores[target]}
            evidence["screens"] = {**scores, "limits": self.bounds.screens}
        if compared.likeness is not None:
            evidence["copies"] = {**compared.likeness, "limits": self.bounds.copies}
        if grid.hashes:
            evidence["hashes"] = {"reference": grid.hashes[reference], "target": grid.hashes[target]}
            evidence["embeddings"] = {"reference": grid.embeddings[reference], "target": grid.embeddings[target]}
        return {
            "conditioning": cells[reference],
            "image": cells[target],
            "caption": caption,
            "instruction": instruction,
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


def _cut(row: Row) -> seams.Cut | Failure:
    """Cut a grid into its panels, or return the reason why it cannot be cut."""
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
    """Measure two panels; `similarity` is the judge's."""
    copy = alignment.copy_distance(a, b)
    if task.geometry != "aligned":
        return Comparison(similarity, copy, None)
    structure, change = alignment.structural_fit(a, b), alignment.whole_change(a, b)
    return Comparison(similarity, copy, structure, change, task.curation.thresholds.get("change", 0.0))


def verdict(compared: Comparison, seam: float, limits: Thresholds) -> tuple[bool, str]:
    """Return whether a pair is accepted, and "kept" or the reason for rejection.

    With any thresholds, these pairs are rejected: panels that should align and do not, aligned panels without a change,
    and pairs that a vision-language model did not judge or could not decide.
    """
    if not compared.aligned:
        return False, MISALIGNED
    if not compared.changed:
        return False, UNCHANGED
    if compared.unjudged:
        passes, reason = _test(compared, math.inf, seam, limits)
        return False, compared.unjudged if passes else reason
    return _test(compared, compared.similarity, seam, limits)


def _test(compared: Comparison, similarity: float, seam: float, limits: Thresholds) -> tuple[bool, str]:
    return verdicts.verdict(similarity, compared.copy.distance, seam, limits, compared.screen, compared.copied)
