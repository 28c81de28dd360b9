"""Memory presets: what a card of 8, 12, 16, 24, 48 or 80 GiB takes to hold FLUX, and the plan that says so.

    student = Student.load(model, base, memory="12")      # or auto
    diptych generate … --memory auto

A preset is a row of `PRESETS`; `plan` counts its bytes from configs alone, on the meta device; `Memory.apply` puts it
on a pipeline. `auto` takes the first row, from the largest card down, that this machine can run and whose plan fits,
and says so. No torch is imported before use.
"""

from __future__ import annotations

import gc
import importlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diptych.errors import UsageError, UserError, nearest
from diptych.student import quantize

if TYPE_CHECKING:
    import torch

    from diptych.student.modulation import Modulation
    from diptych.student.pipeline import DiptychPipeline

log = logging.getLogger("diptych.student")
GIB = 2**30
HEADROOM = 0.92  # share of the free memory a plan may fill: allocators fragment, libraries keep workspaces
TEXT_PARTS = ("text_encoder", "text_encoder_2")


@dataclass(frozen=True)
class Preset:
    """How the parts are held.

    transformer, text: a name of `quantize.QUANTIZATIONS`; `text` is that of T5, CLIP is small.
    staged: text encoders are opened when there is a prompt to encode, and freed before the transformer comes to the
        device (again).
    offload: `none`, or `group`: the transformer's layers come to the device one by one (diffusers' group offload).
    tile: side in pixels of the tiles that the VAE decodes; 0 decodes whole pictures. Tiles blend: pictures change.
    modulation: the AdaLN weights wait on the CPU, see `modulation`.
    """

    transformer: str = "none"
    text: str = "none"
    staged: bool = False
    offload: str = "none"
    tile: int = 0
    modulation: bool = False

    def __str__(self) -> str:
        words = [f"transformer {_words(self.transformer)}", f"T5 {_words(self.text)}"]
        words += ["text encoders staged"] if self.staged else []
        words += [f"{self.offload} offload"] if self.offload != "none" else []
        words += [f"VAE tiles of {self.tile}"] if self.tile else []
        words += ["modulation precomputed"] if self.modulation else []
        return ", ".join(words)


# GiB of the card: what to do, best first. The first that this machine can run is taken.
PRESETS: dict[str, tuple[Preset, ...]] = {
    "8": (
        Preset(transformer="nf4", text="nf4", staged=True, tile=256, modulation=True),
        Preset(transformer="fp8", text="fp8", staged=True, offload="group", tile=256, modulation=True),
    ),
    "12": (Preset(transformer="fp8", staged=True, tile=256, modulation=True),),
    "16": (
        Preset(transformer="int8", staged=True, modulation=True),
        Preset(transformer="fp8", staged=True, modulation=True),
    ),
    "24": (Preset(staged=True, modulation=True),),
    "48": (Preset(),),
    "80": (Preset(),),
}
NAMES = (*PRESETS, "auto")


# What cannot work --------------------------------------------------------------------------------------------------


def problems(preset: Preset, device: str, *, unfused_lora: bool = False) -> list[str]:
    """Why `preset` cannot run on a device type (`cuda`, `cpu`, …), or with an unfused LoRA; empty if it can."""
    quantized = preset.transformer != "none"
    rules = (
        (bool(fault := quantize.problem(preset.transformer, device)), fault),
        (bool(other := quantize.problem(preset.text, device)) and other != fault, other),
        (
            preset.offload == "group" and device not in ("cuda", "xpu", "cpu"),
            f"group offload does not run on {device}; on Apple chips GPU and CPU share their memory anyway",
        ),
        (
            preset.transformer == "nf4" and preset.offload != "none",
            "bitsandbytes weights cannot be offloaded by groups; use fp8",
        ),
        (
            preset.transformer == "int8" and preset.offload != "none",
            "torchao weights that are offloaded cannot be compiled, so they are not offloaded here; use fp8",
        ),
        (quantized and unfused_lora, "a LoRA must be fused before its base is quantized; load with fuse=True"),
        (
            preset.modulation and unfused_lora,
            "modulation precompute needs fused LoRAs: one on the AdaLN layers would be left out; load with fuse=True",
        ),
    )
    return [reason for holds, reason in rules if holds]


