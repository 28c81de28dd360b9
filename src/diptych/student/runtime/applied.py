"""Memory presets and speed settings on a pipeline: applying and removing them.

    apply_memory(pipe, memory)             # once, on a loaded pipeline
    left_out = apply_speed(pipe, speed)    # replaces the current speed setting
    remove_speed(pipe)                     # the transformer is stock again

`Runtime` (`pipe.runtime`) is the state of both, and what the sampler calls during a call. `transform` changes any
diffusers transformer; `stock` uses it for teachers.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers.hooks.group_offloading import _is_group_offload_enabled
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch import nn

from diptych.errors import UsageError, describe
from diptych.student import attention
from diptych.student.canvas import Canvas
from diptych.student.runtime import caches
from diptych.student.runtime.caches import Recall, StepCache
from diptych.student.runtime.memory import Memory
from diptych.student.runtime.modulation import ADALN, exact_timesteps, precomputed, rotary_once
from diptych.student.runtime.speed import COMPILE_FROM, PLAIN, Speed, one_of
from diptych.student.weights import lora
from diptych.student.weights.files import RATIOS_FILE
from diptych.utils.machine import alone

log = logging.getLogger("diptych.student")
FUSED = ("FluxTransformer2DModel", "Flux2Transformer2DModel")  # support fused projections; SD 3.5's loses its norms
TEXT_MIB = 1024  # main memory for embeddings if a memory preset frees the text encoders: 250 of FLUX.1's prompts


class Runtime:
    """The memory preset, speed setting and caches of one pipeline. The defaults are stock diffusers."""

    def __init__(self) -> None:
        self.memory: Memory | None = None
        self.speed = PLAIN
        self.step_cache: StepCache | None = None
        self.recall = Recall()  # embeddings of prompts and references, for `speed.remember`
        self._texts = Recall(TEXT_MIB, "cpu")

    def switches(self, **values: Any) -> Speed:
        """The speed setting with a call's switches in its place, except those that are None."""
        return replace(self.speed, **{name: value for name, value in values.items() if value is not None})

    def stage(self, name: str) -> None:
        """Lets the memory preset move the parts for `text`, `denoise` or `decode` to the device."""
        if self.memory is not None:
            self.memory.stage(name)

    @property
    def waiting(self) -> Sequence[str]:
        """The text encoders that a memory preset loads for each prompt."""
        return self.memory.waiting if self.memory is not None else ()

    @property
    def texts(self) -> Recall | None:
        """The cache of prompt embeddings between calls. None if there is none."""
        if self.recall.limit:
            return self.recall
        return self._texts if self.waiting else None  # otherwise the encoders would be loaded for every image

    @contextmanager
    def sampling(
        self,
        transformer: Any,
        canvas: Canvas,
        timesteps: torch.Tensor,
        pooled: Sequence[torch.Tensor],
        guidance: float,
        modulation: bool,
    ) -> Iterator[None]:
        """The context of the sampler's loop. It restores the transformer at its end.

        Step caches start empty, also after a call that was interrupted. `pooled` has the pooled texts (B, P) of every
        branch. `modulation` precomputes the modulation of all steps (`modulation.precomputed`).
        """
        if hasattr(transformer, "_reset_stateful_cache"):
            transformer._reset_stateful_cache()
        if self.step_cache is not None:
            self.step_cache.begin(canvas, timesteps.tolist(), timesteps.device)
        self.stage("denoise")
        table = precomputed(transformer, timesteps, pooled, guidance, wanted=modulation)
        with exact_timesteps(transformer), rotary_once(transformer), table:
            yield
        if self.step_cache is not None:
            self.step_cache.end()

    @contextmanager
    def capturing(self, transformer: Any, pooled_like: torch.Tensor) -> Iterator[None]:
        """What the pass over reference tokens runs in (`attention.capture`): step caches neither see nor count it, and
        a detached modulation has its table. `pooled_like` (B, P) is a pooled text, for its device and dtype."""
        attention.install(transformer)
        self.stage("denoise")
        zero = torch.zeros(1, device=pooled_like.device)
        table = precomputed(transformer, zero, [torch.zeros_like(pooled_like[:1])], attention.GUIDANCE)
        with table, self.step_cache.paused() if self.step_cache is not None else nullcontext():
            yield

    def step(self, number: int) -> None:
        """Sets the current step of the loop, counted from 0."""
        if self.step_cache is not None:
            self.step_cache.step = number


