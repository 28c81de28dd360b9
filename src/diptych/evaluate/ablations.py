"""An ablation study: which variants of a recipe there are (a YAML file), and the one table that compares them.

    {"name": …, "recipe": …, "seeds": [0, 1, 2], "sets": {…}, "full": "full", "variants": {"full": {}, …}}

`diptych.ablate` runs a study; here is what it reads and what it writes. A variant's score is the mean over its training
seeds. Intervals resample subjects and training seeds together, so they hold what another suite and another training
would change; differences from the full method are paired, subject by subject and seed by seed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from diptych.errors import UsageError, nearest
from diptych.evaluate import metrics
from diptych.evaluate.metrics import Outcome
from diptych.paths import packaged

NAME = r"^[A-Za-z0-9][\w.-]*$"
MEANT = re.compile(r"\{([A-Za-z0-9][\w.-]*)\}")  # another variant's run, of the same seed


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Variant(_Part):
    """What one variant changes. `{NAME}` in a text is the run folder of the variant NAME with the same seed."""

    about: str = ""
    """In words, for the table."""
    method: Literal["student", "adapter"] = "student"
    """What of its run is scored."""
    sets: dict[str, Any] = {}
    """Keys laid over the study's recipe."""

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
        before: list[str] = []
        for name, variant in self.variants.items():
            if not re.match(NAME, name):
                raise ValueError(f"variants: '{name}' is no name for a folder")
            for other in variant.needs():
                if other not in before:
                    raise ValueError(f"variants.{name}: {{{other}}} is no variant that comes before it")
            before.append(name)
        return self


def names() -> list[str]:
    """The studies that ship with diptych."""
    return sorted(path.stem for path in (packaged("recipes") / "ablations").glob("*.yaml"))


def load(study: str) -> tuple[Study, Path]:
    """A study by the name of one that ships, or from a file; and its file. UsageError for what is wrong with it."""
    import yaml

    path = Path(study)
    if not path.is_file():
        path = packaged("recipes") / "ablations" / f"{study}.yaml"
    if not path.is_file():
        raise UsageError(f"{study}: no such study; those that ship: {', '.join(names())}{nearest(study, names())}")
    try:
        return Study.model_validate(yaml.safe_load(path.read_text("utf8"))), path
    except yaml.YAMLError as error:
        raise UsageError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        said = first["msg"].removeprefix("Value error, ")
        raise UsageError(f"{path}: {where}{': ' if where else ''}{said}") from error


def overlay(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Nested keys of several layers, the later over the earlier."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            below = merged.get(key)
            merged[key] = overlay(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def filled(value: Any, folders: Mapping[str, Path]) -> Any:
    """A value with the folders of other variants in the place of their names in braces."""
    if isinstance(value, str):
        return MEANT.sub(lambda found: str(folders[found[1]]), value)
    if isinstance(value, dict):
        return {key: filled(each, folders) for key, each in value.items()}
    return [filled(each, folders) for each in value] if isinstance(value, list) else value


# ---- the table


def row(outcomes: Sequence[Outcome], full: Sequence[Outcome] | None, times: int) -> dict[str, Any]:
    """One variant: `cp`, `pf`, `cp_pf`, `copy_rate` as means over its seeds, their `ci95`, the `cp_pf` of each seed,
    and its `difference` from `full` (the outcomes of the same seeds, in the same order)."""
    if not all(np.array_equal(each.identity, outcomes[0].identity) for each in outcomes):
        raise UsageError("a variant's runs were not asked the same: were their samples or seeds changed in between?")
    means = {name: float(np.mean([each.means()[name] for each in outcomes])) for name in metrics.NAMES}
    spread = resampled(outcomes, times)
    result: dict[str, Any] = {name: round(value, 4) for name, value in means.items()}
    result |= {"n": len(outcomes[0].cp), "seeds": len(outcomes)}
    result["ci95"] = {name: metrics.interval(spread[name]) for name in metrics.NAMES}
    result["cp_pf_by_seed"] = [round(each.means()["cp_pf"], 4) for each in outcomes]
    if full is None or not np.array_equal(full[0].identity, outcomes[0].identity):
        return result
    apart = spread["cp_pf"] - resampled(full, times)["cp_pf"]
    gap = means["cp_pf"] - float(np.mean([each.means()["cp_pf"] for each in full]))
    tail = min(float((apart <= 0).mean()), float((apart >= 0).mean()))
    p = min(1.0, 2 * (tail * times + 1) / (times + 1))
    result["difference"] = {"cp_pf": round(gap, 4), "ci95": metrics.interval(apart), "p": round(p, 4)}
    return result


def resampled(outcomes: Sequence[Outcome], times: int) -> dict[str, np.ndarray]:
    """The scores, (times,) each, with subjects and trainings drawn anew: the same draws for every variant."""
    draws = metrics.resample(outcomes[0].identity, times)
    picked = metrics.resample(np.arange(len(outcomes)), times, seed=1) / len(outcomes)
    each = [metrics.bootstrap(outcome, draws) for outcome in outcomes]
    return {name: sum(picked[:, i] * each[i][name] for i in range(len(each))) for name in metrics.NAMES}  # pyright: ignore


def markdown(result: Mapping[str, Any]) -> str:
    """The table as a page."""
    lines = [
        f"# Ablations: {result['name']}",
        "",
        f"Suite `{result['suite']}` version {result['version']}; {result['subjects']} subjects × {result['prompts']} "
        f"prompts; training seeds {', '.join(map(str, result['seeds']))}. Means over seeds, 95 % intervals over "
        f"subjects and seeds; the difference is that from `{result['full']}`, paired.",
        "",
        "| variant | CP·PF | CP | PF | copy rate | difference | p | seeds | training |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, found in result["variants"].items():
        scores = [f"{found[key]:.3f} ({_interval(found['ci95'][key])})" for key in ("cp_pf", "cp", "pf")]
        gap = found.get("difference")
        shown = f"{gap['cp_pf']:+.3f} ({_interval(gap['ci95'], '+')})" if gap else "–"
        tail = [shown, f"{gap['p']:.3f}" if gap else "–", str(found["seeds"]), f"{found['training_seconds']:.0f} s"]
        copied = f"{100 * found['copy_rate']:.1f} %"
        lines.append(f"| {' | '.join([name, *scores, copied, *tail])} |")
    lines += ["", *(f"- `{name}`: {found['about']}" for name, found in result["variants"].items() if found["about"])]
    if result["missing"]:
        lines += ["", f"Not run yet: {', '.join(result['missing'])}."]
    return "\n".join(lines) + "\n"


def _interval(ends: Sequence[float], sign: str = "") -> str:
    low, high = (f"{end:{sign}.3f}" for end in ends)
    return f"{low} to {high}"
