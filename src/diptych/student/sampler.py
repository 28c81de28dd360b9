"""The sampler: rectified flow on the diptych canvas, as in the paper's released code.

    call = prepare(canvas, ...)                               # the inputs of a call, one row for each image
    timesteps = pipe.family.schedule(scheduler, tokens, steps)  # noise levels σ, shifted for the canvas's size
    x_0 = denoise(pipe, call, timesteps, pipe.runtime)        # x_{i+1} = x_i + (σ_{i+1} − σ_i)·v(x_i)

The canvas [reference | target] is denoised as one wide FLUX image with plain position ids. The condition, the VAE
encoding of [reference | black], is joined to the noisy latents, channel by channel. A student of `tokens` conditioning
denoises only the target panel, with the references as clean tokens (`references`). v is guided (`guidance`):

    v = v(0,"") + i·(v(ref,"") − v(0,"")) + t·(v(ref,text) − v(ref,""))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from diptych.errors import UsageError
from diptych.student import guidance
from diptych.student.canvas import Canvas, right_tokens
from diptych.student.families.base import Family, Texts
from diptych.student.guidance import Branch, Guidance
from diptych.student.references import References
from diptych.student.runtime.applied import Runtime
from diptych.student.runtime.modulation import name_layout
from diptych.student.runtime.speed import Speed

if TYPE_CHECKING:
    from diptych.student.reference_pipeline import ReferencePipeline

Callback = Callable[
    ["ReferencePipeline", int, torch.Tensor, "dict[str, torch.Tensor]"], "dict[str, torch.Tensor] | None"
]  # diffusers' `callback_on_step_end`: (pipeline, step, timestep, tensors) to the tensors that it changes


@dataclass(frozen=True)
class Call:
    """The inputs of one call for B images, one row each."""

    canvas: Canvas
    noise: torch.Tensor  # (B, tokens, C), packed, of the whole canvas
    branches: Mapping[str, Branch]  # (condition, *text) of `cond`, and of `reference` and `null` if guided
    guides: Sequence[Guidance]  # of each row
    guidance_scale: float  # distilled
    switches: Speed
    attention: dict[str, Any] | None = None  # diffusers' joint_attention_kwargs


# Prepare -------------------------------------------------------------------------------------------------------------


def prepare(
    canvas: Canvas,
    text: Texts,
    empty: Texts | None,
    condition: torch.Tensor | References,
    noise: torch.Tensor,
    guides: Sequence[Guidance],
    **options: Any,
) -> Call:
    """A call from one row of `text`, `empty` (None: unguided) and `condition` for each prompt, and one row of `noise`
    and `guides` for each image, in the dtype of the text. UsageError for noise of another shape."""
    embeds = text[0]
    channels = condition.channels if isinstance(condition, References) else condition.shape[-1]
    wanted = (len(guides), canvas.tokens, channels)
    if tuple(noise.shape) != wanted:
        raise UsageError(
            "argument_type",
            f"latents must be packed noise of the whole canvas with shape {wanted}, not {tuple(noise.shape)}.",
        )
    repeats = len(guides) // len(condition)
    condition = _repeated(condition.to(embeds.dtype), repeats)
    null = condition.none() if isinstance(condition, References) else torch.zeros_like(condition)
    branches: dict[str, Branch] = {"cond": (condition, *_each(text, repeats))}
    if empty is not None:
        texts = _each(empty, repeats)
        branches |= {"reference": (condition, *texts), "null": (null, *texts)}
    return Call(canvas, noise.to(device=embeds.device, dtype=embeds.dtype), branches, guides, **options)


def _repeated(condition: torch.Tensor | References, times: int) -> torch.Tensor | References:
    return condition.repeat(times) if isinstance(condition, References) else condition.repeat_interleave(times, dim=0)


def _each(text: Texts, times: int) -> Texts:
    return tuple(tensor.repeat_interleave(times, dim=0) for tensor in text)


# Denoise -------------------------------------------------------------------------------------------------------------


def denoise(
    pipe: ReferencePipeline,
    call: Call,
    timesteps: torch.Tensor,
    runtime: Runtime,
    callback: Callback | None = None,
    shown: Sequence[str] = ("latents",),
) -> torch.Tensor:
    """x_0 (B, tokens, C), the packed latents of the whole canvas.

    `callback` is diffusers' callback_on_step_end. It gets the tensors in `shown` and may return others.
    """
    x_t, canvas, sigmas, switches = call.noise, call.canvas, pipe.scheduler.sigmas, call.switches
    condition = call.branches["cond"][0]
    clean = condition if isinstance(condition, References) else None
    groups = guidance.alike(call.guides, clean.layouts if clean is not None else None)
    if clean is not None and clean.style.attention == "self":
        pooled = pipe.family.text(call.branches["cond"][1:]).pooled
        assert pooled is not None, "only FLUX.1 has this attention"
        with runtime.capturing(pipe.transformer, pooled_like=pooled):
            for group in groups:
                clean[group.rows].capture(pipe.transformer, canvas, call.attention)
    if switches.null_panel == "own" and canvas.panels == 2:
        for group in groups:
            group.give_null_a_panel(x_t, canvas, sigmas)
    texts = [pipe.family.text(branch[1:]) for branch in call.branches.values()]
    pooled = [text.pooled for text in texts if text.pooled is not None]
    inside = runtime.sampling(pipe.transformer, canvas, timesteps, pooled, call.guidance_scale, switches.modulation)
    bar: Any = pipe.progress_bar  # decorated in a way that hides its arguments from a type checker
    with bar(total=len(timesteps)) as progress, inside:
        for i, t in enumerate(timesteps):
            if pipe.interrupt:
                continue
            runtime.step(i)
            forward = partial(velocity, pipe.family, pipe.transformer, call, t)
            given = call.branches, i, len(timesteps), switches.batched_guidance, sigmas[i]
            v = guidance.velocity(groups, forward, x_t, *given)
            x_t = pipe.scheduler.step(v, t, x_t, return_dict=False)[0].to(x_t.dtype)
            if switches.clamp_left and canvas.panels == 2:
                x_t = clamp_left(x_t, call, sigmas[i + 1])
            if callback is not None:
                x_t, call = _called(callback, shown, pipe, i, t, x_t, call)
            progress.update()
    return x_t


def velocity(
    family: Family,
    transformer: Any,
    call: Call,
    t: torch.Tensor,
    name: str,
    x: torch.Tensor,
    condition: torch.Tensor | References,
    *text: torch.Tensor,
) -> torch.Tensor:
    """v(condition, text) at x (B, tokens, C) and time t, for any rows of the batch, from one forward pass.

    `name` separates the branches of guidance in step caches.
    """
    given: dict[str, Any] = {"guidance": call.guidance_scale, "attention": call.attention}
    if isinstance(condition, References):
        given["references"], more = condition.beside(x)
        given["attention"] = {**(call.attention or {}), **more} or None
        name_layout(transformer, (condition.layout, condition.style))
    else:
        given["condition"] = condition
    sigma = t.expand(len(x)).to(x.dtype) / 1000
    with transformer.cache_context(name) if hasattr(transformer, "cache_context") else nullcontext():
        return family.velocity(transformer, x, sigma, family.text(text), call.canvas.size, **given)


def on_path(clean: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """The point of rectified flow's path from noise ε to clean latents z at noise level `sigma`: (1 − σ)·z + σ·ε."""
    return (1 - sigma) * clean + sigma * noise


