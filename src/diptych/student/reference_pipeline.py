"""What every student's pipeline has: a stock pipeline's call, with a reference image. It prepares, schedules, denoises
and decodes; `sampler` has these steps.

Sampling follows the release (github primecai/diffusion-self-distillation). True guidance starts at step index 2
(`guidance`), and may be text guidance without image guidance, unlike in the release. Two other differences make results
repeatable: the condition is the posterior's mode, not a sample; and each image has its own generator, on the CPU for a
seed, so that image i of a batch equals the image generated alone.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Never

import diffusers
import numpy as np
import torch
from diffusers.image_processor import PipelineImageInput
from diffusers.utils import BaseOutput
from PIL.Image import Image

from diptych.errors import UsageError, UserError
from diptych.student import inputs, sampler
from diptych.student.canvas import Canvas, split_panels, split_tokens
from diptych.student.families.base import Family, Size, Text, Texts, pack
from diptych.student.families.flux1 import FLUX1
from diptych.student.guidance import Guidance
from diptych.student.inputs import Reference, Seed
from diptych.student.runtime.applied import Runtime, stock_parts
from diptych.student.sampler import Callback
from diptych.student.settings import OWN_CLASS, Conditioning, Settings, adopt, register
from diptych.student.settings import of as settings_of
from diptych.student.weights.fold import BiasSplit, student_channels
from diptych.student.weights.lora import apply_lora

Images = list[Image] | np.ndarray | torch.Tensor
log = logging.getLogger("diptych.student")
MAX_TEXT_TOKENS = 512
MAX_PANEL = 512


@dataclass
class DiptychOutput(BaseOutput):
    """The output of a call: `images` are the right panels, `references` (with `return_reference`) the left ones."""

    images: Images
    references: Images | None = None


class ReferencePipeline:
    """What a stock pipeline of any family needs to be a student's: see `__call__`. A class has this one before the
    stock class; `pipeline` makes them. Without text encoders, pass prompts as embeddings."""

    family: Family
    stock: str
    """Name of the stock class that opens a saved student. `OWN_CLASS` if none generates the same images."""
    transformer: Any
    vae: Any
    scheduler: Any
    image_processor: Any
    components: dict[str, Any]
    config: Any
    text_parts: tuple[str, ...] = ("text_encoder", "tokenizer")
    """Components that read the prompt."""
    maybe_free_model_hooks: Any
    _callback_tensor_inputs: Sequence[str]
    _execution_device: Any
    _lora_loadable_modules: Sequence[str]

    def begin(self) -> None:
        """Sets what the stock class does not have. UserError for a transformer that is not a student's."""
        adopt(self.transformer)
        student_channels(self.transformer.config, family=self.family)
        self.loaded_from: tuple[Path, ...] = ()  # paths of the model and of the base
        self.loras: tuple[tuple[Path, float], ...] = ()  # further LoRAs with their scales
        self.bias_split: BiasSplit | None = None  # of a model in the released layout
        self.ignored_adapters: tuple[str, ...] = ()  # names of unused adapter tensors in the weights
        self.runtime = Runtime()  # memory preset, speed setting and caches
        self._truncated: set[str] = set()

    @property
    def settings(self) -> Settings:
        """The settings in the transformer's config. Setting them registers them there."""
        return settings_of(self.transformer.config)

    @settings.setter
    def settings(self, settings: Settings) -> None:
        register(self.transformer, settings)

    @property
    def conditioning(self) -> Conditioning:
        """How the reference enters."""
        return self.settings.conditioning

    @property
    def channels(self) -> int:
        """Channels 4C of a packed token."""
        return student_channels(self.transformer.config, family=self.family)

    @property
    def default_panel_size(self) -> int:
        """Default side of a panel in pixels."""
        return min(MAX_PANEL, int(self.vae.config.get("sample_size") or MAX_PANEL))

    def canvas(self, height: int | None = None, width: int | None = None) -> Canvas:
        """The canvas for panels of this size in pixels, by default `default_panel_size`. UsageError for a size that the
        model cannot have."""
        side = self.default_panel_size
        panels = 2 if self.conditioning == "diptych" else 1
        height, width = (side if value is None else value for value in (height, width))
        return Canvas(height, width, self.family.unit(self.vae) // 2, panels)

    @property
    def text_length(self) -> int:
        """Number of text tokens: the family's, and at most the maximum length of its tokenizer."""
        return min(self.family.text_tokens, int(getattr(self.reader, "model_max_length", MAX_TEXT_TOKENS)))

    @property
    def reader(self) -> Any:
        """The tokenizer that limits the length of a prompt. None if the pipeline has none."""
        return getattr(self, self.family.reader)

    @torch.no_grad()
    def encode_text(
        self, prompt: list[str], prompt_2: list[str] | None = None, max_sequence_length: int | None = None
    ) -> Texts:
        """Prompts to the family's tensors: for FLUX.1, prompt_embeds (B, L, D) and pooled_prompt_embeds (B, P). Warns
        once of each truncated prompt."""
        if prompt_2 is not None and self.family.reader != "tokenizer_2":
            raise UsageError("option_unsuited", f"prompt_2 is for FLUX.1, not for {self.family.transformer}.")
        absent = [n for n in self.text_parts if getattr(self, n) is None and n not in self.runtime.waiting]
        if absent:
            raise UserError(
                "model_incomplete",
                f"This student has no {', '.join(absent)} for its prompts. Load it with a base that has text encoders "
                "and tokenizers, or pass prompt_embeds and pooled_prompt_embeds.",
            )
        read = self.settings.read
        prompt, prompt_2 = [read(text) for text in prompt], prompt_2 and [read(text) for text in prompt_2]
        length = max_sequence_length or self.text_length
        for text in prompt_2 or prompt:
            if text not in self._truncated and (warning := self.unread(text, self.reader, length)):
                self._truncated.add(text)
                log.warning(warning, extra={"quotes": True})
        return inputs.encode(self, self.runtime, prompt, prompt_2, length)

    def unread(self, prompt: str, tokenizer: Any, length: int | None = None) -> str:
        """A warning with the end of a prompt that the model does not read. Empty if it reads the whole prompt.
        `tokenizer` is `reader`, or a copy of it."""
        tokens, length = tokenizer(prompt).input_ids, length or self.text_length
        if len(tokens) <= length:
            return ""
        lost = tokenizer.decode(tokens[length - 1 :], skip_special_tokens=True)
        return f"The prompt is longer than {length} tokens. The model does not read: '{lost}'"

    @staticmethod
    def _argument(field: str) -> str:
        return {"embeds": "prompt_embeds", "pooled": "pooled_prompt_embeds", "mask": "prompt_embeds_mask"}[field]

    def text_arguments(self, text: Texts, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        """Encoded prompts as arguments of `__call__`, on this device and in this dtype."""
        moved = (x.to(device, dtype if x.is_floating_point() else None) for x in text)
        return dict(zip(map(self._argument, self.family.texts), moved, strict=True))

    @torch.no_grad()
    def encode_canvas(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels (B, 3, H, W) in [-1, 1] to packed, scaled latents (B, tokens, 4C): the posterior's mode."""
        pixels = pixels.to(device=self._execution_device, dtype=self.vae.dtype)
        return self.family.encode(self.vae, pixels)

    @torch.no_grad()
    def decode_canvas(self, tokens: torch.Tensor, canvas: Canvas) -> torch.Tensor:
        """Packed latents (B, tokens, 4C) to pixels (B, 3, H, W), about [-1, 1]."""
        return self.family.decode(self.vae, tokens, canvas.size)

    def encode_reference(
        self, references: Sequence[Reference | Sequence[Reference]], canvas: Canvas, fit: str = "crop"
    ) -> Any:
        """The condition of each reference: canvas tokens (B, tokens, 4C), or `References`; see `inputs.conditions`."""
        return inputs.conditions(self, references, canvas, fit)

    def noise(self, seeds: Sequence[Seed | None], canvas: Canvas) -> torch.Tensor:
        """Packed standard noise (B, tokens, 4C), float32. A seed gives the same noise in every batch and dtype."""
        shape = (1, self.channels // 4, 2 * canvas.rows, 2 * canvas.columns)
        noise = []
        for seed in seeds:
            generator = torch.Generator("cpu").manual_seed(seed) if isinstance(seed, int) else seed
            noise.append(torch.randn(shape, generator=generator, device=generator.device if generator else "cpu").cpu())
        return pack(torch.cat(noise))

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        prompt_2: str | list[str] | None = None,
        reference: Reference | Sequence[Reference | Sequence[Reference]] = None,
        *,
        image: PipelineImageInput | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float | None = None,
        image_guidance_scale: float | None = None,
        text_guidance_scale: float | None = None,
        guidance_rescale: float = 0.0,
        guidance_parallel: float = 1.0,
        guidance_norm: float = 0.0,
        negative_prompt: str | list[str] | None = None,
        negative_prompt_2: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: Seed | Sequence[Seed] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        pooled_prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        negative_pooled_prompt_embeds: torch.Tensor | None = None,
        prompt_embeds_mask: torch.Tensor | None = None,
        negative_prompt_embeds_mask: torch.Tensor | None = None,
        fit: str = "crop",
        batched_guidance: bool | None = None,
        guidance_from: int | None = None,
        guidance_until: float | None = None,
        clamp_left: bool | None = None,
        null_panel: str | None = None,
        decode: str | None = None,
        return_reference: bool = False,
        output_type: str = "pil",
        return_dict: bool = True,
        joint_attention_kwargs: dict[str, object] | None = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int | None = None,
        **unknown: Never,
    ) -> DiptychOutput | tuple[Images] | tuple[Images, Images | None]:
        """Generates the right panel: the reference's subject in the prompt's scene. The arguments are diffusers', and:

        Args:
            height, width: size of ONE panel in pixels, which is the size of the generated image; multiples of 2 × the
                VAE factor. Defaults to `default_panel_size`.
            reference: a PIL image, pixels (3, h, w) or (B, 3, h, w) in [-1, 1] of the panel's size, None (no
                reference), or a list of these, one for each prompt. A single reference applies to all prompts. A
                student of tokens conditioning accepts pixels of any size and nested lists: [[a, b]] is one image's two.
            image: diffusers' name for the reference: PIL images, or arrays (h, w, 3) and tensors (3, h, w) of any size
                with values from 0 to 1.
            num_inference_steps: sampling steps. This and the next three default to the student's `settings`.
            guidance_scale: distilled guidance, only for a transformer with `guidance_embeds`.
            image_guidance_scale, text_guidance_scale: i and t of the formula in `guidance`; 1 is off. A negative prompt
                replaces the empty text.
            guidance_rescale, guidance_parallel, guidance_norm: corrections against saturation (`guidance.Guidance`).
            generator: a seed or torch.Generator, or a list with one for each image. A single seed applies to every
                prompt, so that each image equals the one generated alone, and counts up over `num_images_per_prompt`. A
                single Generator is used in order. Noise is float32, for a seed on the CPU.
            latents: packed noise of the whole canvas (B, tokens, 4C), instead of a generator.
            fit: `crop`, `pad` or `contain` (`canvas.fit_image`); for tokens also `keep`, the reference's aspect ratio.
            batched_guidance: run the forward passes of a guided step as one batch. One after another needs less memory
                and uses the same kernels as an unguided call. This and the next five default to the speed setting,
                which without a preset is the release's.
            guidance_from, guidance_until: first guided step, counted from 0, and the share of the steps at which
                guidance stops.
            clamp_left: after each step, set the left panel to its known path x(t) = (1 − t)·z + t·ε, where z are the
                reference's latents. It matches training, but not the release.
            null_panel: left panel that v(0, "") sees: `shared`, as released, which shows the reference, or `own`
                (`guidance.NullPanel`). Without a speed setting, it defaults to the student's `settings`.
            decode: `canvas`, or `right` to decode only the right half: less work, other pixels near the seam.
            return_reference: also decode the left panel, the model's reconstruction of the reference.
            output_type: `pil`, `np`, `pt`, or `latent` for the packed latents of the whole canvas.

        Returns:
            DiptychOutput, or without `return_dict` a tuple: (images,) or (images, references).

        Raises:
            UsageError: sizes, counts or arguments that do not match.
            UserError: a prompt without text encoders.
        """
        inputs.refuse(unknown, type(self).__call__)
        defaults = self.settings
        steps = defaults.steps if num_inference_steps is None else num_inference_steps
        guidance_scale = defaults.guidance if guidance_scale is None else guidance_scale
        image_scale = defaults.image_guidance if image_guidance_scale is None else image_guidance_scale
        text_scale = defaults.text_guidance if text_guidance_scale is None else text_guidance_scale
        canvas = self.canvas(height, width)
        switches = self.runtime.switches(
            batched_guidance=batched_guidance,
            guidance_from=guidance_from,
            guidance_until=guidance_until,
            clamp_left=clamp_left,
            null_panel=null_panel or self.runtime.speed.null_panel or defaults.null_panel,
            decode=decode,
        )
        shown = getattr(callback_on_step_end, "tensor_inputs", callback_on_step_end_tensor_inputs)
        inputs.check(output_type, steps, num_images_per_prompt, shown, self._callback_tensor_inputs)
        if return_reference and canvas.panels == 1:
            raise UsageError(
                "option_unsuited",
                f"A student of {defaults.conditioning} conditioning has no left panel. Leave return_reference out.",
            )
        self._guidance_scale, self._joint_attention_kwargs = guidance_scale, joint_attention_kwargs
        self._interrupt = False

        prompts, references = inputs.match(prompt, prompt_embeds, inputs.one_of(image, reference))
        count = len(references)
        encode, device = partial(self.encode_text, max_sequence_length=max_sequence_length), self._execution_device
        second = inputs.texts(prompt_2, count)
        given = Text(prompt_embeds, pooled_prompt_embeds, prompt_embeds_mask)  # pyright: ignore[reportArgumentType]
        text = inputs.embedded(encode, "prompt", prompts, second, given, self.family, count, device)
        condition = self.encode_reference(references, canvas, fit)
        corrections = guidance_rescale, guidance_parallel, guidance_norm
        guide = Guidance(image_scale, text_scale, switches.guidance_from, switches.guidance_until, *corrections)
        guides = guide.rows(references, num_images_per_prompt)
        empty = None
        if any(guide.on for guide in guides):
            given = Text(negative_prompt_embeds, negative_pooled_prompt_embeds, negative_prompt_embeds_mask)  # pyright: ignore
            first = "" if negative_prompt is None and given.embeds is None else negative_prompt
            first, second = inputs.texts(first, count), inputs.texts(negative_prompt_2, count)
            empty = inputs.embedded(encode, "negative_prompt", first, second, given, self.family, count, device)
        if latents is None:
            latents = self.noise(inputs.seeds(generator, count, num_images_per_prompt), canvas)
        call = sampler.prepare(
            canvas,
            text,
            empty,
            condition,
            latents,
            guides,
            guidance_scale=guidance_scale,
            switches=switches,
            attention=joint_attention_kwargs,
        )
        timesteps = self.family.schedule(self.scheduler, canvas.tokens, steps, device, sigmas)
        self._num_timesteps = len(timesteps)
        x_0 = sampler.denoise(self, call, timesteps, self.runtime, callback_on_step_end, shown)
        images, left = self._decoded(x_0, canvas, output_type, return_reference, switches.decode)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (images, left) if return_reference else (images,)
        return DiptychOutput(images=images, references=left)

    def _decoded(
        self, x_0: torch.Tensor, canvas: Canvas, output_type: str, return_reference: bool, decode: str
    ) -> tuple[Images, Images | None]:
        """The right panels of canvas latents (B, tokens, 4C), and the left ones or None."""
        if output_type == "latent":
            return x_0, None
        self.runtime.stage("decode")
        if decode == "right":
            tokens, right = split_tokens(x_0, canvas)
            side = Size(canvas.rows, canvas.panel_columns)
            right = self.family.decode(self.vae, right, side)
            left = self.family.decode(self.vae, tokens, side) if return_reference else tokens
        else:
            left, right = split_panels(self.decode_canvas(x_0, canvas), canvas.panels)
        finish = partial(self.image_processor.postprocess, output_type=output_type)
        return finish(right), finish(left) if return_reference else None  # pyright: ignore[reportReturnType]

    def load_lora_weights(
        self, pretrained_model_name_or_path_or_dict, adapter_name=None, hotswap=False, **kwargs
    ) -> None:
        """Loads a local LoRA file or folder completely or not at all (`lora.apply_lora`). diffusers loads tensors, hub
        names and hot swaps; it skips unknown keys."""
        place = pretrained_model_name_or_path_or_dict
        path = Path(place, kwargs.get("weight_name") or "") if isinstance(place, (str, Path)) else None
        if path is None or hotswap or not path.exists() or self.family is not FLUX1:
            super().load_lora_weights(place, adapter_name, hotswap=hotswap, **kwargs)  # pyright: ignore
        else:
            apply_lora(self, path, name=adapter_name)

    def save_pretrained(self, *args, **kwargs):
        """Writes an ordinary diffusers folder whose model_index names the stock pipeline that runs it, if there is one.

        UserError for a student with an unfused LoRA or quantized weights, which would be lost.
        """
        if any(getattr(getattr(self, part, None), "peft_config", None) for part in self._lora_loadable_modules):
            raise UserError(
                "lora_unsupported", "A student with an unfused LoRA cannot be saved. Load it with fuse=True first."
            )
        if getattr(self.transformer, "hf_quantizer", None) is not None:
            raise UserError(
                "model_quantized", "Quantized weights cannot be saved. Dequantize them with `diptych convert`."
            )
        self.settings = self.settings  # registers default settings too, so that the folder has settings
        name = self.stock
        with stock_parts(self):
            if name == OWN_CLASS:  # no stock pipeline generates the same images
                super().save_pretrained(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
            else:
                stock = getattr(diffusers, name)
                options = [n for n in inspect.signature(stock.__init__).parameters if n not in self.components]
                options = {n: self.config[n] for n in options if n in self.config}
                stock(**self.components, **options).save_pretrained(*args, **kwargs)
