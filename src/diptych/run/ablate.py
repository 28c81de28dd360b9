"""Runs an ablation study (`evaluate.ablations`): every variant with every seed, and a table of the results.

    ablate("pocket", "runs/ablations")

In the study's folder, `base/` has the prompts, grids and pairs that all variants share (you can name another run).
`VARIANT/seed-N/` is a normal run. Its prompts, grids and, if curation is the same, candidates are hard links to those
of the base, so nothing is painted or judged again. `ablations.json` and `ablations.md` are the table, rewritten after
every run. Another call resumes the study.
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
from diptych.run.derive import derive
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
    """Run what is missing, write the table and return it.

    Args:
        study: a file, or the name of a shipped study.
        out: the study's folder.
        base: a curated run with the prompts, grids and candidates, which overrides the study's settings for these
            stages; None makes one in `out`.
        only: variants to run. The table also has the existing results of the others.
        sets: keys for the recipe of every variant, such as `"distill.steps=200"`.

    Raises UsageError for an invalid study. Errors of its runs pass through.
    """
    display, out = display or Display(), Path(out).absolute()
    plan, file = ablations.load(study)
    for name in only:
        if name not in plan.variants:
            known = f"Variants: {', '.join(plan.variants)}"
            raise UsageError("name_unknown", f"--only {name}: the study has no such variant. {known}")
    settings = plan.sets if base is None else _after_judging(plan.sets)
    shared = overlay(settings, *(recipes.parse_set(text) for text in sets))
    if base is None:
        source, local = out / "base", file.parent / plan.recipe
        start = recipes.load(local if local.is_file() else plan.recipe).values()
        recipe = recipes.check(overlay(start, shared, {"name": f"{plan.name}-base"}), str(file))
        _recipes(plan, recipe, shared, out, file)  # finds errors of a variant before hours of painting
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
    """Return the run folder of a variant's training."""
    return out / name / f"seed-{seed}"


def _recipes(plan: Study, base: Recipe, shared: dict[str, Any], out: Path, file: Path) -> dict[tuple[str, int], Recipe]:
    """Return the recipe of every run, in order."""
    return {(name, seed): _recipe(plan, name, seed, base, shared, out, file) for name, seed in plan.runs()}


def _after_judging(sets: Mapping[str, Any]) -> dict[str, Any]:
    """Return a study's settings for the stages after judging."""
    limits = sets.get("curate", {}).get("thresholds")
    later = {key: value for key, value in sets.items() if key not in ROWS}
    return later | ({"curate": {"thresholds": limits}} if limits else {})


def _recipe(plan: Study, name: str, seed: int, base: Recipe, shared: dict[str, Any], out: Path, file: Path) -> Recipe:
    """Return the recipe of one run. Raises UsageError if it changes a stage before curation's thresholds."""
    variant = plan.variants[name]
    filled = ablations.fill(variant.sets, {other: place(out, other, seed) for other in variant.needs()})
    # One run is enough for the range of the scores and the quality of the judges.
    evaluate = {"methods": [variant.method], "yardsticks": (name, seed) == (plan.full, plan.seeds[0])}
    fixed = {"name": f"{name}-{seed}", "distill": {"seed": seed}, "evaluate": evaluate}
    recipe = recipes.check(overlay(base.values(), shared, filled, fixed), f"{file}: variants.{name}")
    free = ("name", "distill.", "evaluate.", "curate.thresholds")
    if early := [key for key in base.differences(recipe) if not key.startswith(free)]:
        raise UsageError(
            "recipe_conflict",
            f"{file}: variants.{name} changes {', '.join(early)}. All variants share the prompts, grids and candidates "
            "of one run, so only distill, evaluate and curate.thresholds can differ.",
        )
    return recipe


def _run(plan: Study, name: str, seed: int, recipe: Recipe, source: Path, out: Path, display: Display) -> None:
    folder, first = place(out, name, seed), place(out, name, plan.seeds[0])
    # The first seed has the candidates with this variant's thresholds already, so they are linked.
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


def _write(plan: Study, out: Path) -> dict[str, Any]:
    """Write the table of the scored runs to `ablations.json` and `ablations.md`."""
    result = table(plan, out)
    if result["variants"]:
        write_atomic(out / "ablations.json", (json.dumps(result, indent=1, allow_nan=False) + "\n").encode())
        write_atomic(out / "ablations.md", ablations.markdown(result).encode())
    return result


class Scored(NamedTuple):
    """The scores of a run."""

    metrics: dict[str, Any]
    lines: list[dict[str, Any]]  # one for each image
    seconds: float  # of training the run's student or adapter, or of tuning for one subject; 0 without training
    method: str  # the method that the table shows


