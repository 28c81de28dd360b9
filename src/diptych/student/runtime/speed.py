"""Speed: the table of `exact`, `fast` and `fastest`, and every switch in it alone.

    student = Student.load("pocket", speed="fast")
    diptych generate … --speed fast --switch decode=canvas

A setting is data (`PRESETS`); `applied.put_on` puts it on a pipeline and `take_off` takes it off. `exact` changes
nothing beyond float rounding. What the lossy switches cost in quality is measured by `benchmarks/inference.py quality`
on the pocket model and kept in `speed_costs.json` beside this file; `docs/speed.md` shows it. No torch is imported
before use.
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
COMPILE_FROM = 100_000_000  # parameters: compiling a smaller transformer takes longer than it ever gives back


def one_of(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise UsageError(f"speed switch {name} is one of {', '.join(known)}, not '{value}'{nearest(value, known)}")


@dataclass(frozen=True)
class Speed:
    """Every switch, set as the released sampler has it. `HELP` says what each does, `LOSSY` which change pictures.

    The upper ones change the loaded model (once, in `put_on`), the lower ones only how a call goes; a call's own
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
        one_of("cache", self.cache, CACHES)
        one_of("decode", self.decode, DECODES)
        if self.null_panel:
            one_of("null_panel", self.null_panel, NULL_PANELS)
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
