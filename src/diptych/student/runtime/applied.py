"""What is put on a pipeline: a memory preset, a speed setting, and what the two keep there. Put on and taken off here.

    hold(pipe, memory)                     # once, on a loaded pipeline
    left_out = put_on(pipe, speed)         # in place of the speed that was there
    take_off(pipe)                         # the transformer is stock again

`Runtime` is `pipe.runtime`, what was put on, and what the sampler asks of it along a call. `transform` changes any
diffusers transformer; teachers have it from `stock`.
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
FUSED = ("FluxTransformer2DModel", "Flux2Transformer2DModel")  # whose attention reads them; SD 3.5's loses its norms
TEXT_MIB = 1024  # main memory for texts where a memory preset frees their encoders: 250 of FLUX.1's prompts


class Runtime:
    """What was put on one pipeline; all of it is as stock diffusers has it until then."""

    def __init__(self) -> None:
        self.memory: Memory | None = None
        self.speed = PLAIN
        self.step_cache: StepCache | None = None
        self.recall = Recall()  # prompts and references, as `remember` in `speed` says
        self._texts = Recall(TEXT_MIB, "cpu")

    def switches(self, **given: Any) -> Speed:
        """The speed setting with a call's own switches, those that are not None, in its place."""
        return replace(self.speed, **{name: value for name, value in given.items() if value is not None})

    def stage(self, name: str) -> None:
        """Before `text`, `denoise` and `decode`: a memory preset brings what that needs and frees the rest."""
        if self.memory is not None:
            self.memory.stage(name)

    @property
    def waiting(self) -> Sequence[str]:
        """The text encoders that a memory preset opens when a prompt comes."""
        return self.memory.waiting if self.memory is not None else ()

    @property
    def texts(self) -> Recall | None:
        """What keeps embeddings of prompts between calls; None where nothing does."""
        if self.recall.limit:
            return self.recall
        return self._texts if self.waiting else None  # else the encoders would be read from their files for every image

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
        """What the sampler's loop runs in; afterwards the transformer is as it was.

        Step caches start afresh, also after a call that was cut short. `pooled` are the texts (B, P) of every branch,
        `modulation` precomputes the modulation of all steps (`modulation.precomputed`).
        """
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
        """The loop is at this step, counted from 0."""
        if self.step_cache is not None:
            self.step_cache.step = number


class Pipeline(Protocol):
    """What is known here of the pipeline that a runtime belongs to."""

    transformer: Any
    runtime: Runtime
    loaded_from: tuple[Path, ...]


def hold(pipe: Any, memory: Memory) -> None:
    """Puts a memory preset on a pipeline whose parts are on the CPU, its LoRAs fused. It stays on."""
    memory.apply(pipe)
    pipe.runtime.memory = memory


@alone
def put_on(pipe: Pipeline, speed: Speed) -> list[str]:
    """Puts `speed` on a pipeline in place of what was there; returns what was left out, each with its reason.

    Fusing LoRAs is for good; everything else `take_off` takes back.
    Raises UsageError for combinations that cannot work, before anything is changed.
    """
    transformer, runtime = pipe.transformer, pipe.runtime
    if speed.cache != "none" and getattr(transformer, "is_cache_enabled", False):
        raise UsageError("a step cache of diffusers is on; call transformer.disable_cache() before another is put on")
    if speed.attention:
        one_of("attention", speed.attention, _attention_backends())
    take_off(pipe)
    if speed.fused_lora:
        lora.fuse_loras(pipe)  # pyright: ignore[reportArgumentType]
    left_out = []
    moves = runtime.memory is not None and runtime.memory.moves
    if speed.packed and moves:
        left_out.append("packed: the transformer leaves the device for new prompts")
        speed = replace(speed, packed=False)
    if speed.fused_qkv and moves:
        left_out.append("fused_qkv: the transformer leaves the device for new prompts, and single projections would")
        speed = replace(speed, fused_qkv=False)
    if speed.modulation and getattr(transformer, "peft_config", None):
        left_out.append("modulation: an unfused LoRA may sit on the modulation (fused_lora=on)")
        speed = replace(speed, modulation=False)
    speed, reasons = transform(transformer, speed)
    left_out += reasons
    if speed.cache != "none":
        runtime.step_cache = caches.enable(transformer, speed, _ratios(pipe.loaded_from))
    runtime.recall = Recall(speed.remember)
    runtime.speed = speed
    for reason in left_out:
        log.info("left out: %s", reason)
    return left_out


