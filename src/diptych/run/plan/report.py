"""A plan as text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

_PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z")


def format_plan(plan: dict[str, Any]) -> list[str]:
    """Return the result of `make` as lines: each stage, then totals, assumptions, missing prices and notes."""
    stages, counts, totals = plan["stages"], plan["counts"], plan["totals"]
    teacher, device = plan["teacher"], plan["device"]
    several = f"{device['devices']} × " if device["devices"] > 1 else ""
    text = [
        f"{plan['recipe']} · task {plan['task']} · {plan['layout']} grids of {plan['panel_size']} px panels · "
        f"on {several}{device['name']}",
        f"teacher {teacher['name']}: {many(teacher['parameters']['transformer'])} parameters and "
        f"{many(teacher['parameters']['text_encoders'])} of text encoders, counted from {teacher['sizes_from']}",
        "",
        f"{counts['prompts']:,} prompts → {counts['grids']:,} grids → {counts['candidates']:,} candidate pairs → "
        f"about {counts['kept']:,} accepted{_range(counts)}",
        "",
        *_row("write", _write(stages["write"])),
        *_row("paint", _paint(stages["paint"])),
        *_row("curate", _curate(stages["curate"])),
        *_row("distill", _distill(stages["distill"])),
        *_row("evaluate", [f"{images:,} images" if (images := stages["evaluate"]["pictures"]) else "no suite"]),
        *_row("total", _total(totals, device)),
    ]
    text += ["", "assumptions (change one with --assume NAME=VALUE):"]
    wide = max(len(name) for name in plan["assumed"])
    for name, one in plan["assumed"].items():
        of = "" if one["of"] == "default" else f"{one['of']}: "
        text.append(f"  {name:<{wide}}  {number(one['value'])} {one['unit']} ({of}{one['source']})")
    text += [f"no price: set --assume {name}=…" for name in plan["missing"]]
    return [*text, *(f"note: {note}" for note in plan["notes"])]


def _row(name: str, parts: Iterable[str]) -> list[str]:
    first, *more = parts
    return [f"{name:<9} {first}", *(f"{'':<9} {part}" for part in more)]


def _range(counts: dict[str, Any]) -> str:
    if counts["kept_low"] is None:
        return ""
    return f" ({counts['kept_low']:,} to {counts['kept_high']:,} at published keep rates of VLM judges)"


def _write(stage: dict[str, Any]) -> list[str]:
    disk = f"disk {size(stage['disk'])}"
    if not stage["calls"]:
        return [f"by the grammar, without calls · {disk}"]
    return [f"{stage['model']}{_on_vllm(stage)}: {_calls(stage)} · {disk}"]


def _paint(stage: dict[str, Any]) -> list[str]:
    each = f"{stage['forwards_per_grid']} forwards of {si(stage['flops_per_forward'])}FLOP a grid"
    preset = f" (paint.memory {stage['memory_preset']}: {stage['held']})" if stage["memory_preset"] else ""
    speed = f" · paint.speed {stage['speed']}" if stage["speed"] else ""
    return [
        f"{each}, {si(stage['flops_per_grid'])}FLOP with its text; {si(stage['flops'])}FLOP in all{speed}",
        f"{seconds(stage['seconds_per_grid'])} a grid · {_hours(stage)} · memory {gib(stage['memory'])}{preset} · "
        f"disk {size(stage['disk'])}",
    ]


def _curate(stage: dict[str, Any]) -> list[str]:
    disk = "disk " + " + ".join(f"{size(part)} {name}" for name, part in stage["disk"].items())
    cut = f"{duration(stage['core_hours'])} of one core to cut and compare"
    text = [f"{stage['judge']} embeds {stage['judge_calls']:,} panels · {cut} · {disk}"]
    if stage["vlm"]:
        answers = f"{stage['votes']:,} votes and {stage['captions']:,} captions"
        time = f" · {_hours(stage)}" if stage["device_hours"] else ""
        text.append(f"{stage['vlm']}{_on_vllm(stage)}: {answers}, {_calls(stage)}{time}")
    return text


def _on_vllm(stage: dict[str, Any]) -> str:
    gpus = stage["vllm_gpus"]
    return f" (vLLM, {gpus} GPU{'s' if gpus > 1 else ''} a worker)" if gpus else ""


def _distill(stage: dict[str, Any]) -> list[str]:
    memory = " + ".join(f"{gib(part)} {name}" for name, part in stage["memory_of"].items())
    phases = stage["memory_phases"]
    largest = max(phases, key=lambda name: (phases[name], name == "steps"))
    most = f"; the maximum is {gib(stage['memory'])}, for {largest}" if largest != "steps" else ""
    disk = " + ".join(f"{size(part)} {name}" for name, part in stage["disk"].items() if part)
    epochs = f", {stage['epochs']:,.1f} epochs" if stage["epochs"] else ""
    return [
        f"{stage['mode']}: {many(stage['trained_parameters'])} parameters trained · {stage['steps']:,} steps of "
        f"{stage['batch_size']}, {stage['samples']:,} samples{epochs}",
        f"{si(stage['flops_per_sample'])}FLOP a sample, {si(stage['flops'])}FLOP with validation and sample sheets",
        f"{seconds(stage['seconds_per_step'])} a step · {_hours(stage)}",
        f"memory {gib(phases['steps'])}: {memory} ({stage['rows_at_once']} rows at once){most}",
        f"disk {disk}",
    ]


def _total(stage: dict[str, Any], device: dict[str, Any]) -> list[str]:
    tokens = stage["tokens"]
    calls = f"{stage['calls']:,} calls, {si(tokens['in'])} tokens in, {si(tokens['out'])} out · "
    spent = calls if stage["calls"] else ""
    money = _money(stage["money"])
    if stage["money"] is None and stage["device_money"] is not None:
        money = f"{_money(stage['device_money'])} for the devices, the rest unknown"
    wall = f", {duration(stage['wall_hours'])} on {device['devices']} devices" if device["devices"] > 1 else ""
    return [
        f"{duration(stage['device_hours'])} of device time{wall} · {spent}money {money}",
        f"disk {size(stage['disk'])} · memory {gib(stage['memory'])}",
    ]


def _calls(stage: dict[str, Any]) -> str:
    tokens = f"{si(stage['tokens']['in'])} tokens in, {si(stage['tokens']['out'])} out"
    return f"{stage['calls']:,} calls, {tokens}, money {_money(stage['money'])}"


def _hours(stage: dict[str, Any]) -> str:
    wall = stage["wall_hours"]
    return duration(stage["device_hours"]) + (f", {duration(wall)} wall" if wall != stage["device_hours"] else "")


def _money(value: float | None) -> str:
    return "unknown" if value is None else f"{value:,.2f}"


def duration(hours: float) -> str:
    """Format hours: `12 s`, `7.5 min`, `3.2 h`, `1,234 h`."""
    if hours < 1 / 60:
        return f"{3600 * hours:.0f} s"
    if hours < 1:
        return f"{60 * hours:.1f} min"
    return f"{hours:,.1f} h" if hours < 100 else f"{hours:,.0f} h"


def seconds(value: float) -> str:
    """Format seconds: `0.098 s`, `3.2 s`."""
    return f"{value:.3f} s" if value < 1 else f"{value:,.1f} s"


def si(value: float) -> str:
    """Format a large number: `11.9 G`, `531 E`; below a thousand without a prefix."""
    step = 0
    while abs(value) >= 1000 and step < len(_PREFIXES) - 1:
        value, step = value / 1000, step + 1
    return f"{value:.3g} {_PREFIXES[step]}"


def many(value: float) -> str:
    """Format a number of parameters: `11.9 B`."""
    return si(value).replace("G", "B").strip()


def size(value: float) -> str:
    """Format bytes on a disk: `105 GB`."""
    return f"{si(value)}B"


def gib(value: float) -> str:
    """Format bytes in memory: `37.1 GiB`."""
    return f"{value / 2**30:,.1f} GiB" if value < 100 * 2**30 else f"{value / 2**30:,.0f} GiB"


def number(value: float) -> str:
    """Format a number with its significant digits: `0.44`, `790`, `1,000`."""
    return f"{value:,.0f}" if value >= 1000 or value == int(value) else f"{value:.3g}"
