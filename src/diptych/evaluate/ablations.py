"""Ablation studies: the YAML file that lists the variants of a recipe, and the table of their scores.

    {"name": …, "recipe": …, "seeds": [0, 1, 2], "sets": {…}, "full": "full", "variants": {"full": {}, …}}

`run.ablate` runs a study. A variant's score is the mean over its training seeds. Intervals resample subjects and
training seeds together, so they cover another suite and another training. Differences from the full method are paired
by subject and by seed. A method that learns nothing from the pairs runs once and is compared with the mean over all
seeds of the full method.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from diptych.errors import UsageError, nearest
from diptych.evaluate.scoring import metrics
from diptych.evaluate.scoring.metrics import ScoreArrays
from diptych.utils import documents
from diptych.utils.paths import packaged

TRAINED = ("student", "adapter")  # methods that learn from the pairs, so that the training seed matters
NAME = r"^[A-Za-z0-9][\w.-]*$"
PLACEHOLDER = re.compile(r"\{([A-Za-z0-9][\w.-]*)\}")  # another variant's run of the same seed


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Variant(_Part):
    """The changes of one variant. `{NAME}` in a text is the run folder of the variant NAME with the same seed."""

    about: str = ""
    """Description for the table."""
    method: Literal["student", "student_shipped", "adapter", "text_only", "copy", "inpaint", "tuned"] = "student"
    """Method of the variant's run to score. For `tuned`, the best of its sweep is scored."""
    beside: tuple[str, ...] = ()
    """Earlier variants to compare with, in addition to the full method."""
    sets: dict[str, Any] = {}
    """Recipe keys that override the study's recipe."""

    @property
    def seeded(self) -> bool:
        """Whether the variant runs once for each training seed."""
        return self.method in TRAINED

    def needs(self) -> list[str]:
        """The variants whose run folders its keys name."""
        return PLACEHOLDER.findall(repr(self.sets))


class Study(_Part):
    """An ablation study."""

    name: str = Field(pattern=NAME)
    recipe: str
    """Recipe to vary: a name, or a file. A relative path is relative to the study's file."""
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    """Training seeds (`distill.seed`). Prompts, grids and candidates are the same for all."""
    sets: dict[str, Any] = {}
    """Recipe keys that override the recipe for every variant."""
    full: str = "full"
    """Variant that the others are compared with."""
    variants: dict[str, Variant] = Field(min_length=1)
    """Variants by name, in the order in which they run and are listed."""

    @model_validator(mode="after")
    def _names(self) -> Study:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds: a seed is listed twice")
        if self.full not in self.variants:
            raise ValueError(f"full: there is no variant '{self.full}'{nearest(self.full, self.variants)}")
        if self.variants[self.full].method != "student":
            raise ValueError(f"variants.{self.full}.method: the full method must be a student")
        before: list[str] = []
        for name, variant in self.variants.items():
            if not re.match(NAME, name):
                raise ValueError(f"variants: '{name}' cannot name a folder; use letters, digits and . _ -")
            for key, others in (("beside", variant.beside), ("sets", variant.needs())):
                if absent := [other for other in others if other not in before]:
                    raise ValueError(f"variants.{name}.{key}: there is no earlier variant '{absent[0]}'")
            before.append(name)
        return self

    def runs(self) -> list[tuple[str, int]]:
        """Variant and seed of every run in order: all variants of the first seed, then of the next."""
        return [(n, s) for s in self.seeds for n, v in self.variants.items() if v.seeded or s == self.seeds[0]]


def names() -> list[str]:
    """The studies that ship with diptych."""
    return sorted(path.stem for path in (packaged("recipes") / "ablations").glob("*.yaml"))


def load(study: str) -> tuple[Study, Path]:
    """A study and its file, by the name of a packaged study or from a file. UsageError for an invalid one."""
    path = Path(study)
    if not path.is_file():
        path = packaged("recipes") / "ablations" / f"{study}.yaml"
    if not path.is_file():
        hint = nearest(study, names())
        raise UsageError("name_unknown", f"Study not found: {study}. Packaged studies: {', '.join(names())}{hint}")
    try:
        return Study.model_validate(documents.parse_yaml(documents.read_text(path), str(path))), path
    except ValidationError as error:
        known = (*Study.model_fields, *Variant.model_fields)
        raise UsageError("recipe_invalid", f"{path}: {documents.first(error, known)}") from error


