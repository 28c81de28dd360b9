"""A first recipe from four answers: teacher, task, hardware and budget (`diptych init`).

    text, plan = draft("pocket", "subject", "cpu", hours=0.5, name="mine")

A recipe that ships is the start. Its prompts and training steps are scaled together, so that the hours of its plan
(`run.plan`) fit the budget, and training is made to fit the memory of the device. The text has a comment above the keys
that a first run may change; the comments are the descriptions in the schema.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from diptych import recipe as recipes
from diptych.errors import UsageError, nearest
from diptych.recipe import tasks
from diptych.recipe.schema import Recipe
from diptych.run import plan as plans
from diptych.run.plan import assumptions, sizes
from diptych.stages.write.stage import WriteStage
from diptych.student.families import teachers
from diptych.utils.documents import parse_yaml, read_text
from diptych.utils.paths import place

POCKET = "pocket"
SHARE = 0.85  # of the budget; the rest is for loading and scoring, which the plan does not count
LEAST, MOST = 1e-4, 20.0  # times the prompts and steps of the recipe that is the start
LEAST_STEPS = 50
UNITS = {"min": 1 / 60, "h": 1.0, "d": 24.0}
EXPLAINED = (
    "write.count",
    "paint.steps",
    "curate.judge",
    "curate.thresholds",
    "distill.mode",
    "distill.steps",
    "distill.batch_size",
    "evaluate.suite",
)
# Changes with which training needs less memory, the cheapest first.
SMALLER: tuple[dict[str, Any], ...] = ({"micro_batch": 1}, {"quantize": "nf4"}, {"rank": 128}, {"rank": 32})


def read_budget(text: str) -> float:
    """`30min`, `2h` or `3d` as hours; a number alone is hours. UsageError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(min|h|d)?\s*", text)
    if match is None or not float(match[1]):
        raise UsageError("option_invalid", f"--budget {text}: write it as 30min, 2h, or 3d.")
    return float(match[1]) * UNITS[match[2] or "h"]


def read_hardware(text: str) -> tuple[str, int]:
    """`cpu`, `H100` or `8xH100` as (device of a plan, number). UsageError for an unknown device."""
    match = re.fullmatch(r"(?:(\d+)\s*[x×])?\s*(\S+)", text.strip())
    number, name = (int(match[1] or 1), match[2]) if match else (0, text)
    known = {each.lower(): each for each in assumptions.devices()}
    if not number or name.lower() not in known:
        shown = ", ".join(known.values())
        raise UsageError(
            "hardware_unknown",
            f"--gpu {text}: unknown hardware. Use one of {shown}, or several: 8xH100{nearest(name, known.values())}",
        )
    return known[name.lower()], number


def read_teacher(text: str) -> str:
    """The teacher's name, for a name that may lack its owner (`FLUX.1-dev`). UsageError for one that cannot be trained,
    UserError for one whose sizes are unknown."""
    if text != POCKET and not place(text).exists():
        text = {name.rpartition("/")[2].lower(): name for name in sizes.known()}.get(text.lower(), text)
    teachers.refuse(text, allowed=False)
    sizes.find(recipes.check({"name": "draft", "teacher": text}, "--teacher"))
    return text


def read_task(text: str, teacher: str) -> str:
    """A task's name or file. UsageError if it is unknown, or if no grammar can write it for this teacher."""
    WriteStage(recipes.check({"name": "draft", "teacher": teacher, "task": text}, "--task")).load()
    return text


def draft(teacher: str, task: str, hardware: str, hours: float, name: str) -> tuple[str, dict[str, Any]]:
    """Return the text of a recipe and its plan.

    Args:
        hardware: a device of the plans, or several of one kind (`8xH100`).
        hours: budget in hours of wall time.
        name: name of the recipe.

    Raises UsageError for an invalid answer or a budget that is too small, UserError for a teacher of unknown size.
    """
    device, number = read_hardware(hardware)
    teacher = read_teacher(teacher)
    start = _start(teacher, read_task(task, teacher))
    start = _fitting({"name": name, "task": task, "seed": 0, "teacher": teacher} | start, device)

    def planned(factor: float) -> tuple[dict[str, Any], dict[str, Any]]:
        values = _scaled(start, factor)
        return values, _plan(values, device, number)

    def spent(plan: Mapping[str, Any]) -> float:
        return plan["totals"]["wall_hours"] / SHARE

    low, high = LEAST, MOST
    values, plan = planned(low)
    if spent(plan) > hours:
        raise UsageError(
            "option_unsuited",
            f"--budget: the smallest run of this teacher on {hardware} takes about {_shown(spent(plan))}. "
            "Raise the budget, or use more or faster hardware.",
        )
    for _ in range(12):  # to half a percent
        middle = (low * high) ** 0.5
        tried, cost = planned(middle)
        if spent(cost) <= hours:
            low, values, plan = middle, tried, cost
        else:
            high = middle
    about = f"task {task} on {teacher}, for at most {_shown(hours)} on {hardware}"
    return _text(values, f"Made by `diptych init`: {about}."), plan


