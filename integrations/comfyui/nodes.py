"""The nodes, thin over the library: load a student, generate with it, relight, enhance a prompt.

ComfyUI's images are float tensors (B, H, W, 3) in 0..1, its masks (B, H, W); the library's are PIL images. For numbers
whose tooltip says so, 0 means the model's default.
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


def to_images(tensor: torch.Tensor) -> list[Image.Image]:
    """Converts (B, H, W, C) in 0..1 to RGB images.

    One channel is gray. A second or fourth one is transparency, laid over white as for files. UserError for an empty
    batch or another number of channels.
    """
    if tensor.ndim != 4 or not len(tensor) or not 1 <= tensor.shape[-1] <= 4:
        shape = " × ".join(str(size) for size in tensor.shape)
        raise UserError("argument_type", f"An IMAGE must be a batch (B, H, W, C) with 1 to 4 channels, not {shape}.")
    pixels = (tensor.float().nan_to_num(0).clamp(0, 1) * 255).round().byte().cpu().numpy()
    if tensor.shape[-1] == 1:
        pixels = pixels[..., 0]
    return [to_rgb(Image.fromarray(image)) for image in pixels]


def to_masks(tensor: torch.Tensor) -> list[Image.Image | None]:
    """Converts (B, H, W) or (H, W) in 0..1 to masks; None for an all-black one, as Load Image gives without a mask."""
    masks = tensor.reshape(-1, *tensor.shape[-2:])
    images = to_images(masks[..., None].expand(*masks.shape, 3))
    return [image if mask.any() else None for image, mask in zip(images, masks, strict=True)]


def to_tensor(images: list[Image.Image]) -> torch.Tensor:
    """Converts images to (B, H, W, 3), float32 in 0..1."""
    return torch.stack([torch.from_numpy(np.asarray(i.convert("RGB"), dtype=np.float32) / 255) for i in images])


def settings(**options: float) -> dict[str, Any]:
    """Returns the options that are set; 0 leaves the model's default."""
    return {name: value for name, value in options.items() if value}


def progress(total: int) -> Callable[..., dict[str, Any]]:
    """Returns a diffusers callback that advances ComfyUI's progress bar; outside ComfyUI it does nothing."""
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
    tooltip = f"{OPTIONS[name].help} 0: the model's default."
    return ("FLOAT", {"default": 0.0, "min": 0.0, "max": 20.0, "step": 0.1, "tooltip": tooltip})


SAMPLING: dict[str, Any] = {
    "seed": ("INT", {"default": 0, "min": 0, "max": MAX_SEED, "tooltip": SEED}),
    "steps": ("INT", {"default": 0, "min": 0, "max": 200, "tooltip": "Sampling steps. 0: the model's default."}),
    "guidance": _scale("guidance"),
    "image_guidance": _scale("image_guidance"),
    "text_guidance": _scale("text_guidance"),
    "size": (
        "INT",
        {"default": 0, "max": 4096, "step": 16, "tooltip": "Image side in pixels. 0: the model's default."},
    ),
    "fit": (list(FITS), {"tooltip": "How to fit a reference that is not square."}),
}