class HasRuntime(Protocol):
    """What this module needs of a pipeline."""

    transformer: Any
    runtime: Runtime
    loaded_from: tuple[Path, ...]


def apply_memory(pipe: Any, memory: Memory) -> None:
    """Applies a memory preset to a pipeline whose parts are on the CPU and whose LoRAs are fused. It cannot be
    removed."""
    memory.apply(pipe)
    pipe.runtime.memory = memory


@alone
def apply_speed(pipe: HasRuntime, speed: Speed) -> list[str]:
    """Applies a speed setting to a pipeline, in place of its current one. Returns the switches that were left out, each
    with its reason.

    Fused LoRAs stay fused; `remove_speed` undoes everything else. UsageError for combinations that cannot work, before
    anything is changed.
    """
    transformer, runtime = pipe.transformer, pipe.runtime
    if speed.cache != "none" and getattr(transformer, "is_cache_enabled", False):
        raise UsageError(
            "speed_unsupported", "A step cache of diffusers is active. Call transformer.disable_cache() first."
        )
    kind = type(transformer).__name__
    if speed.cache != "none" and kind != "FluxTransformer2DModel":
        raise UsageError(
            "speed_unsupported", f"Step caches are for FLUX.1, not for {kind}. Use --speed exact, or set cache=none."
        )
    if speed.attention:
        one_of("attention", speed.attention, _attention_backends())
    remove_speed(pipe)
    if speed.fused_lora:
        lora.fuse_loras(pipe)  # pyright: ignore[reportArgumentType]
    left_out = []
    moves = runtime.memory is not None and runtime.memory.moves
    for switch in ("packed", "fused_qkv") if moves else ():
        if getattr(speed, switch):
            left_out.append(f"{switch}: the transformer leaves the device for new prompts")
            speed = replace(speed, **{switch: False})
    if speed.modulation and getattr(transformer, "peft_config", None):
        left_out.append("modulation: an unfused LoRA may adapt the modulation (fused_lora=on)")
        speed = replace(speed, modulation=False)
    if speed.modulation and kind != "FluxTransformer2DModel":
        left_out.append(f"modulation: only for FLUX.1, not for {kind}")
        speed = replace(speed, modulation=False)
    speed, reasons = transform(transformer, speed)
    left_out += reasons
    if speed.cache != "none":
        calibrated = next((path for folder in pipe.loaded_from if (path := folder / RATIOS_FILE).is_file()), None)
        ratios = {} if calibrated is None else caches.read_ratios(calibrated)
        runtime.step_cache = caches.enable(transformer, speed, ratios)
    runtime.recall = Recall(speed.remember)
    runtime.speed = speed
    for reason in left_out:
        log.info("left out: %s", reason)
    return left_out


def remove_speed(pipe: HasRuntime) -> None:
    """Removes a speed setting: the transformer is stock again, except that fused LoRAs stay fused."""
    transformer, runtime = pipe.transformer, pipe.runtime
    unpack(transformer)
    for block in _repeated(transformer):
        block._compiled_call_impl = None  # set by torch's Module.compile; the code itself stays in torch's cache
    if runtime.step_cache is not None:
        caches.disable(transformer)
        runtime.step_cache = None
    if type(transformer).__name__ in FUSED:
        transformer.unfuse_qkv_projections()
    if runtime.speed.attention:
        transformer.reset_attention_backend()
    runtime.recall = Recall()
    runtime.speed = PLAIN


