"""Caches of work between sampling steps (`StepCache`, lossy) and of embeddings between calls (`Recall`, exact).

Neighboring sampling steps are similar, so a step cache skips part of their work, with diffusers' ModelHooks. There are
three rules. Each has separate state for each guidance branch (diffusers' `cache_context`). Each ignores the left panel,
whose path is known; only the tokens of the right panel (*columns* of the canvas) count.

- `first_block`: the first block always runs. If its change of a row's right panel is close to that of the last computed
  step, the sum of the other blocks is reused. The decision is made for each row, so that an image of a batch equals the
  image generated alone. (FirstBlockCache of ParaAttention, after TeaCache, arXiv 2411.19108; diffusers averages all
  tokens and all rows.)
- `magnitude`: calibration measures how much the sum of the blocks shrinks or grows from step to step. Steps are skipped
  while the accumulated error is below the threshold (MagCache, arXiv 2506.09045). Ratios are indexed by the step, so
  branches that start late stay aligned. Without ratios for a number of steps, the first images are computed completely
  and calibrate it; `speed.json` in the model's folder stores the ratios (`write_ratios`).
- `skip`: every n-th step is computed, on a fixed schedule. Between, the velocity is extrapolated along the line through
  the last two computed ones, which costs almost nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import BaseState, StateManager

from diptych.errors import UserError
from diptych.student.canvas import Canvas, right_tokens
from diptych.student.runtime.modulation import Slot
from diptych.student.runtime.speed import Speed
from diptych.utils.io import write_atomic

HOOK = "diptych_step_cache"
Blocks = tuple[torch.Tensor, torch.Tensor]  # text (B, L, D) and image (B, tokens, D), the output of FLUX's blocks


class StepCache:
    """One rule on one transformer. The runtime sets `step` during the sampling loop.

    `computed` and `skipped` count rows × steps × branches of the current or last call.
    """

    def __init__(self, speed: Speed, ratios: Mapping[int, Sequence[float]]) -> None:
        self.speed = speed
        self.ratios = {steps: list(values) for steps, values in ratios.items()}
        self.step = 0
        self.times: list[float] = []
        self.right: torch.Tensor | None = None  # indices of the right panel's tokens
        self.computed = self.skipped = 0
        self.off = False  # the transformer runs as without a cache
        self._measured: dict[int, list[float]] = {}  # step → magnitude ratios of its branches, while calibrating

    @property
    def steps(self) -> int:
        return len(self.times)

    def begin(self, canvas: Canvas, times: list[float], device: torch.device) -> None:
        """Starts a call. `times` are the timesteps in the order of sampling."""
        self.times, self.step = times, 0
        self.right = right_tokens(canvas).nonzero().flatten().to(device)
        self.computed = self.skipped = 0
        self._measured = {}

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within it, the transformer runs as without a cache."""
        self.off = True
        try:
            yield
        finally:
            self.off = False

    def count(self, computed: int, rows: int) -> None:
        self.computed += computed
        self.skipped += rows - computed

    @property
    def calibrating(self) -> bool:
        """Whether the current call computes everything, to measure the magnitude ratios of its number of steps."""
        return self.speed.cache == "magnitude" and self.steps not in self.ratios

    def measure(self, before: torch.Tensor, now: torch.Tensor) -> None:
        """Records |now| / |before| of the blocks' sums (B, tokens, D), the mean over the right panel's tokens."""
        sizes = [torch.linalg.vector_norm(x[:, self.right].float(), dim=-1) for x in (now, before)]
        self._measured.setdefault(self.step, []).append(float((sizes[0] / (sizes[1] + 1e-8)).mean()))

    def end(self) -> None:
        """Ends a call. The ratios that a complete call measured are used by later calls."""
        if self.calibrating and self.step == self.steps - 1:
            measured = [self._measured.get(step) for step in range(self.steps)]
            self.ratios[self.steps] = [sum(x) / len(x) if x else 1.0 for x in measured]