def table(plan: Study, out: Path) -> dict[str, Any]:
    """Return all variants with a scored run: the main split, and the others under `splits`.

    `missing` lists the runs without scores, and `seconds` is the time of all completed stages of all runs.
    """
    from diptych.evaluate.suites import MAIN

    scored = {(n, s): scores for n, s in plan.runs() if (scores := _scores(plan, out, n, s))}
    result: dict[str, Any] = {"name": plan.name, "full": plan.full, "seeds": list(plan.seeds)}
    result["missing"] = [f"{n} (seed {s})" for n, s in plan.runs() if (n, s) not in scored]
    result |= {"variants": {}, "splits": {}, "machine": machine(), "versions": versions()}
    result["seconds"] = round(_seconds(plan, out), 1)
    for name, variant in plan.variants.items():
        by_seed = {seed: scored[name, seed] for seed in plan.seeds if (name, seed) in scored}
        if not by_seed:
            continue
        metrics = next(iter(by_seed.values())).metrics
        if name == plan.full or "suite" not in result:
            result |= {key: metrics[key] for key in ("suite", "version", "prompts")}
            result["subjects"] = metrics["identities"]
        for split in (MAIN, *metrics["splits"]):
            rows = result["variants"] if split == MAIN else result["splits"].setdefault(split, {})
            rows[name] = _row(plan, name, variant, by_seed, scored, split)
    return result


def _row(
    plan: Study,
    name: str,
    variant: Variant,
    by_seed: dict[int, Scored],
    scored: dict[tuple[str, int], Scored],
    split: str,
) -> dict[str, Any]:
    """Return a variant's row on one split, with its differences from the full method and from the variants in `beside`.

    Differences use the seeds that both variants have, and the images that this variant generated.
    """
    from diptych.evaluate.scoring.summary import outcome

    one = next(iter(by_seed.values()))
    images = {line["id"] for line in one.lines}

    def outcomes(of: str, seeds: Sequence[int]) -> list[Any]:
        runs = (scored[of, seed] for seed in seeds)
        return [outcome([x for x in each.lines if x["id"] in images], each.method, split) for each in runs]

    def gap(other: str) -> dict[str, Any]:
        """Return the difference from another variant, paired by seed if both have seeds; empty without scores."""
        ours, theirs = list(by_seed), [seed for seed in plan.seeds if (other, seed) in scored]
        if variant.seeded and plan.variants[other].seeded:
            ours = theirs = [seed for seed in theirs if seed in by_seed]
        if not theirs:
            return {}
        difference = ablations.row(outcomes(name, ours), outcomes(other, theirs), times).get("difference", {})
        return difference and {**difference, "seeds": len(theirs)}

    times = one.metrics["settings"]["bootstrap"]
    row = ablations.row(outcomes(name, list(by_seed)), None, times)
    if name != plan.full and (difference := gap(plan.full)):
        row["difference"] = difference
    row["beside"] = {other: difference for other in variant.beside if (difference := gap(other))}
    row["training_seconds"] = round(sum(each.seconds for each in by_seed.values()) / len(by_seed), 2)
    row["seconds_per_image"] = one.metrics["methods"][one.method]["seconds_per_image"]
    if variant.method == "tuned":
        row |= {"picked": one.method, "sweep": {each: s["cp_pf"] for each, s in one.metrics["methods"].items()}}
    return {"about": variant.about, **row}


def _scores(plan: Study, out: Path, name: str, seed: int) -> Scored | None:
    """Return a run's scores; None if it is not scored."""
    folder, method = place(out, name, seed), plan.variants[name].method
    trained = {"adapter": "baselines/adapter/adapter.json", "student": "student/training/summary.json"}.get(method)
    try:
        metrics = parse_json((folder / "report" / "metrics.json").read_text("utf8"))
        text = (folder / "samples" / "scores.jsonl").read_text("utf8")
        about: dict[str, Any] = parse_json((folder / trained).read_text("utf8")) if trained else {"seconds": 0.0}
    except (OSError, ValueError):
        return None
    lines, methods = [parse_json(line) for line in text.splitlines()], metrics["methods"]
    if method == "tuned":  # the best of the sweep by the scores, which favors the baseline
        method = max(methods, key=lambda each: methods[each]["cp_pf"])
        about = {"seconds": methods[method]["seconds_per_subject"]}
    return Scored(metrics, lines, float(about.get("summary", about)["seconds"]), method)


def _seconds(plan: Study, out: Path) -> float:
    """Return the seconds of all stages of every run, and of the base if it is in `out`."""
    folders = [out / "base", *(place(out, name, seed) for name, seed in plan.runs())]
    spent = sum(sum(places.seconds(folder).values()) for folder in folders)
    for name, seed in plan.runs():
        if plan.variants[name].method == "adapter" and (scores := _scores(plan, out, name, seed)):
            spent += scores.seconds  # not a stage of the run
    return spent


def format_table(result: dict[str, Any]) -> list[str]:
    """Return the table as lines of text."""
    return ablations.markdown(result).splitlines() if result["variants"] else ["Nothing is scored yet."]
