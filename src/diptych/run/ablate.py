"""Runs an ablation study (`evaluate.ablations`): what is missing of every variant and seed, and the table of them all.

    ablate("pocket", "runs/ablations")

The folder: `base/` has the prompts, grids and pairs that all share (or another run is named for them).
`VARIANT/seed-N/` is a run like any other, whose prompts, grids and, where curation is the same, candidates are hard
links to the base's: nothing is painted or judged again. `ablations.json` and `ablations.md` are the table, written anew
after every run. Called again it goes on where it was.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from diptych import recipe as recipes
from diptych.data import places
from diptych.data.places import link_all
from diptych.data.scan import open_run
from diptych.errors import UsageError
from diptych.evaluate import ablations
from diptych.evaluate.ablations import Study, Variant
from diptych.evaluate.evaluation import overlay
from diptych.recipe.schema import Recipe
from diptych.run.recurate import derive
from diptych.run.runner import run
from diptych.utils.console import Display
from diptych.utils.documents import parse_json
from diptych.utils.io import write_atomic
from diptych.utils.machine import machine, versions

ROWS = ("write", "paint", "curate")
LATENTS = Path("student") / "training" / "latents"
OF_ADAPTER = Path("baselines") / "adapter" / "latents"
LATENT_FILES = "*/part-*.safetensors"


def ablate(
    study: str,
    out: str | Path,
    display: Display | None = None,
    base: str | Path | None = None,
    only: Sequence[str] = (),
    sets: Sequence[str] = (),
) -> dict[str, Any]:
    """Runs what is missing and returns the table, which it also writes.

    Args:
        study: a file, or the name of one that ships.
        out: the study's folder.
        base: a curated run to take prompts, grids and candidates from, whatever the study says of them; None makes one
            in `out`.
        only: variants to run; the others are shown as far as they are.
        sets: keys laid over the recipe of every variant, as `"distill.steps=200"`.

    Raises UsageError for a study that does not fit together; what its runs raise passes through.
    """
    display, out = display or Display(), Path(out).absolute()
    plan, file = ablations.load(study)
    for name in only:
        if name not in plan.variants:
            raise UsageError(f"--only {name}: the study has {', '.join(plan.variants)}")
    said = plan.sets if base is None else _later(plan.sets)
    shared = overlay(said, *(recipes.parse_set(text) for text in sets))
    if base is None:
        source, beside = out / "base", file.parent / plan.recipe
        start = recipes.load(beside if beside.is_file() else plan.recipe).values()
        recipe = recipes.check(overlay(start, shared, {"name": f"{plan.name}-base"}), str(file))
        _recipes(plan, recipe, shared, out, file)  # what is wrong with a variant is told before hours of painting
        display.say(f"base: {source}")
        run(recipe, source, ROWS, display)
    else:
        source = Path(base).absolute()
    _, frozen, _ = open_run(source)
    wanted = _recipes(plan, frozen, shared, out, file)
    result: dict[str, Any] = {}
    for (name, seed), recipe in wanted.items():
        if only and name not in only:
            continue
        display.say(f"{name}, seed {seed}: {place(out, name, seed)}")
        _run(plan, name, seed, recipe, source, out, display)
        result = _write(plan, out)
    return result or _write(plan, out)


def place(out: Path, name: str, seed: int) -> Path:
    """The run folder of a variant's training."""
    return out / name / f"seed-{seed}"


def _recipes(plan: Study, base: Recipe, shared: dict[str, Any], out: Path, file: Path) -> dict[tuple[str, int], Recipe]:
    """The recipe of every run, in the order in which they run."""
    return {(name, seed): _recipe(plan, name, seed, base, shared, out, file) for name, seed in plan.runs()}


def _later(sets: Mapping[str, Any]) -> dict[str, Any]:
    """What a study says of the stages after judging."""
    limits = sets.get("curate", {}).get("thresholds")
    later = {key: value for key, value in sets.items() if key not in ROWS}
    return later | ({"curate": {"thresholds": limits}} if limits else {})


