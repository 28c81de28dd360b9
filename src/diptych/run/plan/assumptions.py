"""What a plan cannot count and has to assume: each with its value, its unit and where it comes from.

`--assume NAME=VALUE` sets one. What a run of the same recipe measured replaces a default, never what somebody set.
Prices have no default: a plan with no price says so instead of guessing one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from diptych.errors import UsageError, nearest
from diptych.recipe.schema import Recipe


@dataclass(frozen=True)
class Device:
    """What a plan may run on. `tflops`: what its matrix products reach, 10^12 a second, in bfloat16 on a GPU.

    `paint_share` and `train_share`: how much of that drawing and training reach. `memory` in bytes; None: not known.
    """

    tflops: float
    memory: float | None
    source: str
    memory_source: str = "its data sheet"
    paint_share: float = 0.42
    train_share: float = 0.45


GPU_SHARES = {
    "paint_share": "published FLUX.1 draws in 2.2 s compiled where 1.33 s is the floor, and 1.3 to 1.55 times slower "
    "uncompiled, as painting is",
    "train_share": "the goal of our training benchmark, with checkpointing; not measured yet",
}
COMPILED = 0.60, "published FLUX.1 draws in 2.2 s compiled, as paint.speed has it, where 1.33 s is the floor"
CPU_SHARES = dict.fromkeys(GPU_SHARES, "tflops is then what drawing itself reached")
DEVICES = {
    "H200": Device(790, 141e9, "bfloat16 matrix products measured on an H200"),
    "H100": Device(
        749, 80e9, "bfloat16 matrix products measured on an H100 (benchmarks/results/gpu-inference-h100-2026-11-26)"
    ),
    "RTX4090": Device(165, 24 * 2**30, "a floor of 6.4 s for a FLUX.1 picture of 1.055 PFLOP"),
    "cpu": Device(
        0.226,
        None,
        "two AMD EPYC cores paint a pocket grid of 11.8 GFLOP in 0.052 s, 50 at once",
        paint_share=1.0,
        train_share=1.0,
    ),
}


@dataclass(frozen=True)
class Assumption:
    """One of them. `value` None: nobody said. `low` and `high` bound what is published, `of` says who set it."""

    value: float | None
    unit: str
    source: str
    low: float | None = None
    high: float | None = None
    of: str = "default"  # or "set", or "measured"

    def values(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        shown = {"value": self.value, "unit": self.unit, "of": self.of, "source": self.source}
        return shown | ({"low": self.low, "high": self.high} if self.low is not None else {})


_PRICE = "nothing is built in"
_RULE = "OpenAI's rule of thumb for English"
# The mean of two published rates, both of vision-language judges. What an embedding judge keeps depends on its
# threshold and has not been measured on such a teacher.
KEEP_RATE_SOURCE = "a guess: published of VLM judges, UNO 0.354 and Subjects200K 0.529; never measured with this judge"
SHARES = ("keep_rate", "judge_share", "local_vlm_share", "paint_share", "train_share")


def defaults(recipe: Recipe, gpu: str | None = None) -> dict[str, Assumption]:
    """Every assumption by name, as far as the recipe and the device decide it. UsageError for an unknown device."""
    name = device_name(recipe, gpu)
    device, shares = DEVICES[name], CPU_SHARES if name == "cpu" else GPU_SHARES
    pocket = recipe.teacher == "pocket"
    compiled = recipe.paint.speed is not None and name != "cpu"
    share, source = COMPILED if compiled else (device.paint_share, shares["paint_share"])
    return {
        "keep_rate": Assumption(0.12, "of candidates", "4,806 of 40,000 with the teacher that ships")
        if pocket
        else Assumption(0.44, "of candidates", KEEP_RATE_SOURCE, 0.354, 0.529),
        "devices": Assumption(1, "at once", "work is taken to share out evenly"),
        "tflops": Assumption(device.tflops, "TFLOP/s a device", device.source),
        "paint_share": Assumption(share, "of tflops", source),
        "train_share": Assumption(device.train_share, "of tflops", shares["train_share"]),
        "device_gib": Assumption(
            device.memory and round(device.memory / 2**30, 1), "GiB a device", device.memory_source
        ),
        "seconds_per_grid": Assumption(None, "s on a device", "from operations, tflops and paint_share"),
        "seconds_per_step": Assumption(None, "s on a device", "from operations, tflops and train_share"),
        "gpu_hour": Assumption(None, "money a device hour", _PRICE),
        "judge_share": Assumption(1.0, "of pairs", "at most: as if every other test let every pair through to the vlm"),
        "image_tokens": Assumption(None, "tokens", "Qwen2-VL: one for 28 × 28 pixels (arXiv 2409.12191)"),
        "chars_per_token": Assumption(4.0, "characters", _RULE),
        "words_per_token": Assumption(0.75, "words", _RULE),
        "judge_input_tokens": Assumption(None, "tokens", "the question's words and two pictures"),
        "judge_answer_tokens": Assumption(300, "tokens", "a guess: a few sentences a step; it may be thrice that"),
        "caption_answer_tokens": Assumption(110, "tokens", "60 words, the task's limit, and an instruction of 20"),
        "writer_answer_tokens": Assumption(None, "tokens", "the most words that the task's form allows"),
        "seed_caption_tokens": Assumption(20, "tokens", "a guess: a line"),
        "vlm_input_price": Assumption(None, "money a million tokens", _PRICE),
        "vlm_output_price": Assumption(None, "money a million tokens", _PRICE),
        "writer_input_price": Assumption(None, "money a million tokens", _PRICE),
        "writer_output_price": Assumption(None, "money a million tokens", _PRICE),
        "local_vlm_share": Assumption(0.04, "of painting's hours", "published: 20 to 30 times cheaper", 1 / 30, 1 / 20),
        "seam_ms": Assumption(0.5 if pocket else 10, "ms a grid on a core", "measured, docs/data.md"),
        "compare_ms": Assumption(9, "ms for two panels on a core", "measured, docs/data.md"),
        "pixel_bytes": Assumption(1.7, "bytes", "112 MB of 8,000 pocket grids as PNG")
        if pocket
        else Assumption(
            1.6, "bytes", "PNG of photographs (the Kodak set), WebP and JPEG less; 3 is the most it can be"
        ),
        "grid_bytes": Assumption(None, "bytes", "pixels and pixel_bytes"),
        "candidate_bytes": Assumption(None, "bytes", "pixels and pixel_bytes"),
        "row_bytes": Assumption(1000, "bytes", "a guess: a row's words and numbers; 100 to 200 in the pocket world"),
    }


def device_name(recipe: Recipe, gpu: str | None = None) -> str:
    """Where a plan takes a recipe to run: on `gpu` (in any case of its letters), else the pocket world, unless it says
    otherwise, on a CPU and the rest on an H200. UsageError for an unknown one."""
    if gpu is None:
        small = recipe.device == "cpu" or (recipe.device == "auto" and recipe.teacher == "pocket")
        return "cpu" if small else "H200"
    known = {name.lower(): name for name in DEVICES}
    if gpu.lower() not in known:
        raise UsageError(
            f"--gpu {gpu}: what it reaches is not known here; known: {', '.join(DEVICES)}{nearest(gpu, DEVICES)}; "
            "for any other say --assume tflops=… and --assume device_gib=…"
        )
    return known[gpu.lower()]


def collect(recipe: Recipe, sets: Sequence[str] = (), gpu: str | None = None) -> dict[str, Assumption]:
    """The defaults with `sets` (`"keep_rate=0.4"`) laid over. UsageError for a name or a value that makes no sense."""
    found = defaults(recipe, gpu)
    if gpu is not None:
        found |= {name: replace(found[name], of="set") for name in ("tflops", "device_gib")}
    for text in sets:
        name, value = parse(text, found)
        found[name] = replace(found[name], value=value, low=None, high=None, of="set", source="--assume")
    vlm = recipe.curate.vlm
    for role, endpoint in (("writer", recipe.write.endpoint), ("vlm", vlm.endpoint if vlm else None)):
        for way in ("input", "output"):
            price = getattr(endpoint, f"{way}_price", None)
            name = f"{role}_{way}_price"
            if price is not None and found[name].of == "default":
                found[name] = replace(found[name], value=price, of="recipe", source=f"endpoint.{way}_price")
    return found


def parse(text: str, known: Mapping[str, Assumption]) -> tuple[str, float]:
    """`"keep_rate=0.4"` as ("keep_rate", 0.4)."""
    name, equals, given = (part.strip() for part in text.partition("="))
    if not equals or not name:
        raise UsageError(f"--assume {text}: write it as name=number, for instance --assume keep_rate=0.4")
    if name not in known:
        hint = nearest(name, known) or f"; there are {', '.join(known)}"
        raise UsageError(f"--assume {text}: there is no such assumption{hint}")
    try:
        value = float(given)
    except ValueError:
        value = math.nan
    priced = name.endswith("_price") or name == "gpu_hour"
    if not math.isfinite(value) or value < 0 or (value == 0 and not (priced or name in SHARES)):
        raise UsageError(f"--assume {text}: {known[name].unit} must be a number above 0")
    if name in SHARES and value > 1:
        raise UsageError(f"--assume {text}: a share is at most 1")
    if name == "devices" and value != int(value):
        raise UsageError(f"--assume {text}: a whole number of devices")
    if name in ("paint_share", "train_share") and value == 0:
        raise UsageError(f"--assume {text}: nothing would ever be done")
    return name, value
