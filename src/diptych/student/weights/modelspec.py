"""The header that model managers read: https://github.com/Stability-AI/ModelSpec, version 1.0.1.

Without its `date`: equal weights make equal bytes here.
"""

from __future__ import annotations

from typing import Any

from diptych.utils.machine import VERSION

_FLUX = 3072  # width of FLUX.1
_IMPLEMENTATIONS = {
    "diffusers": "diffusers",
    "comfyui": "https://github.com/black-forest-labs/flux",
    "kohya": "https://github.com/black-forest-labs/flux",
}


def modelspec(title: str, style: str, *, lora: bool, width: int, guidance: bool | None = None) -> dict[str, str]:
    """Metadata of a file in a style of keys; `width` is the model's, `guidance` whether it has FLUX.1-dev's embedding,
    if that is known."""
    family = "flux-1" if width != _FLUX else "flux-1-schnell" if guidance is False else "flux-1-dev"
    fields: dict[str, Any] = {
        "sai_model_spec": "1.0.1",
        "architecture": f"{family}/{'lora' if lora else 'control'}",
        "implementation": _IMPLEMENTATIONS[style],
        "title": title,
        "description": f"Diffusion Self-Distillation (arXiv 2411.18616), written by diptych {VERSION}",
        "usage_hint": "the input has twice the channels: the noisy canvas, and the latents of [reference | black]",
    }
    return {f"modelspec.{key}": value for key, value in fields.items()}
