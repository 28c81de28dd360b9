"""Memory and speed presets on a stock diffusers text-to-image pipeline: a teacher, which has its own sampling loop.

    memory = stock.resolve_memory(folder, "24", device, dtype, {"rows": 4, "panel": (512, 512)})
    applied = stock.apply(pipe, memory, stock.resolve_speed(folder, "fast"), device)
    with applied.call():
        pipe(...)

Tables and functions are the student's (`presets`, `memory`, `speed`, `caches`). Features of the student's loop are
implemented in another way here, or left out with a reason: `LOOP` and `suited_speed`.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.hooks import HookRegistry
from diffusers.hooks.hooks import CacheContext

from diptych.errors import UsageError
from diptych.student.runtime import caches, presets, speed
from diptych.student.runtime.applied import transform
from diptych.student.runtime.memory import Memory, prepare
from diptych.student.runtime.presets import Shapes
from diptych.student.runtime.speed import Speed
from diptych.student.weights.files import read_json

log = logging.getLogger("diptych.student")
INDEX = "model_index.json"
SCHEDULER = "FlowMatchEulerDiscreteScheduler"  # `skip` needs its straight line of times, with one velocity a step
# Switches that a stock pipeline's loop does not support, and why.
LOOP: dict[str, str] = {
    "modulation": "only useful when memory is short; paint.memory has it",
    "remember": "no prompt is used twice",
    "batched_guidance": "the pipeline computes guidance",
    "guidance_until": "the pipeline computes guidance",
    "decode": "a grid is always decoded whole",
}


def shapes(folder: Path) -> Shapes:
    """The configs of a pipeline's parts. UsageError for a pipeline without a transformer, which no preset supports."""
    index = read_json(folder / INDEX)
    if not (folder / "transformer" / "config.json").is_file():
        raise UsageError(
            "option_unsuited",
            f"{folder} is a {index.get('_class_name', 'folder')} without a transformer. Set paint.memory and "
            "paint.speed to null; they apply only to transformers.",
        )
    parts = [part for part in ("transformer", "vae", *presets.TEXTS) if (folder / part / "config.json").is_file()]
    configs: dict[str, Any] = {part: read_json(folder / part / "config.json") for part in parts}
    named = {part: index[part][1] for part in parts if isinstance(index.get(part), list) and index[part][1]}
    return Shapes(**configs, classes=named)


def resolve_memory(
    folder: Path, name: str, device: str | torch.device, dtype: torch.dtype, load: dict[str, Any]
) -> Memory:
    """A memory preset for the pipeline in `folder`, chosen and checked from its configs, before anything is loaded.

    Args:
        load: the size of one batch, for `memory.plan`: `rows`, `panel`, `text_tokens`.

    UsageError if the preset does not work here, UserError if `auto` finds none that fits.
    """
    memory = prepare(name, device, "paint.memory")
    _log_left_out(memory.resolve(shapes(folder), dtype, {}, reopened=False, **load))
    log.info("%s", memory.reason)
    return memory


def resolve_speed(folder: Path, name: str | None) -> Speed:
    """The speed preset `name` with the switches that the pipeline in `folder` supports. The others are logged. None is
    the pipeline without a preset."""
    if name is None:
        return speed.PLAIN
    named = read_json(folder / INDEX).get("scheduler") or [None, "pipeline without a scheduler"]
    suited, left_out = suited_speed(speed.parse(name), shapes(folder), str(named[1]))
    _log_left_out(left_out)
    return suited


def suited_speed(wanted: Speed, parts: Shapes, scheduler: str) -> tuple[Speed, list[str]]:
    """`wanted` without the switches that a stock pipeline of these parts does not support, and these, each with its
    reason."""
    reasons = {key: reason for key, reason in LOOP.items() if getattr(wanted, key) != getattr(speed.PLAIN, key)}
    if wanted.cache != "none" and (reason := _cannot_skip(wanted, parts, scheduler)):
        reasons["cache"] = reason
    plain = {key: getattr(speed.PLAIN, key) for key in reasons}
    return replace(wanted, **plain), [f"{key}: {reason}" for key, reason in reasons.items()]


def apply(pipe: Any, memory: Memory | None, wanted: Speed, device: torch.device) -> StockRuntime:
    """Applies both presets to a stock pipeline whose parts are on the CPU, and moves its parts to the device."""
    transformer = pipe.transformer if wanted != speed.PLAIN or memory is not None else None
    applied = StockRuntime(pipe)
    if memory is not None:
        memory.shrink(transformer)
        if memory.modulation is not None:
            applied.tabulate(memory.modulation)
    if wanted.cache != "none":
        applied.skip(wanted)  # before the hooks that move the transformer, which wrap this one again in each call
    left_out = _place(pipe, memory, device)
    # After the move, which would end the sharing of bytes between fused and single projections.
    left_out += transform(transformer, wanted)[1]
    _log_left_out(left_out)
    return applied


