"""A student's transformer as a `torch.export` program, for any number of text tokens and image tokens.

    program = torch.export.load("student.pt2").module()
    velocity = program(hidden_states=…, encoder_hidden_states=…, …)[0]

The arguments are `FluxTransformer2DModel.forward`'s, by name: (B, N, 2C), (B, T, D), (B, P), (B,), (N, 3), (T, 3), and
`guidance` (B,) where the model has it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from diptych.errors import UserError
from diptych.student.settings import of

SETTINGS_FILE = "diptych.json"  # a student's settings, among the program's extra files
TOLERANCE = 1e-5  # largest difference between program and model, relative to the largest output
_SIZES = ((8, 6), (18, 11), (5, 3))  # (image, text) tokens: traced with the first, compared with all


def export(state: Mapping[str, torch.Tensor], config: Mapping[str, Any], path: Path) -> None:
    """Writes the program after comparing it with the model. UserError if they differ by more than `TOLERANCE`."""
    from diffusers import FluxTransformer2DModel

    model: Any = FluxTransformer2DModel.from_config(dict(config))
    model.load_state_dict(dict(state))
    model.requires_grad_(False).eval()
    image, text = torch.export.Dim("image", min=2), torch.export.Dim("text", min=2)
    shapes: dict[str, Any] = {
        "hidden_states": {1: image},
        "encoder_hidden_states": {1: text},
        "pooled_projections": None,
        "timestep": None,
        "img_ids": {0: image},
        "txt_ids": {0: text},
        "return_dict": None,
    }
    if config.get("guidance_embeds"):
        shapes["guidance"] = None
    traced = inputs(config, *_SIZES[0])
    with torch.no_grad():
        program = torch.export.export(model, (), {**traced, "return_dict": False}, dynamic_shapes=shapes, strict=False)
        run = program.module()
        for size in _SIZES:
            given = inputs(config, *size)
            wanted = model(**given, return_dict=False)[0]
            off = float((run(**given, return_dict=False)[0] - wanted).abs().max() / wanted.abs().max())
            if not off <= TOLERANCE:
                raise UserError(
                    "model_unsupported",
                    f"The exported program differs from the model by {off:.1e} with {size[0]} image tokens and "
                    f"{size[1]} text tokens, more than {TOLERANCE:g}. Nothing was written; use another layout.",
                )
    torch.export.save(program, path, extra_files={SETTINGS_FILE: json.dumps(of(config).values(), sort_keys=True)})


def inputs(config: Mapping[str, Any], image: int, text: int) -> dict[str, torch.Tensor]:
    """Arguments of a transformer for these numbers of image and text tokens. Equal numbers give equal values."""
    generator = torch.Generator().manual_seed(image * 1000 + text)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    given = {
        "hidden_states": random(1, image, config["in_channels"]),
        "encoder_hidden_states": random(1, text, config["joint_attention_dim"]),
        "pooled_projections": random(1, config["pooled_projection_dim"]),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.stack([torch.zeros(image), torch.arange(image) // 3, torch.arange(image) % 3], dim=1).float(),
        "txt_ids": torch.zeros(text, 3),
    }
    if config.get("guidance_embeds"):
        given["guidance"] = torch.tensor([3.5])
    return given
