"""An ablation study: which variants of a recipe there are and what stands beside them (a YAML file), and one table.

    {"name": …, "recipe": …, "seeds": [0, 1, 2], "sets": {…}, "full": "full", "variants": {"full": {}, …}}

`run.ablate` runs a study; here is what it reads and what it writes. A variant's score is the mean over its training
seeds. Intervals resample subjects and training seeds together, so they hold what another suite and another training
would change; differences from the full method are paired, subject by subject and seed by seed. A method that learns
nothing from the pairs runs once and stands beside the mean of all of the full method's seeds.
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
from diptych.utils.documents import parse_yaml, read_text
from diptych.utils.paths import packaged

TRAINED = ("student", "adapter")  # methods that learn from the pairs, so that a seed makes another
NAME = r"^[A-Za-z0-9][\w.-]*$"
MEANT = re.compile(r"\{([A-Za-z0-9][\w.-]*)\}")  # another variant's run, of the same seed


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Variant(_Part):
    """What one variant changes. `{NAME}` in a text is the run folder of the variant NAME with the same seed."""

    about: str = ""
    """In words, for the table."""
    method: Literal["student", "student_shipped", "adapter", "text_only", "copy", "inpaint", "tuned"] = "student"
    """What of its run is scored; of `tuned` the best of its sweep."""
    beside: tuple[str, ...] = ()
    """Variants before it that it is compared with, apart from the full method."""
    sets: dict[str, Any] = {}
    """Keys laid over the study's recipe."""

    @property
    def seeded(self) -> bool:
        """Whether each training seed makes another."""
        return self.method in TRAINED

    def needs(self) -> list[str]:
        """The variants whose runs it names."""
        return MEANT.findall(repr(self.sets))


class Study(_Part):
    """An ablation study."""

    name: str = Field(pattern=NAME)
    recipe: str
    """The recipe that is varied: a name, or a file (beside this one, if the path is relative)."""
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    """Of training (`distill.seed`): prompts, grids and candidates are the same for all."""
    sets: dict[str, Any] = {}
    """Keys laid over the recipe for every variant."""
    full: str = "full"
    """The variant that the others are compared with."""
    variants: dict[str, Variant] = Field(min_length=1)
    """In the order in which they run and are shown."""

    @model_validator(mode="after")
    def _names(self) -> Study:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds: one is there twice")
        if self.full not in self.variants:
            raise ValueError(f"full: there is no variant '{self.full}'{nearest(self.full, self.variants)}")
        if self.variants[self.full].method != "student":
            raise ValueError(f"variants.{self.full}.method: what the others are compared with is a student")
        before: list[str] = []
        for name, variant in self.variants.items():
            if not re.match(NAME, name):
                raise ValueError(f"variants: '{name}' is no name for a folder")
            for other in variant.beside:
                if other not in before:
                    raise ValueError(f"variants.{name}.beside: {other} is no variant that comes before it")
            for other in variant.needs():
                if other not in before:
                    raise ValueError(f"variants.{name}: {{{other}}} is no variant that comes before it")
            before.append(name)
        return self

    def runs(self) -> list[tuple[str, int]]:
        """Variant and seed of every run, in their order: all of the first seed, then of the next."""
        return [(n, s) for s in self.seeds for n, v in self.variants.items() if v.seeded or s == self.seeds[0]]


def names() -> list[str]:
    """The studies that ship with diptych."""
    return sorted(path.stem for path in (packaged("recipes") / "ablations").glob("*.yaml"))


def load(study: str) -> tuple[Study, Path]:
    """A study by the name of one that ships, or from a file; and its file. UsageError for what is wrong with it."""
    path = Path(study)
    if not path.is_file():
        path = packaged("recipes") / "ablations" / f"{study}.yaml"
    if not path.is_file():
        raise UsageError(f"{study}: no such study; those that ship: {', '.join(names())}{nearest(study, names())}")
    try:
        return Study.model_validate(parse_yaml(read_text(path), str(path))), path
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        said = documents.explain(first)
        raise UsageError(f"{path}: {where}{': ' if where else ''}{said}") from error