def enable(transformer: Any, speed: Speed, ratios: Mapping[int, Sequence[float]] | None = None) -> StepCache:
    """Adds the hooks of `speed.cache` to a FLUX transformer. UserError if it has too few blocks."""
    cache = StepCache(speed, ratios or {})
    if speed.cache == "skip":
        register(transformer, SkipHook(cache))
    else:
        blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
        if len(blocks) < 2:
            raise UserError(
                "speed_unsupported",
                f"The step cache {speed.cache} needs a transformer with at least two blocks. Use cache=none.",
            )
        shared = StateManager(_Sum)  # pyright: ignore[reportArgumentType]
        rule = _first_block if speed.cache == "first_block" else _magnitude
        for i, block in enumerate(blocks):
            register(block, _BlockHook(cache, shared, rule if i == 0 else None, last=i == len(blocks) - 1))
    HookRegistry.check_if_exists_or_initialize(transformer).invalidate_child_registries_cache()
    return cache


def disable(transformer: Any) -> None:
    """Removes the hooks of `enable`."""
    registry = HookRegistry.check_if_exists_or_initialize(transformer)
    registry.remove_hook(HOOK, recurse=True)
    registry.invalidate_child_registries_cache()


def read_ratios(path: Path) -> dict[int, list[float]]:
    """Magnitude ratios by number of steps. UserError if the file has none."""
    try:
        values = json.loads(path.read_text("utf8"))["magnitude_ratios"]
        ratios = {int(steps): [float(x) for x in of_steps] for steps, of_steps in values.items()}
        if wrong := [steps for steps, of_steps in ratios.items() if steps != len(of_steps)]:
            raise ValueError(f"{wrong[0]} steps have {len(ratios[wrong[0]])} ratios")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            "file_damaged", f"{path} has no valid magnitude ratios ({error!r}). Remove it, or calibrate again."
        ) from error
    return ratios


def write_ratios(cache: StepCache, path: Path) -> None:
    """Writes the calibrated ratios, and keeps the file's other values."""
    known = json.loads(path.read_text("utf8")) if path.is_file() else {}
    ratios = known.get("magnitude_ratios", {}) | {
        str(steps): [round(x, 5) for x in values] for steps, values in cache.ratios.items()
    }
    write_atomic(path, (json.dumps(known | {"magnitude_ratios": ratios}) + "\n").encode())


def register(module: torch.nn.Module, hook: ModelHook) -> None:
    HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, HOOK)


# A fixed schedule --------------------------------------------------------------------------------------------------


class _Past(BaseState):
    """State of one branch: the last two computed velocities, (step, velocity), newest last."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.points: list[tuple[int, torch.Tensor]] = []


class SkipHook(ModelHook):
    """The hook of `skip` on the whole transformer, which does not run at skipped steps."""

    _is_stateful = True
    fn_ref: Any

    def __init__(self, cache: StepCache) -> None:
        super().__init__()
        self.cache = cache
        self.state_manager = StateManager(_Past)  # pyright: ignore[reportArgumentType]

    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        cache = self.cache
        if cache.off:
            return self.fn_ref.original_forward(*args, **kwargs)
        points: list[tuple[int, torch.Tensor]] = self.state_manager.get_state().points
        rows = len(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])
        if self._skips(points, rows):
            cache.count(0, rows)
            (older, v_0), (newer, v_1) = points
            times = cache.times
            slope = (times[cache.step] - times[newer]) / (times[newer] - times[older])
            return (v_1 + slope * (v_1 - v_0),)
        output = self.fn_ref.original_forward(*args, **kwargs)
        cache.count(rows, rows)
        points.append((cache.step, output[0]))
        del points[:-2]
        return output

    def _skips(self, points: list[tuple[int, torch.Tensor]], rows: int) -> bool:
        cache, interval = self.cache, self.cache.speed.cache_interval
        if cache.speed.runs(cache.step, cache.steps):
            return False
        # A branch that has just begun, or resumes after a pause, has no line to extrapolate.
        recent = len(points) == 2 and cache.step - points[0][0] < 2 * interval and len(points[0][1]) == rows
        return recent and cache.step - points[1][0] < interval

    def reset_state(self, module: torch.nn.Module) -> torch.nn.Module:
        self.state_manager.reset()
        return module


# Reuse of the blocks' sum --------------------------------------------------------------------------------------------


class _Sum(BaseState):
    """State of one branch: what the blocks after the anchor added to the image tokens when they last ran."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.seen = -2  # the last step of this branch
        self.fresh = True  # the branch did not run at the previous step
        self.sum: torch.Tensor | None = None  # (B, tokens, D)
        self.trigger: torch.Tensor | None = None  # first block's change at the computed step, (B, right tokens, D)
        self.ratio, self.error, self.in_a_row = 1.0, 0.0, 0
        self.rows: torch.Tensor | None = None  # rows to compute in this forward pass; None: all
        self.anchor: Blocks | None = None


