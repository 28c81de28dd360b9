"""Memory presets: what a card of 8, 12, 16, 24, 48 or 80 GiB takes to hold FLUX, and the plan that says so.

    student = Student.load(model, base, memory="12")      # or auto
    diptych generate … --memory auto

A preset is a row of `PRESETS`; `plan` counts its bytes from configs alone, on the meta device; `Memory.apply` puts it
on a pipeline. `auto` takes the first row, from the largest card down, that this machine can run and whose plan fits,
and says so. No torch is imported before use.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
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


def problems(preset: Preset, device: str, *, unfused_lora: bool = False, compile: bool = False) -> list[str]:
    """Why `preset` cannot run on a device type (`cuda`, `cpu`, …) together with those options; empty if it can."""
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
            preset.transformer == "int8" and preset.offload != "none" and compile,
            "torchao weights, offload and compile do not work together; leave one out",
        ),
        (quantized and unfused_lora, "a LoRA must be fused before its base is quantized; load with fuse=True"),
        (
            preset.modulation and unfused_lora,
            "modulation precompute needs fused LoRAs: one on the AdaLN layers would be left out; load with fuse=True",
        ),
    )
    return [reason for holds, reason in rules if holds]


def pick(name: str, device: str, **options: bool) -> Preset:
    """The preset of that name; UsageError, with every reason, if no row of it works on `device`."""
    if name not in PRESETS:
        raise UsageError(f"unknown memory preset '{name}': one of {', '.join(NAMES)}{nearest(name, NAMES)}")
    reasons: list[str] = []
    for preset in PRESETS[name]:
        found = problems(preset, device, **options)
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
    """What a plan is made from: the configs of the parts as plain values. Text configs may be absent."""

    transformer: Mapping[str, Any]
    vae: Mapping[str, Any]
    text_encoder: Mapping[str, Any] | None = None
    text_encoder_2: Mapping[str, Any] | None = None


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

    transformer = _meta_transformer(shapes.transformer)
    blocks, block_rest = _quantized_split(transformer, preset.transformer, dtype_bytes)
    adaln = sum(_count(layer) for layer in adaln_layers(transformer).values())
    modulation = (adaln + _count(transformer.time_text_embed)) * dtype_bytes
    other = block_rest - modulation
    clip = _meta_text("CLIPTextModel", shapes.text_encoder)
    t5 = _meta_text("T5EncoderModel", shapes.text_encoder_2)
    text = sum(_quantized_split(t5, preset.text, dtype_bytes)) if t5 is not None else 0
    text += _count(clip) * dtype_bytes if clip is not None else 0
    vae = _count(_meta_vae(shapes.vae)) * dtype_bytes

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
    aside = resident if preset.staged and not shared else 0  # the transformer steps aside while text is encoded
    stages = {
        "text": text + vae + resident + on_device - aside + _text_activations(shapes, text_tokens, dtype_bytes),
        "denoise": resident + on_device + text_weights + vae + table + activations + scratch,
        "decode": resident + on_device + text_weights + vae + decode,
    }
    host = 0 if shared else waiting_modulation + grouped + aside
    return Plan(blocks, modulation, other, text, vae, table, activations, stages, host)


def _meta_transformer(config: Mapping[str, Any]) -> Any:
    import torch
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        return FluxTransformer2DModel.from_config({k: v for k, v in config.items() if not k.startswith("_")})


def _meta_vae(config: Mapping[str, Any]) -> Any:
    import torch
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        return AutoencoderKL.from_config({k: v for k, v in config.items() if not k.startswith("_")})


def _meta_text(name: str, config: Mapping[str, Any] | None) -> Any:
    if config is None:
        return None
    import torch
    import transformers

    cls = getattr(transformers, name)
    with torch.device("meta"):
        return cls(cls.config_class.from_dict(dict(config)))


def _count(model: Any) -> int:
    """Numbers in a model's parameters, shared ones once."""
    return sum(p.numel() for p in model.parameters())


def _quantized_split(model: Any, name: str, dtype_bytes: int) -> tuple[int, int]:
    """Bytes of the weights that `quantize` would take, quantized, and of everything else."""
    linears = quantize.quantizable(model).values()
    shapes = [(linear.out_features, linear.in_features) for linear in linears]
    rest = _count(model) - sum(rows * columns for rows, columns in shapes)
    return quantize.quantized_bytes(name, shapes, dtype_bytes), rest * dtype_bytes


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
    return "unquantized" if quantization == "none" else quantization


# Applying ----------------------------------------------------------------------------------------------------------


