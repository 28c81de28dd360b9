"""What the memory presets are: for a card of 8, 12, 16, 24, 48 or 80 GiB, how FLUX is held there, and where that works.

A preset is a row of `PRESETS`; whether its bytes fit is `memory`'s to say.
"""

from __future__ import annotations

from dataclasses import dataclass

from diptych.errors import UsageError, nearest
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
