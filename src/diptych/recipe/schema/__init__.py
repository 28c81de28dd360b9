"""The keys of a recipe: a section for each stage, every key typed, bounded and documented beside its definition.

One file per section. The defaults suit the pocket world. Unknown keys are errors; `recipe.load` suggests the nearest
known one.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from diptych.llm.endpoint import Endpoint
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
    """A recipe defines a run completely. When a run starts, its recipe is frozen in its folder, with every `auto`
    resolved."""

    name: str = Field(pattern=r"^[A-Za-z0-9][\w.-]*$")
    """Name of the run. Its folder is `runs/NAME` unless `--out` names another."""
    task: str = Field(default="subject", min_length=1)
    """Task of the run, which says what a pair is: a name that `diptych tasks` lists, or a task file."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the run. The seed of every row is derived from it and from the row's id."""
    teacher: str = Field(default="pocket", min_length=1)
    """Text-to-image model that generates the grids and becomes the student: `pocket`, a folder, or a hub name."""
    device: str = Field(default="auto", pattern=r"^(auto|cpu|mps|xpu|cuda(:\d+)?)$")
    """Device to compute on. `auto` is the best that is available; it is resolved when a run is frozen."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads of torch. Results depend on their number in the last bits. null is torch's default; it is resolved
    when a run is frozen."""
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
            needed, memory = model.tensor_parallel_size, model.gpu_memory_utilization
            shares = 0 < gpus < 1 and needed == 1
            if gpus >= needed or (shares and memory <= gpus):
                continue
            fix = f"set gpu_memory_utilization to at most {gpus:g}" if shares else f"set it to {needed}, or null"
            raise ValueError(
                f"ray.{stage}.gpus: a worker gets {gpus:g}, but its vLLM model takes {memory:g} of the memory of "
                f"{needed} GPU{'s' if needed > 1 else ''}; {fix}"
            )
        return self

    def vllm(self, stage: str) -> Vllm | None:
        """Returns the model that vLLM runs in each worker of a stage, if any."""
        if stage == "write":
            return self.write.vllm if self.write.writer == "llm" else None
        return self.curate.vlm.vllm if stage == "curate" and self.curate.vlm else None

    def endpoint(self, stage: str) -> Endpoint | None:
        """Returns the server that each worker of a stage sends its questions to, if any."""
        if stage == "write":
            return self.write.endpoint if self.write.writer == "llm" else None
        return self.curate.vlm.endpoint if stage == "curate" and self.curate.vlm else None

    @property
    def training_seed(self) -> int:
        """The seed of training."""
        return self.seed if self.distill.seed is None else self.distill.seed

    def draws_pairs(self) -> bool:
        """Whether the run trains on pairs that it makes itself."""
        return not self.distill.data or any(data.path == OWN for data in self.distill.data)

    def values(self) -> dict[str, Any]:
        """Returns all keys as plain values, in the order of the fields."""
        return self.model_dump(mode="json")

    def dump(self) -> str:
        """Returns all keys as YAML, defaults included: the same text for the same recipe."""
        import yaml

        return yaml.safe_dump(self.values(), sort_keys=False, allow_unicode=True, width=100)

    def flat(self) -> dict[str, Any]:
        """Returns all keys with dots: `{"distill.steps": 4000, …}`."""
        return flat(self.values())

    def fingerprint(self, *keys: str) -> str:
        """Returns the sha256 of keys and sections (`"write"`, `"seed"`, `"curate.judge"`); of all if none is given."""
        values = self.values()
        for optional in ("vlm", "screens", "copies", "duplicates"):
            if values["curate"][optional] is None:
                # Left out, so that rows from before the key existed stay valid.
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
            ("distill", "positions", "frame"),
            ("distill", "reference_attention", "joint"),
        ):
            if values[section][key] == default:
                del values[section][key]
        del values["ray"]  # resources do not change rows
        if keys:
            values = {key: _at(values, key) for key in keys}
        return sha256_json(values)

    def differences(self, other: Recipe) -> list[str]:
        """Returns the dotted keys whose value differs in `other`. Those of `ray` change no row and are left out."""
        mine, theirs = self.flat(), other.flat()
        # Only one of them has a key whose section is null in the other.
        differ = [key for key in mine | theirs if mine.get(key) != theirs.get(key)]
        return [key for key in differ if not key.startswith("ray.")]


def _at(values: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        values = values[part]
    return values