def clamp_left(x_t: torch.Tensor, call: Call, sigma: torch.Tensor) -> torch.Tensor:
    """x_t (B, tokens, C) at noise level `sigma` with its left panel on the known path from the noise to the condition.

    Rows without a reference (an all-zero condition) stay unchanged.
    """
    condition = call.branches["cond"][0]
    assert not isinstance(condition, References), "there is no left panel"
    has_reference = condition.flatten(1).any(dim=1).view(-1, 1, 1)
    clamped = has_reference & ~right_tokens(call.canvas).to(x_t.device).view(1, -1, 1)
    return torch.where(clamped, on_path(condition, call.noise, sigma.to(x_t.device, x_t.dtype)), x_t)


def _called(
    callback: Callback,
    shown: Sequence[str],
    pipe: ReferencePipeline,
    step: int,
    t: torch.Tensor,
    x_t: torch.Tensor,
    call: Call,
) -> tuple[torch.Tensor, Call]:
    """x_t and the call with the changes of a callback."""
    condition, embeds, *others = call.branches["cond"]
    tensors = {"latents": x_t, "prompt_embeds": embeds}
    changed = callback(pipe, step, t, {key: tensors[key] for key in shown}) or {}
    branches = {**call.branches, "cond": (condition, changed.get("prompt_embeds", embeds), *others)}
    return changed.get("latents", x_t), replace(call, branches=branches)
