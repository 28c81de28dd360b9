"""Speed presets (`exact`, `fast`, `fastest`) and their switches.

    student = Student.load("pocket", speed="fast")
    diptych generate … --speed fast --switch decode=canvas

A setting is data (`PRESETS`); `applied.apply_speed` applies it to a pipeline and `remove_speed` removes it. `exact`
changes nothing beyond float rounding. `benchmarks/inference.py quality` measures the quality cost of the lossy switches
on the pocket model and writes `speed_costs.json` beside this file; `docs/speed.md` shows it. This module does not
import torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from diptych.errors import UsageError, nearest
from diptych.student.settings import NULL_PANELS

COSTS = Path(__file__).with_name("speed_costs.json")
CACHES = ("none", "first_block", "magnitude", "skip")
DECODES = ("canvas", "right")
COMPILE_FROM = 100_000_000  # parameters; compiling a smaller transformer takes more time than it saves


def one_of(name: str, value: str, known: Sequence[str]) -> None:
    """UsageError unless the value of a speed switch is a known one."""
    if value not in known:
        raise _invalid(name, f"one of {', '.join(known)}", value, nearest(value, known))


def _invalid(name: str, wanted: str, value: object, hint: str = "") -> UsageError:
    return UsageError("option_invalid", f"Speed switch {name} must be {wanted}, not '{value}'{hint}")


@dataclass(frozen=True)
class Speed:
    """All switches; the defaults are the released sampler's. `HELP` describes each, `LOSSY` lists those that change
    images.

    The switches up to `few_step_lora` change the loaded model, once, in `apply_speed`. The others change only a call,
    whose arguments of the same names take precedence.
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
        one_of("cache", self.cache, CACHES)
        one_of("decode", self.decode, DECODES)
        if self.null_panel:
            one_of("null_panel", self.null_panel, NULL_PANELS)
        lowest = {"remember": 0, "cache_interval": 1, "cache_warmup": 1, "steps": 0, "guidance_from": 0}
        for name, low in (lowest | {"cache_threshold": 0}).items():
            if getattr(self, name) < low:
                raise _invalid(name, f"at least {low}", getattr(self, name))
        if not 0 <= self.guidance_until <= 1:
            raise _invalid("guidance_until", "a share of the steps from 0 to 1", self.guidance_until)

    def runs(self, step: int, steps: int) -> bool:
        """Whether `step`, counted from 0, is computed: always, except at skipped steps of `cache: skip`."""
        since = step - (self.cache_warmup - 1)
        return self.cache != "skip" or since <= 0 or since % self.cache_interval == 0 or step == steps - 1

    def changed(self) -> dict[str, Any]:
        """The switches that differ from the released sampler."""
        return {key: value for key, value in asdict(self).items() if value != getattr(PLAIN, key)}


