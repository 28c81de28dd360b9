"""The cost of a recipe before it runs: rows, operations, hours, calls, tokens, money, disk and memory.

    plan = make(recipes.load("flux-subject"), ["keep_rate=0.4", "gpu_hour=2.5"])
    print("\\n".join(format_plan(plan)))     # or, on the command line: diptych plan flux-subject

Rows and calls are counted from the recipe and its task, operations and bytes from the teacher's configs, and the length
of a question from its text. The rest are assumptions with a name, a source and an option (`assumptions`), or rates that
a run of the same recipe measured. Nothing runs, and nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diptych.errors import UsageError
from diptych.recipe import tasks
from diptych.recipe.schema import Distill, Recipe
from diptych.run.plan import assumptions, costs, sizes
from diptych.run.plan.assumptions import Book
from diptych.run.plan.report import format_plan
from diptych.run.plan.workload import Workload
from diptych.student.families import teachers

__all__ = ["format_plan", "make"]

PRICES = ("gpu_hour", "writer_input_price", "writer_output_price", "vlm_input_price", "vlm_output_price")


def make(
    recipe: Recipe, assume: Sequence[str] = (), gpu: str | None = None, run_dir: str | Path | None = None
) -> dict[str, Any]:
    """Return the plan as plain values. Bytes and operations are whole numbers; values without a price are None.

    Args:
        assume: assumptions of `assumptions.defaults`, such as `"keep_rate=0.4"`.
        gpu: a device of assumptions.yaml; None uses the recipe's usual device.
        run_dir: a run whose measured rates apply where its recipe agrees; None is runs/NAME.

    Raises UsageError for an invalid recipe, task, assumption or device, UserError for a teacher of unknown size.
    """
    if not recipe.draws_pairs():
        why = "This recipe trains only on the pairs of distill.data, so there is nothing to plan"
        raise UsageError("recipe_conflict", f"{why}. Plan a recipe that generates its pairs.")
    book = Book(assumptions.collect(recipe, assume, gpu))
    recipe, task = tasks.resolve(recipe), tasks.load(recipe.task)
    task.layout(recipe.write.layout)
    source = sizes.find(recipe)
    source.panel(recipe.paint.panel_size)
    folder = Path(run_dir) if run_dir is not None else Path("runs") / recipe.name
    book.measure(assumptions.rates(recipe, folder))
    device = assumptions.device_name(recipe, gpu)
    counts = sizes.count(source)
    work = Workload(recipe, task, source, counts, book, on_cpu=device == "cpu")
    written, painted = costs.write(work), costs.paint(work)
    curated, trained = costs.curate(work, painted["device_hours"]), costs.distill(work)
    stages = {"write": written, "paint": painted, "curate": curated, "distill": trained}
    keep = book.known["keep_rate"]
    parts = {"transformer": counts.transformer, "text_encoders": counts.text, "vae": counts.vae}
    result: dict[str, Any] = {
        "recipe": recipe.name,
        "task": task.name,
        "layout": work.layout.name,
        "panel_size": work.size,
        "teacher": {
            "name": source.name,
            "sizes_from": source.source,
            "parameters": parts,
            "distilled": source.distilled.reason if source.distilled else None,
        },
        "device": {"name": device, "devices": int(book["devices"]), "gib": book.maybe("device_gib")},
        "counts": {
            "prompts": recipe.write.count,
            "grids": work.grids,
            "panels": work.grids * work.layout.panels,
            "candidates": work.candidates,
            "kept": work.kept,
            "kept_low": round(work.candidates * keep.low) if keep.low is not None else None,
            "kept_high": round(work.candidates * keep.high) if keep.high is not None else None,
        },
        "stages": {**stages, "evaluate": costs.evaluate(work)},
    }
    result["totals"] = _totals(stages, book)
    result["assumed"] = {name: one.values() for name, one in book.used.items() if one.value is not None}
    result["missing"] = [name for name in PRICES if name in book.used and book.used[name].value is None]
    result["notes"] = _notes(recipe, result)
    return result


def _totals(stages: dict[str, dict[str, Any]], book: Book) -> dict[str, Any]:
    hours = sum(stage.get("device_hours", 0.0) for stage in stages.values())
    price = book.maybe("gpu_hour")
    spent: list[float | None] = [None if price is None else hours * price]
    spent += [stage["money"] for stage in stages.values() if "money" in stage]
    disks = [size for stage in stages.values() for size in _flat(stage["disk"])]
    tokens = {way: sum(stages[stage]["tokens"][way] for stage in ("write", "curate")) for way in ("in", "out")}
    return {
        "device_hours": hours,
        "wall_hours": hours / book["devices"],
        "flops": sum(stage.get("flops", 0.0) for stage in stages.values()),
        "calls": sum(stages[stage]["calls"] for stage in ("write", "curate")),
        "tokens": tokens,
        "device_money": spent[0],
        "money": None if None in spent else sum(part or 0.0 for part in spent),
        "disk": sum(disks),
        "memory": max(stages["paint"]["memory"], stages["distill"]["memory"]),
    }


def _flat(disk: int | dict[str, int]) -> list[int]:
    return list(disk.values()) if isinstance(disk, dict) else [disk]


def _notes(recipe: Recipe, plan: dict[str, Any]) -> list[str]:
    """Return what to change or to know before the run."""
    notes = _teacher_notes(recipe)
    kept, device = plan["counts"]["kept"], plan["device"]
    if kept < recipe.distill.batch_size:
        notes.append(
            f"about {kept} accepted pairs are fewer than one batch of {recipe.distill.batch_size}: raise write.count"
        )
    room = device["gib"]
    for stage in ("paint", "distill"):
        needs = plan["stages"][stage]["memory"] / 2**30
        if room is None or needs <= room:
            continue
        cures = ["lower paint.batch_size", *(["set paint.memory=auto"] if recipe.paint.memory is None else [])]
        if stage == "distill":
            cures = _cures(recipe.distill, plan["stages"][stage])
        notes.append(f"{stage} needs {needs:,.0f} GiB, and a device has {room:,.0f}: {', '.join(cures)}")
    held = plan["stages"]["paint"]["held"]
    if "transformer as loaded" not in held or "offload" in held:
        uncounted = "the time to move and dequantize weights is not counted"
        notes.append(f"painting with paint.memory below 24 takes longer than planned: {uncounted}")
    if device["devices"] > 1:
        notes.append("painting uses one device and training several (torchrun); the plan divides both evenly")
    if any(one["of"] == "measured" for one in plan["assumed"].values()):
        notes.append("rates that a run of this recipe measured replace assumptions")
    if plan["stages"]["write"]["calls"] or plan["stages"]["curate"]["calls"]:
        notes.append("repairs of invalid answers and the reasoning of a model need further tokens")
    notes += _vllm_notes(recipe, device["name"])
    if recipe.distill.data:
        notes.append("distill.data: imported pairs and their encoding are not counted")
    notes.append(
        "not counted: operations of the VAE and of the embedding judge, loading, scoring, sample sheets on disk"
    )
    return notes


def _teacher_notes(recipe: Recipe) -> list[str]:
    """Return notes about training from, or painting with, a step-distilled teacher."""
    notes = []
    if (distilled := teachers.examine(recipe.teacher)) is not None:
        forced = recipe.distill.allow_distilled_teacher
        rejected = f"distill trains from it nevertheless ({teachers.KEY})" if forced else "distill rejects it"
        notes.append(f"{distilled.describe(recipe.teacher)}; {rejected}")
    if (advice := teachers.advice(recipe.teacher, recipe.paint.steps, recipe.paint.true_guidance)) is not None:
        notes.append(advice)
    return notes


def _cures(settings: Distill, planned: dict[str, Any]) -> list[str]:
    """Return settings with which a training fits, the cheapest first."""
    phases = planned["memory_phases"]
    cures: list[str] = []
    if max(phases.values()) in (phases["steps"], phases["validation"]):
        cures += [] if settings.gradient_checkpointing else ["set distill.gradient_checkpointing=true"]
        cures += ["set distill.micro_batch=1"] if planned["rows_at_once"] > 1 else []
    if settings.mode == "full":
        return [*cures, "use several devices with distill.sharding=full", "or distill.mode=lora"]
    if settings.quantize == settings.offload == "none":
        cures += ["set distill.quantize=nf4 or distill.offload=blocks"]
    return [*cures, *(["lower distill.rank"] if settings.rank > 1 else [])] or ["use a larger device"]


def _vllm_notes(recipe: Recipe, device: str) -> list[str]:
    keys = {"write": "write.vllm", "curate": "curate.vlm.vllm"}
    used = [key for stage, key in keys.items() if recipe.vllm(stage)]
    if not used:
        return []
    where = "; this plan's device is a CPU" if device == "cpu" else ""
    needs = "pip install 'diptych[vllm]' and GPUs where the stage runs; check these machines with `diptych doctor`"
    notes = [f"{' and '.join(used)}: {needs}{where}"]
    if recipe.vllm("write"):
        notes.append("write.vllm: the hours of its GPUs are not counted, because its speed is unknown")
    return notes