def filled(value: Any, folders: Mapping[str, Path]) -> Any:
    """A value with the folders of other variants in the place of their names in braces."""
    if isinstance(value, str):
        return MEANT.sub(lambda found: str(folders[found[1]]), value)
    if isinstance(value, dict):
        return {key: filled(each, folders) for key, each in value.items()}
    return [filled(each, folders) for each in value] if isinstance(value, list) else value


# ---- the table


def row(outcomes: Sequence[ScoreArrays], full: Sequence[ScoreArrays] | None, times: int) -> dict[str, Any]:
    """One variant: `cp`, `pf`, `cp_pf`, `copy_rate` as means over its seeds, their `ci95`, the `cp_pf` of each seed,
    and its `difference` from `full` (the outcomes of the same seeds in the same order, or of all seeds), with whether
    the intervals of the two are `apart`."""
    if not all(np.array_equal(each.identity, outcomes[0].identity) for each in outcomes):
        raise UsageError("a variant's runs were not asked the same: were their samples or seeds changed in between?")
    means = {name: float(np.mean([each.means()[name] for each in outcomes])) for name in metrics.NAMES}
    spread = resampled(outcomes, times)
    result: dict[str, Any] = {name: round(value, 4) for name, value in means.items()}
    count = len(np.unique(outcomes[0].identity))
    result |= {"n": len(outcomes[0].cp), "identities": count, "seeds": len(outcomes)}
    result["ci95"] = metrics.intervals(outcomes, means, spread)
    result["cp_pf_by_seed"] = [round(each.means()["cp_pf"], 4) for each in outcomes]
    if full is None or not np.array_equal(full[0].identity, outcomes[0].identity):
        return result
    wholly = resampled(full, times)
    between = spread["cp_pf"] - wholly["cp_pf"]
    base = {name: float(np.mean([each.means()[name] for each in full])) for name in metrics.NAMES}
    gap = means["cp_pf"] - base["cp_pf"]
    ours, theirs = result["ci95"]["cp_pf"], metrics.intervals(full, base, wholly)["cp_pf"]
    sides = (means["cp_pf"], ours), (base["cp_pf"], theirs)
    tail = min(float((between <= 0).mean()), float((between >= 0).mean()))
    # Resampling alone would find two subjects enough; exchanging them cannot.
    exchanged = metrics.permuted(_averaged(outcomes), _averaged(full), "cp_pf", max(times, metrics.PERMUTATIONS))
    p = min(1.0, max(2 * (tail * times + 1) / (times + 1), exchanged))
    ci95 = metrics.difference_interval(gap, between, *sides, count)
    result["difference"] = {"cp_pf": round(gap, 4), "ci95": ci95, "p": round(p, 4)}
    result["difference"]["apart"] = ours[1] < theirs[0] or theirs[1] < ours[0]
    return result


def _averaged(outcomes: Sequence[ScoreArrays]) -> ScoreArrays:
    """Each sample's scores as means over trainings."""
    cp, pf, copied = (np.mean([getattr(x, key) for x in outcomes], axis=0) for key in ("cp", "pf", "copied"))
    return ScoreArrays(outcomes[0].identity, cp, pf, copied)


def resampled(outcomes: Sequence[ScoreArrays], times: int) -> dict[str, np.ndarray]:
    """The scores, (times,) each, with subjects and trainings drawn anew: the same draws for every variant."""
    draws = metrics.resample(outcomes[0].identity, times)
    picked = metrics.resample(np.arange(len(outcomes)), times, seed=1) / len(outcomes)
    each = [metrics.bootstrap(outcome, draws) for outcome in outcomes]
    return {name: sum(picked[:, i] * each[i][name] for i in range(len(each))) for name in metrics.NAMES}  # pyright: ignore


def markdown(result: Mapping[str, Any]) -> str:
    """The table as a page."""
    from diptych.evaluate.report.render import template

    def p(gap: Mapping[str, Any], found: Mapping[str, Any]) -> str:
        return metrics.p_said(gap, identities=found.get("identities"))

    return template("ablations.md.j2").render(**result, p=p) + "\n"
