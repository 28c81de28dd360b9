"""A plan for people."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

_PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z")


def lines(found: dict[str, Any]) -> list[str]:
    """What `make` found, a line for each stage, then totals, assumptions, and what to know."""
    stages, counts, totals = found["stages"], found["counts"], found["totals"]
    teacher, device = found["teacher"], found["device"]
    several = f"{device['devices']} × " if device["devices"] > 1 else ""
    text = [
        f"{found['recipe']} · task {found['task']} · {found['layout']} grids of {found['panel_size']} px panels · "
        f"on {several}{device['name']}",
        f"teacher {teacher['name']}: {many(teacher['parameters']['transformer'])} parameters and "
        f"{many(teacher['parameters']['text_encoders'])} of text encoders, counted from {teacher['sizes_from']}",
        "",
        f"{counts['prompts']:,} prompts → {counts['grids']:,} grids → {counts['candidates']:,} candidate pairs → "
        f"about {counts['kept']:,} kept{_between(counts)}",
        "",
        *_row("write", _write(stages["write"])),
        *_row("paint", _paint(stages["paint"])),
        *_row("curate", _curate(stages["curate"])),
        *_row("distill", _distill(stages["distill"])),
        *_row("evaluate", [_evaluate(stages["evaluate"])]),
        *_row("total", _total(totals, device)),
    ]
    text += ["", "assumed (change one with --assume NAME=VALUE):"]
    wide = max(len(name) for name in found["assumed"])
    for name, one in found["assumed"].items():
        of = "" if one["of"] == "default" else f"{one['of']}: "
        text.append(f"  {name:<{wide}}  {number(one['value'])} {one['unit']} ({of}{one['source']})")
    text += [f"no price: set --assume {name}=…" for name in found["missing"]]
    return [*text, *(f"note: {note}" for note in found["notes"])]


def _row(name: str, parts: Iterable[str]) -> list[str]:
    first, *more = parts
    return [f"{name:<9} {first}", *(f"{'':<9} {part}" for part in more)]


def _between(counts: dict[str, Any]) -> str:
    if counts["kept_low"] is None:
        return ""
    return f" ({counts['kept_low']:,} to {counts['kept_high']:,} at the keep rates published of VLM judges)"


def _write(found: dict[str, Any]) -> list[str]:
    disk = f"disk {size(found['disk'])}"
    if not found["calls"]:
        return [f"the grammar writes them: no calls · {disk}"]
    return [f"{found['model']}{_on_vllm(found)}: {_calls(found)} · {disk}"]


def _paint(found: dict[str, Any]) -> list[str]:
    each = f"{found['forwards_per_grid']} forwards of {si(found['flops_per_forward'])}FLOP a grid"
    preset = f" (paint.memory {found['memory_preset']}: {found['held']})" if found["memory_preset"] else ""
    speed = f" · paint.speed {found['speed']}" if found["speed"] else ""
    return [
        f"{each}, {si(found['flops_per_grid'])}FLOP with its text; {si(found['flops'])}FLOP in all{speed}",
        f"{seconds(found['seconds_per_grid'])} a grid · {_hours(found)} · memory {gib(found['memory'])}{preset} · "
        f"disk {size(found['disk'])}",
    ]


def _curate(found: dict[str, Any]) -> list[str]:
    disk = "disk " + " + ".join(f"{size(part)} {name}" for name, part in found["disk"].items())
    cut = f"{duration(found['core_hours'])} of one core to cut and compare"
    text = [f"{found['judge']} embeds {found['judge_calls']:,} panels · {cut} · {disk}"]
    if found["vlm"]:
        asked = f"{found['votes']:,} votes and {found['captions']:,} captions"
        time = f" · {_hours(found)}" if found["device_hours"] else ""
        text.append(f"{found['vlm']}{_on_vllm(found)}: {asked}, {_calls(found)}{time}")
    return text


def _on_vllm(found: dict[str, Any]) -> str:
    gpus = found["vllm_gpus"]
    return f" (vLLM, {gpus} GPU{'s' if gpus > 1 else ''} a worker)" if gpus else ""


def _distill(found: dict[str, Any]) -> list[str]:
    memory = " + ".join(f"{gib(part)} {name}" for name, part in found["memory_of"].items())
    phases = found["memory_phases"]
    largest = max(phases, key=lambda name: (phases[name], name == "steps"))
    most = f"; the most is {gib(found['memory'])}, for {largest}" if largest != "steps" else ""
    disk = " + ".join(f"{size(part)} {name}" for name, part in found["disk"].items() if part)
    epochs = f", {found['epochs']:,.1f} epochs" if found["epochs"] else ""
    return [
        f"{found['mode']}: {many(found['trained_parameters'])} parameters trained · {found['steps']:,} steps of "
        f"{found['batch_size']}, {found['samples']:,} samples{epochs}",
        f"{si(found['flops_per_sample'])}FLOP a sample, {si(found['flops'])}FLOP with validation and sample sheets",
        f"{seconds(found['seconds_per_step'])} a step · {_hours(found)}",
        f"memory {gib(phases['steps'])}: {memory} ({found['rows_at_once']} rows at once){most}",
        f"disk {disk}",
    ]


def _evaluate(found: dict[str, Any]) -> str:
    return f"{found['pictures']:,} pictures" if found["pictures"] else "no suite"


def _total(found: dict[str, Any], device: dict[str, Any]) -> list[str]:
    tokens = found["tokens"]
    calls = f"{found['calls']:,} calls, {si(tokens['in'])} tokens in, {si(tokens['out'])} out · "
    spent = calls if found["calls"] else ""
    money = _money(found["money"])
    if found["money"] is None and found["device_money"] is not None:
        money = f"{_money(found['device_money'])} for the devices, the rest not known"
    wall = f", {duration(found['wall_hours'])} on {device['devices']} devices" if device["devices"] > 1 else ""
    return [
        f"{duration(found['device_hours'])} of device time{wall} · {spent}money {money}",
        f"disk {size(found['disk'])} · memory {gib(found['memory'])}",
    ]


def _calls(found: dict[str, Any]) -> str:
    told = f"{si(found['tokens']['in'])} tokens in, {si(found['tokens']['out'])} out"
    return f"{found['calls']:,} calls, {told}, money {_money(found['money'])}"


def _hours(found: dict[str, Any]) -> str:
    wall = found["wall_hours"]
    return duration(found["device_hours"]) + (f", {duration(wall)} wall" if wall != found["device_hours"] else "")


def _money(value: float | None) -> str:
    return "not known" if value is None else f"{value:,.2f}"


def duration(hours: float) -> str:
    """`12 s`, `7.5 min`, `3.2 h`, `1,234 h`."""
    if hours < 1 / 60:
        return f"{3600 * hours:.0f} s"
    if hours < 1:
        return f"{60 * hours:.1f} min"
    return f"{hours:,.1f} h" if hours < 100 else f"{hours:,.0f} h"


def seconds(value: float) -> str:
    """`0.098 s`, `3.2 s`."""
    return f"{value:.3f} s" if value < 1 else f"{value:,.1f} s"


def si(value: float) -> str:
    """A large number: `11.9 G`, `531 E`; below a thousand as it is."""
    step = 0
    while abs(value) >= 1000 and step < len(_PREFIXES) - 1:
        value, step = value / 1000, step + 1
    return f"{value:.3g} {_PREFIXES[step]}"


def many(value: float) -> str:
    """A large number as the field writes it: `11.9 B`."""
    return si(value).replace("G", "B").strip()


def size(value: float) -> str:
    """Bytes on a disk: `105 GB`."""
    return f"{si(value)}B"


def gib(value: float) -> str:
    """Bytes in memory: `37.1 GiB`."""
    return f"{value / 2**30:,.1f} GiB" if value < 100 * 2**30 else f"{value / 2**30:,.0f} GiB"


def number(value: float) -> str:
    """Without digits that say nothing: `0.44`, `790`, `1,000`."""
    return f"{value:,.0f}" if value >= 1000 or value == int(value) else f"{value:.3g}"