def _start(teacher: str, task: str) -> dict[str, Any]:
    """The sections of the recipe to start from, as plain values."""
    aligned = tasks.load(task).geometry == "aligned"
    pocket = teacher == POCKET
    shipped = ("pocket-relight" if aligned else "demo") if pocket else ("flux-relight" if aligned else "flux-subject")
    path = recipes.find(shipped)
    values = parse_yaml(read_text(path), str(path))
    made = {stage: dict(values[stage]) for stage in ("write", "paint", "curate", "distill", "evaluate")}
    made["write"].pop("grammar", None)  # it follows from the teacher
    if not pocket:
        made["paint"]["memory"] = "auto"
    if pocket and task not in ("subject", "relight"):
        made["evaluate"] = {"suite": "none"}  # the pocket suites score these two
    return made


def _scaled(values: Mapping[str, Any], factor: float) -> dict[str, Any]:
    """The recipe with `factor` times the prompts and the training steps, rounded down to two digits."""
    write, distill = dict(values["write"]), dict(values["distill"])
    size = write["shard_size"]
    # Enough prompts for one batch even if a tenth of the pairs is accepted.
    least = -(-5 * distill["batch_size"] // size) * size
    write["count"] = max(least, _round(write["count"] * factor) // size * size)
    distill["steps"] = steps = max(LEAST_STEPS, _round(distill["steps"] * factor))
    distill["warmup"] = min(distill["warmup"], steps // 10)
    for key, parts in (("checkpoint_every", 5), ("validate_every", 5), ("sample_every", 2)):
        distill[key] = min(distill[key], max(1, steps // parts))
    return {**values, "write": write, "distill": distill}


def _round(value: float) -> int:
    whole = int(value)
    unit = 10 ** max(0, len(str(whole)) - 2)
    return whole // unit * unit


def _fitting(values: dict[str, Any], device: str) -> dict[str, Any]:
    """The recipe with a training that fits the device's memory; the smallest one if none does."""
    room = assumptions.devices()[device].memory
    if room is None or values["distill"]["mode"] != "lora":
        return values
    for change in ({}, *SMALLER):
        distill = values["distill"]
        if distill.get("rank", 0) >= change.get("rank", 0):
            values = {**values, "distill": distill | change}
        if _plan(values, device, 1)["stages"]["distill"]["memory"] <= room:
            break
    return values


def _plan(values: Mapping[str, Any], device: str, number: int) -> dict[str, Any]:
    return plans.make(recipes.check(dict(values), "draft"), [f"devices={number}"], device)


def _shown(hours: float) -> str:
    """Hours as a budget: `12min`, `2.5h`, `3d`; rounded up, so that it is enough."""
    if hours < 1:
        return f"{-(-hours * 60 // 1):.0f}min"
    return f"{-(-hours * 10 // 1) / 10:g}h" if hours < 72 else f"{-(-hours * 10 / 24 // 1) / 10:g}d"


def _text(values: Mapping[str, Any], about: str) -> str:
    """The recipe as YAML with comments."""
    lines = [f"# {about}", "# The reference of recipes in the documentation has every key."]
    for key, value in values.items():
        if isinstance(value, dict):
            lines += ["", f"{key}:", *_section(key, value)]
        else:
            lines.append(_pair(key, value))
    return "\n".join(lines) + "\n"


def _section(stage: str, values: Mapping[str, Any]) -> Iterator[str]:
    model: Any = Recipe.model_fields[stage].annotation
    for key, value in values.items():
        if f"{stage}.{key}" in EXPLAINED:
            about = " ".join((model.model_fields[key].description or "").replace("`", "").split())
            yield from textwrap.wrap(about, 110, initial_indent="  # ", subsequent_indent="  # ")
        yield f"  {_pair(key, value)}"


def _pair(key: str, value: Any) -> str:
    dumped = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10**6)
    return f"{key}: {dumped.strip().removesuffix('...').strip()}"
