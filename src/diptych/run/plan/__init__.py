"""What a recipe will cost, before it costs it: rows, operations, hours, calls, tokens, money, disk and memory.

    found = make(recipes.load("flux-subject"), ["keep_rate=0.4", "gpu_hour=2.5"])
    print("\\n".join(lines(found)))          # or, on the command line: diptych plan flux-subject

What can be counted is counted: rows and calls from the recipe and its task, operations and bytes from the teacher's own
configs, the words of a question from the question. The rest is an assumption with a name, a source and an option
(`assumptions`), or was measured by a run of the same recipe. Nothing runs, and nothing is downloaded.
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
from diptych.run.plan.lines import lines
from diptych.run.plan.workload import Workload
from diptych.student.families import teachers

__all__ = ["lines", "make"]

PRICES = ("gpu_hour", "writer_input_price", "writer_output_price", "vlm_input_price", "vlm_output_price")


def make(
    recipe: Recipe, assume: Sequence[str] = (), gpu: str | None = None, run_dir: str | Path | None = None
) -> dict[str, Any]:
    """The plan as plain values; bytes and operations whole, None where nobody said what it takes to know.

    Args:
        assume: `"keep_rate=0.4"`, any of `assumptions.defaults`.
        gpu: a name of `assumptions.DEVICES`; None takes what the recipe is made for.
        run_dir: a run whose measured rates are taken where its recipe agrees; None is runs/NAME.

    Raises:
        UsageError for what no recipe, task, assumption or device can mean, UserError for a teacher without known sizes.
    """
    if not recipe.draws_pairs():
        raise UsageError("plan counts what a run draws, and this recipe's distill.data has other people's pairs alone")
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
    found = {"write": written, "paint": painted, "curate": curated, "distill": trained}
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
        "stages": {**found, "evaluate": costs.evaluate(work)},
    }
    result["totals"] = _totals(found, book)
    result["assumed"] = {name: one.values() for name, one in book.used.items() if one.value is not None}
    result["missing"] = [name for name in PRICES if name in book.used and book.used[name].value is None]
    result["notes"] = _notes(recipe, result)
    return result


def _totals(found: dict[str, dict[str, Any]], book: Book) -> dict[str, Any]:
    hours = sum(stage.get("device_hours", 0.0) for stage in found.values())
    price = book.maybe("gpu_hour")
    spent: list[float | None] = [None if price is None else hours * price]
    spent += [stage["money"] for stage in found.values() if "money" in stage]
    disks = [size for stage in found.values() for size in _flat(stage["disk"])]
    tokens = {way: sum(found[stage]["tokens"][way] for stage in ("write", "curate")) for way in ("in", "out")}
    return {
        "device_hours": hours,
        "wall_hours": hours / book["devices"],
        "flops": sum(stage.get("flops", 0.0) for stage in found.values()),
        "calls": sum(found[stage]["calls"] for stage in ("write", "curate")),
        "tokens": tokens,
        "device_money": spent[0],
        "money": None if None in spent else sum(part or 0.0 for part in spent),
        "disk": sum(disks),
        "memory": max(found["paint"]["memory"], found["distill"]["memory"]),
    }


def _flat(disk: int | dict[str, int]) -> list[int]:
    return list(disk.values()) if isinstance(disk, dict) else [disk]


def _notes(recipe: Recipe, found: dict[str, Any]) -> list[str]:
    """What somebody should change, or know, before it starts."""
    notes = _teacher_notes(recipe)
    kept, device = found["counts"]["kept"], found["device"]
    if kept < recipe.distill.batch_size:
        notes.append(
            f"about {kept} kept pairs are fewer than one batch of {recipe.distill.batch_size}: raise write.count"
        )
    room = device["gib"]
    for stage in ("paint", "distill"):
        needs = found["stages"][stage]["memory"] / 2**30
        if room is None or needs <= room:
            continue
        cures = ["lower paint.batch_size", *(["set paint.memory=auto"] if recipe.paint.memory is None else [])]
        if stage == "distill":
            cures = _cures(recipe.distill, found["stages"][stage])
        notes.append(f"{stage} needs {needs:,.0f} GiB, and a device has {room:,.0f}: {', '.join(cures)}")
    held = found["stages"]["paint"]["held"]
    if "transformer as loaded" not in held or "offload" in held:
        notes.append(
            "painting with paint.memory below 24 takes longer than planned: unpacking and moving weights is not counted"
        )
    if device["devices"] > 1:
        notes.append("painting drives one device, training several (torchrun); the plan shares both out evenly")
    if any(one["of"] == "measured" for one in found["assumed"].values()):
        notes.append("rates that a run of this recipe has measured take the place of assumptions")
    if found["stages"]["write"]["calls"] or found["stages"]["curate"]["calls"]:
        notes.append("repairs of wrong answers, and the thoughts of a reasoning model, come on top of the tokens")
    notes += _vllm_notes(recipe, device["name"])
    if recipe.distill.data:
        notes.append("distill.data: other people's pairs, and encoding them, are not counted")
    notes.append(
        "not counted: operations of the VAE and of the embedding judge, loading, scoring, sample sheets on disk"
    )
    return notes


def _teacher_notes(recipe: Recipe) -> list[str]:
    """What is wrong with training from, or painting with, a step-distilled teacher."""
    notes = []
    if (found := teachers.examine(recipe.teacher)) is not None:
        forced = recipe.distill.allow_distilled_teacher
        refused = f"distill trains from it all the same ({teachers.KEY})" if forced else "distill refuses it"
        notes.append(f"{found.describe(recipe.teacher)}; {refused}")
    if (wrong := teachers.advice(recipe.teacher, recipe.paint.steps, recipe.paint.true_guidance)) is not None:
        notes.append(wrong)
    return notes


def _cures(settings: Distill, planned: dict[str, Any]) -> list[str]:
    """What makes a training fit, first what costs least."""
    phases = planned["memory_phases"]
    found: list[str] = []
    if max(phases.values()) in (phases["steps"], phases["validation"]):
        found += [] if settings.gradient_checkpointing else ["set distill.gradient_checkpointing=true"]
        found += ["set distill.micro_batch=1"] if planned["rows_at_once"] > 1 else []
    if settings.mode == "full":
        return [*found, "use several devices with distill.sharding=full", "or distill.mode=lora"]
    if settings.quantize == settings.offload == "none":
        found += ["set distill.quantize=nf4 or distill.offload=blocks"]
    return [*found, *(["lower distill.rank"] if settings.rank > 1 else [])] or ["use a larger device"]


def _vllm_notes(recipe: Recipe, device: str) -> list[str]:
    keys = {"write": "write.vllm", "curate": "curate.vlm.vllm"}
    found = [key for stage, key in keys.items() if recipe.vllm(stage)]
    if not found:
        return []
    where = "; this plan's device is a CPU" if device == "cpu" else ""
    needs = "pip install 'diptych[vllm]' and GPUs where the stage runs; `diptych doctor` there says whether it can"
    notes = [f"{' and '.join(found)}: {needs}{where}"]
    if recipe.vllm("write"):
        notes.append("write.vllm: the hours of its GPUs are not counted: how fast it writes is not known here")
    return notes