def pick(name: str, device: str) -> Preset:
    """The preset of that name; UsageError, with every reason, if no row of it works on `device`."""
    if name not in PRESETS:
        raise UsageError(f"unknown memory preset '{name}': one of {', '.join(NAMES)}{nearest(name, NAMES)}")
    reasons: list[str] = []
    for preset in PRESETS[name]:
        found = problems(preset, device)
        if not found:
            return preset
        reasons += [reason for reason in found if reason not in reasons]
    raise UsageError(f"--memory {name} does not work here: {'; '.join(reasons)}")


def free_bytes(device: str | torch.device) -> tuple[int, str]:
    """(bytes free on `device`, what it is called); a CPU's are the machine's available memory."""
    import torch

    device = torch.device(device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free, torch.cuda.get_device_name(device)
    import psutil

    return psutil.virtual_memory().available, "this machine"


# The plan ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shapes:
    """What a plan is made from: the configs of the parts as plain values. Text configs may be absent.

    `quantized`: bytes of the transformer's weights that its file holds quantized already (GGUF); they stay so.
    """

    transformer: Mapping[str, Any]
    vae: Mapping[str, Any]
    text_encoder: Mapping[str, Any] | None = None
    text_encoder_2: Mapping[str, Any] | None = None
    quantized: int = 0


@dataclass(frozen=True)
class Plan:
    """Bytes. `stages`: what the device holds at most while encoding text, denoising, decoding; `host`: what waits."""

    blocks: int
    modulation: int
    other: int
    text: int
    vae: int
    table: int
    activations: int
    stages: Mapping[str, int]
    host: int

    @property
    def peak(self) -> int:
        return max(self.stages.values())


def plan(
    shapes: Shapes,
    preset: Preset,
    *,
    device: str = "cuda",
    dtype_bytes: int = 2,
    panel: tuple[int, int] = (512, 512),
    steps: int = 28,
    rows: int = 1,
    text_tokens: int = 512,
) -> Plan:
    """What `preset` needs, from configs alone: the models are built on the meta device.

    Weights and table are counted; activations are estimated (`_activations`). `rows`: pictures drawn together, times
    the branches of batched guidance. On a CPU what waits shares the memory with what runs, so it counts in every stage.
    """
    from diptych.student.modulation import adaln_layers

    transformer = _meta("diffusers", "FluxTransformer2DModel", shapes.transformer)
    if shapes.quantized:
        blocks, modulation, other = _as_in_file(transformer, shapes.quantized, dtype_bytes)
    else:
        blocks, rest = _quantized_split(transformer, preset.transformer, dtype_bytes)
        adaln = sum(_count(layer) for layer in adaln_layers(transformer).values())
        modulation = (adaln + _count(transformer.time_text_embed)) * dtype_bytes
        other = rest - modulation
    clip = _meta("transformers", "CLIPTextModel", shapes.text_encoder)
    t5 = _meta("transformers", "T5EncoderModel", shapes.text_encoder_2)
    text = sum(_quantized_split(t5, preset.text, dtype_bytes)) if t5 is not None else 0
    text += _count(clip) * dtype_bytes if clip is not None else 0
    vae = _count(_meta("diffusers", "AutoencoderKL", shapes.vae)) * dtype_bytes

    columns = sum(layer.linear.out_features for layer in adaln_layers(transformer).values())  # pyright: ignore
    table = steps * (rows + 1) * columns * dtype_bytes if preset.modulation else 0  # one more text: the negative
    activations = _activations(shapes, panel, rows, text_tokens, dtype_bytes)
    widest = max((m.in_features * m.out_features for m in quantize.quantizable(transformer).values()), default=0)
    scratch = 0 if preset.transformer == "none" else widest * dtype_bytes
    decode = _decoding(shapes.vae, panel, preset.tile, dtype_bytes) * rows

    shared = device == "cpu"
    waiting_modulation = modulation if preset.modulation else 0
    grouped = blocks if preset.offload == "group" else 0
    resident = blocks + modulation + other - grouped - waiting_modulation
    on_device = (waiting_modulation + grouped) if shared else 0
    if grouped and not shared:
        scratch += 2 * blocks // max(1, len(quantize.quantizable(transformer)) // 8)  # a group, and the next one coming
    text_weights = 0 if preset.staged else text
    aside = (
        resident if preset.staged and not shared and not grouped else 0
    )  # the transformer steps aside while text is encoded
    stages = {
        "text": text + vae + resident + on_device - aside + _text_activations(shapes, text_tokens, dtype_bytes),
        "denoise": resident + on_device + text_weights + vae + table + activations + scratch,
        "decode": resident + on_device + text_weights + vae + decode,
    }
    host = 0 if shared else waiting_modulation + grouped + aside
    return Plan(blocks, modulation, other, text, vae, table, activations, stages, host)


def _meta(library: str, name: str, config: Mapping[str, Any] | None) -> Any:
    """A model without weights, from its config; None from none."""
    if config is None:
        return None
    plain = {key: value for key, value in config.items() if not key.startswith("_")}
    return _built(library, name, json.dumps(plain, sort_keys=True, default=str))


@lru_cache(maxsize=8)
def _built(library: str, name: str, config: str) -> Any:
    import torch

    cls: Any = getattr(importlib.import_module(library), name)
    values = json.loads(config)
    with torch.device("meta"):
        return cls.from_config(values) if library == "diffusers" else cls(cls.config_class.from_dict(values))


def _count(model: Any) -> int:
    """Numbers in a model's parameters, shared ones once."""
    return sum(p.numel() for p in model.parameters())


def _quantized_split(model: Any, name: str, dtype_bytes: int) -> tuple[int, int]:
    """Bytes of the layers that `quantize` would take, quantized, and of everything else."""
    linears = quantize.quantizable(model).values()
    rest = _count(model) - sum(_count(linear) for linear in linears)
    return quantize.quantized_bytes(name, linears, dtype_bytes), rest * dtype_bytes


def _as_in_file(transformer: Any, packed: int, dtype_bytes: int) -> tuple[int, int, int]:
    """Bytes of blocks, modulation and the rest where a file's `packed` bytes stay: all matrices, but the input layer's.

    They are shared out as if every weight had as many bits.
    """
    from diptych.student.modulation import adaln_layers

    modulation = (*adaln_layers(transformer), "time_text_embed")
    matrices, plain = [0, 0, 0], [0, 0, 0]
    for name, parameter in transformer.named_parameters():
        layer = name.rpartition(".")[0]
        part = 1 if layer.startswith(modulation) else 0 if "blocks." in layer else 2
        kept = parameter.ndim == 2 and layer != "x_embedder"
        (matrices if kept else plain)[part] += parameter.numel()
    sizes = [round(packed * m / sum(matrices)) + p * dtype_bytes for m, p in zip(matrices, plain, strict=True)]
    return sizes[0], sizes[1], sizes[2]


def _activations(shapes: Shapes, panel: tuple[int, int], rows: int, text_tokens: int, dtype_bytes: int) -> int:
    """Denoising's, at its widest: a single block holds its input, the normed input, the MLP's 4 widths before and after
    the activation, queries, keys and values, and float32 copies of two of these: 16 widths a token."""
    config = shapes.transformer
    width = config.get("num_attention_heads", 24) * config.get("attention_head_dim", 128)
    down = 2 ** (len(shapes.vae["block_out_channels"]) - 1) * 2
    tokens = text_tokens + 2 * (panel[0] // down) * (panel[1] // down)
    return 16 * rows * tokens * width * dtype_bytes


def _text_activations(shapes: Shapes, text_tokens: int, dtype_bytes: int) -> int:
    """T5's widest layer: attention scores in float32 and the gated MLP."""
    config = shapes.text_encoder_2 or {}
    scores = config.get("num_heads", 64) * text_tokens**2 * 4
    return scores + 4 * text_tokens * config.get("d_ff", 10240) * dtype_bytes


def _decoding(vae: Mapping[str, Any], panel: tuple[int, int], tile: int, dtype_bytes: int) -> int:
    """The decoder's last up block works at full size on the second-narrowest channels: four maps of that, and the
    picture itself where it is put together from tiles."""
    channels = vae["block_out_channels"][min(1, len(vae["block_out_channels"]) - 1)]
    pixels = panel[0] * panel[1] * 2
    at_once = min(pixels, tile * tile) if tile else pixels
    return 4 * channels * at_once * dtype_bytes + 3 * 3 * pixels * dtype_bytes


def _words(quantization: str) -> str:
    return "as loaded" if quantization == "none" else quantization


# Applying ----------------------------------------------------------------------------------------------------------


class Memory:
    """A preset for one pipeline, and what it has to do there while that draws: `pipe.memory`.

    In the order of loading: `prepare` makes one, `settle` once the configs are known, `check` once the LoRAs are,
    `apply` on the loaded pipeline; then the sampler calls `stage`.
    """

    def __init__(self, name: str, preset: Preset | None, device: torch.device) -> None:
        self.name = name
        self._preset = preset  # None: auto, until the configs are known
        self.device = device
        self.free, self.where = free_bytes(device)
        self.reason = ""
        self.modulation: Modulation | None = None
        self._pipe: Any = None
        self._places: dict[str, Path] = {}  # of the text encoders that are opened when a prompt comes
        self._open = False

    @property
    def preset(self) -> Preset:
        assert self._preset is not None, "settle comes first"
        return self._preset

    def settle(self, shapes: Shapes, dtype: torch.dtype, places: Mapping[str, Path]) -> None:
        """Chooses for `auto`, and says what was chosen and planned in `reason`.

        Args:
            places: the folders of the parts; staged text encoders are opened from there.

        Raises:
            UserError when `auto` finds no preset that fits.
        """
        self.dtype = dtype
        side = min(512, int(shapes.vae["sample_size"]))
        options: Any = {"device": self.device.type, "dtype_bytes": dtype.itemsize, "panel": (side, side)}
        if self._preset is None:
            self.name, self._preset = choose(shapes, self.free, self.where, **options)
        if shapes.quantized:
            self._preset = replace(self._preset, transformer="none")
        needed = plan(shapes, self.preset, **options).peak
        self.reason = (
            f"memory {self.name}: {self.preset}; plan {needed / GIB:.1f} GiB, {self.free / GIB:.1f} GiB free on "
            f"{self.where}"
        )
        if needed > self.free:
            log.warning("%s: this may run out of memory", self.reason)
        if self.preset.staged:
            self._places = {part: places[part] for part in TEXT_PARTS if part in places}

    def check(self, loras: Sequence[Path], fuse: bool) -> None:
        """Refuses LoRAs that this preset cannot take, before anything is loaded."""
        if found := problems(self.preset, self.device.type, unfused_lora=bool(loras) and not fuse):
            raise UsageError(f"--memory {self.name} does not work here: {'; '.join(found)}")
        if self._places:
            from diptych.student.tensors import open_safetensors

            for path in loras:
                tensors, _ = open_safetensors(path)
                if any(key.startswith(("text_encoder", "lora_te")) for key in tensors):
                    raise UsageError(f"{path} adapts a text encoder, which --memory {self.name} opens anew for prompts")

    def apply(self, pipe: DiptychPipeline) -> None:
        """Quantizes, places and offloads the parts of `pipe`, which are on the CPU, its LoRAs fused."""
        preset, self._pipe = self.preset, pipe
        transformer: Any = pipe.transformer
        # Modulation first: quantizers and offload then never see those weights.
        if preset.modulation:
            from diptych.student.modulation import Modulation

            self.modulation = Modulation(transformer).detach("cpu")
        quantize.quantize(transformer, preset.transformer, self.device, self.dtype)
        pipe.vae.to(self.device)
        if preset.tile:
            factor = 2 ** (len(pipe.vae.config.block_out_channels) - 1)
            pipe.vae.tile_sample_min_size, pipe.vae.tile_latent_min_size = preset.tile, preset.tile // factor
        for part in TEXT_PARTS:
            if (encoder := getattr(pipe, part)) is not None:
                setattr(pipe, part, self._placed(part, encoder))
        if preset.offload == "group":
            transformer.enable_group_offload(
                onload_device=self.device, offload_type="leaf_level", use_stream=self.device.type == "cuda"
            )
        elif not self._places:
            transformer.to(self.device)
        pipe.memory = self

    def stage(self, name: str) -> None:
        """Called by the sampler before `text`, `denoise` and `decode`: brings what that needs, frees the rest."""
        if name == "text":
            self._open_text()
        elif self._open:
            self._close_text()
        if name == "denoise" and self.preset.offload == "none":
            self._pipe.transformer.to(self.device)
        if self.preset.tile:
            self._pipe.vae.use_tiling = name == "decode"  # the reference is encoded whole

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Within it the pipeline holds every weight under its name, as for saving; UserError if any was quantized."""
        if any(quantize.is_quantized(getattr(self._pipe, part)) for part in ("transformer", *TEXT_PARTS)):
            raise UserError("quantized weights are not saved; load the student without --memory to save or convert it")
        self._open_text()
        try:
            with self.modulation.attached() if self.modulation else nullcontext():
                yield
        finally:
            self._close_text()

    @property
    def waiting(self) -> tuple[str, ...]:
        """The text encoders that are opened when a prompt comes."""
        return tuple(self._places)

    def _placed(self, part: str, encoder: Any) -> Any:
        quantize.quantize(encoder, self.preset.text if part == "text_encoder_2" else "none", self.device, self.dtype)
        return encoder.to(self.device)

    def _open_text(self) -> None:
        from diptych.student.components import open_part

        if self._open or not self._places:
            return
        if self.device.type != "cpu" and self.preset.offload == "none":
            self._pipe.transformer.to("cpu")
        for part, place in self._places.items():
            setattr(self._pipe, part, self._placed(part, open_part(part, place, self.dtype)))
        self._open = True

    def _close_text(self) -> None:
        import torch

        for part in self._places:
            setattr(self._pipe, part, None)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self._open = False


def prepare(name: str | int | Preset, device: str | torch.device) -> Memory:
    """A preset by name or made by hand, checked before anything is opened.

    Raises UsageError with every reason when it does not work on this machine.
    """
    import torch

    device = torch.device(device)
    if isinstance(name, Preset):
        if found := problems(name, device.type):
            raise UsageError(f"this memory preset does not work here: {'; '.join(found)}")
        return Memory("custom", name, device)
    return Memory(str(name), None if str(name) == "auto" else pick(str(name), device.type), device)


def choose(shapes: Shapes, free: int, where: str, *, device: str, **options: Any) -> tuple[str, Preset]:
    """`auto`: (name, preset) of the first row, largest card first, that runs here and whose plan fits `free` bytes."""
    seen: list[str] = []
    for name in reversed(PRESETS):
        for preset in PRESETS[name]:
            if found := problems(preset, device):
                seen.append(f"{name}: {found[0]}")
                continue
            needed = plan(shapes, preset, device=device, **options).peak
            if needed <= HEADROOM * free:
                return f"auto → {name}", preset
            seen.append(f"{name} needs {needed / GIB:.1f} GiB")
    raise UserError(
        f"no memory preset fits {where} with {free / GIB:.1f} GiB free ({'; '.join(seen)}); close what else uses it"
    )


def shapes_in(config: Mapping[str, Any], places: Mapping[str, Path], quantized: int = 0) -> Shapes:
    """The configs of a pipeline's parts: its transformer's, and those in the folders of the others."""
    from diptych.student.files import read_json

    found = {part: read_json(places[part] / "config.json") for part in ("vae", *TEXT_PARTS) if part in places}
    return Shapes(config, **found, quantized=quantized)
