"""Speed: the table of `exact`, `fast` and `fastest`, and every switch in it alone.

    student = Student.load("pocket", speed="fast")
    diptych generate … --speed fast --switch decode=canvas

A setting is data (`PRESETS`); `apply` puts it on a pipeline and `remove` takes it off. `exact` changes nothing beyond
float rounding. What the lossy switches cost in quality is measured by `benchmarks/inference.py quality` on the pocket
model and kept in `speed_costs.json` beside this file; `docs/speed.md` shows it. No torch is imported before use.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diptych.errors import UsageError, nearest
from diptych.student.settings import NULL_PANELS
from diptych.utils.machine import alone

if TYPE_CHECKING:
    from diptych.student.pipeline import DiptychPipeline

log = logging.getLogger("diptych.student")
COSTS = Path(__file__).with_name("speed_costs.json")
CACHES = ("none", "first_block", "magnitude", "skip")
DECODES = ("canvas", "right")
FUSED = ("FluxTransformer2DModel", "Flux2Transformer2DModel")  # whose attention reads them; SD 3.5's loses its norms
COMPILE_FROM = 100_000_000  # parameters: compiling a smaller transformer takes longer than it ever gives back


def _one_of(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise UsageError(f"speed switch {name} is one of {', '.join(known)}, not '{value}'{nearest(value, known)}")


@dataclass(frozen=True)
class Speed:
    """Every switch, set as the released sampler has it. `HELP` says what each does, `LOSSY` which change pictures.

    The upper ones change the loaded model (once, in `apply`), the lower ones only how a call goes; a call's own
    arguments of the same names go first.
    """

    fused_lora: bool = False
    packed: bool = False
    fused_qkv: bool = False
    compile: bool = False
    attention: str = ""
    modulation: bool = False
    remember: int = 0
    cache: str = "none"
    cache_threshold: float = 0.1
    cache_interval: int = 2
    cache_warmup: int = 3
    few_step_lora: str = ""
    steps: int = 0
    batched_guidance: bool = False
    guidance_from: int = 2
    guidance_until: float = 1.0
    clamp_left: bool = False
    null_panel: str = ""
    decode: str = "canvas"

    def __post_init__(self) -> None:
        _one_of("cache", self.cache, CACHES)
        _one_of("decode", self.decode, DECODES)
        if self.null_panel:
            _one_of("null_panel", self.null_panel, NULL_PANELS)
        for name, low in (
            ("remember", 0),
            ("cache_interval", 1),
            ("cache_warmup", 1),
            ("steps", 0),
            ("guidance_from", 0),
        ):
            if getattr(self, name) < low:
                raise UsageError(f"speed switch {name} is at least {low}, not {getattr(self, name)}")
        if not 0 <= self.guidance_until <= 1:
            raise UsageError(f"speed switch guidance_until is a share of the steps, 0 to 1, not {self.guidance_until}")
        if self.cache_threshold < 0:
            raise UsageError(f"speed switch cache_threshold is not negative, so not {self.cache_threshold}")

    def runs(self, step: int, steps: int) -> bool:
        """Whether the fixed schedule of `cache: skip` computes this step, counted from 0; without it, always."""
        since = step - (self.cache_warmup - 1)
        return self.cache != "skip" or since <= 0 or since % self.cache_interval == 0 or step == steps - 1

    def changed(self) -> dict[str, Any]:
        """The switches that are not as in the released sampler."""
        return {key: value for key, value in asdict(self).items() if value != getattr(PLAIN, key)}


HELP = {
    "fused_lora": "add LoRAs into the weights",
    "packed": "linear layers by oneDNN, weights packed once (float32 on a CPU; in the place of fused_qkv and compile)",
    "fused_qkv": "one product for query, key and value",
    "compile": f"compile the repeated blocks (transformers of at least {COMPILE_FROM // 10**6} M parameters)",
    "attention": "a diffusers attention back-end, for instance flash, sage, _native_cudnn; empty: torch chooses",
    "modulation": "precompute the modulation of all steps in one product",
    "remember": "MiB of embeddings of prompts and references kept between calls",
    "cache": "skip transformer blocks at steps that change little: first_block, magnitude, or skip (a fixed schedule)",
    "cache_threshold": "change that first_block and magnitude tolerate",
    "cache_interval": "skip computes every n-th step; magnitude skips at most n - 1 in a row",
    "cache_warmup": "first steps that are always computed",
    "few_step_lora": "a LoRA for fewer steps, PATH or PATH:SCALE; set steps too",
    "steps": "sampling steps, unless the call says; 0: the model's own",
    "batched_guidance": "run the forwards of a guided step as one batch",
    "guidance_from": "first guided step, counted from 0",
    "guidance_until": "share of the steps after which true guidance stops",
    "clamp_left": "hold the left panel to its known path",
    "null_panel": "left panel that guidance's null pass sees: shared (as released), own; empty: as the student has it",
    "decode": "canvas, or right: decode the right half alone, which differs at the seam",
}
LOSSY = ("cache", "few_step_lora", "steps", "guidance_from", "guidance_until", "clamp_left", "null_panel", "decode")
"""Switches that change pictures beyond float rounding; those of the `cache_` family only tune one of them."""

PLAIN = Speed()
_EXACT = Speed(
    fused_lora=True,
    packed=True,
    fused_qkv=True,
    compile=True,
    modulation=True,
    remember=256,
    batched_guidance=True,
)
PRESETS = {
    "exact": _EXACT,
    "fast": replace(_EXACT, cache="skip", cache_interval=2, guidance_until=0.9),
    "fastest": replace(_EXACT, cache="skip", cache_interval=4, guidance_until=0.7, decode="right"),
}


def name_of(switch: str) -> str:
    """The field that a `NAME=VALUE` switch sets."""
    return switch.partition("=")[0].strip().replace("-", "_")


def parse(preset: str | Speed | None, switches: Sequence[str] = ()) -> Speed:
    """A preset's name (None: as the released sampler) with `NAME=VALUE` switches on top.

    UsageError, with the nearest known name, for an unknown preset, switch or value.
    """
    if isinstance(preset, Speed):
        speed = preset
    elif preset is None:
        speed = PLAIN
    elif preset in PRESETS:
        speed = PRESETS[preset]
    else:
        raise UsageError(f"unknown speed '{preset}': one of {', '.join(PRESETS)}{nearest(str(preset), PRESETS)}")
    kinds = {field.name: type(getattr(PLAIN, field.name)) for field in fields(Speed)}
    given: dict[str, Any] = {}
    for switch in switches:
        name, (_, equals, text) = name_of(switch), switch.partition("=")
        if name not in kinds:
            raise UsageError(f"unknown speed switch '{name}': one of {', '.join(kinds)}{nearest(name, kinds)}")
        if not equals:
            raise UsageError(f"speed switch '{switch}' has no value: {name}=VALUE")
        given[name] = _read(name, text.strip(), kinds[name])
    return replace(speed, **given)


@alone
def apply(pipe: DiptychPipeline, speed: Speed) -> list[str]:
    """Puts `speed` on a pipeline in place of what was there; returns what was left out, each with its reason.

    Fusing LoRAs is for good; everything else `remove` takes back.
    Raises UsageError for combinations that cannot work, before anything is changed.
    """
    from diptych.student.runtime import caches
    from diptych.student.weights import lora

    transformer: Any = pipe.transformer
    if speed.cache != "none" and getattr(transformer, "is_cache_enabled", False):
        raise UsageError("a step cache of diffusers is on; call transformer.disable_cache() before another is put on")
    if speed.attention:
        _one_of("attention", speed.attention, _attention_backends())
    remove(pipe)
    if speed.fused_lora:
        lora.fuse_loras(pipe)
    left_out = []
    moves = pipe.memory is not None and pipe.memory.moves
    if speed.packed and moves:
        left_out.append("packed: the transformer leaves the device for new prompts")
        speed = replace(speed, packed=False)
    if speed.fused_qkv and moves:
        left_out.append("fused_qkv: the transformer leaves the device for new prompts, and single projections would")
        speed = replace(speed, fused_qkv=False)
    speed, instead = apply_packed(transformer, speed)
    left_out += instead + apply_attention(transformer, speed)
    if speed.modulation and getattr(transformer, "peft_config", None):
        left_out.append("modulation: an unfused LoRA may sit on the modulation (fused_lora=on)")
        speed = replace(speed, modulation=False)
    if speed.cache != "none":
        pipe.step_cache = caches.enable(transformer, speed, _ratios(pipe))
    left_out += apply_compile(transformer, speed)
    pipe.recall = caches.Recall(speed.remember)
    pipe.speed = speed
    for reason in left_out:
        log.info("left out: %s", reason)
    return left_out


def apply_attention(transformer: Any, speed: Speed) -> list[str]:
    """The attention back-end and fused projections on any diffusers transformer; what was left out, with its reason."""
    if speed.attention:
        _one_of("attention", speed.attention, _attention_backends())
        _set_attention(transformer, speed.attention)
    if speed.fused_qkv and (reason := _cannot_fuse_qkv(transformer)):
        return [f"fused_qkv: {reason}"]
    if speed.fused_qkv:
        _fuse_qkv(transformer)
    return []


def apply_packed(transformer: Any, speed: Speed) -> tuple[Speed, list[str]]:
    """Packs the linear layers of any diffusers transformer: what of `speed` is still to be applied, and what is left
    out, with its reason. Fused projections and compiled blocks would hold or look for the weights as they were."""
    from diptych.student.runtime import modulation as packed

    if not speed.packed:
        return speed, []
    if reason := packed.cannot_pack(transformer):
        return speed, [f"packed: {reason}"]
    packed.pack(transformer, _repeated(transformer))
    instead = [f"{name}: packed takes its place" for name in ("fused_qkv", "compile") if getattr(speed, name)]
    return replace(speed, fused_qkv=False, compile=False), instead


def apply_compile(transformer: Any, speed: Speed) -> list[str]:
    """Compiles the repeated blocks of any diffusers transformer; or why not."""
    if speed.compile and (reason := _cannot_compile(transformer)):
        return [f"compile: {reason}"]
    if speed.compile:
        for block in _repeated(transformer):
            block.compile()  # what diffusers' compile_repeated_blocks does, where it names them
    return []


def remove(pipe: DiptychPipeline) -> None:
    """Takes a speed setting off: the transformer is stock again, LoRAs that were fused stay so."""
    from diptych.student.runtime import caches
    from diptych.student.runtime import modulation as packed

    transformer: Any = pipe.transformer
    packed.unpack(transformer)
    for block in _repeated(transformer):
        block._compiled_call_impl = None  # what torch's own Module.compile sets; the code itself stays in torch's cache
    if pipe.step_cache is not None:
        caches.disable(transformer)
        pipe.step_cache = None
    transformer.unfuse_qkv_projections()
    if pipe.speed.attention:
        transformer.reset_attention_backend()
    pipe.recall = caches.Recall()
    pipe.speed = PLAIN


@contextmanager
def off(pipe: DiptychPipeline) -> Iterator[None]:
    """Within it the pipeline has no speed setting, as for saving; afterwards it has its own again."""
    speed, kept = pipe.speed, pipe.recall
    ratios = pipe.step_cache.ratios if pipe.step_cache is not None else {}
    remove(pipe)
    try:
        yield
    finally:
        apply(pipe, speed)
        pipe.recall = kept
        if pipe.step_cache is not None:
            pipe.step_cache.ratios |= ratios


def costs() -> dict[str, Any]:
    """What the lossy switches cost, as last measured; empty where nothing was measured yet."""
    return json.loads(COSTS.read_text("utf8")) if COSTS.is_file() else {}


def cost(name: str) -> str:
    """What a preset, or a lossy switch at each measured value, costs in CP·PF on the pocket model."""
    known = {key: entry for key, entry in costs().get("settings", {}).items() if key.partition("=")[0] == name}
    if not known:
        return "cost in quality not measured yet"
    phrases = []
    for key, entry in known.items():
        low, high = (100 * bound for bound in entry["ci95"])
        change = f"{100 * entry['change']:+.1f} % [{low:+.1f}, {high:+.1f}]"
        phrases.append(f"{key} changes CP·PF by {change}")
    return ", ".join(phrases) + " on the pocket model"


def summary() -> str:
    """The presets in a line, for `--help`, with what the lossy ones cost."""
    lossy = ", ".join(f"{name} ({cost(name)})" for name in PRESETS if name != "exact")
    return f"exact (float rounding alone), {lossy} [default: as the released sampler]."


def describe() -> str:
    """The switches in words, for `--help`: what each does, and what the lossy ones cost."""
    lines = [f"{name}: {text}" + (f" (lossy; {cost(name)})" if name in LOSSY else "") for name, text in HELP.items()]
    return "; ".join(lines)


# What a model can take ---------------------------------------------------------------------------------------------


def _read(name: str, text: str, kind: type) -> Any:
    """The value of a switch from its text."""
    if kind is str:
        return text
    if kind is bool:
        if text.lower() in ("on", "yes", "true", "1"):
            return True
        if text.lower() in ("off", "no", "false", "0"):
            return False
        raise UsageError(f"speed switch {name} is on or off, not '{text}'")
    try:
        return kind(text)
    except ValueError as error:
        raise UsageError(f"speed switch {name} is a number, not '{text}'") from error


def _repeated(transformer: Any) -> Iterator[Any]:
    """The blocks that diffusers names as repeated; of a transformer where it names none, the members of its lists."""
    from torch import nn

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
    import torch
    from diffusers.hooks.group_offloading import _is_group_offload_enabled
    from torch import nn

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
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry

    elsewhere, _ = registry.get_active_backend()
    try:
        transformer.set_attention_backend(name)
        registry.set_active_backend(elsewhere)  # diffusers sets it for the whole process, and never back
    except (RuntimeError, ValueError, ImportError) as error:
        line = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise UsageError(f"the attention back-end {name} does not work here: {line}") from error


def _attention_backends() -> list[str]:
    from diffusers.models.attention_dispatch import AttentionBackendName

    return sorted(backend.value for backend in AttentionBackendName)


def _ratios(pipe: DiptychPipeline) -> dict[int, list[float]]:
    """Calibrated magnitude ratios by number of steps, from `speed.json` in the model's folder; empty: none."""
    from diptych.student.runtime.caches import read_ratios
    from diptych.student.weights.files import RATIOS_FILE

    for folder in pipe.loaded_from:
        if (folder / RATIOS_FILE).is_file():
            return read_ratios(folder / RATIOS_FILE)
    return {}
