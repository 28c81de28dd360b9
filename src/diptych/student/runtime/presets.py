"""Memory presets for cards of 8, 12, 16, 24, 48 and 80 GiB: how FLUX is stored there, and on which machines that works.

A preset is a row of `PRESETS`. `memory` computes whether it fits.
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

HEADROOM = 0.92  # share of the free memory that a plan may fill: allocators fragment, libraries need workspace


@dataclass(frozen=True)
class Preset:
    """How a pipeline's parts are stored.

    Attributes:
        transformer: quantization of the transformer, a key of `quantize.QUANTIZATIONS`.
        text: quantization of T5 or of a language model. CLIP is small and never quantized.
        staged: load text encoders when there is a prompt to encode, and free them before the transformer moves to the
            device.
        offload: `none`, or `group`, which moves the transformer's layers to the device one by one (diffusers' group
            offload).
        tile: side in pixels of the tiles that the VAE decodes; 0 decodes whole images. Tiles are blended, which changes
            images.
        modulation: keep the AdaLN weights on the CPU and precompute their outputs (`modulation`).
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


# GiB of the card: presets, best first. The first one that this machine can run is used.
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
    """The reasons why `preset` cannot run on a device type (`cuda`, `cpu`, …), or with an unfused LoRA."""
    quantized = preset.transformer != "none"
    rules = (
        (bool(fault := quantize.problem(preset.transformer, device)), fault),
        (bool(other := quantize.problem(preset.text, device)) and other != fault, other),
        (
            preset.offload == "group" and device not in ("cuda", "xpu", "cpu"),
            f"group offload does not run on {device}, and on Apple chips GPU and CPU share their memory",
        ),
        (
            preset.transformer == "nf4" and preset.offload != "none",
            "bitsandbytes weights cannot be offloaded by groups; use fp8",
        ),
        (
            preset.transformer == "int8" and preset.offload != "none",
            "offloaded torchao weights cannot be compiled; use fp8",
        ),
        (quantized and unfused_lora, "a LoRA must be fused before its base is quantized; load with fuse=True"),
        (
            preset.modulation and unfused_lora,
            "modulation precompute needs fused LoRAs, because it leaves out LoRAs on AdaLN layers; load with fuse=True",
        ),
    )
    return [reason for applies, reason in rules if applies]


def pick(name: str, device: str, option: str = "--memory") -> Preset:
    """The preset of this name. UsageError, with every reason, if none of its rows works on `device`. `option` names the
    CLI option or recipe key in errors."""
    if name not in PRESETS:
        hint = nearest(name, NAMES)
        raise UsageError("name_unknown", f"Unknown memory preset '{name}'. Use one of {', '.join(NAMES)}{hint}")
    reasons: list[str] = []
    for preset in PRESETS[name]:
        faults = problems(preset, device)
        if not faults:
            return preset
        reasons += [reason for reason in faults if reason not in reasons]
    raise unsupported(f"{option} {name}", reasons)


def unsupported(preset: str, reasons: list[str]) -> UsageError:
    """The error for a memory preset that this machine or model cannot use."""
    return UsageError("device_unavailable", f"{preset} does not work here: {'; '.join(reasons)}")


def _words(quantization: str) -> str:
    return "as loaded" if quantization == "none" else quantization


# Bytes of parts and images, from configs alone. Weights are counted; activations are estimated by the rule that each
# function states.

TEXTS = ("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4")
CLASSES = {
    "transformer": "FluxTransformer2DModel",
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModel",
    "text_encoder_2": "T5EncoderModel",
}


def is_small(text_encoder: str) -> bool:
    """Whether text encoders of this class are never quantized. CLIP has about a hundredth of T5's weights."""
    return text_encoder.startswith("CLIP")