class Memory:
    """A preset on a pipeline, and what it still has to do there: `pipe.memory`.

    `prepare` before loading, `apply` on the loaded pipeline (on the CPU, LoRAs fused), `stage` from the sampler.
    """

    def __init__(self, name: str, preset: Preset | None, device: torch.device, free: int, where: str) -> None:
        self.name = name
        self.preset = preset  # None: auto, until the configs are known
        self.device = device
        self.free = free
        self.where = where
        self.reason = ""
        self.modulation: Modulation | None = None
        self._pipe: Any = None
        self._open: bool = True
        self._places: dict[str, Path] = {}

    def apply(self, pipe: DiptychPipeline, dtype: torch.dtype, places: Mapping[str, Path] | None = None) -> None:
        """Quantizes, stages, offloads and places the parts of `pipe`; `places`: the folders of its text encoders.

        UserError when `auto` finds no preset that fits.
        """
        shapes = shapes_of(pipe, places or {})
        if self.preset is None:
            self.name, self.preset = choose(shapes, self.device.type, self.free, self.where, dtype.itemsize)
        planned = plan(shapes, self.preset, device=self.device.type, dtype_bytes=dtype.itemsize, **_size_of(pipe))
        self.reason = (
            f"memory {self.name}: {self.preset}; plan {planned.peak / GIB:.1f} GiB "
            f"of {self.free / GIB:.1f} GiB free on {self.where}"
        )
        if planned.peak > self.free:
            log.warning("%s: this may run out of memory", self.reason)

        preset, self._pipe = self.preset, pipe
        transformer: Any = pipe.transformer
        pipe.memory = self
        # Modulation first: quantizers and offload then never see those weights.
        if preset.modulation:
            from diptych.student.modulation import Modulation

            self.modulation = Modulation(transformer).detach("cpu")
        quantize.quantize(transformer, preset.transformer, self.device, dtype)
        pipe.vae.to(self.device)
        if preset.tile:
            factor = 2 ** (len(pipe.vae.config.block_out_channels) - 1)
            pipe.vae.tile_sample_min_size, pipe.vae.tile_latent_min_size = preset.tile, preset.tile // factor
        if preset.staged:
            self._places = {part: place for part, place in (places or {}).items() if part in TEXT_PARTS}
            self._dtype = dtype
            self._close_text()
        else:
            for part in TEXT_PARTS:
                if (encoder := getattr(pipe, part)) is not None:
                    quantize.quantize(encoder, preset.text if part == "text_encoder_2" else "none", self.device, dtype)
                    encoder.to(self.device)
        if preset.offload == "group":
            transformer.enable_group_offload(
                onload_device=self.device, offload_type="leaf_level", use_stream=self.device.type == "cuda"
            )
        elif not preset.staged:
            transformer.to(self.device)

    def stage(self, name: str) -> None:
        """Called by the sampler before `text`, `denoise` and `decode`: brings what that needs, frees the rest."""
        assert self.preset is not None
        if self.preset.staged and self._places:
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
        if self._places:
            self._open_text()
        with self.modulation.attached() if self.modulation else nullcontext():
            yield
        if self._places:
            self._close_text()

    @property
    def waiting(self) -> tuple[str, ...]:
        """The text encoders that are opened when a prompt comes."""
        return tuple(self._places)

    def _open_text(self) -> None:
        from diptych.student.components import open_part

        if self._open:
            return
        assert self.preset is not None
        if self.device.type != "cpu" and self.preset.offload == "none":
            self._pipe.transformer.to("cpu")
        for part, place in self._places.items():
            encoder = open_part(part, place, self._dtype)
            quantize.quantize(
                encoder, self.preset.text if part == "text_encoder_2" else "none", self.device, self._dtype
            )
            setattr(self._pipe, part, encoder.to(self.device))
        self._open = True

    def _close_text(self) -> None:
        import torch

        for part in self._places:
            setattr(self._pipe, part, None)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self._open = False


def prepare(
    name: str | int | Preset, device: str | torch.device, *, fuse: bool = True, lora: Sequence[Any] | Any = ()
) -> Memory:
    """What `load` needs to know before it opens anything: the preset, checked, and the memory that is free now.

    Raises UsageError with every reason when the preset does not work on this machine or with those options.
    """
    import torch

    device = torch.device(device)
    options = {"unfused_lora": bool(lora) and not fuse}
    preset = None
    if isinstance(name, Preset):
        preset, name = name, "custom"
        if found := problems(preset, device.type, **options):
            raise UsageError(f"this memory preset does not work here: {'; '.join(found)}")
    elif str(name) != "auto":
        preset = pick(str(name), device.type, **options)
    return Memory(str(name), preset, device, *free_bytes(device))


def choose(shapes: Shapes, device: str, free: int, where: str, dtype_bytes: int) -> tuple[str, Preset]:
    """`auto`: (name, preset) of the first row, largest card first, that runs here and whose plan fits."""
    seen: list[str] = []
    for name in reversed(PRESETS):
        for preset in PRESETS[name]:
            if found := problems(preset, device):
                seen.append(f"{name}: {found[0]}")
                continue
            needed = plan(shapes, preset, device=device, dtype_bytes=dtype_bytes).peak
            if needed <= HEADROOM * free:
                return f"auto → {name}", preset
            seen.append(f"{name} needs {needed / GIB:.1f} GiB")
    raise UserError(
        f"no memory preset fits {where} with {free / GIB:.1f} GiB free ({'; '.join(seen)}); close what else uses it"
    )


def shapes_of(pipe: Any, places: Mapping[str, Path]) -> Shapes:
    """The configs of a pipeline's parts; of text encoders that are not open, from their folders."""
    from diptych.student.files import read_json

    text: dict[str, Any] = {}
    for part in TEXT_PARTS:
        encoder = getattr(pipe, part, None)
        if encoder is not None:
            text[part] = encoder.config.to_dict()
        elif part in places:
            text[part] = read_json(places[part] / "config.json")
    return Shapes(dict(pipe.transformer.config), dict(pipe.vae.config), **text)


def _size_of(pipe: Any) -> dict[str, Any]:
    side = pipe.default_panel_size
    return {"panel": (side, side), "text_tokens": pipe.text_length}
