"""DiptychPipeline: the stock FLUX-Control pipeline, given a reference image.

Sampling follows the release (github primecai/diffusion-self-distillation). The canvas [reference | target] is denoised
as one wide FLUX image with plain position ids; the condition is the VAE encoding of [reference | black], encoded as one
image. With image guidance > 1 (or, unlike the release, text guidance > 1 alone), from step index 2 on:

    v = v(0,"") + i·(v(ref,"") − v(0,"")) + t·(v(ref,text) − v(ref,""))

where the null reference 0 is all-zero packed latents; see `guidance`, also for a null that cannot see the reference on
the shared canvas either (`null_panel`). Two differences from the release make results
repeatable: the condition takes the posterior's mode, not a sample; and noise comes from one generator per image, on the
CPU for a seed: image i of a batch is the image made alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers import FluxControlPipeline
from diffusers.pipelines.flux.pipeline_flux_control import retrieve_timesteps
from diffusers.utils import BaseOutput

from diptych.errors import UsageError, UserError
from diptych.student import guidance, sampler
from diptych.student.canvas import Canvas, condition_canvas, pack, right_tokens, split_panels, unpack
from diptych.student.guidance import exact_timesteps, shift_exponent
from diptych.student.runtime import speed
from diptych.student.runtime.caches import Recall, content
from diptych.student.runtime.modulation import precomputed, rotary_once
from diptych.student.sampler import Reference, Seed
from diptych.student.settings import Conditioning, Settings, adopt, register
from diptych.student.settings import of as settings_of
from diptych.student.weights.fold import BiasSplit, student_channels
from diptych.student.weights.lora_file import RELEASED_LORA
from diptych.utils import models
from diptych.utils.opening import check_pipeline

if TYPE_CHECKING:
    from diptych.student.runtime.caches import StepCache
    from diptych.student.runtime.memory import Memory

log = logging.getLogger("diptych.student")
MAX_TEXT_TOKENS = 512
MAX_PANEL = 512


@dataclass
class DiptychOutput(BaseOutput):
    """`images`: the right panels. `references`: the reconstructed left panels, if they were asked for."""

    images: Any
    references: Any = None


class DiptychPipeline(FluxControlPipeline):
    """Stock components, stock weights; see `__call__`. Text encoders may be absent: prompts then come as embeddings."""

    _optional_components = ["text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"]  # noqa: RUF012 (diffusers' name)
    _lora_loadable_modules = ["transformer", "text_encoder", "text_encoder_2"]  # noqa: RUF012 (diffusers: not T5)

    def __init__(
        self, scheduler, vae, transformer, text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None
    ):
        super().__init__(
            scheduler=scheduler,
            vae=vae,
            text_encoder=text_encoder,  # pyright: ignore[reportArgumentType]
            tokenizer=tokenizer,  # pyright: ignore[reportArgumentType]
            text_encoder_2=text_encoder_2,  # pyright: ignore[reportArgumentType]
            tokenizer_2=tokenizer_2,  # pyright: ignore[reportArgumentType]
            transformer=transformer,
        )
        student_channels(transformer.config)
        adopt(transformer)
        self.loaded_from: tuple[Path, ...] = ()  # the model folder and the base folder, as `student.load` found them
        self.loras: tuple[tuple[Path, float], ...] = ()  # on top of these, each with its scale
        self.bias_split: BiasSplit | None = None  # of a model that came in the released layout
        self.ignored_adapters: tuple[str, ...] = ()  # adapter tensors inside its weights, which were not used
        self.speed = speed.PLAIN  # put on and taken off by `speed.apply` and `speed.remove`
        self.recall = Recall()
        self.step_cache: StepCache | None = None
        self.memory: Memory | None = None  # a preset that was put on: it moves parts as the call goes on
        self._truncated: set[str] = set()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """diffusers'. UserError for a folder that brings code or pickles, one with a LoRA beside its weights, which
        diffusers would leave out, and for a config that names more layers than its weights have."""
        folder = Path(pretrained_model_name_or_path or "")
        models.check_folder(folder)
        if folder.is_dir():
            check_pipeline(folder, "student")
        lora = folder / RELEASED_LORA
        if lora.is_file():
            raise UserError(
                f"{lora} belongs to this student, and DiptychPipeline.from_pretrained does not load it. Open the "
                "folder with Student.load, or fuse the LoRA: diptych convert FOLDER OUT --to folded --fuse"
            )
        pipe: Any = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        if lora.parent.is_dir():
            pipe.loaded_from = (lora.parent,)
        return pipe

    @property
    def settings(self) -> Settings:
        """What it needs to be run right, from its transformer's config; setting it registers it there."""
        return settings_of(self.transformer.config)

    @settings.setter
    def settings(self, settings: Settings) -> None:
        register(self.transformer, settings)

    @property
    def conditioning(self) -> Conditioning:
        """How the reference enters (`geometry`)."""
        return self.settings.conditioning

    # Sizes and texts -----------------------------------------------------------------------------------------------

    @property
    def default_panel_size(self) -> int:
        """Side of a panel in pixels when none is asked for."""
        return min(MAX_PANEL, int(self.vae.config.sample_size))

    def canvas(self, height: int | None = None, width: int | None = None) -> Canvas:
        """The canvas for panels of this size in pixels, by default `default_panel_size`. UsageError if none fits."""
        side = self.default_panel_size
        panels = 2 if self.conditioning == "diptych" else 1
        height, width = (side if value is None else value for value in (height, width))
        return Canvas(height, width, self.vae_scale_factor, panels)

    @property
    def text_length(self) -> int:
        """Text tokens, from the second tokenizer's own maximum length."""
        if self.tokenizer_2 is None:
            return MAX_TEXT_TOKENS
        return min(MAX_TEXT_TOKENS, int(self.tokenizer_2.model_max_length))

    @torch.no_grad()
    def encode_text(
        self, prompt: list[str], prompt_2: list[str] | None = None, max_sequence_length: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompts to (prompt_embeds (B, L, D), pooled_prompt_embeds (B, P)); warns once of each prompt cut short."""
        waiting = self.memory.waiting if self.memory is not None else ()
        absent = [n for n in self._optional_components if getattr(self, n) is None and n not in waiting]
        if absent:
            raise UserError(
                f"this student was loaded without {', '.join(absent)}, so it cannot read a prompt: load it with a base "
                "that has text encoders and tokenizers, or pass prompt_embeds and pooled_prompt_embeds"
            )
        read = self.settings.read
        prompt, prompt_2 = [read(text) for text in prompt], prompt_2 and [read(text) for text in prompt_2]
        length = max_sequence_length or self.text_length
        self._warn_of_truncation(prompt_2 or prompt, length)

        def encode(*texts: Any) -> tuple[torch.Tensor, torch.Tensor]:
            self._stage("text")
            with _quiet_truncation():
                embeds, pooled, _ = self.encode_prompt(*texts, max_sequence_length=length)
            assert embeds is not None and pooled is not None
            return embeds, pooled

        if self.recall.limit:
            remember: Any = self.recall
        elif waiting and self.memory is not None:
            remember = self.memory.remember  # else the encoders would be read from their files for every picture
        else:
            return encode(prompt, prompt_2)
        # Each text alone, so that an embedding does not depend on which others were asked for with it.
        # A memory preset opens its text encoders anew; otherwise another object is another encoder.
        own = None if self.memory is not None else (id(self.text_encoder), id(self.text_encoder_2))
        encoders = (own, str(self._execution_device))
        made = []
        for first, second in zip(prompt, prompt_2 or [None] * len(prompt), strict=True):
            texts = ([first], [second] if second is not None else None)
            made.append(remember(("text", first, second, length, *encoders), partial(encode, *texts)))
        embeds, pooled = (torch.cat(parts).to(self._execution_device) for parts in zip(*made, strict=True))
        return embeds, pooled

    def _warn_of_truncation(self, prompts: list[str], length: int) -> None:
        for prompt in prompts:
            if prompt not in self._truncated and (cut := self.unread(prompt, self.tokenizer_2, length)):
                self._truncated.add(prompt)
                log.warning(cut, extra={"quotes": True})

    def unread(self, prompt: str, tokenizer: Any, length: int | None = None) -> str:
        """What is beyond the tokens that the model reads of a prompt, as a warning; empty if nothing is. `tokenizer`
        is the second one, or a copy of it."""
        tokens, length = tokenizer(prompt).input_ids, length or self.text_length
        if len(tokens) <= length:
            return ""
        lost = tokenizer.decode(tokens[length - 1 :], skip_special_tokens=True)
        return f"the prompt is longer than {length} tokens; not read: '{lost}'"

    # Pictures and latents ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_canvas(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels (B, 3, H, W) in [-1, 1] to packed, scaled latents (B, tokens, 4C): the posterior's mode."""
        pixels = pixels.to(device=self._execution_device, dtype=self.vae.dtype)
        latents = self.vae.encode(pixels).latent_dist.mode()
        return pack((latents - (self.vae.config.shift_factor or 0.0)) * self.vae.config.scaling_factor)

    @torch.no_grad()
    def decode_canvas(self, tokens: torch.Tensor, canvas: Canvas) -> torch.Tensor:
        """Packed latents (B, tokens, 4C) to pixels (B, 3, H, W), about [-1, 1]."""
        return self._decode(unpack(tokens, canvas.rows, canvas.columns))

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        latents = latents / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0.0)
        return self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0]

    def encode_reference(self, references: Sequence[Reference], canvas: Canvas, fit: str = "crop") -> torch.Tensor:
        """The condition (B, tokens, 4C): [reference | black] encoded jointly; zeros for a reference of None.

        Encoded one at a time, each distinct picture once, so that a batch gives the bits of the single calls.
        """
        null = torch.zeros(1, canvas.tokens, self.transformer.config.in_channels // 2, device=self._execution_device)
        known: dict[int, torch.Tensor] = {}
        for reference in references:
            if id(reference) not in known:
                known[id(reference)] = null if reference is None else self._condition(reference, canvas, fit)
        return torch.cat([known[id(reference)].float() for reference in references])

    def _condition(self, reference: Reference, canvas: Canvas, fit: str) -> torch.Tensor:
        pixels = condition_canvas(sampler.panel(reference, canvas, fit), canvas.panels)
        if not self.recall.limit:
            return self.encode_canvas(pixels)
        key = ("reference", content(pixels), id(self.vae), self.vae.dtype, str(self._execution_device))
        return self.recall(key, lambda: (self.encode_canvas(pixels),))[0]

    def noise(self, seeds: Sequence[Seed | None], canvas: Canvas) -> torch.Tensor:
        """Packed standard noise (B, tokens, 4C) in float32: one seed gives the same noise in every batch and dtype."""
        shape = (1, self.transformer.config.in_channels // 8, 2 * canvas.rows, 2 * canvas.columns)
        drawn = []
        for seed in seeds:
            generator = torch.Generator("cpu").manual_seed(seed) if isinstance(seed, int) else seed
            drawn.append(torch.randn(shape, generator=generator, device=generator.device if generator else "cpu").cpu())
        return pack(torch.cat(drawn))

    # The call ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        prompt: str | list[str] | None = None,
        prompt_2: str | list[str] | None = None,
        reference: Reference | Sequence[Reference] = None,
        *,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float | None = None,
        image_guidance_scale: float | None = None,
        text_guidance_scale: float | None = None,
        negative_prompt: str | list[str] | None = None,
        negative_prompt_2: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: Seed | Sequence[Seed] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        pooled_prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        negative_pooled_prompt_embeds: torch.Tensor | None = None,
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
        joint_attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[..., dict[str, Any] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int | None = None,
    ) -> DiptychOutput | tuple:
        """Draws the right panel: the reference's subject as the prompt asks. diffusers' arguments, and these:

        Args:
            reference: a PIL image, pixels (3, h, w) or (B, 3, h, w) in [-1, 1] of the panel's size, None (no reference:
                text only), or a list of those, one for each prompt. One reference serves all prompts.
            height, width: of ONE panel in pixels, multiples of 2 × the VAE factor; default `default_panel_size`.
            num_inference_steps: sampling steps. None, here and for the next three: the student's own (`settings`).
            guidance_scale: distilled guidance; read only by a transformer that has `guidance_embeds`.
            image_guidance_scale, text_guidance_scale: i and t of the module's formula; 1 is off. A negative prompt
                stands for the empty text.
            generator: a seed or torch.Generator, or a list with one for each image. A single seed serves every prompt
                (each image is then the one made alone), and counts up over `num_images_per_prompt`; a single Generator
                is drawn from in order. Noise is drawn in float32, for a seed on the CPU.
            latents: packed noise of the whole canvas (B, tokens, 4C), instead of a generator.
            fit: `crop`, `pad` or `contain`; see `geometry.fit_image`.
            batched_guidance: run the forwards of one guided step as one batch. One after another needs the least
                memory and gives each forward the very kernels of an unguided call. None, here and for the next five:
                as `speed` says, which is as the release does unless a speed was put on.
            guidance_from, guidance_until: the first guided step, counted from 0, and the share of the steps after
                which none is.
            clamp_left: after each step, put the left panel where its known path has it: x(t) = (1 − t)·z + t·ε, with z
                the reference's latents. What training saw, but not what the release does.
            null_panel: the left panel that v(0, "") sees: `shared`, as released, which shows it the reference, or `own`
                (`guidance.NullPanel`). If neither this nor `speed` says, the student's own (`settings`).
            decode: `canvas`, or `right` to decode the right half alone: less work, other pixels near the seam.
            return_reference: also decode the left panel, the model's reconstruction of the reference.
            output_type: `pil`, `np`, `pt`, or `latent` for the packed latents of the whole canvas.

        Returns:
            DiptychOutput, or a tuple if not `return_dict`: (images,) or (images, references).

        Raises:
            UsageError: sizes, counts or arguments that do not fit together. UserError: text without text encoders.
        """
        own = self.settings
        num_inference_steps = own.steps if num_inference_steps is None else num_inference_steps
        guidance_scale = own.guidance if guidance_scale is None else guidance_scale
        image_guidance_scale = own.image_guidance if image_guidance_scale is None else image_guidance_scale
        text_guidance_scale = own.text_guidance if text_guidance_scale is None else text_guidance_scale
        canvas = self.canvas(height, width)
        if return_reference and canvas.panels == 1:
            raise UsageError("a student of channel conditioning draws no left panel, so it has no reference to return")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise UsageError(f"unknown output_type '{output_type}': one of pil, np, pt, latent")
        settings = self._settings(
            batched_guidance=batched_guidance,
            guidance_from=guidance_from,
            guidance_until=guidance_until,
            clamp_left=clamp_left,
            null_panel=null_panel,
            decode=decode,
        )
        if num_inference_steps < 1 or num_images_per_prompt < 1:
            raise UsageError("num_inference_steps and num_images_per_prompt are at least 1")
        if unknown := sorted(set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)):
            raise UsageError(f"callbacks can be given {self._callback_tensor_inputs}, not {unknown}")
        self._guidance_scale = guidance_scale
        self._joint_attention_kwargs = joint_attention_kwargs
        self._interrupt = False
        device = self._execution_device

        # Text: one row for each prompt, then for each image.
        prompts, references = sampler.match(prompt, prompt_embeds, reference)
        count = len(references)
        embeds, pooled = self._text(
            "prompt",
            prompts,
            sampler.texts(prompt_2, count),
            prompt_embeds,
            pooled_prompt_embeds,
            count,
            max_sequence_length,
        )
        condition = self.encode_reference(references, canvas, fit)
        # The formula's two differences vanish where i = 1 or t = 1, and i has no meaning for a row without a reference.
        guides = [
            guidance.Guidance(
                image=1.0 if reference is None else image_guidance_scale,
                text=text_guidance_scale,
                first=settings.guidance_from,
                until=settings.guidance_until,
            )
            for reference in references
            for _ in range(num_images_per_prompt)
        ]
        negative = None
        if any(guide.on for guide in guides):
            given = negative_prompt if negative_prompt is not None or negative_prompt_embeds is not None else ""
            negative = self._text(
                "negative_prompt",
                sampler.texts(given, count),
                sampler.texts(negative_prompt_2, count),
                negative_prompt_embeds,
                negative_pooled_prompt_embeds,
                count,
                max_sequence_length,
            )

        repeats = num_images_per_prompt
        dtype = embeds.dtype
        embeds, pooled, condition = (x.repeat_interleave(repeats, dim=0) for x in (embeds, pooled, condition.to(dtype)))
        if negative is not None:
            negative = tuple(x.repeat_interleave(repeats, dim=0) for x in negative)
        total = count * repeats
        if latents is None:
            latents = self.noise(sampler.seeds(generator, count, repeats), canvas)
        if tuple(latents.shape) != (total, canvas.tokens, condition.shape[-1]):
            raise UsageError(
                f"latents are packed noise of the whole canvas, {(total, canvas.tokens, condition.shape[-1])} here, "
                f"not {tuple(latents.shape)}"
            )
        x_t = latents.to(device=device, dtype=dtype)
        image_ids = self._prepare_latent_image_ids(total, canvas.rows, canvas.columns, device, dtype)

        timesteps = self._timesteps(num_inference_steps, sigmas, canvas, device)
        self._num_timesteps = len(timesteps)
        distilled = None
        if self.transformer.config.guidance_embeds:  # as many rows as one forward may have
            distilled = torch.full([3 * total], guidance_scale, device=device, dtype=torch.float32)

        # What may run at a step, by the name that tells step caches the branches apart.
        branches: dict[str, guidance.Branch] = {"cond": (condition, embeds, pooled)}
        if negative is not None:
            empty, empty_pooled = negative
            branches["reference"] = (condition, empty, empty_pooled)
            branches["null"] = (torch.zeros_like(condition), empty, empty_pooled)

        def velocity(name: str, x, c, text, pool) -> torch.Tensor:
            """v(c, text) at x and the present time, for any rows of the batch."""
            with self.transformer.cache_context(name):
                return self.transformer(
                    hidden_states=torch.cat([x, c], dim=2),
                    timestep=t.expand(len(x)).to(x.dtype) / 1000,
                    guidance=distilled[: len(x)] if distilled is not None else None,
                    pooled_projections=pool,
                    encoder_hidden_states=text,
                    txt_ids=torch.zeros(text.shape[1], 3, device=device, dtype=dtype),
                    img_ids=image_ids,
                    joint_attention_kwargs=self._joint_attention_kwargs,
                    return_dict=False,
                )[0]

        clamp = _LeftPanel(condition, x_t, canvas, self.scheduler.sigmas) if settings.clamp_left else None
        groups = guidance.alike(guides)
        if (settings.null_panel or own.null_panel) == "own" and canvas.panels == 2:
            for group in groups:
                group.give_null_a_panel(x_t, canvas, self.scheduler.sigmas)
        self._begin(canvas, timesteps)
        self._stage("denoise")
        pools = [pool for _, _, pool in branches.values()]
        table = precomputed(self.transformer, timesteps, pools, guidance_scale, wanted=settings.modulation)
        bar: Any = self.progress_bar  # decorated in a way that hides its arguments from a type checker
        with (
            bar(total=len(timesteps)) as progress,
            exact_timesteps(self.transformer),
            rotary_once(self.transformer),
            table,
        ):
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue
                if self.step_cache is not None:
                    self.step_cache.step = i
                v = guidance.velocity(groups, velocity, x_t, branches, i, len(timesteps), settings.batched_guidance)
                x_t = self.scheduler.step(v, t, x_t, return_dict=False)[0].to(dtype)
                if clamp is not None:
                    x_t = clamp(x_t, i + 1)

                if callback_on_step_end is not None:
                    tensors = {"latents": x_t, "prompt_embeds": embeds}
                    given = {key: tensors[key] for key in callback_on_step_end_tensor_inputs}
                    changed = callback_on_step_end(self, i, t, given) or {}
                    x_t, embeds = changed.get("latents", x_t), changed.get("prompt_embeds", embeds)
                    branches["cond"] = (condition, embeds, pooled)
                progress.update()

        if self.step_cache is not None and not self.interrupt:
            self.step_cache.end()
        images, left = self._finish(x_t, canvas, output_type, return_reference, settings.decode)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (images, left) if return_reference else (images,)
        return DiptychOutput(images=images, references=left)

    def _text(self, what, texts, texts_2, embeds, pooled, count, max_length) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings (count, L, D) and (count, P) from texts or from given embeddings."""
        if embeds is None:
            if texts is None:
                raise UsageError(f"give {what} or {what}_embeds")
            embeds, pooled = self.encode_text(texts, texts_2, max_length)
        elif texts is not None or texts_2 is not None:
            raise UsageError(f"give {what} or {what}_embeds, not both")
        elif pooled is None:
            name = "negative_pooled_prompt_embeds" if what.startswith("negative") else "pooled_prompt_embeds"
            raise UsageError(f"{what}_embeds need {name} from the same text")
        embeds, pooled = (x.to(self._execution_device) for x in (embeds, pooled))
        if {len(embeds), len(pooled)} - {1, count}:
            raise UsageError(f"{what}: {len(embeds)} embeddings and {len(pooled)} pooled ones for {count} images")
        return embeds.expand(count, -1, -1), pooled.expand(count, -1)

    def _timesteps(self, steps: int, sigmas: list[float] | None, canvas: Canvas, device) -> torch.Tensor:
        mu = shift_exponent(self.scheduler.config, canvas.tokens)
        shift = {} if mu is None else {"mu": mu}
        given = np.linspace(1.0, 1 / steps, steps) if sigmas is None else sigmas
        timesteps, _ = retrieve_timesteps(self.scheduler, steps, device, sigmas=given, **shift)  # pyright: ignore
        self.scheduler.set_begin_index(0)
        return timesteps  # pyright: ignore[reportReturnType]

    def _stage(self, name: str) -> None:
        """Before `text`, `denoise` and `decode`: a memory preset brings what that needs and frees the rest."""
        if self.memory is not None:
            self.memory.stage(name)

    def _settings(self, **given: Any) -> speed.Speed:
        """The pipeline's speed with what this call was given in its place."""
        return replace(self.speed, **{name: value for name, value in given.items() if value is not None})

    def _begin(self, canvas: Canvas, timesteps: torch.Tensor) -> None:
        """Step caches start afresh, also after a call that was cut short."""
        self.transformer._reset_stateful_cache()
        if self.step_cache is not None:
            self.step_cache.begin(canvas, timesteps.tolist(), self._execution_device)

    def _finish(
        self, x_0: torch.Tensor, canvas: Canvas, output_type: str, return_reference: bool, decode: str
    ) -> tuple[Any, Any]:
        if output_type == "latent":
            return x_0, None
        self._stage("decode")
        if decode == "right":
            left, right = split_panels(unpack(x_0, canvas.rows, canvas.columns), canvas.panels)
            right, left = self._decode(right), self._decode(left) if return_reference else None
        else:
            left, right = split_panels(self.decode_canvas(x_0, canvas), canvas.panels)
        images = self.image_processor.postprocess(right, output_type=output_type)
        if not return_reference or left is None:
            return images, None
        return images, self.image_processor.postprocess(left, output_type=output_type)

    def load_lora_weights(
        self, pretrained_model_name_or_path_or_dict, adapter_name=None, hotswap=False, **kwargs
    ) -> None:
        """Loads a LoRA from a file or folder on this machine, every key of it or nothing (`lora.apply_lora`). Tensors,
        names on the hub and hot swapping are left to diffusers, whose reader skips what it does not know."""
        from diptych.student.weights.lora import apply_lora

        place = pretrained_model_name_or_path_or_dict
        path = Path(place, kwargs.get("weight_name") or "") if isinstance(place, (str, Path)) else None
        if path is None or hotswap or not path.exists():
            return super().load_lora_weights(place, adapter_name, hotswap, **kwargs)
        apply_lora(self, path, name=adapter_name)
        return None

    def save_pretrained(self, *args, **kwargs):
        """Writes an ordinary diffusers folder; its model_index names FluxControlPipeline, which opens it.

        UserError for a student with an unfused LoRA or quantized weights, which would be lost.
        """
        if any(getattr(getattr(self, part, None), "peft_config", None) for part in self._lora_loadable_modules):
            raise UserError(
                "this student carries an unfused LoRA; load it with fuse=True before saving the whole student"
            )
        if getattr(self.transformer, "hf_quantizer", None) is not None:
            raise UserError(
                "this student is quantized, and quantized weights are not saved; `diptych convert` dequantizes"
            )
        self.settings = self.settings  # also where they are the family's: the folder is then not taken to say nothing
        # Fused projections are no layers of a stock model, and weights that wait elsewhere would be left out.
        with speed.off(self), self.memory.undone() if self.memory is not None else nullcontext():
            stock = FluxControlPipeline(**self.components)  # a saved subclass would write its own class name
            stock.save_pretrained(*args, **kwargs)


class _LeftPanel:
    """The left panel's known path, x(t) = (1 − t)·z + t·ε: z from the condition, ε from the noise, both packed.

    Rows without a reference (an all-zero condition) go free.
    """

    def __init__(self, condition: torch.Tensor, noise: torch.Tensor, canvas: Canvas, sigmas: torch.Tensor) -> None:
        given = condition.flatten(1).any(dim=1).view(-1, 1, 1)
        self.held = given & ~right_tokens(canvas).to(condition.device).view(1, -1, 1)
        self.clean, self.noise, self.sigmas = condition, noise, sigmas

    def __call__(self, x_t: torch.Tensor, step: int) -> torch.Tensor:
        """x_t (B, tokens, C) as it comes to step number `step`, its left panel put in place."""
        sigma = self.sigmas[step].to(x_t.device, x_t.dtype)
        return torch.where(self.held, (1 - sigma) * self.clean + sigma * self.noise, x_t)


@contextmanager
def _quiet_truncation() -> Iterator[None]:
    """Holds back diffusers' own truncation messages: they come at every call, and name the wrong part of the text."""
    logger = logging.getLogger("diffusers.pipelines.flux.pipeline_flux_control")

    def quiet(record: logging.LogRecord) -> bool:
        return "was truncated" not in record.getMessage()

    logger.addFilter(quiet)
    try:
        yield
    finally:
        logger.removeFilter(quiet)
