"""`diptych doctor`: versions, devices, memory, extras, built-in models, and what fits. Include it in bug reports."""

from __future__ import annotations

import importlib.util
import os
import platform
from pathlib import Path
from typing import Annotated, Any

import typer

from diptych.cli.options import Json, command, print_result
from diptych.utils import models
from diptych.utils.machine import processor, versions
from diptych.utils.paths import packaged

# Extra → the modules that it installs.
EXTRAS = {
    "train": ("bitsandbytes", "tensorboard"),
    "ray": ("ray",),
    "s3": ("s3fs", "upath"),
    "serve": ("fastapi", "uvicorn", "gradio"),
    "flux": ("sentencepiece",),
    "c2pa": ("c2pa", "cryptography"),
    "screens": ("rapidocr", "nudenet"),
    "vllm": ("vllm",),
    "dev": ("pytest", "hypothesis", "datasets"),
}
# Memory in GiB that models need on the CPU. For GPUs, the memory presets have these figures.
NEEDS = (
    ("pocket, everything", 2.0),
    ("FLUX.1-dev in bfloat16 on the CPU (slow: minutes a step)", 40.0),
)
GIB = 2**30


@command("diptych doctor", "diptych doctor --teacher FLUX.1-schnell --json", Input="teacher")
def doctor(
    teacher: Annotated[
        str | None,
        typer.Option("--teacher", metavar="MODEL", help="Teacher to inspect: a folder or a hub name."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check this machine: versions, devices, memory, models.

    Teachers in the hub's cache, and the one of --teacher, are checked for step distillation. The exit code is 1 if
    something prevents diptych from working.
    """
    report = examine(teacher)
    print_result(report, format_report, as_json, indent=2)
    if report["problems"]:
        raise typer.Exit(1)


def examine(teacher: str | None = None) -> dict[str, Any]:
    """The report as plain values; `problems` lists what prevents diptych from working, each with its remedy.

    Args:
        teacher: a folder or hub name to check, besides the teachers in the hub's cache.
    """
    from diptych.llm import vllm

    problems: list[str] = []
    report: dict[str, Any] = {
        "system": platform.platform(),
        "versions": versions(),
        "cpu": _cpu(problems),
        "memory": _memory(),
        "devices": _devices(),
        "extras": {name: not _missing(modules) for name, modules in EXTRAS.items()},
        "pocket": _pocket(problems),
        "hub": {"offline": bool(os.environ.get("HF_HUB_OFFLINE")), "cache": _cache()},
    }
    report["fits"] = {name: report["memory"]["total"] >= need for name, need in NEEDS}
    report["flux"] = _flux(report["devices"])
    report["vllm"] = vllm.problem()
    report["teachers"] = _teachers(teacher)
    report["problems"] = problems
    return report


def _cpu(problems: list[str]) -> dict[str, Any]:
    import psutil

    values: dict[str, Any] = {"processor": processor(), "cores": psutil.cpu_count()}
    try:
        import torch
    except (ImportError, OSError) as error:
        problems.append(f"torch cannot be imported ({error}); reinstall it: pip install --force-reinstall torch")
        return values
    values["threads"] = torch.get_num_threads()
    values["capability"] = torch.backends.cpu.get_cpu_capability()
    # torch has these under private names only; a version without them is not an error.
    for key, name in (
        ("amx", "_is_amx_tile_supported"),
        ("avx512_bf16", "_is_avx512_bf16_supported"),
        ("vnni", "_is_vnni_supported"),
    ):
        if probe := getattr(torch.cpu, name, None):
            values[key] = bool(probe())
    return values


def _memory() -> dict[str, float]:
    """The machine's memory in GiB."""
    import psutil

    memory = psutil.virtual_memory()
    return {"total": round(memory.total / GIB, 1), "available": round(memory.available / GIB, 1)}


def _devices() -> list[dict[str, Any]]:
    if importlib.util.find_spec("torch") is None:
        return []
    try:
        import torch
    except (ImportError, OSError):
        return []
    devices: list[dict[str, Any]] = []
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        devices.append(
            {
                "device": f"cuda:{i}",
                "name": torch.cuda.get_device_name(i),
                "memory": round(total / GIB, 1),
                "free": round(free / GIB, 1),
            }
        )
    if torch.backends.mps.is_available():
        devices.append({"device": "mps", "name": "Apple GPU (shares the machine's memory)"})
    devices.append({"device": "cpu", "name": processor()})
    return devices


def _missing(modules: tuple[str, ...]) -> list[str]:
    return [name for name in modules if importlib.util.find_spec(name) is None]


def _pocket(problems: list[str]) -> dict[str, float | None]:
    """Size in MB of each built-in model; None for one that is missing."""
    sizes: dict[str, float | None] = {}
    for role in models.SHIPPED:
        folder = packaged("pocket/weights") / role
        weights = list(folder.rglob("*.safetensors"))
        sizes[role] = round(sum(p.stat().st_size for p in weights) / 1e6, 1) if weights else None
    if absent := [role for role, size in sizes.items() if size is None]:
        problems.append(
            f"the pocket weights lack {', '.join(absent)}: this installation is incomplete; reinstall diptych"
        )
    return sizes


def _cache() -> str:
    return os.environ.get("HF_HUB_CACHE") or str(
        Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser() / "hub"
    )


def _flux(devices: list[dict[str, Any]]) -> dict[str, str]:
    """Memory preset → why FLUX.1-dev does not work with it on the first CUDA GPU; empty if it does."""
    card = next((device for device in devices if device["device"].startswith("cuda")), None)
    from diptych.student.runtime import memory as presets

    return {name: _why_not(name, card) for name in presets.PRESETS}


def _teachers(named: str | None) -> list[dict[str, Any]]:
    """The pipelines in the hub's cache and the named one, and whether each is step-distilled."""
    from diptych.student.families import teachers
    from diptych.utils.opening import INDEX, read

    listed = list(teachers.cached())
    if named is not None:
        kind = str(read(named, INDEX).get("_class_name", ""))
        listed = [(named, kind, teachers.examine(named)), *(each for each in listed if each[0] != named)]
    return [{"name": name, "class": kind, "distilled": why.reason if why else ""} for name, kind, why in listed]


def _why_not(name: str, card: dict[str, Any] | None) -> str:
    from diptych.student.runtime import memory as presets

    if card is None:
        return "no CUDA GPU; on a CPU, --memory auto uses the machine's memory"
    if card["memory"] < presets.HEADROOM * int(name):
        return f"{card['device']} has {card['memory']} GiB"
    reasons = [presets.problems(preset, "cuda") for preset in presets.PRESETS[name]]
    return "" if not all(reasons) else "; ".join(dict.fromkeys(reason for row in reasons for reason in row))


def format_report(report: dict[str, Any]) -> list[str]:
    """The report as text."""
    cpu, memory = report["cpu"], report["memory"]
    flags = [key for key in ("amx", "avx512_bf16", "vnni") if cpu.get(key)]
    pocket = ", ".join(f"{role} {f'{size} MB' if size else 'MISSING'}" for role, size in report["pocket"].items())
    out = [
        " · ".join(f"{name} {version}" for name, version in report["versions"].items()),
        f"system    {report['system']}",
        f"cpu       {cpu['processor']}: {cpu['cores']} cores, torch uses {cpu.get('threads', '?')} threads; "
        f"{cpu.get('capability', '')}{', with ' + ', '.join(flags) if flags else ''}",
        f"memory    {memory['total']} GiB, {memory['available']} GiB free",
    ]
    for device in report["devices"]:
        size = f", {device['memory']} GiB ({device['free']} free)" if "memory" in device else ""
        out.append(f"device    {device['device']}: {device['name']}{size}")
    out.append(
        "extras    " + ", ".join(f"{name} {'yes' if there else 'no'}" for name, there in report["extras"].items())
    )
    out.append(f"pocket    {pocket}")
    out.append(f"hub       {report['hub']['cache']}{' (offline)' if report['hub']['offline'] else ''}")
    out += [f"fits      {name}: {'yes' if fits else 'no'}" for name, fits in report["fits"].items()]
    for reason in dict.fromkeys(report["flux"].values()):
        names = ", ".join(name for name, why in report["flux"].items() if why == reason)
        out.append(f"memory    FLUX.1-dev with --memory {names}: {f'no: {reason}' if reason else 'yes'}")
    for teacher in report["teachers"]:
        why = teacher["distilled"]
        fit = f"step-distilled ({why}): paint with few steps, do not train from it" if why else "not step-distilled"
        out.append(f"teacher   {teacher['name']}: {teacher['class'] or 'unknown class'}, {fit}")
    reason = report["vllm"]
    out.append(f"judge     a vision-language model on vLLM (curate.vlm.vllm): {f'no: {reason}' if reason else 'yes'}")
    out += [f"problem   {problem}" for problem in report["problems"]] or ["no problems"]
    return out