@contextmanager
def stock_parts(pipe: HasRuntime) -> Iterator[None]:
    """A context in which the pipeline's parts are stock and complete, for saving. Its presets are applied again at the
    end.

    Fused projections are not layers of a stock model, and weights that wait elsewhere would not be saved.
    """
    runtime = pipe.runtime
    speed, recall = runtime.speed, runtime.recall
    ratios = runtime.step_cache.ratios if runtime.step_cache is not None else {}
    remove_speed(pipe)
    try:
        with runtime.memory.undone() if runtime.memory is not None else nullcontext():
            yield
    finally:
        apply_speed(pipe, speed)
        runtime.recall = recall
        if runtime.step_cache is not None:
            runtime.step_cache.ratios |= ratios


# On any diffusers transformer ----------------------------------------------------------------------------------------


def transform(transformer: Any, speed: Speed) -> tuple[Speed, list[str]]:
    """Packs, fuses and compiles the layers of a transformer and sets its attention back-end, according to `speed`.

    Returns the resulting setting, and the switches that were left out, each with its reason. Packing excludes fused
    projections and compiled blocks, which use the unpacked weights.
    """
    left_out = []
    if speed.packed and (reason := cannot_pack(transformer)):
        left_out.append(f"packed: {reason}")
    elif speed.packed:
        pack(transformer, _repeated(transformer))
        left_out += [f"{name}: packed replaces it" for name in ("fused_qkv", "compile") if getattr(speed, name)]
        speed = replace(speed, fused_qkv=False, compile=False)
    if speed.attention:
        one_of("attention", speed.attention, _attention_backends())
        _set_attention(transformer, speed.attention)
    if speed.fused_qkv and (reason := _cannot_fuse_qkv(transformer)):
        left_out.append(f"fused_qkv: {reason}")
    elif speed.fused_qkv:
        _fuse_qkv(transformer)
    if speed.compile and (reason := _cannot_compile(transformer)):
        left_out.append(f"compile: {reason}")
    elif speed.compile:
        for block in _repeated(transformer):
            block.compile()  # as diffusers' compile_repeated_blocks does for models that name their blocks
    return speed, left_out


def _repeated(transformer: Any) -> Iterator[Any]:
    """The blocks that diffusers names as repeated. For a transformer without these names, the members of its lists."""
    if names := getattr(transformer, "_repeated_blocks", None):
        return (module for module in transformer.modules() if type(module).__name__ in names)
    return (block for child in transformer.children() if isinstance(child, nn.ModuleList) for block in child)


def _cannot_compile(transformer: Any) -> str:
    """The reason why compiling would fail or take more time than it saves. Empty if there is none."""
    count = sum(p.numel() for p in transformer.parameters())
    if count < COMPILE_FROM:
        return f"compiling a transformer of {count / 1e6:.0f} M parameters takes more time than it saves"
    device = next(transformer.parameters()).device.type
    if device == "cpu" and not any(shutil.which(name) for name in ("g++", "clang++", "cl")):
        return "no C++ compiler on this machine (install g++)"
    if device == "mps":
        return "not on MPS"
    return ""


def _cannot_fuse_qkv(transformer: Any) -> str:
    """The reason why query, key and value cannot be computed in one product. Empty if there is none."""
    if type(transformer).__name__ not in FUSED:
        return f"diffusers has no exact fused projections for {type(transformer).__name__}"
    if getattr(transformer, "peft_config", None):
        return "an unfused LoRA adapts the projections (fused_lora=on)"
    if hasattr(transformer, "_hf_hook"):
        return "the transformer moves to the device for each call, with the single projections"
    if _is_group_offload_enabled(transformer):
        return "group offload moves only the single projections"
    linears = [m for name, m in transformer.named_modules() if name.endswith((".to_q", ".add_q_proj"))]
    # torchao's weights are a subclass of Tensor that reports a floating-point dtype.
    plain = (type(m) is nn.Linear and type(m.weight.data) is torch.Tensor for m in linears)
    if not all(plain) or any(m.weight.is_meta or not m.weight.is_floating_point() for m in linears):
        return "the projections are quantized or offloaded"
    if any(m.weight.element_size() < 2 or hasattr(m, "_diffusers_hook") for m in linears):
        return "the projections are stored in 8 bits or hooked one by one"
    return ""