def _place(pipe: Any, memory: Memory | None, device: torch.device) -> list[str]:
    """Moves the parts to the device, or adds the hooks that do. Returns what was left out, with its reason."""
    if memory is None:
        pipe.to(device)
        return []
    left_out: list[str] = []
    texts = [encoder for part in presets.TEXTS if (encoder := getattr(pipe, part, None)) is not None]
    for encoder in texts:
        memory.shrink_text(encoder)
    if memory.preset.tile and not hasattr(pipe.vae, "enable_tiling"):
        left_out.append(f"tile: {type(pipe.vae).__name__} does not support tiling")
    elif memory.preset.tile:
        memory.tile(pipe.vae)
        pipe.vae.enable_tiling()
    if memory.preset.offload == "group":
        for model in (pipe.transformer, *(texts if memory.preset.staged else ())):
            memory.offload(model)
        for part in pipe.components.values():
            if hasattr(part, "parameters") and part is not pipe.transformer and part not in texts:
                part.to(device)
    elif memory.preset.staged and pipe.model_cpu_offload_seq is not None:
        pipe.enable_model_cpu_offload(device=device)
    else:
        if memory.preset.staged:
            left_out.append(f"staged: {type(pipe).__name__} does not define the order of its parts")
        pipe.to(device)
    return left_out


class StockRuntime:
    """The presets of a stock pipeline, during its calls."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.table: ModulationTable | None = None
        self.skipping: caches.StepCache | None = None

    @contextmanager
    def call(self) -> Iterator[None]:
        """The context of one call of the pipeline. Cached values of the call are dropped at its end."""
        try:
            yield
        finally:
            if self.table is not None:
                self.table.clear()
            if self.skipping is not None:
                # Some pipelines do this after a call, and some do not.
                HookRegistry.check_if_exists_or_initialize(self.pipe.transformer).reset_stateful_hooks(recurse=True)

    def tabulate(self, modulation: Any) -> None:
        """Precomputes the modulation of a FLUX transformer before its forward passes."""
        self.table = ModulationTable(modulation, self.pipe.scheduler)
        self.pipe.transformer.register_forward_pre_hook(self.table, with_kwargs=True)

    def skip(self, wanted: Speed) -> None:
        """Skips steps on the fixed schedule of `wanted`."""
        self.skipping = caches.StepCache(wanted, {})
        caches.register(self.pipe.transformer, StockSkip(self.skipping, self.pipe.scheduler))


class ModulationTable:
    """A forward pre-hook of a FLUX transformer with detached modulation, which extends the table if it lacks a text.

    The scheduler has all steps at the first forward pass, so one product covers them, as in the student's loop. Another
    product is needed only for a branch of true guidance whose text comes later.
    """

    def __init__(self, modulation: Any, scheduler: Any) -> None:
        self.modulation, self.scheduler = modulation, scheduler
        self.pooled: torch.Tensor | None = None

    def clear(self) -> None:
        self.pooled = None
        self.modulation.lookup.clear()

    def __call__(self, transformer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        pooled, guidance = kwargs["pooled_projections"], kwargs.get("guidance")
        if self.pooled is not None and (pooled[:, None] == self.pooled).all(-1).any(-1).all():
            return
        texts = pooled if self.pooled is None else torch.cat([self.pooled, pooled])
        self.pooled = torch.unique(texts, dim=0)
        lookup, strength = self.modulation.lookup, None if guidance is None else float(guidance[0])
        lookup.timesteps, lookup.table = self.modulation.table(self.scheduler.timesteps, self.pooled, strength)
        lookup.pooled = self.pooled


class StockSkip(caches.SkipHook):
    """`SkipHook` for a loop that is not ours: the step is the scheduler's, and a step's forward passes are its branches
    in order."""

    def __init__(self, cache: caches.StepCache, scheduler: Any) -> None:
        super().__init__(cache)
        self.scheduler = scheduler
        self.branch, self.last = 0, -1

    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        cache, step = self.cache, self.scheduler.step_index or 0  # None until the first step was taken
        self.branch = self.branch + 1 if step == self.last else 0
        if step == 0 and self.branch == 0:
            cache.times, cache.computed, cache.skipped = self.scheduler.timesteps.tolist(), 0, 0
        cache.step = self.last = step
        self.state_manager.set_context(CacheContext(str(self.branch)))
        return super().new_forward(module, *args, **kwargs)

    def reset_state(self, module: torch.nn.Module) -> torch.nn.Module:
        self.branch, self.last = 0, -1
        return super().reset_state(module)


def _cannot_skip(wanted: Speed, parts: Shapes, scheduler: str) -> str:
    """The reason why steps cannot be skipped. Empty if there is none."""
    if wanted.cache != "skip":
        return f"{wanted.cache} needs the student's right panel"
    if scheduler != SCHEDULER:
        return f"skipping steps needs a {SCHEDULER}, not a {scheduler}"
    forward = getattr(diffusers, parts.class_of("transformer")).forward
    if "hidden_states" not in inspect.signature(forward).parameters:
        return f"{parts.class_of('transformer')} has no input hidden_states"
    return ""


def _log_left_out(left_out: list[str]) -> None:
    for reason in left_out:
        log.info("left out: %s", reason)