HELP = {
    "fused_lora": "add LoRAs to the weights",
    "packed": "use oneDNN for linear layers, with packed weights (float32 on a CPU; replaces fused_qkv and compile)",
    "fused_qkv": "compute query, key and value in one product",
    "compile": f"compile the repeated blocks (transformers of at least {COMPILE_FROM // 10**6} M parameters)",
    "attention": "a diffusers attention back-end, for instance flash, sage, _native_cudnn; empty: torch chooses",
    "modulation": "precompute the modulation of all steps in one product",
    "remember": "MiB of embeddings of prompts and references to cache between calls",
    "cache": "skip transformer blocks at steps that change little: first_block, magnitude, or skip (a fixed schedule)",
    "cache_threshold": "change that first_block and magnitude tolerate",
    "cache_interval": "skip computes every n-th step; magnitude skips at most n - 1 in a row",
    "cache_warmup": "number of first steps that are always computed",
    "few_step_lora": "a LoRA for fewer steps, PATH or PATH:SCALE; set steps too",
    "steps": "default number of sampling steps; 0: the model's setting",
    "batched_guidance": "run the forward passes of a guided step as one batch",
    "guidance_from": "first guided step, counted from 0",
    "guidance_until": "share of the steps after which true guidance stops",
    "clamp_left": "keep the left panel on its known path",
    "null_panel": "left panel that guidance's null pass sees: shared (as released), own; empty: the student's setting",
    "decode": "canvas, or right: decode only the right half, which differs at the seam",
}
LOSSY = ("cache", "few_step_lora", "steps", "guidance_from", "guidance_until", "clamp_left", "null_panel", "decode")
"""Switches that change images beyond float rounding. The `cache_` switches only tune `cache`."""

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
    """The setting of a preset (None: the released sampler) with `NAME=VALUE` switches on top.

    UsageError, with the nearest known name, for an unknown preset, switch or value.
    """
    if isinstance(preset, Speed):
        speed = preset
    elif preset is None:
        speed = PLAIN
    elif preset in PRESETS:
        speed = PRESETS[preset]
    else:
        hint = nearest(str(preset), PRESETS)
        raise UsageError("name_unknown", f"Unknown speed '{preset}'. Use one of {', '.join(PRESETS)}{hint}")
    kinds = {field.name: type(getattr(PLAIN, field.name)) for field in fields(Speed)}
    changes: dict[str, Any] = {}
    for switch in switches:
        name, (_, equals, text) = name_of(switch), switch.partition("=")
        if name not in kinds:
            hint = nearest(name, kinds)
            raise UsageError("name_unknown", f"Unknown speed switch '{name}'. Use one of {', '.join(kinds)}{hint}")
        if not equals:
            raise UsageError("option_invalid", f"Speed switch '{switch}' has no value. Write {name}=VALUE.")
        changes[name] = _read(name, text.strip(), kinds[name])
    return replace(speed, **changes)


def costs() -> dict[str, Any]:
    """The measured costs of the lossy switches. Empty if nothing was measured."""
    return json.loads(COSTS.read_text("utf8")) if COSTS.is_file() else {}


def cost(name: str) -> str:
    """The cost of a preset, or of a lossy switch at each measured value, in CP·PF on the pocket model."""
    known = {key: entry for key, entry in costs().get("settings", {}).items() if key.partition("=")[0] == name}
    if not known:
        return "cost in quality not measured yet"
    phrases = []
    for key, entry in known.items():
        low, high = (100 * bound for bound in entry["ci95"])
        change = f"{100 * entry['change']:+.1f} % [{low:+.1f}, {high:+.1f}]"
        phrases.append(f"{key} changes CP·PF by {change}")
    return ", ".join(phrases) + " on the pocket model"


def presets() -> dict[str, dict[str, Any]]:
    """Preset -> the switches that it changes, and its measured cost in quality (empty for `exact`)."""
    return {
        name: {"sets": preset.changed(), "cost": "" if name == "exact" else cost(name)}
        for name, preset in PRESETS.items()
    }


def switches() -> dict[str, dict[str, Any]]:
    """Switch -> its default, its meaning, whether it is lossy, and its measured cost in quality (empty if lossless)."""
    return {
        name: {
            "default": getattr(PLAIN, name),
            "help": text,
            "lossy": name in LOSSY,
            "cost": cost(name) if name in LOSSY else "",
        }
        for name, text in HELP.items()
    }


def format_switches(result: Mapping[str, Any]) -> list[str]:
    """`presets` and `switches` as text."""
    lines = ["Presets (--speed NAME). Without one, the model samples as released."]
    for name, preset in result["presets"].items():
        changed = " ".join(f"{key}={_text_of(value)}" for key, value in preset["sets"].items())
        lines += [f"  {name}: {preset['cost'] or 'float rounding only'}", f"      {changed}"]
    lines += ["", "Switches (--switch NAME=VALUE), which override the preset."]
    for name, switch in result["switches"].items():
        lossy = f" Lossy: {switch['cost']}." if switch["lossy"] else ""
        lines.append(f"  {name + '=' + _text_of(switch['default']):<24}{switch['help']}.{lossy}")
    return lines


def _text_of(value: object) -> str:
    """A switch's value as the command line takes it."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)


def _read(name: str, text: str, kind: type) -> Any:
    """The value of a switch from its text."""
    if kind is bool:
        if text.lower() in ("on", "yes", "true", "1"):
            return True
        if text.lower() in ("off", "no", "false", "0"):
            return False
        raise _invalid(name, "on or off", text)
    try:
        return kind(text)
    except ValueError as error:
        raise _invalid(name, "a number", text) from error