def _first_block(cache: StepCache, state: _Sum, change: torch.Tensor) -> torch.Tensor:
    """Which rows (B,) to compute, from the first block's change of the right panel (B, right tokens, D)."""
    compute = torch.ones(len(change), dtype=torch.bool, device=change.device)
    if state.trigger is not None and not state.fresh and cache.step >= cache.speed.cache_warmup:
        moved = (change - state.trigger).abs().float().mean(dim=(1, 2))
        compute = moved > cache.speed.cache_threshold * state.trigger.abs().float().mean(dim=(1, 2))
    keep = compute.view(-1, 1, 1)
    state.trigger = change if state.trigger is None or state.fresh else torch.where(keep, change, state.trigger)
    return compute


def _magnitude(cache: StepCache, state: _Sum, change: torch.Tensor) -> torch.Tensor:
    """All rows (B,) or none, from the calibrated ratios of the steps since the last computed one."""
    speed = cache.speed
    skip = False
    if not cache.calibrating and not state.fresh and cache.step >= speed.cache_warmup:
        state.ratio *= cache.ratios[cache.steps][cache.step]
        state.error += abs(1 - state.ratio)
        state.in_a_row += 1
        skip = state.error <= speed.cache_threshold and state.in_a_row < speed.cache_interval
    if not skip:
        state.ratio, state.error, state.in_a_row = 1.0, 0.0, 0
    return torch.full((len(change),), not skip, dtype=torch.bool, device=change.device)


