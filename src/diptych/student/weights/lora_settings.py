"""The scale of a LoRA file: alpha over rank, from its header or from the `adapter_config.json` beside it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diptych.errors import UserError
from diptych.student.weights.delta import Delta
from diptych.student.weights.files import read_json
from diptych.student.weights.lora_keys import COMPONENTS, PEFT_PREFIX
from diptych.utils.documents import parse_json

HEADER = "lora_adapter_metadata"  # diffusers' key: JSON of one peft config for each component
CONFIG_FILE = "adapter_config.json"  # what peft itself writes beside `adapter_model.safetensors`
# How peft's settings say that more than B A is added: by how the adapters began, and by their kind.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")
_VARIANTS = ("use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config", "velora_config", "kasa_config")


@dataclass(frozen=True)
class LoraSettings:
    """peft's settings of each component that a file adapts; none where it says nothing, so that its scale is 1."""

    path: Path
    by_component: Mapping[str, Mapping[str, Any]]

    @classmethod
    def read(cls, path: Path, header: Mapping[str, str], keys: Iterable[str]) -> LoraSettings:
        """The settings of a LoRA file with these keys; UserError if they are damaged, or say that it is no LoRA."""
        beside = path.parent / CONFIG_FILE
        try:
            said: dict[str, Any] = parse_json(header.get(HEADER, "{}"))
            by_component = {name: _of(said, name) for name in COMPONENTS}
        except (ValueError, AttributeError) as error:
            raise UserError(f"the '{HEADER}' metadata of {path} is damaged ({error}); fetch it again") from error
        if beside.is_file() and (path.stem == "adapter_model" or any(key.startswith(PEFT_PREFIX) for key in keys)):
            by_component = dict.fromkeys(COMPONENTS, read_json(beside))
        for settings in by_component.values():
            _check(path, settings)
        return cls(path, by_component)

    def scale(self, target: str, rank: int, alpha: float | None) -> float:
        """What B A is multiplied by: alpha / r, or alpha / √r with rank-stabilized LoRA; 1 where neither is stated.

        `alpha` is the layer's, from its tensor. UserError if the settings state another one.
        """
        component, _, layer = target.partition(".")
        settings = self.by_component[component]
        said = None
        if settings.get("r") or settings.get("lora_alpha"):
            rank = int(_chosen(settings, "rank", layer, settings.get("r") or rank)) if alpha is None else rank
            said = float(_chosen(settings, "alpha", layer, settings.get("lora_alpha", rank)))
        if alpha is not None and said is not None and alpha != said:
            raise UserError(
                f"{self.path} states two alphas for {target}: {alpha:g} in its tensors and {said:g} in its settings. "
                "Nothing was loaded; remove the one that is wrong"
            )
        alpha = said if alpha is None else alpha
        return 1.0 if alpha is None else alpha / (rank**0.5 if settings.get("use_rslora") else rank)

    def is_dora(self, target: str) -> bool:
        """Whether the settings say that the layer has magnitudes."""
        return bool(self.by_component[target.partition(".")[0]].get("use_dora"))


def ranks_of(deltas: Mapping[str, Delta]) -> dict[str, Any]:
    """peft's settings of adapters with these ranks, whose scale is 1: alpha is the rank everywhere."""
    ranks = {layer: delta.a.shape[0] for layer, delta in deltas.items()}
    most = max(ranks.values(), key=list(ranks.values()).count)
    # peft looks for the end of a name: `proj_out` would be that of every block, too.
    ends = {layer for layer in ranks if any(other.endswith(f".{layer}") for other in ranks)}
    pattern = {f"^{layer}" if layer in ends else layer: rank for layer, rank in ranks.items() if rank != most}
    return {"r": most, "lora_alpha": most, "rank_pattern": pattern, "alpha_pattern": dict(pattern)}


def _of(said: Mapping[str, Any], component: str) -> dict[str, Any]:
    return {key.removeprefix(f"{component}."): v for key, v in said.items() if key.startswith(f"{component}.")}


def _chosen(settings: Mapping[str, Any], kind: str, layer: str, default: float) -> float:
    from peft.utils.other import get_pattern_key

    pattern = settings.get(f"{kind}_pattern") or {}
    return pattern.get(get_pattern_key(list(pattern), layer), default)


def _check(path: Path, settings: Mapping[str, Any]) -> None:
    kind, start = str(settings.get("peft_type") or "LORA"), str(settings.get("init_lora_weights"))
    odd = [name for name in _VARIANTS if settings.get(name)]
    odd += [f"init_lora_weights={start}"] if start.lower().startswith(_CHANGES_BASE) else []
    odd += [f"peft_type={kind}"] if not kind.endswith("LORA") else []
    if odd:
        raise UserError(
            f"{path} is no plain LoRA: its settings say {', '.join(odd)}, which changes more than the layers it adds "
            "to. Nothing was loaded; convert it to a LoRA with peft, or merge it into the base there"
        )
