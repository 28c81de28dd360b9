"""The memory and speed presets on a stock diffusers text-to-image pipeline: a teacher, which paints in its own loop.

    settled = stock.settle(folder, "24", device, dtype, {"rows": 4, "panel": (512, 512)})
    drawing = stock.apply(pipe, settled, stock.speed_of(folder, "fast"), device)
    with drawing.call():
        pipe(...)

Tables and functions are the student's (`presets`, `memory`, `speed`, `caches`). What hangs on the student's own loop
goes another way here or is left out, with its reason: `LOOP` and `suited_speed`.
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
SCHEDULER = "FlowMatchEulerDiscreteScheduler"  # one velocity a step, on a straight line of times: what `skip` follows
# Switches of a loop that is not ours, as they are with a stock pipeline, and why nothing is lost or can be done.
LOOP: dict[str, str] = {
    "modulation": "the table pays where memory is short; paint.memory has it",
    "remember": "no prompt is drawn from twice",
    "batched_guidance": "guidance is the pipeline's own",
    "guidance_until": "guidance is the pipeline's own",
    "decode": "a grid is wanted whole",
}


def shapes(folder: Path) -> Shapes:
    """The configs of a pipeline's parts. UsageError for one without a transformer, which no preset is made for."""
    index = read_json(folder / INDEX)
    if not (folder / "transformer" / "config.json").is_file():
        raise UsageError(
            f"{folder} is a {index.get('_class_name', 'folder')} without a transformer; paint.memory and paint.speed "
            "are for transformers: leave both null"
        )
    parts = [part for part in ("transformer", "vae", *presets.TEXTS) if (folder / part / "config.json").is_file()]
    configs: dict[str, Any] = {part: read_json(folder / part / "config.json") for part in parts}
    named = {part: index[part][1] for part in parts if isinstance(index.get(part), list) and index[part][1]}
    return Shapes(**configs, classes=named)


def settle(folder: Path, name: str, device: str | torch.device, dtype: torch.dtype, drawn: dict[str, Any]) -> Memory:
    """A preset by name for the pipeline in `folder`, chosen and checked from its configs, before anything is opened.

    Args:
        drawn: what is drawn at once, as `memory.plan` takes it: `rows`, `panel`, `text_tokens`.

    Raises:
        UsageError if the preset does not work here, UserError if `auto` finds none that fits.
    """
    held = prepare(name, device, "paint.memory")
    left_out = held.settle(shapes(folder), dtype, {}, reopened=False, **drawn)
    _tell(left_out)
    log.info("%s", held.reason)
    return held


def speed_of(folder: Path, name: str | None) -> Speed:
    """The preset `name` as far as the pipeline in `folder` can have it; what is left out is told. None: as it is."""
    if name is None:
        return speed.PLAIN
    found, left_out = suited_speed(speed.parse(name), shapes(folder), _scheduler(folder))
    _tell(left_out)
    return found


def suited_speed(wanted: Speed, found: Shapes, scheduler: str) -> tuple[Speed, list[str]]:
    """`wanted` without what a stock pipeline of these parts cannot have, and that, each with its reason."""
    reasons = {key: reason for key, reason in LOOP.items() if getattr(wanted, key) != getattr(speed.PLAIN, key)}
    if wanted.cache != "none" and (reason := _cannot_skip(wanted, found, scheduler)):
        reasons["cache"] = reason
    plain = {key: getattr(speed.PLAIN, key) for key in reasons}
    return replace(wanted, **plain), [f"{key}: {reason}" for key, reason in reasons.items()]


def apply(pipe: Any, held: Memory | None, wanted: Speed, device: torch.device) -> Drawing:
    """Puts both on a stock pipeline whose parts are on the CPU, and its parts where they belong."""
    transformer = pipe.transformer if wanted != speed.PLAIN or held is not None else None
    drawing = Drawing(pipe)
    if held is not None:
        held.shrink(transformer)
        if held.modulation is not None:
            drawing.tabulate(held.modulation)
    if wanted.cache != "none":
        drawing.skip(wanted)  # before what moves the transformer, which goes around it and is put on anew each call
    left_out = _place(pipe, held, device)
    # After the move: fused and single projections share their bytes, which a move would end.
    left_out += transform(transformer, wanted)[1]
    _tell(left_out)
    return drawing