def fill(value: Any, folders: Mapping[str, Path]) -> Any:
    """Replaces the names of variants in braces by their folders, anywhere in a value."""
    if isinstance(value, str):
        return PLACEHOLDER.sub(lambda match: str(folders[match[1]]), value)
    if isinstance(value, dict):
        return {key: fill(each, folders) for key, each in value.items()}
    return [fill(each, folders) for each in value] if isinstance(value, list) else value


# ---- the table


def row(outcomes: Sequence[ScoreArrays], full: Sequence[ScoreArrays] | None, times: int) -> dict[str, Any]:
    """The row of one variant: `cp`, `pf`, `cp_pf` and `copy_rate` as means over its seeds, their `ci95`, and the
    `cp_pf` of each seed.

    With `full` (the outcomes of the same seeds in the same order, or of all seeds) it has the `difference` from the
    full method, and whether the two intervals are `apart`.
    """
    if not all(np.array_equal(each.identity, outcomes[0].identity) for each in outcomes):
        raise UsageError(
            "suite_mismatch",
            "The runs of a variant have different samples. Evaluate them again with one set of samples and seeds.",
        )
    means = {name: float(np.mean([each.means()[name] for each in outcomes])) for name in metrics.NAMES}
    spread = resampled(outcomes, times)
    result: dict[str, Any] = {name: round(value, 4) for name, value in means.items()}
    count = len(np.unique(outcomes[0].identity))
    result |= {"n": len(outcomes[0].cp), "identities": count, "seeds": len(outcomes)}
    result["ci95"] = metrics.intervals(outcomes, means, spread)
    result["cp_pf_by_seed"] = [round(each.means()["cp_pf"], 4) for each in outcomes]
    if full is None or not np.array_equal(full[0].identity, outcomes[0].identity):
        return result
    full_spread = resampled(full, times)
    between = spread["cp_pf"] - full_spread["cp_pf"]
    base = {name: float(np.mean([each.means()[name] for each in full])) for name in metrics.NAMES}
    gap = means["cp_pf"] - base["cp_pf"]
    ours, theirs = result["ci95"]["cp_pf"], metrics.intervals(full, base, full_spread)["cp_pf"]
    sides = (means["cp_pf"], ours), (base["cp_pf"], theirs)
    tail = min(float((between <= 0).mean()), float((between >= 0).mean()))
    # Resampling alone can give a small p for two subjects; the permutation test cannot.
    exchanged = metrics.permuted(_averaged(outcomes), _averaged(full), "cp_pf", max(times, metrics.PERMUTATIONS))
    p = min(1.0, max(2 * (tail * times + 1) / (times + 1), exchanged))
    ci95 = metrics.difference_interval(gap, between, *sides, count)
    result["difference"] = {"cp_pf": round(gap, 4), "ci95": ci95, "p": round(p, 4)}
    result["difference"]["apart"] = ours[1] < theirs[0] or theirs[1] < ours[0]
    return result


def _averaged(outcomes: Sequence[ScoreArrays]) -> ScoreArrays:
    """The scores of each sample as means over trainings."""
    cp, pf, copied = (np.mean([getattr(x, key) for x in outcomes], axis=0) for key in ("cp", "pf", "copied"))
    return ScoreArrays(outcomes[0].identity, cp, pf, copied)


def resampled(outcomes: Sequence[ScoreArrays], times: int) -> dict[str, np.ndarray]:
    """The scores, shape (times,) each, with subjects and trainings resampled: the same resamplings for every
    variant."""
    counts = metrics.resample(outcomes[0].identity, times)
    weights = metrics.resample(np.arange(len(outcomes)), times, seed=1) / len(outcomes)
    each = [metrics.bootstrap(outcome, counts) for outcome in outcomes]
    return {name: sum(weights[:, i] * each[i][name] for i in range(len(each))) for name in metrics.NAMES}  # pyright: ignore


def markdown(result: Mapping[str, Any]) -> str:
    """The table as a Markdown page."""
    from diptych.evaluate.report.render import template

    def p(gap: Mapping[str, Any], variant: Mapping[str, Any]) -> str:
        return metrics.format_p(gap, identities=variant.get("identities"))

    return template("ablations.md.j2").render(**result, p=p) + "\n"
