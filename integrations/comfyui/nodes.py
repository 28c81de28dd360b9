"""The nodes, thin over the library: load a student, draw with it, relight, enhance a prompt.

ComfyUI's pictures are float tensors (B, H, W, 3) in 0..1, its masks (B, H, W); the library's are PIL's. A 0 in a
number whose tooltip says so means the model's own setting.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image

from diptych import Student
from diptych.data.formats import to_rgb
from diptych.errors import UserError
from diptych.student.sampling import FITS, MAX_SEED, OPTIONS, SEED

MEMORY = ["none", "auto", "8", "12", "16", "24", "48", "80"]
SPEED = ["as released", "exact", "fast", "fastest"]


def to_pictures(tensor: torch.Tensor) -> list[Image.Image]:
    """(B, H, W, C) in 0..1 to RGB: 1 channel is gray, and a second or fourth one is transparency, laid over white as
    the library does with files. UserError for an empty batch or another number of channels."""
    if tensor.ndim != 4 or not len(tensor) or not 1 <= tensor.shape[-1] <= 4:
        shape = " × ".join(str(size) for size in tensor.shape)
        raise UserError(f"an IMAGE is a batch of pictures with 1 to 4 channels, (B, H, W, C); this one is {shape}")
    pixels = (tensor.float().nan_to_num(0).clamp(0, 1) * 255).round().byte().cpu().numpy()
    if tensor.shape[-1] == 1:
        pixels = pixels[..., 0]
    return [to_rgb(Image.fromarray(picture)) for picture in pixels]


def to_masks(tensor: torch.Tensor) -> list[Image.Image | None]:
    """(B, H, W) or (H, W) in 0..1 to PIL; None where all is black: so Load Image says that nobody painted a mask."""
    masks = tensor.reshape(-1, *tensor.shape[-2:])
    drawn = to_pictures(masks[..., None].expand(*masks.shape, 3))
    return [picture if mask.any() else None for picture, mask in zip(drawn, masks, strict=True)]


def to_tensor(pictures: list[Image.Image]) -> torch.Tensor:
    """PIL to (B, H, W, 3), float32 in 0..1."""
    return torch.stack([torch.from_numpy(np.asarray(p.convert("RGB"), dtype=np.float32) / 255) for p in pictures])


def settings(**asked: float) -> dict[str, Any]:
    """Those that are set: 0 leaves the model's own."""
    return {name: value for name, value in asked.items() if value}


def progress(total: int) -> Callable[..., dict[str, Any]]:
    """A diffusers callback that moves ComfyUI's bar; outside ComfyUI it does nothing."""
    try:
        from comfy.utils import ProgressBar  # pyright: ignore[reportMissingImports]
    except ImportError:
        return lambda pipe, step, timestep, tensors: {}
    bar = ProgressBar(total)

    def step(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        bar.update(1)
        return {}

    return step


def _scale(name: str) -> tuple[str, dict[str, Any]]:
    tooltip = f"{OPTIONS[name].help} 0: the model's own."
    return ("FLOAT", {"default": 0.0, "min": 0.0, "max": 20.0, "step": 0.1, "tooltip": tooltip})


SAMPLING: dict[str, Any] = {
    "seed": ("INT", {"default": 0, "min": 0, "max": MAX_SEED, "tooltip": SEED}),
    "steps": ("INT", {"default": 0, "min": 0, "max": 200, "tooltip": "0: the model's own."}),
    "guidance": _scale("guidance"),
    "image_guidance": _scale("image_guidance"),
    "text_guidance": _scale("text_guidance"),
    "size": ("INT", {"default": 0, "max": 4096, "step": 16, "tooltip": "Pixels of a side. 0: the model's own."}),
    "fit": (list(FITS), {"tooltip": "How a reference that is not square becomes a panel."}),
}


class DiptychLoad:
    """Opens a student once; the others use it."""

    CATEGORY, FUNCTION = "diptych", "load"
    RETURN_TYPES, RETURN_NAMES = ("DIPTYCH_STUDENT",), ("student",)
    DESCRIPTION = "A Diffusion Self-Distillation student: the embedded pocket model, a folder, a file or a hub name."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("STRING", {"default": "pocket", "tooltip": "pocket, a folder, a .safetensors or .gguf file"}),
                "base": ("STRING", {"default": "", "tooltip": "The teacher beside it, such as a FLUX.1-dev folder."}),
                "memory": (MEMORY, {"tooltip": "Preset for a card of so many GiB; auto looks at the card."}),
                "speed": (SPEED, {"tooltip": "exact changes nothing beyond rounding; the others trade quality."}),
            },
            "optional": {
                "lora": ("STRING", {"default": "", "tooltip": "A LoRA file to add, or empty."}),
                "lora_scale": ("FLOAT", {"default": 1.0, "min": -4.0, "max": 4.0, "step": 0.05}),
            },
        }

    def load(
        self, model: str, base: str, memory: str, speed: str, lora: str = "", lora_scale: float = 1.0
    ) -> tuple[Student]:
        student = Student.load(
            model.strip(),
            base.strip() or None,
            memory=None if memory == "none" else memory,
            speed=None if speed == SPEED[0] else speed,
            lora=[(lora.strip(), lora_scale)] if lora.strip() else [],
            progress_bar=False,
        )
        return (student,)