def _place(pipe: Any, held: Memory | None, device: torch.device) -> list[str]:
    """Puts the parts on the device, or what brings them there; what was left out, with its reason."""
    if held is None:
        pipe.to(device)
        return []
    left_out: list[str] = []
    texts = [encoder for part in presets.TEXTS if (encoder := getattr(pipe, part, None)) is not None]
    for encoder in texts:
        held.shrink_text(encoder)
    if held.preset.tile and not hasattr(pipe.vae, "enable_tiling"):
        left_out.append(f"tile: a {type(pipe.vae).__name__} decodes no tiles")
    elif held.preset.tile:
        held.tile(pipe.vae)
        pipe.vae.enable_tiling()
    if held.preset.offload == "group":
        for model in (pipe.transformer, *(texts if held.preset.staged else ())):
            held.offload(model)
        for part in pipe.components.values():
            if hasattr(part, "parameters") and part is not pipe.transformer and part not in texts:
                part.to(device)
    elif held.preset.staged and pipe.model_cpu_offload_seq is not None:
        pipe.enable_model_cpu_offload(device=device)
    else:
        if held.preset.staged:
            left_out.append(f"staged: a {type(pipe).__name__} does not say in which order its parts run")
        pipe.to(device)
    return left_out


class Drawing:
    """What goes on within the calls of one pipeline that has presets on it."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.table: Table | None = None
        self.skipping: caches.StepCache | None = None

    @contextmanager
    def call(self) -> Iterator[None]:
        """One call of the pipeline: nothing that was kept for the one before is seen in it."""
        try:
            yield
        finally:
            if self.table is not None:
                self.table.clear()
            if self.skipping is not None:
                # Some pipelines do so after a call, and some do not.
                HookRegistry.check_if_exists_or_initialize(self.pipe.transformer).reset_stateful_hooks(recurse=True)

    def tabulate(self, modulation: Any) -> None:
        """Precomputes the modulation of a FLUX transformer as its forwards come."""
        self.table = Table(modulation, self.pipe.scheduler)
        self.pipe.transformer.register_forward_pre_hook(self.table, with_kwargs=True)

    def skip(self, wanted: Speed) -> None:
        """Skips steps on the fixed schedule of `wanted`."""
        self.skipping = caches.StepCache(wanted, {})
        caches.register(self.pipe.transformer, StockSkip(self.skipping, self.pipe.scheduler))


class Table:
    """Before each forward of a FLUX transformer whose modulation is detached: makes the table if it lacks this one's.

    The scheduler knows all steps when the first forward comes, so there is one product for all, as in the student's
    loop, and another only for a branch (true guidance) whose text comes later.
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
    """Where no loop of ours says so, the scheduler tells the step, and a step's forwards are its branches in order."""

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


def _cannot_skip(wanted: Speed, found: Shapes, scheduler: str) -> str:
    """Why steps cannot be skipped; empty if they can."""
    if wanted.cache != "skip":
        return f"{wanted.cache} looks at the student's right panel"
    if scheduler != SCHEDULER:
        return f"steps are skipped along the straight line of a {SCHEDULER}, and this is a {scheduler}"
    forward = getattr(diffusers, found.class_of("transformer")).forward
    if "hidden_states" not in inspect.signature(forward).parameters:
        return f"a {found.class_of('transformer')} takes its pictures in a form of its own"
    return ""


def _scheduler(folder: Path) -> str:
    named = read_json(folder / INDEX).get("scheduler") or [None, "pipeline without a scheduler"]
    return str(named[1])


def _tell(left_out: list[str]) -> None:
    for reason in left_out:
        log.info("left out: %s", reason)
