"""Memory presets on a full-size model that is made on the GPU, compared with the plan (`gpu.py` runs it).

It needs no files: the parts get random weights on the device, the preset is applied to them, and an image is generated
from random embeddings with sequential true guidance. The peaks of denoising and decoding are compared with
`memory.plan`. Staged text encoders, which are opened from files, are not measured, and on a CPU there is no comparison.
"""

from __future__ import annotations

from typing import Any

import measuring
import numpy as np
import torch
from gpu_inference import TINY, size
from memory import DEV, FLUX
from PIL import Image

from diptych.student.runtime import memory
from diptych.student.runtime.memory import PRESETS, Memory, Preset, Shapes

STEPS = 4
ROWS = (("80", 0), ("24", 0), ("12", 0), ("8", 0), ("16", 0), ("16", 1), ("8", 1))  # the most telling first
SMALL = Shapes(
    {**TINY, "in_channels": 128, "out_channels": 64},
    {**DEV["vae"], "block_out_channels": [8, 16, 16, 16], "norm_num_groups": 4, "layers_per_block": 1},
    {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2},
    {"d_model": 32, "d_ff": 64, "d_kv": 16, "num_heads": 2, "num_layers": 1, "vocab_size": 99}
    | {"feed_forward_proj": "gated-gelu"},
)


def run(sheet: measuring.Sheet, device: torch.device, small: bool) -> None:
    shapes, side, tokens = (SMALL, 32, 8) if small else (FLUX, 512, 512)
    measuring.clocked(lambda: torch.ones(8, 8, device=device) @ torch.ones(8, 8, device=device), device)
    for name, number in ROWS:
        preset = PRESETS[name][number]
        label = name if number == 0 else f"{name}, else"
        if found := memory.problems(preset, device.type):
            sheet.line(label, lambda found=found: {"not_run": "; ".join(found)})
            continue
        sheet.line(label, lambda p=preset: one(shapes, p, device, side, tokens), needs=0 if small else 6)


def one(shapes: Shapes, preset: Preset, device: torch.device, side: int, tokens: int) -> dict[str, Any]:
    """Peak memory of each stage of one image in GiB, measured and planned."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    before = held(device)
    pipe, made = measuring.clocked(lambda: build(shapes, preset, device, dtype), device)[:2]
    seat = Memory("benchmark", preset, device)
    seat.resolve(shapes, dtype, {})
    applied = measuring.clocked(lambda: seat.apply(pipe), device)[1]
    planned = memory.plan(
        shapes,
        preset,
        device=device.type,
        dtype_bytes=dtype.itemsize,
        panel=(side, side),
        steps=STEPS,
        text_tokens=tokens,
    )
    peaks: dict[str, int] = {}
    if not preset.staged:
        peaks["text"] = measuring.clocked(lambda: encode(pipe, shapes, tokens, device), device)[2]

    now = {"stage": ""}
    inner = pipe.runtime.stage

    def stage(name: str) -> None:
        finish()
        inner(name)
        now["stage"] = name
        measuring.reset_peak(device)

    def finish() -> None:
        measuring.synchronize(device)
        if now["stage"]:
            peaks[now["stage"]] = measuring.peak(device)

    pipe.runtime.stage = stage
    width, pooled = (shapes.transformer[key] for key in ("joint_attention_dim", "pooled_projection_dim"))
    texts = [torch.randn(1, tokens, width), torch.randn(1, pooled), torch.randn(1, tokens, width)]
    texts = [text.to(device, dtype) for text in [*texts, torch.randn(1, pooled)]]
    names = ("prompt_embeds", "pooled_prompt_embeds", "negative_prompt_embeds", "negative_pooled_prompt_embeds")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (side, side, 3), dtype=np.uint8))
    draw = {"reference": image, "height": side, "width": side, "num_inference_steps": STEPS, "generator": 0}
    draw |= {"image_guidance_scale": 1.5, "text_guidance_scale": 2.0, "output_type": "pt"}
    seconds = measuring.clocked(lambda: pipe(**draw, **dict(zip(names, texts, strict=True))), device)[1]
    finish()
    stages = {
        name: {
            "planned_gib": round(planned.stages[name] / 2**30, 3),
            "measured_gib": round((bytes_ - before) / 2**30, 3),
            "planned_over_measured": round(planned.stages[name] / max(1, bytes_ - before), 4),
        }
        for name, bytes_ in peaks.items()
    }
    return {
        "preset": str(preset),
        "stages": stages,
        "transformer_gib": round(size(pipe.transformer) / 2**30, 3),
        "made_s": round(made, 1),
        "applied_s": round(applied, 1),
        "seconds": round(seconds, 2),
        "forwards": 2 + 3 * (STEPS - 2),
    }


def held(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def build(shapes: Shapes, preset: Preset, device: torch.device, dtype: torch.dtype) -> Any:
    """The pipeline with random weights on `device`. It has text encoders only if they stay on the device."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    from diptych.student.pipeline import DiptychPipeline

    transformer = measuring.random_weights(
        lambda: FluxTransformer2DModel.from_config(dict(shapes.transformer)), device, dtype
    )
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            vae: Any = AutoencoderKL.from_config(dict(shapes.vae))
            clip = t5 = None
            if not preset.staged:
                clip = CLIPTextModel(CLIPTextConfig(**dict(shapes.text_encoder or {}))).eval()
                t5 = T5EncoderModel(T5Config(**dict(shapes.text_encoder_2 or {}))).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = DiptychPipeline(scheduler, vae.eval(), transformer, text_encoder=clip, text_encoder_2=t5)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def encode(pipe: Any, shapes: Shapes, tokens: int, device: torch.device) -> None:
    """The computation of encoding one prompt."""
    pipe.text_encoder(torch.ones(1, min(77, 8 * tokens), dtype=torch.long, device=device))
    pipe.text_encoder_2(torch.ones(1, tokens, dtype=torch.long, device=device))
