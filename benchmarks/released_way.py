"""The sampling of the released code, rewritten from its description. `inference.py` compares ours with it.

It has two input layers, `x_embedder(x) + c_embedder(c)`, and an unfused LoRA on the attention projections. With image
guidance above 1 it runs three forward passes one after another from the third step on. Every call encodes the texts and
the reference, decodes the whole canvas, and returns its right half. Two things differ from the release, at no cost, to
make runs comparable: the condition is the posterior's mode (the release samples it without a seed), and timestep
frequencies are correctly rounded (`runtime.modulation`). It reproduces the release's fixture: `inference.py golden`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FluxControlPipeline, FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux_control import calculate_shift
from PIL import Image
from safetensors.torch import load_file

from diptych.student.canvas import Canvas, condition_canvas, fit_image, split_panels, to_pixels
from diptych.student.families.base import pack, unpack
from diptych.student.runtime.modulation import exact_timesteps


class TwoEmbedders(torch.nn.Module):
    """x_embedder(x) + c_embedder(c) of [x ; c], (B, tokens, 2·C)."""

    def __init__(self, x_embedder: torch.nn.Linear, c_embedder: torch.nn.Linear) -> None:
        super().__init__()
        self.x_embedder, self.c_embedder = x_embedder, c_embedder

    def forward(self, both: torch.Tensor) -> torch.Tensor:
        x, c = both.chunk(2, dim=-1)
        return self.x_embedder(x) + self.c_embedder(c)


def from_folder(folder: Path) -> FluxTransformer2DModel:
    """The transformer of a folder in the released layout, its LoRA file loaded and not fused."""
    state = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    state = {key: tensor for key, tensor in state.items() if ".lora_" not in key}
    config = FluxTransformer2DModel.load_config(folder / "transformer")
    config = {key: value for key, value in config.items() if not key.startswith("_")}
    wide = torch.cat([state.pop("x_embedder.weight"), state.pop("c_embedder.weight")], dim=1)
    biases = state.pop("x_embedder.bias"), state.pop("c_embedder.bias")
    plain: Any = FluxTransformer2DModel.from_config(config)
    missing, unexpected = plain.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) == {"x_embedder.weight", "x_embedder.bias"}, (missing, unexpected)
    split_input(plain, wide, *biases)
    lora = folder / "pytorch_lora_weights.safetensors"
    if lora.is_file():
        plain.load_lora_adapter(load_file(lora), prefix="transformer")
    return plain.eval()


def split_input(
    transformer: Any, weight: torch.Tensor, bias_x: torch.Tensor, bias_c: torch.Tensor | None = None
) -> None:
    """Puts the two input layers of a folded weight (inner, 2·C) into a transformer."""
    layers = []
    for part, bias in zip(weight.chunk(2, dim=1), (bias_x, bias_c), strict=True):
        layer = torch.nn.Linear(part.shape[1], part.shape[0], device=part.device, dtype=part.dtype)
        with torch.no_grad():
            layer.weight.copy_(part)
            layer.bias.copy_(bias) if bias is not None else layer.bias.zero_()
        layers.append(layer)
    transformer.x_embedder = TwoEmbedders(*layers)


class ReleasedWay:
    """The sampler around such a transformer and stock parts. Text encoders may be None: texts come as embeddings."""

    def __init__(self, transformer: Any, vae: Any, scheduler: Any, **text_parts: Any) -> None:
        parts = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")) | text_parts
        self.stock = FluxControlPipeline(transformer=transformer, vae=vae, scheduler=scheduler, **parts)
        self.transformer, self.vae, self.scheduler = transformer, vae, scheduler

    @property
    def device(self) -> torch.device:
        return next(self.transformer.parameters()).device

    def texts(self, prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(1, L, D) and (1, P)."""
        length = min(512, int(self.stock.tokenizer_2.model_max_length))
        embeds, pooled, _ = self.stock.encode_prompt([prompt], None, max_sequence_length=length)
        assert embeds is not None and pooled is not None
        return embeds, pooled

    def condition(self, reference: Image.Image, canvas: Canvas) -> torch.Tensor:
        panel = fit_image(reference, canvas.panel_height, canvas.panel_width)
        pixels = condition_canvas(to_pixels(panel)[None]).to(self.device, self.vae.dtype)
        latents = self.vae.encode(pixels).latent_dist.mode()
        return pack((latents - (self.vae.config.shift_factor or 0.0)) * self.vae.config.scaling_factor)

    def decode(self, tokens: torch.Tensor, canvas: Canvas) -> torch.Tensor:
        latents = unpack(tokens, canvas.size) / self.vae.config.scaling_factor
        latents = latents + (self.vae.config.shift_factor or 0.0)
        pixels = self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0]
        return split_panels(pixels)[1]

    @torch.no_grad()
    def __call__(
        self,
        reference: Image.Image,
        prompt: str | None,
        noise: torch.Tensor,
        canvas: Canvas,
        *,
        steps: int,
        guidance: float = 3.5,
        image_guidance: float = 1.0,
        text_guidance: float = 1.0,
        texts: tuple[torch.Tensor, torch.Tensor] | None = None,
        empty: tuple[torch.Tensor, torch.Tensor] | None = None,
        latents_only: bool = False,
    ) -> torch.Tensor:
        """Right-panel pixels (1, 3, h, w), or the canvas's packed latents, from packed noise (1, tokens, C)."""
        text = texts if texts is not None else self.texts(prompt or "")
        guided = image_guidance > 1
        nothing = (empty if empty is not None else self.texts("")) if guided else None
        dtype, device = text[0].dtype, self.device
        c = self.condition(reference, canvas).to(dtype)
        x_t = noise.to(device, dtype)
        image_ids = FluxControlPipeline._prepare_latent_image_ids(1, canvas.rows, canvas.columns, device, dtype)
        distilled = torch.full([1], guidance, device=device) if self.transformer.config.guidance_embeds else None
        scheduler = self.scheduler
        shift = {"mu": shift_of(canvas, scheduler)} if scheduler.config.use_dynamic_shifting else {}
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), device=device, **shift)

        def velocity(
            condition: torch.Tensor, given: tuple[torch.Tensor, torch.Tensor], t: torch.Tensor
        ) -> torch.Tensor:
            return self.transformer(
                hidden_states=torch.cat([x_t, condition], dim=2),
                timestep=t.expand(1).to(dtype) / 1000,
                guidance=distilled,
                pooled_projections=given[1],
                encoder_hidden_states=given[0],
                txt_ids=torch.zeros(given[0].shape[1], 3, device=device, dtype=dtype),
                img_ids=image_ids,
                return_dict=False,
            )[0]

        with exact_timesteps(self.transformer):
            for i, t in enumerate(scheduler.timesteps):
                if nothing is not None and i >= 2:
                    v_null = velocity(torch.zeros_like(c), nothing, t)
                    v_reference = velocity(c, nothing, t)
                    v_text = velocity(c, text, t)
                    v = v_null + image_guidance * (v_reference - v_null) + text_guidance * (v_text - v_reference)
                else:
                    v = velocity(c, text, t)
                x_t = scheduler.step(v, t, x_t, return_dict=False)[0].to(dtype)
        return x_t if latents_only else self.decode(x_t, canvas)


def shift_of(canvas: Canvas, scheduler: Any) -> float:
    """FLUX's schedule shift for the canvas's number of tokens."""
    config = scheduler.config
    return calculate_shift(
        canvas.tokens,
        config.get("base_image_seq_len", 256),
        config.get("max_image_seq_len", 4096),
        config.get("base_shift", 0.5),
        config.get("max_shift", 1.15),
    )