class DiptychLoad:
    """Opens a student for the other nodes."""

    CATEGORY, FUNCTION = "diptych", "load"
    RETURN_TYPES, RETURN_NAMES = ("DIPTYCH_STUDENT",), ("student",)
    DESCRIPTION = "A Diffusion Self-Distillation student: the embedded pocket model, a folder, a file or a hub name."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("STRING", {"default": "pocket", "tooltip": "pocket, a folder, a .safetensors or .gguf file"}),
                "base": ("STRING", {"default": "", "tooltip": "Base model that supplies missing components."}),
                "memory": (MEMORY, {"tooltip": "Memory preset for a GPU of N GiB; auto reads the GPU's memory."}),
                "speed": (
                    SPEED,
                    {"tooltip": "exact equals the released sampler up to rounding; others trade quality."},
                ),
            },
            "optional": {
                "lora": ("STRING", {"default": "", "tooltip": "LoRA file to add, or empty."}),
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
    """Generates one image for each reference of a batch."""

    CATEGORY, FUNCTION = "diptych", "generate"
    RETURN_TYPES, RETURN_NAMES = ("IMAGE",), ("images",)
    DESCRIPTION = "Shows the reference's subject in the scene of the prompt."

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
        references = to_images(reference)
        options = settings(
            steps=steps, guidance=guidance, image_guidance=image_guidance, text_guidance=text_guidance, size=size
        )
        images = student.generate(
            references,
            prompt,
            seed=seed,
            fit=fit,
            negative_prompt=negative_prompt or None,
            callback_on_step_end=progress(len(references) * int(steps or student.sampling["steps"])),
            **options,
        )
        return (to_tensor(images),)


class DiptychRelight:
    """Relights each image of a batch."""

    CATEGORY, FUNCTION = "diptych", "relight"
    RETURN_TYPES, RETURN_NAMES = ("IMAGE",), ("images",)
    DESCRIPTION = "Shows the same scene under another light, everything in its place."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "student": ("DIPTYCH_STUDENT",),
                "reference": ("IMAGE",),
                "light": ("STRING", {"default": "soft golden light from the left"}),
                "scene": ("STRING", {"default": "", "tooltip": "What the image shows, in words. It helps the model."}),
                "detail": (
                    "FLOAT",
                    {
                        "default": 1.0,
                        "min": 0.0,
                        "max": 1.0,
                        "step": 0.05,
                        "tooltip": "Share of the fine detail that comes from the reference.",
                    },
                ),
                **SAMPLING,
            },
            "optional": {
                "mask": ("MASK", {"tooltip": "The painted part may change, the rest stays. Unpainted: all may change."})
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
        options = settings(
            steps=steps, guidance=guidance, image_guidance=image_guidance, text_guidance=text_guidance, size=size
        )
        references = to_images(reference)
        masks = [None] if mask is None else to_masks(mask)
        bar = progress(len(references) * int(steps or student.sampling["steps"]))
        images = [
            student.relight(
                image,
                light,
                scene=scene,
                detail=detail,
                mask=masks[min(number, len(masks) - 1)],
                seed=seed,
                fit=fit,
                callback_on_step_end=bar,
                **options,
            )
            for number, image in enumerate(references)
        ]
        return (to_tensor(images),)


class DiptychEnhance:
    """Extends the prompt with a vision-language model that sees the reference. The user's words stay."""

    CATEGORY, FUNCTION = "diptych", "enhance"
    RETURN_TYPES, RETURN_NAMES = ("STRING",), ("prompt",)
    DESCRIPTION = (
        "Extends a prompt from the reference, the first of a batch. "
        "The API key, if one is needed, is read from DIPTYCH_LLM_KEY."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "reference": ("IMAGE",),
                "prompt": ("STRING", {"multiline": True, "default": "a cat on the beach"}),
                "endpoint": (
                    "STRING",
                    {"default": "", "tooltip": "OpenAI-compatible address. Empty: $DIPTYCH_LLM_URL."},
                ),
                "model": ("STRING", {"default": "", "tooltip": "Model name. Empty: $DIPTYCH_LLM_MODEL."}),
            }
        }

    def enhance(self, reference: torch.Tensor, prompt: str, endpoint: str, model: str) -> tuple[str]:
        from diptych.apps.enhance import endpoint_of, enhance

        chosen = endpoint_of(endpoint.strip() or None, model.strip() or None)
        return (enhance(prompt, to_images(reference)[0], chosen),)


NODE_CLASS_MAPPINGS: dict[str, type] = {
    "DiptychLoad": DiptychLoad,
    "DiptychGenerate": DiptychGenerate,
    "DiptychRelight": DiptychRelight,
    "DiptychEnhance": DiptychEnhance,
}
NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {
    "DiptychLoad": "Load student (diptych)",
    "DiptychGenerate": "Generate from reference (diptych)",
    "DiptychRelight": "Relight (diptych)",
    "DiptychEnhance": "Enhance prompt (diptych)",
}
