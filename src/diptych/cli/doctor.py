"""What this machine can do: versions, devices, memory, extras, the models that ship, and what fits.

`diptych doctor` prints it; bug reports should carry it.
"""

from __future__ import annotations

import importlib.util
import os
import platform
from pathlib import Path
from typing import Annotated, Any

import typer

from diptych.cli.options import Json, command, tell
from diptych.utils import models
from diptych.utils.machine import processor, versions
from diptych.utils.paths import packaged

# Extra → the modules it brings.
EXTRAS = {
    "train": ("bitsandbytes", "tensorboard"),
    "ray": ("ray",),
    "s3": ("s3fs", "upath"),
    "serve": ("fastapi", "uvicorn", "gradio"),
    "flux": ("sentencepiece",),
    "c2pa": ("c2pa", "cryptography"),
    "vllm": ("vllm",),
    "dev": ("pytest", "hypothesis", "datasets"),
}
# What fits into the machine's memory, GiB. For a GPU the memory presets say it.
NEEDS = (
    ("pocket, everything", 2.0),
    ("FLUX.1-dev in bfloat16 on the CPU (slow: minutes a step)", 40.0),
)
GIB = 2**30


@command("diptych doctor --json")
def doctor(
    teacher: Annotated[
        str | None,
        typer.Option("--teacher", metavar="MODEL", help="A teacher to examine: a folder or a hub name."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what this machine can do: versions, devices, memory, extras, models that ship, what fits.

    Teachers in the hub's cache, and the one of --teacher, are examined for step distillation.

    Exit code 1 if something keeps diptych from working.
    """
    found = examine(teacher)
    tell(found, lines, as_json, indent=2)
    if found["problems"]:
        raise typer.Exit(1)


def examine(teacher: str | None = None) -> dict[str, Any]:
    """Everything as plain values; `problems` lists what keeps diptych from working, each with what to do.

    Args:
        teacher: also examine this one, a folder or a hub name, beside those in the hub's cache.
    """
    from diptych.llm import vllm

    problems: list[str] = []
    found: dict[str, Any] = {
        "system": platform.platform(),
        "versions": versions(),
        "cpu": _cpu(problems),
        "memory": _memory(),
        "devices": _devices(),
        "extras": {name: not _missing(modules) for name, modules in EXTRAS.items()},
        "pocket": _pocket(problems),
        "hub": {"offline": bool(os.environ.get("HF_HUB_OFFLINE")), "cache": _cache()},
    }
    found["fits"] = {name: found["memory"]["total"] >= need for name, need in NEEDS}
    found["flux"] = _flux(found["devices"])
    found["vllm"] = vllm.problem()
    found["teachers"] = _teachers(teacher)
    found["problems"] = problems
    return found


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
    # torch offers these under private names only; a version without them just says nothing.
    for key, name in (
        ("amx", "_is_amx_tile_supported"),
        ("avx512_bf16", "_is_avx512_bf16_supported"),
        ("vnni", "_is_vnni_supported"),
    ):
        if probe := getattr(torch.cpu, name, None):
            values[key] = bool(probe())
    return values


def _memory() -> dict[str, float]:
    """GiB, of the machine."""
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
    """MB of each of the models that ship, None for one that is not there."""
    sizes: dict[str, float | None] = {}
    for role in models.SHIPPED:
        folder = packaged("pocket/weights") / role
        weights = list(folder.rglob("*.safetensors"))
        sizes[role] = round(sum(p.stat().st_size for p in weights) / 1e6, 1) if weights else None
    if absent := [role for role, size in sizes.items() if size is None]:
        problems.append(f"the pocket weights lack {', '.join(absent)}: this installation is incomplete; reinstall it")
    return sizes


def _cache() -> str:
    return os.environ.get("HF_HUB_CACHE") or str(
        Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser() / "hub"
    )


def _flux(devices: list[dict[str, Any]]) -> dict[str, str]:
    """Memory preset → why FLUX.1-dev cannot be drawn with it on the first CUDA card; empty if it can."""
    card = next((device for device in devices if device["device"].startswith("cuda")), None)
    from diptych.student.runtime import memory as presets

    return {name: _why_not(name, card) for name in presets.PRESETS}


def _teachers(named: str | None) -> list[dict[str, Any]]:
    """The pipelines in the hub's cache, and the one that was named: whether each is step-distilled."""
    from diptych.student.families import teachers
    from diptych.utils.opening import INDEX, read

    listed = list(teachers.cached())
    if named is not None:
        kind = str(read(named, INDEX).get("_class_name", ""))
        listed = [(named, kind, teachers.examine(named)), *(one for one in listed if one[0] != named)]
    return [{"name": name, "class": kind, "distilled": found.reason if found else ""} for name, kind, found in listed]


def _why_not(name: str, card: dict[str, Any] | None) -> str:
    from diptych.student.runtime import memory as presets

    if card is None:
        return "no CUDA card here; on a CPU, --memory auto plans with the machine's memory"
    if card["memory"] < presets.HEADROOM * int(name):
        return f"{card['device']} has {card['memory']} GiB"
    reasons = [presets.problems(preset, "cuda") for preset in presets.PRESETS[name]]
    return "" if not all(reasons) else "; ".join(dict.fromkeys(reason for row in reasons for reason in row))


def lines(found: dict[str, Any]) -> list[str]:
    """The findings as text."""
    cpu, memory = found["cpu"], found["memory"]
    flags = [key for key in ("amx", "avx512_bf16", "vnni") if cpu.get(key)]
    pocket = ", ".join(f"{role} {f'{size} MB' if size else 'MISSING'}" for role, size in found["pocket"].items())
    out = [
        " · ".join(f"{name} {version}" for name, version in found["versions"].items()),
        f"system    {found['system']}",
        f"cpu       {cpu['processor']}: {cpu['cores']} cores, torch uses {cpu.get('threads', '?')} threads; "
        f"{cpu.get('capability', '')}{', with ' + ', '.join(flags) if flags else ''}",
        f"memory    {memory['total']} GiB, {memory['available']} GiB free",
    ]
    for device in found["devices"]:
        size = f", {device['memory']} GiB ({device['free']} free)" if "memory" in device else ""
        out.append(f"device    {device['device']}: {device['name']}{size}")
    out.append(
        "extras    " + ", ".join(f"{name} {'yes' if there else 'no'}" for name, there in found["extras"].items())
    )
    out.append(f"pocket    {pocket}")
    out.append(f"hub       {found['hub']['cache']}{' (offline)' if found['hub']['offline'] else ''}")
    out += [f"fits      {name}: {'yes' if fits else 'no'}" for name, fits in found["fits"].items()]
    for reason in dict.fromkeys(found["flux"].values()):
        names = ", ".join(name for name, why in found["flux"].items() if why == reason)
        out.append(f"memory    FLUX.1-dev with --memory {names}: {f'no: {reason}' if reason else 'yes'}")
    for teacher in found["teachers"]:
        why = teacher["distilled"]
        fit = f"step-distilled ({why}): paint with few steps, do not train from it" if why else "not step-distilled"
        out.append(f"teacher   {teacher['name']}: {teacher['class'] or 'class not known here'}, {fit}")
    reason = found["vllm"]
    out.append(f"judge     a vision-language model on vLLM (curate.vlm.vllm): {f'no: {reason}' if reason else 'yes'}")
    out += [f"problem   {problem}" for problem in found["problems"]] or ["all right"]
    return out
