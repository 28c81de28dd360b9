"""A recipe's keys: a section for each stage, every key typed, bounded and documented where it stands.

One file a section. Defaults are the pocket world's. A key that is not known is refused (`recipe.load` names the nearest
one that is).
"""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from diptych.llm.vllm import Vllm
from diptych.recipe.schema.base import Section, flat
from diptych.recipe.schema.curate import Classifier, Copies, Curate, Duplicates, Screens, Thresholds, Vlm
from diptych.recipe.schema.distill import OWN, Data, Distill, Preference
from diptych.recipe.schema.evaluate import Adapter, Evaluate, Method, Relighting, StockPipeline, Tuning
from diptych.recipe.schema.paint import Paint
from diptych.recipe.schema.ray import Pool, Ray
from diptych.recipe.schema.write import Write
from diptych.utils.io import sha256_json

__all__ = [
    "OWN", "Adapter", "Classifier", "Copies", "Curate", "Data", "Distill", "Duplicates", "Evaluate", "Method", "Paint",
    "Pool", "Preference", "Ray", "Recipe", "Relighting", "Screens", "Section", "StockPipeline", "Thresholds", "Tuning",
    "Vlm", "Write", "flat",
]  # fmt: skip


class Recipe(Section):
    """Everything that defines a run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][\w.-]*$")
    """Of the run; its folder is runs/NAME unless told otherwise."""
    task: str = Field(default="subject", min_length=1)
    """A task's name, or a task file."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Every row's seed comes from this one and the row's id."""
    teacher: str = Field(default="pocket", min_length=1)
    """A text-to-image model: `pocket`, a folder, or a hub name."""
    device: str = Field(default="auto", pattern=r"^(auto|cpu|mps|xpu|cuda(:\d+)?)$")
    """`auto` takes the best that is there."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads of torch; null is torch's own choice. Bytes depend on it, so a run freezes it."""
    write: Write = Write()
    paint: Paint = Paint()
    curate: Curate = Curate()
    distill: Distill = Distill()
    evaluate: Evaluate = Evaluate()
    ray: Ray = Ray()

    @model_validator(mode="after")
    def _room_for_vllm(self) -> Recipe:
        for stage in ("write", "curate"):
            model, gpus = self.vllm(stage), self.ray.pool(stage).gpus
            if model is None or gpus is None:
                continue
            takes, most = model.tensor_parallel_size, model.gpu_memory_utilization
            shares = 0 < gpus < 1 and takes == 1
            if gpus >= takes or (shares and most <= gpus):
                continue
            fix = f"set gpu_memory_utilization to at most {gpus:g}" if shares else f"set it to {takes}, or null"
            raise ValueError(
                f"ray.{stage}.gpus: a worker gets {gpus:g}, and its vLLM model takes {most:g} of the memory of "
                f"{takes} GPU{'s' if takes > 1 else ''}; {fix}"
            )
        return self

    def vllm(self, stage: str) -> Vllm | None:
        """The model that vLLM runs in each worker of a stage, if any."""
        if stage == "write":
            return self.write.vllm if self.write.writer == "llm" else None
        return self.curate.vlm.vllm if stage == "curate" and self.curate.vlm else None

    @property
    def training_seed(self) -> int:
        """What training draws from."""
        return self.seed if self.distill.seed is None else self.distill.seed

    def draws_pairs(self) -> bool:
        """Whether it trains on pairs that it draws itself."""
        return not self.distill.data or any(data.path == OWN for data in self.distill.data)

    def values(self) -> dict[str, Any]:
        """All keys as plain values, in the order of the fields."""
        return self.model_dump(mode="json")

    def dump(self) -> str:
        """All keys as YAML, defaults included: the same text for the same recipe."""
        import yaml

        return yaml.safe_dump(self.values(), sort_keys=False, allow_unicode=True, width=100)

    def flat(self) -> dict[str, Any]:
        """All keys with dots: `{"distill.steps": 4000, …}`."""
        return flat(self.values())

    def fingerprint(self, *keys: str) -> str:
        """sha256 over these keys and sections (`"write"`, `"seed"`, `"curate.judge"`); over everything if none."""
        values = self.values()
        for optional in ("vlm", "screens", "copies", "duplicates"):
            if values["curate"][optional] is None:
                # Rows from before they existed are not made again.
                del values["curate"][optional]
        for section in (values["write"], values["curate"].get("vlm")):
            if section and section["vllm"] is None:
                del section["vllm"]
        for section, key, default in (
            ("curate", "format", "png"),
            ("paint", "format", "png"),
            ("paint", "images", 1),
            ("paint", "memory", None),
            ("paint", "speed", None),
            ("write", "local", None),
            ("distill", "condition_init", "zeros"),
        ):
            if values[section][key] == default:
                del values[section][key]
        del values["ray"]  # where it is made is not what is made
        if keys:
            values = {key: _at(values, key) for key in keys}
        return sha256_json(values)

    def differences(self, other: Recipe) -> list[str]:
        """Keys with another value in `other`, with dots; those of `ray` decide no row and are left out."""
        mine, theirs = self.flat(), other.flat()
        # A key may be there in one alone: a section of the other that is null.
        differ = [key for key in mine | theirs if mine.get(key) != theirs.get(key)]
        return [key for key in differ if not key.startswith("ray.")]


def _at(values: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        values = values[part]
    return values