def _fuse_qkv(transformer: Any) -> None:
    """diffusers' fusion without its second copy: the single projections become views of the fused one's rows."""
    transformer.fuse_qkv_projections()
    for module in transformer.modules():
        for fused, parts in (
            ("to_qkv", ("to_q", "to_k", "to_v")),
            ("to_added_qkv", ("add_q_proj", "add_k_proj", "add_v_proj")),
        ):
            if getattr(module, "fused_projections", False) and (whole := getattr(module, fused, None)) is not None:
                whole.requires_grad_(False)
                for i, part in enumerate(getattr(module, name) for name in parts):
                    rows = slice(i * part.out_features, (i + 1) * part.out_features)
                    part.weight.data = whole.weight.data[rows]
                    if part.bias is not None:
                        part.bias.data = whole.bias.data[rows]


def _set_attention(transformer: Any, name: str) -> None:
    registry = _AttentionBackendRegistry
    before, _ = registry.get_active_backend()
    try:
        transformer.set_attention_backend(name)
        registry.set_active_backend(before)  # diffusers sets it for the whole process
    except (RuntimeError, ValueError, ImportError) as error:
        raise UsageError(
            "speed_unsupported", f"The attention back-end {name} does not work here: {describe(error)}"
        ) from error


def _attention_backends() -> list[str]:
    return sorted(backend.value for backend in AttentionBackendName)


# The switch `packed`: linear layers by oneDNN on a CPU, with weights packed once. PyTorch computes float32 products
# with MKL, which uses its widest instructions only on Intel's CPUs. oneDNN uses them on every x86 CPU that has them,
# with weights in its blocked layout. Packing only moves values: `unpack` restores the same bits, and there is no second
# copy. Results differ from MKL's by float rounding.

ROWS = 128  # the layout is optimized for products of about this many rows, and works for others


class PackedLinear(nn.Module):
    """Replaces a float32 `nn.Linear` and stores its weight packed."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.original = [linear]  # in a list, so that it is not a submodule; its weight is empty
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.data, ROWS)
        linear.weight.data = linear.weight.data.new_empty(0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, in_features) → (…, out_features)."""
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")

    def unpacked(self) -> nn.Linear:
        """The original linear layer with its original weight."""
        linear = self.original[0]
        linear.weight.data = self.weight.to_dense()
        return linear


def pack(transformer: nn.Module, blocks: Iterable[nn.Module]) -> None:
    """Packs the linear layers of `blocks`, modules of `transformer`, except those of AdaLN, whose inputs have one
    or two rows."""
    chosen = {id(module) for block in blocks for module in block.modules() if type(module) is nn.Linear}
    chosen -= {id(module.linear) for module in transformer.modules() if isinstance(module, ADALN)}
    for name, module in list(transformer.named_modules()):
        if id(module) in chosen:
            transformer.set_submodule(name, PackedLinear(module))  # pyright: ignore[reportArgumentType]


def unpack(transformer: nn.Module) -> None:
    """Undoes `pack`, bit for bit."""
    for name, module in list(transformer.named_modules()):
        if isinstance(module, PackedLinear):
            transformer.set_submodule(name, module.unpacked())


def cannot_pack(transformer: Any) -> str:
    """The reason why linear layers cannot be packed. Empty if there is none."""
    weights = [weight for weight in transformer.parameters() if weight.dim() == 2]
    if any(weight.device.type != "cpu" for weight in weights):
        return "only on CPUs"
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return "this PyTorch has no oneDNN"
    if any(type(weight.data) is not torch.Tensor or weight.dtype != torch.float32 for weight in weights):
        return "only for float32; PyTorch uses oneDNN for other types"
    if getattr(transformer, "peft_config", None):
        return "an unfused LoRA adapts the layers (fused_lora=on)"
    if hasattr(transformer, "_hf_hook") or _is_group_offload_enabled(transformer):
        return "the transformer is offloaded"
    return ""
