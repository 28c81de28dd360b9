"""What the memory presets are: for a card of 8, 12, 16, 24, 48 or 80 GiB, how FLUX is held there, and where that works.

A preset is a row of `PRESETS`; whether its bytes fit is `memory`'s to say.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from diptych.errors import UsageError, nearest
from diptych.student import settings
from diptych.student.families.shapes import Tensors, tensors
from diptych.student.runtime import quantize

HEADROOM = 0.92  # share of the free memory a plan may fill: allocators fragment, libraries keep workspaces


@dataclass(frozen=True)
class Preset:
    """How the parts are held.

    transformer, text: a name of `quantize.QUANTIZATIONS`; `text` is that of T5 (or a language model), CLIP is small.
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


def pick(name: str, device: str, asked: str = "--memory") -> Preset:
    """The preset of that name; UsageError, with every reason, if no row of it works on `device`. `asked`: by what."""
    if name not in PRESETS:
        raise UsageError(f"unknown memory preset '{name}': one of {', '.join(NAMES)}{nearest(name, NAMES)}")
    reasons: list[str] = []
    for preset in PRESETS[name]:
        found = problems(preset, device)
        if not found:
            return preset
        reasons += [reason for reason in found if reason not in reasons]
    raise UsageError(f"{asked} {name} does not work here: {'; '.join(reasons)}")


def _words(quantization: str) -> str:
    return "as loaded" if quantization == "none" else quantization


# How many bytes parts and pictures take, from configs alone. Weights are counted, activations estimated: each
# function says by which rule.

TEXTS = ("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4")
CLASSES = {
    "transformer": "FluxTransformer2DModel",
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModel",
    "text_encoder_2": "T5EncoderModel",
}


def is_small(text_encoder: str) -> bool:
    """Whether text encoders of this class are never quantized: CLIPs are a hundredth of what they stand beside."""
    return text_encoder.startswith("CLIP")


@dataclass(frozen=True)
class Shapes:
    """What a plan is made from: the configs of the parts as plain values. Text configs may be absent.

    `quantized`: bytes of the transformer's weights that its file holds quantized already (GGUF); they stay so.
    `classes`: of the parts that are not FLUX.1's (`CLASSES`).
    """

    transformer: Mapping[str, Any]
    vae: Mapping[str, Any]
    text_encoder: Mapping[str, Any] | None = None
    text_encoder_2: Mapping[str, Any] | None = None
    quantized: int = 0
    text_encoder_3: Mapping[str, Any] | None = None
    text_encoder_4: Mapping[str, Any] | None = None
    classes: Mapping[str, str] = field(default_factory=dict)

    def class_of(self, part: str) -> str:
        return self.classes.get(part, CLASSES.get(part, ""))

    @property
    def is_flux(self) -> bool:
        """Whether the transformer is FLUX.1's, the one whose modulation is precomputed."""
        return self.class_of("transformer") == CLASSES["transformer"]

    def tensors(self, part: str) -> Tensors:
        """What a part is made of, which is there."""
        library = "transformers" if part in TEXTS else "diffusers"
        return tensors(library, self.class_of(part), getattr(self, part))

    def texts(self) -> dict[str, Mapping[str, Any]]:
        """The configs of the text encoders that are there."""
        return {part: config for part in TEXTS if (config := getattr(self, part)) is not None}


def quantized_split(model: Tensors, name: str, dtype_bytes: int) -> tuple[int, int]:
    """Bytes of the layers that `quantize` would take, quantized, and of everything else."""
    linears = [model.of(linear) for linear in sorted(model.linears) if quantize.takes(linear)]
    rest = model.count - sum(math.prod(shape) for linear in linears for shape in linear.values())
    return quantize.quantized_bytes(name, linears, dtype_bytes), rest * dtype_bytes


def as_in_file(transformer: Tensors, packed: int, dtype_bytes: int) -> tuple[int, int, int]:
    """Bytes of blocks, modulation and the rest where a file's `packed` bytes stay: all matrices, but the input layer's.

    They are shared out as if every weight had as many bits.
    """
    modulation = (*adaln(transformer), "time_text_embed")
    matrices, plain = [0, 0, 0], [0, 0, 0]
    for name, shape in transformer.shapes.items():
        layer = name.rpartition(".")[0]
        part = 1 if layer.startswith(modulation) else 0 if "blocks." in layer else 2
        kept = len(shape) == 2 and layer != "x_embedder"
        (matrices if kept else plain)[part] += math.prod(shape)
    sizes = [round(packed * m / sum(matrices)) + p * dtype_bytes for m, p in zip(matrices, plain, strict=True)]
    return sizes[0], sizes[1], sizes[2]


def adaln(transformer: Tensors) -> list[str]:
    """FLUX.1's AdaLN linears (`modulation.adaln_layers`)."""
    return [linear for linear in transformer.linears if quantize.is_modulation(linear)]


def activations(shapes: Shapes, panel: tuple[int, int], rows: int, text_tokens: int, dtype_bytes: int) -> int:
    """Denoising's, at its widest: a single block holds its input, the normed input, the MLP's 4 widths before and after
    the activation, queries, keys and values, and float32 copies of two of these: 16 widths a token.

    Reference tokens that attend to themselves are not in the step, and every block's keys and values of them are."""
    config = shapes.transformer
    width = config.get("num_attention_heads", 24) * config.get("attention_head_dim", 128)
    down = 2 ** (len(channels(shapes.vae)) - 1) * 2
    one = (panel[0] // down) * (panel[1] // down)
    if settings.of(config).reference_attention == "self":
        blocks = config.get("num_layers", 19) + config.get("num_single_layers", 38)
        return rows * (16 * (text_tokens + one) + 2 * blocks * one) * width * dtype_bytes
    return 16 * rows * (text_tokens + 2 * one) * width * dtype_bytes


def text_activations(shapes: Shapes, text_tokens: int, dtype_bytes: int) -> int:
    """The widest layer of a text encoder, T5's where none is known: attention scores in float32 and the gated MLP."""
    sizes = []
    for config in shapes.texts().values():
        own = config.get("text_config") or config  # a vision-language model's
        heads = own.get("num_heads", own.get("num_attention_heads", 64))
        wide = own.get("d_ff", own.get("intermediate_size", 10240))
        sizes.append(heads * text_tokens**2 * 4 + 4 * text_tokens * wide * dtype_bytes)
    return max(sizes, default=64 * text_tokens**2 * 4 + 4 * text_tokens * 10240 * dtype_bytes)


def channels(vae: Mapping[str, Any]) -> list[int]:
    """A VAE's widths, the full size's first, in whichever words its config has them."""
    found = vae.get("block_out_channels") or vae.get("decoder_block_out_channels")
    return list(found or [vae.get("base_dim", 96) * times for times in vae.get("dim_mult", (1, 2, 4, 4))])


def decoding(vae: Mapping[str, Any], panel: tuple[int, int], tile: int, dtype_bytes: int) -> int:
    """The decoder's last up block works at full size on the second-narrowest channels: three maps of that, and the
    picture itself where it is put together from tiles."""
    widths = channels(vae)
    pixels = panel[0] * panel[1] * 2
    at_once = min(pixels, tile * tile) if tile else pixels
    return 3 * widths[min(1, len(widths) - 1)] * at_once * dtype_bytes + 3 * 3 * pixels * dtype_bytes


def encoding(vae: Mapping[str, Any], panel: tuple[int, int], dtype_bytes: int) -> int:
    """The encoder's first block works at full size on the narrowest channels: five maps of that."""
    return 5 * channels(vae)[0] * panel[0] * panel[1] * 2 * dtype_bytes
