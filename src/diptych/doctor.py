"""What this machine can do: versions, devices, memory, extras, the models that ship, and what fits.

`diptych doctor` prints it; bug reports should carry it.
"""

from __future__ import annotations

import importlib.util
import os
import platform
from pathlib import Path
from typing import Any

from diptych import models
from diptych.machine import processor, versions
from diptych.paths import packaged

# Extra → the modules it brings.
EXTRAS = {
    "train": ("bitsandbytes", "tensorboard"),
    "ray": ("ray",),
    "serve": ("fastapi", "uvicorn", "gradio"),
    "eval": ("torchmetrics", "imagehash"),
    "flux": ("sentencepiece",),
    "dev": ("pytest", "hypothesis", "datasets"),
}
# What fits where: GiB for weights and work (FLUX.1 in bfloat16: 23.8 GB of transformer, 9.5 of T5, and the rest).
NEEDS = (
    ("pocket, everything", "memory", 2.0),
    ("FLUX.1-dev in bfloat16 on a GPU", "gpu", 36.0),
    ("FLUX.1-dev in bfloat16 on the CPU (slow: minutes a step)", "memory", 40.0),
)
GIB = 2**30


def examine() -> dict[str, Any]:
    """Everything as plain values; `problems` lists what keeps diptych from working, each with what to do."""
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
    found["fits"] = {name: _fits(kind, need, found) for name, kind, need in NEEDS}
    found["problems"] = problems
    return found


def _cpu(problems: list[str]) -> dict[str, Any]:
    values: dict[str, Any] = {"processor": processor(), "cores": os.cpu_count()}
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


def _memory() -> dict[str, float | None]:
    """GiB, of the machine; None where the system does not say."""
    info = Path("/proc/meminfo")
    if info.is_file():
        lines = dict(line.split(":", 1) for line in info.read_text("utf8").splitlines() if ":" in line)
        kib = {key: float(value.split()[0]) for key, value in lines.items()}
        return {
            "total": round(kib["MemTotal"] / 2**20, 1),
            "available": round(kib.get("MemAvailable", kib["MemTotal"]) / 2**20, 1),
        }
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    except (AttributeError, ValueError, OSError):
        return {"total": None, "available": None}
    return {"total": round(total, 1), "available": None}


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
    for role in models.ROLES:
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


def _fits(kind: str, need: float, found: dict[str, Any]) -> bool:
    if kind == "memory":
        total = found["memory"]["total"]
        return total is not None and total >= need
    return any(device.get("memory", 0) >= need for device in found["devices"])


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
    out += [f"problem   {problem}" for problem in found["problems"]] or ["all right"]
    return out