def _recipe(plan: Study, name: str, seed: int, base: Recipe, shared: dict[str, Any], out: Path, file: Path) -> Recipe:
    """The recipe of one run. UsageError if it changes what comes before curation's thresholds."""
    variant = plan.variants[name]
    own = ablations.filled(variant.sets, {other: place(out, other, seed) for other in variant.needs()})
    # One run is enough to show what the scores can reach and how good the judges are.
    evaluate = {"methods": [variant.method], "yardsticks": (name, seed) == (plan.full, plan.seeds[0])}
    fixed = {"name": f"{name}-{seed}", "distill": {"seed": seed}, "evaluate": evaluate}
    recipe = recipes.check(overlay(base.values(), shared, own, fixed), f"{file}: variants.{name}")
    free = ("name", "distill.", "evaluate.", "curate.thresholds")
    if early := [key for key in base.differences(recipe) if not key.startswith(free)]:
        raise UsageError(
            f"{file}: variants.{name} changes {', '.join(early)}: all variants share the prompts, grids and candidates "
            "of one run, so only distill, evaluate and curate.thresholds can differ"
        )
    return recipe


def _run(plan: Study, name: str, seed: int, recipe: Recipe, source: Path, out: Path, display: Display) -> None:
    folder, first = place(out, name, seed), place(out, name, plan.seeds[0])
    # The first seed's candidates are this variant's, judged under its thresholds: linked, and not written again.
    whole = first != folder and (first / "pairs" / "manifest.json").is_file()
    derive(first if whole else source, recipe, folder, display)
    frozen, method = recipes.load(folder / "recipe.yaml"), plan.variants[name].method
    if method == "student":
        for cached in (place(out, plan.full, plan.seeds[0]), first):
            link_all(cached / LATENTS, folder / LATENTS, LATENT_FILES)
        run(frozen, folder, ("distill",), display)
    elif method == "adapter":
        from diptych.evaluate.methods import adapter

        link_all(first / OF_ADAPTER, folder / OF_ADAPTER, LATENT_FILES)
        with display.stage("adapter", "steps") as report:
            adapter.fit(frozen, folder, report)
    run(frozen, folder, ("evaluate",), display)


# ---- the table


def _write(plan: Study, out: Path) -> dict[str, Any]:
    """The table of the runs that are scored, as `ablations.json` and `ablations.md`."""
    result = table(plan, out)
    if result["variants"]:
        write_atomic(out / "ablations.json", (json.dumps(result, indent=1, allow_nan=False) + "\n").encode())
        write_atomic(out / "ablations.md", ablations.markdown(result).encode())
    return result


class Scored(NamedTuple):
    """A run that is scored."""

    metrics: dict[str, Any]
    lines: list[dict[str, Any]]  # one for each picture
    seconds: float  # of training: of the run's student or adapter, of one subject, or none
    method: str  # what of it is shown


def table(plan: Study, out: Path) -> dict[str, Any]:
    """All variants with a scored run: the main split, and the others under `splits`. `missing` are runs without one,
    `seconds` what all stages of all runs took that reached their end."""
    from diptych.evaluate.suites import MAIN

    scored = {(n, s): found for n, s in plan.runs() if (found := _scores(plan, out, n, s))}
    result: dict[str, Any] = {"name": plan.name, "full": plan.full, "seeds": list(plan.seeds)}
    result["missing"] = [f"{n} (seed {s})" for n, s in plan.runs() if (n, s) not in scored]
    result |= {"variants": {}, "splits": {}, "machine": machine(), "versions": versions()}
    result["seconds"] = round(_seconds(plan, out), 1)
    for name, variant in plan.variants.items():
        own = {seed: scored[name, seed] for seed in plan.seeds if (name, seed) in scored}
        if not own:
            continue
        metrics = next(iter(own.values())).metrics
        if name == plan.full or "suite" not in result:
            result |= {key: metrics[key] for key in ("suite", "version", "prompts")}
            result["subjects"] = metrics["identities"]
        for split in (MAIN, *metrics["splits"]):
            found = _row(plan, name, variant, own, scored, split)
            if split == MAIN:
                result["variants"][name] = found
            else:
                result["splits"].setdefault(split, {})[name] = found
    return result