def take_off(pipe: Pipeline) -> None:
    """Takes a speed setting off: the transformer is stock again, LoRAs that were fused stay so."""
    transformer, runtime = pipe.transformer, pipe.runtime
    unpack(transformer)
    for block in _repeated(transformer):
        block._compiled_call_impl = None  # what torch's own Module.compile sets; the code itself stays in torch's cache
    if runtime.step_cache is not None:
        caches.disable(transformer)
        runtime.step_cache = None
    transformer.unfuse_qkv_projections()
    if runtime.speed.attention:
        transformer.reset_attention_backend()
    runtime.recall = Recall()
    runtime.speed = PLAIN


@contextmanager
def stock_parts(pipe: Pipeline) -> Iterator[None]:
    """Within it the pipeline's parts are stock and whole, as for saving; afterwards all that was on it is on again.

    Fused projections are no layers of a stock model, and weights that wait elsewhere would be left out.
    """
    runtime = pipe.runtime
    speed, kept = runtime.speed, runtime.recall
    ratios = runtime.step_cache.ratios if runtime.step_cache is not None else {}
    take_off(pipe)
    try:
        with runtime.memory.undone() if runtime.memory is not None else nullcontext():
            yield
    finally:
        put_on(pipe, speed)
        runtime.recall = kept
        if runtime.step_cache is not None:
            runtime.step_cache.ratios |= ratios


def _ratios(folders: Sequence[Path]) -> dict[int, list[float]]:
    """Calibrated magnitude ratios by number of steps, from the first `speed.json` in the folders; empty: none."""
    found = next((path for folder in folders if (path := folder / RATIOS_FILE).is_file()), None)
    return caches.read_ratios(found) if found is not None else {}


# On any diffusers transformer ----------------------------------------------------------------------------------------


def transform(transformer: Any, speed: Speed) -> tuple[Speed, list[str]]:
    """Packs, fuses and compiles the layers of a transformer, and sets its attention back-end, as `speed` has it.

    Returns what of `speed` is then on, and what was left out, each with its reason. Fused projections and compiled
    blocks would hold or look for the weights as they were before packing.
    """
    left_out = []
    if speed.packed and (reason := cannot_pack(transformer)):
        left_out.append(f"packed: {reason}")
    elif speed.packed:
        pack(transformer, _repeated(transformer))
        left_out += [f"{name}: packed takes its place" for name in ("fused_qkv", "compile") if getattr(speed, name)]
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
            block.compile()  # what diffusers' compile_repeated_blocks does, where it names them
    return speed, left_out


def _repeated(transformer: Any) -> Iterator[Any]:
    """The blocks that diffusers names as repeated; of a transformer where it names none, the members of its lists."""
    if names := getattr(transformer, "_repeated_blocks", None):
        return (module for module in transformer.modules() if type(module).__name__ in names)
    return (block for child in transformer.children() if isinstance(child, nn.ModuleList) for block in child)


def _cannot_compile(transformer: Any) -> str:
    """Why compiling would not work or not pay; empty if it would."""
    count = sum(p.numel() for p in transformer.parameters())
    if count < COMPILE_FROM:
        return f"a transformer of {count / 1e6:.0f} M parameters draws faster than it compiles"
    device = next(transformer.parameters()).device.type
    if device == "cpu" and not any(shutil.which(name) for name in ("g++", "clang++", "cl")):
        return "no C++ compiler on this machine (install g++)"
    if device == "mps":
        return "not on MPS"
    return ""


