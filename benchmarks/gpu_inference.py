"""Generation at full size on one GPU, method by method, the most important first (`gpu.py` runs this).

It uses a random FLUX.1 of 12 B parameters in bfloat16 twice: with the release's two input layers and an unfused LoRA of
rank 128, and folded and fused in our pipeline. Every method has one call to warm up (which compiles) and one that
counts. Settings that cache the reference reuse it from the first call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import inference
import measuring
import numpy as np
import torch
from inference import GUIDED, H200_RATE, UNGUIDED
from PIL import Image

from diptych.student.canvas import Canvas
from diptych.student.runtime.applied import apply_speed
from diptych.student.runtime.speed import PLAIN, PRESETS, Speed

STEPS, FEW_STEPS, WARM_STEPS = 20, 6, 4
TINY: dict[str, Any] = {
    "in_channels": 64,
    "num_layers": 1,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "axes_dims_rope": (4, 6, 6),
    "guidance_embeds": True,
}


def run(sheet: measuring.Sheet, device: torch.device, small: bool) -> None:
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    config, side, text = (TINY, 32, 8) if small else (inference.FLUX, 512, 512)
    rate = measuring.matrix_rate(device, dtype, 256 if small else 8192)
    sheet.note(matrix_tflops=round(rate / 1e12, 2), dtype=str(dtype).removeprefix("torch."))
    can_compile = sheet.line("torch.compile", lambda: compiles(device))
    torch._dynamo.config.recompile_limit = 64  # every setting of this process shares the blocks' compiled code

    released_way, ours = inference.random_pair(config, device, dtype, side)
    canvas = Canvas(side, side, ours.vae_scale_factor)
    work = measuring.forward_flop(ours.transformer.config, canvas.tokens, text)
    weights = {"released": size(released_way.transformer), "ours": size(ours.transformer)}
    sheet.note(
        parameters=sum(p.numel() for p in ours.transformer.parameters()),
        image_tokens=canvas.tokens,
        text_tokens=text,
        forward_tflop=round(work / 1e12, 4),
        transformer_gib={name: round(each / 2**30, 2) for name, each in weights.items()},
    )
    generator = torch.Generator().manual_seed(1)
    shapes = (1, text, ours.transformer.config.joint_attention_dim), (1, ours.transformer.config.pooled_projection_dim)
    texts: Any
    empty: Any
    texts, empty = (
        tuple(torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes) for _ in range(2)
    )
    given = dict(zip(("prompt_embeds", "pooled_prompt_embeds"), texts, strict=True))
    given |= dict(zip(("negative_prompt_embeds", "negative_pooled_prompt_embeds"), empty, strict=True))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (side, side, 3), dtype=np.uint8))
    noise = ours.noise([1], canvas)
    first: dict[str, torch.Tensor] = {}  # the released way's picture of each case
    base: dict[str, float] = {}  # and its seconds

    def theirs(steps: int, scales: Any) -> torch.Tensor:
        return released_way(image, None, noise, canvas, steps=steps, texts=texts, empty=empty, **scales).clamp(-1, 1)

    def mine(steps: int, scales: Any) -> torch.Tensor:
        return inference.ours_pixels(ours, image, noise, canvas, steps, scales, **given)

    def method(
        case: str, draw: Callable[..., torch.Tensor], setting: Speed | None, steps: int, exact: bool = True
    ) -> dict[str, Any]:
        scales = UNGUIDED if case == "unguided" else GUIDED
        left_out = []
        if setting is not None:
            setting = setting if "s" in can_compile else replace(setting, compile=False)
            left_out = apply_speed(ours, setting)
        with torch.no_grad():
            warm = measuring.clocked(lambda: draw(min(steps, WARM_STEPS), scales), device)[1]
            pixels, seconds, peak, rest = measuring.clocked(lambda: draw(steps, scales), device)
        forwards = steps if case == "unguided" else min(2, steps) + 3 * max(0, steps - 2)
        mine_bytes = weights["released" if setting is None else "ours"]
        key = f"{case} {steps}"
        if setting is None:
            first[key], base[key] = pixels.float(), seconds
        found = {
            "steps": steps,
            "seconds": round(seconds, 4),
            "warm_s": round(warm, 2),
            "peak_above_rest_gib": round((peak - rest) / 2**30, 3),
            "peak_with_its_transformer_gib": round((peak - rest + mine_bytes) / 2**30, 2),
        }
        if exact:
            floor = forwards * work / seconds
            found |= {"forwards": forwards, "tflops": round(floor / 1e12, 2), "share": round(floor / rate, 3)}
            found["share_of_790_tflops"] = round(floor / H200_RATE, 3)
        if key in base:
            difference = (pixels.float() - first[key]).abs()
            found["speedup"] = round(base[key] / seconds, 3)
            found["difference"] = {"max": float(difference.max()), "mean": float(difference.mean())}
        if left_out:
            found["left_out"] = left_out
        if setting is not None:
            found["switches"] = setting.changed()
        return found

    def line(name: str, *what: Any, needs: float = 6.0, **more: Any) -> None:
        sheet.line(name, lambda: method(*what, **more), needs=0 if small else needs)

    steps, few = (4, 3) if small else (STEPS, FEW_STEPS)
    line("unguided released", "unguided", theirs, None, steps)
    line("unguided exact", "unguided", mine, PRESETS["exact"], steps, needs=25)
    line("guided released", "guided", theirs, None, steps, needs=14)
    line("guided fastest", "guided", mine, PRESETS["fastest"], steps, needs=15, exact=False)
    line("guided exact", "guided", mine, PRESETS["exact"], steps, needs=12)
    line("guided fast", "guided", mine, PRESETS["fast"], steps, needs=8, exact=False)
    line("guided few released", "guided", theirs, None, few)
    line("guided few plain", "guided", mine, PLAIN, few)
    switches = [name for name in inference.EXACT_SWITCHES if name not in ("packed", "compile")]
    for switch, setting in inference.alone(switches).items():
        line(f"guided few {switch}", "guided", mine, setting, few)
    if device.type == "cuda":
        cudnn = replace(PRESETS["exact"], compile=False, attention="_native_cudnn")
        line("guided few exact uncompiled", "guided", mine, replace(PRESETS["exact"], compile=False), few)
        line("guided few exact uncompiled cudnn", "guided", mine, cudnn, few)
        line("unguided exact cudnn", "unguided", mine, replace(cudnn, compile=True), steps, needs=25)
    line("guided few only_compile", "guided", mine, replace(PLAIN, compile=True), few, needs=25)


def compiles(device: torch.device) -> dict[str, Any]:
    """Whether torch.compile works here, and the seconds of its first, small graph."""

    def graph(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.gelu(x @ x) * 2

    x = torch.ones(64, 64, device=device)
    seconds = measuring.clocked(lambda: torch.compile(graph)(x), device)[1]
    return {"s": round(seconds, 2)}


def size(model: Any) -> int:
    """Bytes of the parameters."""
    return sum(p.numel() * p.element_size() for p in model.parameters())
