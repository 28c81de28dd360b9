"""Memory presets: the plan for FLUX.1-dev, and the error of a plan compared with a real load.

    python benchmarks/memory.py table                  # the table of docs/memory.md and the README; seconds
    python benchmarks/memory.py load [--device cuda]   # a random model of 2.1 GB, loaded with every preset that runs

`load` makes random weights in a temporary folder and opens them in a separate process for each preset. It compares the
plan's bytes at rest with the memory that the load and one small image added: anonymous memory on a CPU, torch's
allocated bytes on a GPU. The image is small, so that weights and not activations are compared.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from diptych.run.plan.sizes import known
from diptych.student.runtime import memory
from diptych.student.runtime.memory import GIB, PRESETS, Preset, Shapes, plan

sys.path.insert(0, str(Path(__file__).parent))

DEV = known()["black-forest-labs/FLUX.1-dev"]
VAE: dict[str, Any] = dict(DEV["vae"])
FLUX = Shapes(
    {**DEV["transformer"], "in_channels": 128, "out_channels": 64}, VAE, DEV["text_encoder"], DEV["text_encoder_2"]
)
# FLUX.1's layers, fewer and half as wide: 0.52 B parameters, 2.1 GB in float32 (what a CPU computes in).
SMALL = {**FLUX.transformer, "num_layers": 3, "num_single_layers": 7, "num_attention_heads": 12}
PANEL, TEXT_TOKENS = 64, 16


def table() -> str:
    """The presets' plans for FLUX.1-dev in bfloat16, one image of two 512² panels, 28 steps, true guidance."""
    lines = ["| `--memory` | how | GPU, GiB: text · denoise · decode | waits in RAM |", "|---|---|---|---|"]
    for name, rows in PRESETS.items():
        for i, preset in enumerate(rows):
            planned = plan(FLUX, preset)
            sizes = " · ".join(f"{planned.stages[stage] / GIB:.1f}" for stage in ("text", "denoise", "decode"))
            lines.append(f"| {name if i == 0 else f'{name}, else'} | {preset} | {sizes} | {planned.host / GIB:.1f} |")
    return "\n".join(lines)


def make(folder: Path) -> None:
    """A student's folder with random weights: transformer in bfloat16, VAE, scheduler; text comes as embeddings."""
    import torch
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
    from safetensors.torch import save_file

    from diptych.student.weights import files, fold

    torch.manual_seed(0)
    state = {
        key: torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02) for key, shape in fold.shapes_of(SMALL).items()
    }
    place = folder / "transformer"
    place.mkdir(parents=True)
    save_file(state, place / files.WEIGHTS_FILE, metadata={"format": "pt"})
    (place / "config.json").write_text(json.dumps({"_class_name": "FluxTransformer2DModel", **SMALL}))
    # In bfloat16 too: a CPU then casts it, where float32 would stay mapped from the file.
    AutoencoderKL(**VAE).to(torch.bfloat16).save_pretrained(folder / "vae")
    FlowMatchEulerDiscreteScheduler().save_pretrained(folder / "scheduler")


def load_one(folder: Path, preset: Preset, device: str) -> dict[str, Any]:
    """Loads with one preset in this process, generates an image, and compares the memory in use with the plan."""
    import torch
    from measuring import status

    from diptych import student

    where = torch.device(device)
    torch.manual_seed(0)
    texts: dict[str, Any] = {
        "prompt_embeds": torch.randn(1, TEXT_TOKENS, SMALL["joint_attention_dim"]),
        "pooled_prompt_embeds": torch.randn(1, SMALL["pooled_projection_dim"]),
    }
    tiny_load(where)

    def held() -> int:
        gc.collect()
        if where.type == "cuda":
            torch.cuda.synchronize()
            return torch.cuda.memory_allocated()
        _trim()
        return status("RssAnon")

    before = held()
    pipe = student.load(folder, device=device, memory=preset)
    dtype = pipe.transformer.dtype
    pipe.set_progress_bar_config(disable=True)
    pipe(
        **{key: value.to(dtype) for key, value in texts.items()},
        height=PANEL,
        width=PANEL,
        num_inference_steps=1,
        generator=0,
    )
    loaded = held() - before
    counted = plan(Shapes(SMALL, VAE), preset, device=where.type, dtype_bytes=dtype.itemsize)
    planned = counted.blocks + counted.modulation + counted.other + counted.vae
    if where.type == "cuda":
        planned -= counted.host
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "planned_bytes": planned,
        "loaded_bytes": loaded,
        "planned_over_loaded": round(planned / loaded, 4),
    }


def tiny_load(device: Any) -> None:
    """Imports and uses every library once, before the memory is read for the first time."""
    import torch
    from diffusers import AutoencoderKL, FluxTransformer2DModel

    with torch.no_grad():
        for model in (
            AutoencoderKL(),
            FluxTransformer2DModel(num_layers=1, num_single_layers=1, num_attention_heads=1),
        ):
            model.to(device)
        torch.mm(torch.ones(64, 64, device=device), torch.ones(64, 64, device=device))


def _trim() -> None:
    """Returns freed memory to the system if the C library can (glibc)."""
    import ctypes
    import ctypes.util

    library = ctypes.CDLL(ctypes.util.find_library("c"))
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)


def load(device: str, out: Path | None) -> dict[str, Any]:
    """Every preset that this machine can run, each in a separate process."""
    import torch
    from measuring import about, write

    result: dict[str, Any] = {"about": about(torch.device(device)), "parameters": 0, "presets": {}}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "student"
        make(folder)
        counted = plan(Shapes(SMALL, VAE), Preset(), dtype_bytes=1)
        result["parameters"] = counted.blocks + counted.modulation + counted.other
        seen: dict[Preset, str] = {}
        for name, rows in PRESETS.items():
            for i, preset in enumerate(rows):
                key = name if i == 0 else f"{name}, else"
                if preset in seen:
                    result["presets"][key] = {"preset": str(preset), "same_as": seen[preset]}
                    continue
                seen[preset] = key
                if found := memory.problems(preset, torch.device(device).type):
                    result["presets"][key] = {"preset": str(preset), "not_run": "; ".join(found)}
                    continue
                command = [sys.executable, __file__, "one", str(folder), name, str(i), "--device", device]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                measured = json.loads(done.stdout.strip().splitlines()[-1])
                result["presets"][key] = {"preset": str(preset), **measured}
                print(key, result["presets"][key], flush=True)
    path = write("memory", result, out)
    print(path)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("table")
    loading = commands.add_parser("load")
    loading.add_argument("--out", type=Path)
    one = commands.add_parser("one")
    one.add_argument("folder", type=Path)
    one.add_argument("name")
    one.add_argument("row", type=int)
    for command in (loading, one):
        command.add_argument("--device", default="cpu")
    given = parser.parse_args()
    if given.command == "table":
        print(table())
    elif given.command == "load":
        load(given.device, given.out)
    else:
        print(json.dumps(load_one(given.folder, replace(PRESETS[given.name][given.row]), given.device)))


if __name__ == "__main__":
    main()