@dataclass(frozen=True)
class Shapes:
    """The configs of a pipeline's parts, as plain values, from which a plan is computed. Text configs may be absent.

    Attributes:
        quantized: bytes of the transformer's weights in a quantized file (GGUF), which stay quantized.
        classes: classes of the parts that differ from FLUX.1's (`CLASSES`).
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
        """Whether the transformer is FLUX.1's, the only one whose modulation can be precomputed."""
        return self.class_of("transformer") == CLASSES["transformer"]

    def tensors(self, part: str) -> Tensors:
        """The tensors of a part that is there."""
        library = "transformers" if part in TEXTS else "diffusers"
        return tensors(library, self.class_of(part), getattr(self, part))

    def texts(self) -> dict[str, Mapping[str, Any]]:
        """The configs of the text encoders that are there."""
        return {part: config for part in TEXTS if (config := getattr(self, part)) is not None}


def quantized_split(model: Tensors, name: str, dtype_bytes: int) -> tuple[int, int]:
    """(bytes of the layers that `quantize` quantizes, bytes of all other tensors)."""
    linears = [model.of(linear) for linear in sorted(model.linears) if quantize.takes(linear)]
    rest = model.count - sum(math.prod(shape) for linear in linears for shape in linear.values())
    return quantize.quantized_bytes(name, linears, dtype_bytes), rest * dtype_bytes


def as_in_file(transformer: Tensors, packed: int, dtype_bytes: int) -> tuple[int, int, int]:
    """Bytes of blocks, of modulation and of the rest for a quantized file, which has all matrices except the input
    layer's in `packed` bytes. All weights are assumed to have the same number of bits."""
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
    """Bytes at the widest point of denoising. A single block stores its input, the normed input, the MLP's 4 widths
    before and after the activation, queries, keys and values, and float32 copies of two of these: 16 widths a token.

    Reference tokens with self attention are not part of a step, but every block's keys and values of them are stored.
    """
    config = shapes.transformer
    width = config.get("num_attention_heads", 24) * config.get("attention_head_dim", 128)
    down = 2 ** (len(channels(shapes.vae)) - 1) * 2
    one = (panel[0] // down) * (panel[1] // down)
    if settings.of(config).reference_attention == "self":
        blocks = config.get("num_layers", 19) + config.get("num_single_layers", 38)
        return rows * (16 * (text_tokens + one) + 2 * blocks * one) * width * dtype_bytes
    return 16 * rows * (text_tokens + 2 * one) * width * dtype_bytes


def text_activations(shapes: Shapes, text_tokens: int, dtype_bytes: int) -> int:
    """Bytes of the widest layer of a text encoder (T5's if there is none): attention scores in float32 and the gated
    MLP."""
    sizes = []
    for config in [*shapes.texts().values()] or [{}]:
        text = config.get("text_config") or config  # nested in a vision-language model
        heads = text.get("num_heads", text.get("num_attention_heads", 64))
        wide = text.get("d_ff", text.get("intermediate_size", 10240))
        sizes.append(heads * text_tokens**2 * 4 + 4 * text_tokens * wide * dtype_bytes)
    return max(sizes)


def channels(vae: Mapping[str, Any]) -> list[int]:
    """A VAE's widths, that of the full size first, under any of the names that configs use."""
    widths = vae.get("block_out_channels") or vae.get("decoder_block_out_channels")
    return list(widths or [vae.get("base_dim", 96) * times for times in vae.get("dim_mult", (1, 2, 4, 4))])


def decoding(vae: Mapping[str, Any], panel: tuple[int, int], tile: int, dtype_bytes: int) -> int:
    """Bytes of decoding. The decoder's last up block has three maps of full size with the second-narrowest channels;
    tiles are joined in an image of full size."""
    widths = channels(vae)
    pixels = panel[0] * panel[1] * 2
    at_once = min(pixels, tile * tile) if tile else pixels
    return 3 * widths[min(1, len(widths) - 1)] * at_once * dtype_bytes + 3 * 3 * pixels * dtype_bytes


def encoding(vae: Mapping[str, Any], panel: tuple[int, int], dtype_bytes: int) -> int:
    """Bytes of encoding. The encoder's first block has five maps of full size with the narrowest channels."""
    return 5 * channels(vae)[0] * panel[0] * panel[1] * 2 * dtype_bytes