def _cannot_fuse_qkv(transformer: Any) -> str:
    """Why query, key and value cannot be one product here; empty if they can."""
    if type(transformer).__name__ not in FUSED:
        return f"diffusers' fused projections of a {type(transformer).__name__} are not read, or leave a norm out"
    if getattr(transformer, "peft_config", None):
        return "an unfused LoRA sits on the projections (fused_lora=on)"
    if hasattr(transformer, "_hf_hook"):
        return "the transformer comes to the device for each call, and the single projections would come as well"
    if _is_group_offload_enabled(transformer):
        return "the layers are offloaded by groups, which know the single projections alone"
    linears = [m for name, m in transformer.named_modules() if name.endswith((".to_q", ".add_q_proj"))]
    # torchao's weights are a subclass of Tensor that calls itself floating point.
    plain = (type(m) is nn.Linear and type(m.weight.data) is torch.Tensor for m in linears)
    if not all(plain) or any(m.weight.is_meta or not m.weight.is_floating_point() for m in linears):
        return "the projections are quantized or offloaded"
    if any(m.weight.element_size() < 2 or hasattr(m, "_diffusers_hook") for m in linears):
        return "the projections are stored in 8 bits or hooked one by one"
    return ""


def _fuse_qkv(transformer: Any) -> None:
    """diffusers' fusion, without its second copy: the single projections become views of the fused one's rows."""
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
    elsewhere, _ = registry.get_active_backend()
    try:
        transformer.set_attention_backend(name)
        registry.set_active_backend(elsewhere)  # diffusers sets it for the whole process, and never back
    except (RuntimeError, ValueError, ImportError) as error:
        raise UsageError(f"the attention back-end {name} does not work here: {describe(error)}") from error


def _attention_backends() -> list[str]:
    return sorted(backend.value for backend in AttentionBackendName)


# Linear layers by oneDNN on a CPU, their weights packed once: the switch `packed` of `speed`. PyTorch gives float32
# products to MKL, which keeps its widest instructions for Intel's CPUs; oneDNN uses them on every x86 CPU that has
# them, from weights that lie in blocks of its own. Packing moves values and changes none: `unpack` gives the same
# bits back, and there is no second copy meanwhile. Results differ from MKL's by float rounding.

ROWS = 128  # the layout is chosen for products of about this many rows; it serves others as well


class PackedLinear(nn.Module):
    """In the place of a float32 `nn.Linear`, whose weight it holds packed."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.original = [linear]  # a list, so that it is not a submodule: its weight is empty
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.data, ROWS)
        linear.weight.data = linear.weight.data.new_empty(0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, in_features) → (…, out_features)."""
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")

    def unpacked(self) -> nn.Linear:
        """The linear layer that was here, its weight as it was."""
        linear = self.original[0]
        linear.weight.data = self.weight.to_dense()
        return linear


def pack(transformer: nn.Module, blocks: Iterable[nn.Module]) -> None:
    """Packs the linear layers of `blocks`, modules of `transformer`, but those of AdaLN, which see a row or two."""
    chosen = {id(module) for block in blocks for module in block.modules() if type(module) is nn.Linear}
    chosen -= {id(module.linear) for module in transformer.modules() if isinstance(module, ADALN)}
    for name, module in list(transformer.named_modules()):
        if id(module) in chosen:
            transformer.set_submodule(name, PackedLinear(module))  # pyright: ignore[reportArgumentType]


def unpack(transformer: nn.Module) -> None:
    """The layers as they were before `pack`, to the bit."""
    for name, module in list(transformer.named_modules()):
        if isinstance(module, PackedLinear):
            transformer.set_submodule(name, module.unpacked())


def cannot_pack(transformer: Any) -> str:
    """Why there is nothing to pack, or no way to; empty if there is."""
    weights = [weight for weight in transformer.parameters() if weight.dim() == 2]
    if any(weight.device.type != "cpu" for weight in weights):
        return "on CPUs alone"
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return "this PyTorch has no oneDNN"
    if any(type(weight.data) is not torch.Tensor or weight.dtype != torch.float32 for weight in weights):
        return "for float32 alone; others PyTorch gives to oneDNN anyhow"
    if getattr(transformer, "peft_config", None):
        return "an unfused LoRA sits on the layers (fused_lora=on)"
    if hasattr(transformer, "_hf_hook") or _is_group_offload_enabled(transformer):
        return "the transformer is offloaded"
    return ""