class _BlockHook(ModelHook):
    """The hook on every block. The first one, which has the `rule`, decides which rows run. The `last` one joins the
    rows."""

    _is_stateful = True
    fn_ref: Any

    def __init__(self, cache: StepCache, shared: StateManager, rule: Any, last: bool) -> None:
        super().__init__()
        self.cache = cache
        self.state_manager = shared
        self.rule = rule
        self.last = last

    # Neither this method nor the decisions are traced, so that a compiled block stays one graph.
    @torch.compiler.disable(recursive=False)
    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Blocks:
        if self.cache.off:
            return self.fn_ref.original_forward(*args, **kwargs)
        state: _Sum = self.state_manager.get_state()
        if self.rule is not None:
            self._begin(state, kwargs)
        blocks: Blocks = kwargs["encoder_hidden_states"], kwargs["hidden_states"]
        if state.rows is None or len(state.rows):
            self._narrow(state, module, kwargs)
            blocks = self.fn_ref.original_forward(*args, **kwargs)
        if self.rule is _first_block:
            blocks = self._look(state, kwargs["hidden_states"], blocks)
        return self._finish(state, blocks[1]) if self.last else blocks

    @torch.compiler.disable
    def _begin(self, state: _Sum, kwargs: dict[str, Any]) -> None:
        """Before the first block: all rows run, unless the rule decides without the first block's output."""
        image: torch.Tensor = kwargs["hidden_states"]
        state.fresh = state.seen != self.cache.step - 1 or state.sum is None or state.sum.shape != image.shape
        state.seen = self.cache.step
        state.anchor = (kwargs["encoder_hidden_states"], image)
        state.rows = None
        if self.rule is not _first_block:
            self._choose(state, self.rule(self.cache, state, image))

    @torch.compiler.disable
    def _look(self, state: _Sum, before: torch.Tensor, blocks: Blocks) -> Blocks:
        """After the first block: selects the rows that the other blocks run on."""
        state.anchor = blocks
        self._choose(state, self.rule(self.cache, state, (blocks[1] - before)[:, self.cache.right]))
        return blocks if state.rows is None or not len(state.rows) else (blocks[0][state.rows], blocks[1][state.rows])

    def _choose(self, state: _Sum, compute: torch.Tensor) -> None:
        rows = compute.nonzero().flatten()
        state.rows = None if len(rows) == len(compute) else rows
        self.cache.count(len(rows), len(compute))

    @torch.compiler.disable
    def _narrow(self, state: _Sum, module: torch.nn.Module, kwargs: dict[str, Any]) -> None:
        """Narrows the inputs of a block to the rows that run: the modulation, precomputed or not."""
        if state.rows is not None:
            kwargs["temb"] = kwargs["temb"][state.rows]
            given = kwargs.get("joint_attention_kwargs") or {}
            if "references" in given:
                kwargs["joint_attention_kwargs"] = {**given, "references": given["references"].rows(state.rows)}
            for slot in (m for m in module.modules() if isinstance(m, Slot)):
                slot.rows = slot.rows[state.rows] if slot.rows is not None else None

    @torch.compiler.disable
    def _finish(self, state: _Sum, image: torch.Tensor) -> Blocks:
        """Text and image of all rows after the last block. The text is not used afterwards."""
        assert state.anchor is not None
        text, anchor = state.anchor
        before, state.anchor = state.sum, None
        if state.rows is None:
            state.sum = image - anchor
            if self.cache.calibrating and before is not None and not state.fresh:
                self.cache.measure(before, state.sum)
            return text, image
        assert before is not None
        whole = anchor + before
        if len(state.rows):
            whole[state.rows] = image
            state.sum = before.clone()
            state.sum[state.rows] = image - anchor[state.rows]
        return text, whole

    def reset_state(self, module: torch.nn.Module) -> torch.nn.Module:
        self.state_manager.reset()
        return module


# Embeddings between calls --------------------------------------------------------------------------------------------

Tensors = tuple[torch.Tensor, ...]


class Recall:
    """A cache of embeddings of prompts and references, which drops the least recently used ones.

    Keys are contents (texts, pixels, sizes, dtype), never file names or objects, so a changed image has another key.
    `hits` and `misses` count the look-ups.

    Args:
        megabytes: the limit in MiB. 0 disables the cache.
        device: device of cached tensors. None keeps them on the device where they were made.
    """

    def __init__(self, megabytes: float = 0, device: str | None = None) -> None:
        self.limit = int(megabytes * 2**20)
        self.device = device
        self.hits = self.misses = 0
        self._kept: OrderedDict[Hashable, Tensors] = OrderedDict()

    def __call__(self, key: Hashable, make: Callable[[], Tensors]) -> Tensors:
        """The cached tensors of a key, or those that `make` returns. They are shared; callers must not change them."""
        if key in self._kept:
            self.hits += 1
            self._kept.move_to_end(key)
            return self._kept[key]
        self.misses += 1
        made = tuple(tensor.to(device=self.device) for tensor in make())
        if _bytes(made) <= self.limit:
            self._kept[key] = made
            while self.size > self.limit:
                self._kept.popitem(last=False)
        return made

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def size(self) -> int:
        """Bytes in use."""
        return sum(_bytes(tensors) for tensors in self._kept.values())

    def clear(self) -> None:
        """Empties the cache. Required after a text encoder or the VAE was changed in place."""
        self._kept.clear()


def content(tensor: torch.Tensor) -> str:
    """A hash of a tensor's shape, dtype and values."""
    array = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{tuple(array.shape)} {array.dtype}".encode())
    digest.update(array.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _bytes(tensors: Tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