def _row(
    plan: Study,
    name: str,
    variant: Variant,
    own: dict[int, Scored],
    scored: dict[tuple[str, int], Scored],
    split: str,
) -> dict[str, Any]:
    """A variant's row on one split; compared with the full method, and with what it stands beside, on the seeds that
    both have and the pictures that the variant was asked for."""
    from diptych.evaluate.scoring.summary import outcome

    one = next(iter(own.values()))
    asked = {line["id"] for line in one.lines}

    def outcomes(of: str, seeds: Sequence[int]) -> list[Any]:
        found = (scored[of, seed] for seed in seeds)
        return [outcome([x for x in each.lines if x["id"] in asked], each.method, split) for each in found]

    def gap(other: str) -> dict[str, Any]:
        """Its difference from another variant, seed by seed where both have seeds; empty if that has no scores."""
        ours, theirs = list(own), [seed for seed in plan.seeds if (other, seed) in scored]
        if variant.seeded and plan.variants[other].seeded:
            ours = theirs = [seed for seed in theirs if seed in own]
        if not theirs:
            return {}
        found = ablations.row(outcomes(name, ours), outcomes(other, theirs), times).get("difference", {})
        return found and {**found, "seeds": len(theirs)}

    times = one.metrics["settings"]["bootstrap"]
    row = ablations.row(outcomes(name, list(own)), None, times)
    if name != plan.full and (found := gap(plan.full)):
        row["difference"] = found
    row["beside"] = {other: found for other in variant.beside if (found := gap(other))}
    row["training_seconds"] = round(sum(each.seconds for each in own.values()) / len(own), 2)
    row["seconds_per_image"] = one.metrics["methods"][one.method]["seconds_per_image"]
    if variant.method == "tuned":
        row |= {"picked": one.method, "sweep": {each: s["cp_pf"] for each, s in one.metrics["methods"].items()}}
    return {"about": variant.about, **row}


def _scores(plan: Study, out: Path, name: str, seed: int) -> Scored | None:
    """A run's scores; None if it is not scored."""
    folder, method = place(out, name, seed), plan.variants[name].method
    trained = {"adapter": "baselines/adapter/adapter.json", "student": "student/training/summary.json"}.get(method)
    try:
        metrics = parse_json((folder / "report" / "metrics.json").read_text("utf8"))
        text = (folder / "samples" / "scores.jsonl").read_text("utf8")
        about: dict[str, Any] = parse_json((folder / trained).read_text("utf8")) if trained else {"seconds": 0.0}
    except (OSError, ValueError):
        return None
    lines, methods = [parse_json(line) for line in text.splitlines()], metrics["methods"]
    if method == "tuned":  # the best of the sweep, picked with the scores in sight: in the baseline's favour
        method = max(methods, key=lambda each: methods[each]["cp_pf"])
        about = {"seconds": methods[method]["seconds_per_subject"]}
    return Scored(metrics, lines, float(about.get("summary", about)["seconds"]), method)


def _seconds(plan: Study, out: Path) -> float:
    """What the stages of the base, if it was made here, and of every run took."""
    folders = [out / "base", *(place(out, name, seed) for name, seed in plan.runs())]
    spent = sum(sum(places.seconds(folder).values()) for folder in folders)
    for name, seed in plan.runs():
        if plan.variants[name].method == "adapter" and (found := _scores(plan, out, name, seed)):
            spent += found.seconds  # not a stage of the run
    return spent


def lines(result: dict[str, Any]) -> list[str]:
    """The table, for people."""
    return ablations.markdown(result).splitlines() if result["variants"] else ["nothing has been scored yet"]