class DiptychGenerate:
    """Every picture of the batch is a reference; each gives one picture."""

    CATEGORY, FUNCTION = "diptych", "generate"
    RETURN_TYPES, RETURN_NAMES = ("IMAGE",), ("images",)
    DESCRIPTION = "The reference's subject in the scene that the prompt says."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "student": ("DIPTYCH_STUDENT",),
                "reference": ("IMAGE",),
                "prompt": ("STRING", {"multiline": True, "default": "a cat on the beach"}),
                **SAMPLING,
            },
            "optional": {"negative_prompt": ("STRING", {"multiline": True, "default": ""})},
        }

    def generate(
        self,
        student: Student,
        reference: torch.Tensor,
        prompt: str,
        seed: int,
        steps: int,
        guidance: float,
        image_guidance: float,
        text_guidance: float,
        size: int,
        fit: str,
        negative_prompt: str = "",
    ) -> tuple[torch.Tensor]:
        references = to_pictures(reference)
        asked = settings(
            steps=steps, guidance=guidance, image_guidance=image_guidance, text_guidance=text_guidance, size=size
        )
        drawn = student.generate(
            references,
            prompt,
            seed=seed,
            fit=fit,
            negative_prompt=negative_prompt or None,
            callback_on_step_end=progress(len(references) * int(steps or student.sampling["steps"])),
            **asked,
        )
        return (to_tensor(drawn),)


class DiptychRelight:
    """Every picture of the batch under one light."""

    CATEGORY, FUNCTION = "diptych", "relight"
    RETURN_TYPES, RETURN_NAMES = ("IMAGE",), ("images",)
    DESCRIPTION = "The same scene under another light, everything in its place."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "student": ("DIPTYCH_STUDENT",),
                "reference": ("IMAGE",),
                "light": ("STRING", {"default": "soft golden light from the left"}),
                "scene": ("STRING", {"default": "", "tooltip": "What the picture shows, if the model should be told."}),
                "detail": (
                    "FLOAT",
                    {
                        "default": 1.0,
                        "min": 0.0,
                        "max": 1.0,
                        "step": 0.05,
                        "tooltip": "Share of the fine detail that is the reference's own.",
                    },
                ),
                **SAMPLING,
            },
            "optional": {
                "mask": ("MASK", {"tooltip": "What is painted may change, the rest stays. Nothing painted: all may."})
            },
        }

    def relight(
        self,
        student: Student,
        reference: torch.Tensor,
        light: str,
        scene: str,
        detail: float,
        seed: int,
        steps: int,
        guidance: float,
        image_guidance: float,
        text_guidance: float,
        size: int,
        fit: str,
        mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor]:
        asked = settings(
            steps=steps, guidance=guidance, image_guidance=image_guidance, text_guidance=text_guidance, size=size
        )
        pictures = to_pictures(reference)
        masks = [None] if mask is None else to_masks(mask)
        bar = progress(len(pictures) * int(steps or student.sampling["steps"]))
        drawn = [
            student.relight(
                picture,
                light,
                scene=scene,
                detail=detail,
                mask=masks[min(number, len(masks) - 1)],
                seed=seed,
                fit=fit,
                callback_on_step_end=bar,
                **asked,
            )
            for number, picture in enumerate(pictures)
        ]
        return (to_tensor(drawn),)


class DiptychEnhance:
    """A vision-language model sees the reference and fills the prompt out, in the user's own words."""

    CATEGORY, FUNCTION = "diptych", "enhance"
    RETURN_TYPES, RETURN_NAMES = ("STRING",), ("prompt",)
    DESCRIPTION = (
        "Fills a prompt out from the reference, the first of a batch. "
        "The key, if one is needed, is read from DIPTYCH_LLM_KEY."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "reference": ("IMAGE",),
                "prompt": ("STRING", {"multiline": True, "default": "a cat on the beach"}),
                "endpoint": ("STRING", {"default": "", "tooltip": "OpenAI-compatible; empty: $DIPTYCH_LLM_URL."}),
                "model": ("STRING", {"default": "", "tooltip": "Empty: $DIPTYCH_LLM_MODEL."}),
            }
        }

    def enhance(self, reference: torch.Tensor, prompt: str, endpoint: str, model: str) -> tuple[str]:
        from diptych.apps.enhance import endpoint_of, enhance

        found = endpoint_of(endpoint.strip() or None, model.strip() or None)
        return (enhance(prompt, to_pictures(reference)[0], found),)


NODE_CLASS_MAPPINGS: dict[str, type] = {
    "DiptychLoad": DiptychLoad,
    "DiptychGenerate": DiptychGenerate,
    "DiptychRelight": DiptychRelight,
    "DiptychEnhance": DiptychEnhance,
}
NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {
    "DiptychLoad": "Load student (diptych)",
    "DiptychGenerate": "Draw from reference (diptych)",
    "DiptychRelight": "Relight (diptych)",
    "DiptychEnhance": "Enhance prompt (diptych)",
}
