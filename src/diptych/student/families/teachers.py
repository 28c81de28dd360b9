"""Teachers: their traits, known before they are opened, and opening them.

A teacher is a diffusers text-to-image pipeline. Its traits follow from its class, in the table `teachers.yaml`
(`Traits`), and from its name and configs (`examine`).

**Guidance.** diptych has one convention, that of classifier-free guidance: v = u + w·(c − u), where c and u are the
predictions with the prompt and with the empty prompt. `paint.true_guidance` is w, and 1 is off. Pipelines differ in
four ways:

- The scale s of most pipelines means u + s·(c − u). Z-Image and Krea 2 compute c + s·(c − u), so s = w − 1 there.
- Guidance runs for s > 1 or for s > 0, in some pipelines always, and in some never.
- Both predictions are rows of one forward pass, or two passes.
- Some pipelines let a language model rewrite the prompt unless a switch prevents it.

**Step distillation** (FLUX.1-schnell, FLUX.2 klein, the Turbo models). Such a model samples in a few steps, without
classifier-free guidance. It does not predict the velocity at every noise level, so a student that is trained from it
generates gray or blocky images: train from the base model. Painting works with the model's few steps. Nothing is
downloaded and no weight is read: hub names are looked up in the hub's cache.
"""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diptych.errors import UsageError, UserError
from diptych.utils import models
from diptych.utils.documents import facts
from diptych.utils.opening import INDEX, class_of, folder_of, open_pipeline, read, read_file

if TYPE_CHECKING:
    import torch

KEY = "distill.allow_distilled_teacher"
MOST = 12  # the largest number of steps that suits a step-distilled teacher
SCHEDULERS = ("FlowMatchLCMScheduler", "LCMScheduler", "SCMScheduler", "TCDScheduler")
"""Schedulers that only consistency models use."""

_REWRITES = re.compile(r"(^use_pe$|rewrite|upsampl|enhanc|expan)")
_WORDS = "schnell|turbo|lightning|hyper-?(?:sd|flux)|lcm|sprint|tcd|dmd2?|distill(?:ed)?"
_COUNT = r"(?<![0-9])([1-9]|1[0-2])[-_ ]?steps?"
_NAME = re.compile(rf"(?<![a-z])(?:{_WORDS}|{_COUNT})(?![a-z])")
_NOT = re.compile(r"(un|non|de)[-_ ]?distill|not[-_ ]distill")
_KLEIN = re.compile(r"flux\.?2[-_ ]klein(?!.*base)")


@dataclass(frozen=True)
class Traits:
    """The traits of a pipeline class.

    Attributes:
        scale: argument of classifier-free guidance. None if the pipeline has none.
        neutral: scale that adds nothing to c: 1 for u + s·(c − u), 0 for c + s·(c − u).
        above: the pipeline computes u for scales above this value.
        always: whether it computes u for every scale, so that turning guidance off saves nothing.
        together: whether c and u are rows of one forward pass. Otherwise a guided step takes two passes.
        embedded: argument of distilled guidance, an input of the transformer. None if there is none.
        unless_distilled: whether it ignores the scale if model_index.json has `is_distilled`.
        switches: arguments that prevent changes of the prompt and the size.
        distilled: whether only step-distilled models have this class.
        steps: number of steps of its step-distilled checkpoints.
        unsuited: reason why it cannot paint. None if it can.
        known: whether the table has its guidance.
    """

    scale: str | None = "guidance_scale"
    neutral: float = 1.0
    above: float = 1.0
    always: bool = False
    together: bool = False
    embedded: str | None = None
    unless_distilled: bool = False
    switches: Mapping[str, Any] = field(default_factory=dict)
    distilled: bool = False
    steps: int = 4
    unsuited: str | None = None
    known: bool = True

    def guides(self, true_guidance: float, index: Mapping[str, Any]) -> bool:
        """Whether u is computed for this `true_guidance`. `index` is the pipeline's model_index.json."""
        if self.scale is None or (self.unless_distilled and index.get("is_distilled")):
            return False
        return self.always or self.neutral + true_guidance - 1 > self.above

    def branches(self, true_guidance: float, index: Mapping[str, Any]) -> int:
        """Predictions a step and image, each as expensive as a forward pass of one row."""
        return 2 if self.guides(true_guidance, index) else 1

    def rows(self, true_guidance: float, index: Mapping[str, Any]) -> int:
        """Rows of one forward pass for each image."""
        return self.branches(true_guidance, index) if self.together else 1

    def arguments(self, true_guidance: float) -> dict[str, Any]:
        """The scale as an argument of this class. UsageError for a scale that it does not support."""
        if self.scale is None:
            return {}
        scale = self.neutral + true_guidance - 1
        if true_guidance > 1 and not self.always and scale <= self.above:
            least = self.above - self.neutral + 1
            raise UsageError(
                "option_invalid",
                f"paint.true_guidance {true_guidance:g} has no effect: this pipeline applies guidance only above "
                f"{least:g}. Set 1, which turns guidance off, or a value above {least:g}.",
            )
        return {self.scale: scale}


@cache
def table() -> Mapping[str, Traits]:
    """The table `teachers.yaml`, by pipeline class."""
    return {name: _unknown(**row) if "unsuited" in row else Traits(**row) for name, row in facts(__file__).items()}


def _unknown(**row: Any) -> Traits:
    """The traits of a class that is not in the table: u + s·(c − u) in one forward pass, which needs the most
    memory."""
    return Traits(together=True, known=False, **row)


def of(name: str) -> Traits:
    """The traits of a pipeline class, which need not be in the table."""
    return table().get(name) or _unknown()


def rewrites(argument: str) -> bool:
    """Whether an argument, by its name, lets the pipeline rewrite the prompt."""
    return _REWRITES.search(argument) is not None


def guess(pipe: Any) -> Traits:
    """The traits of a pipeline's class. For a class that is not in the table, they follow from its signature."""
    if (traits := of(type(pipe).__name__)).known:
        return traits
    arguments = inspect.signature(pipe.__call__).parameters
    config = getattr(getattr(pipe, "transformer", None), "config", {})
    switches = {name: False for name, value in arguments.items() if rewrites(name) and value.default is True}
    switches |= {"use_resolution_binning": False}
    if "true_cfg_scale" in arguments:
        return Traits("true_cfg_scale", embedded="guidance_scale", switches=switches, known=False)
    if config.get("guidance_embeds") and "guidance_scale" in arguments:
        return Traits(None, embedded="guidance_scale", switches=switches, known=False)
    return _unknown(scale="guidance_scale" if "guidance_scale" in arguments else None, switches=switches)


def doubt(name: str, true_guidance: float) -> str | None:
    """A warning for painting with a class whose guidance is unknown, or that has none. None for other classes.
    UsageError for a class that cannot paint."""
    call = of(name)
    if call.unsuited:
        raise UsageError("model_unsupported", f"{name} cannot paint: {call.unsuited}. Choose another teacher.")
    if not call.known:
        return (
            f"The pipeline class {name} is not in diptych's table, so its guidance is unknown. paint.true_guidance "
            f"{true_guidance:g} is passed as most pipelines expect it, u + s·(c − u) with 1 as off. Compare a few "
            "grids at 1 and at 2 before you paint all."
        )
    if call.scale is None and true_guidance > 1:
        return f"{name} has no classifier-free guidance: paint.true_guidance {true_guidance:g} has no effect. Set 1."
    call.arguments(true_guidance)
    return None


def open_teacher(folder: Path, dtype: torch.dtype, kind: str | None = None, device: Any = "cpu") -> Any:
    """The text-to-image pipeline in a diffusers folder, on `device`, computing in `dtype` whatever its files hold; as
    the class `kind`, or as the one that the folder names. UserError if it cannot be opened."""
    pipe: Any = open_pipeline(folder, dtype, kind=kind)
    arguments = inspect.signature(pipe.__call__).parameters
    if absent := [name for name in ("prompt", "height", "width", "generator") if name not in arguments]:
        raise UserError(
            "model_unsupported",
            f"{folder} is a {type(pipe).__name__}, which has no {', '.join(absent)}. Choose a text-to-image pipeline "
            "as the teacher.",
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe if str(device) == "cpu" else pipe.to(device)


@dataclass(frozen=True)
class Distilled:
    """The evidence that a teacher is step-distilled, and its number of steps."""

    reason: str
    steps: int

    def describe(self, name: str) -> str:
        """A clause for messages."""
        return (
            f"The teacher {name} is step-distilled ({self.reason}): it samples in about {self.steps} steps, without "
            "classifier-free guidance"
        )


def examine(name: str) -> Distilled | None:
    """Whether a teacher (a folder, a hub name or `pocket`) is step-distilled, and why. None if nothing indicates
    it."""
    if name in models.BUILT_IN:
        return None
    folder = folder_of(name)
    title = _title(folder) if folder else name.partition("@")[0].rpartition("/")[2]
    return _of(title, lambda file: read(name, file))


def refuse(name: str, allowed: bool) -> None:
    """UsageError for training from a step-distilled teacher. Only a warning if the recipe allows it."""
    if (distilled := examine(name)) is None:
        return
    text = distilled.describe(name)
    if not allowed:
        raise UsageError(
            "teacher_distilled",
            f"{text}. Students trained from it generate gray or blocky images. Use the model that it was distilled "
            f"from as the teacher, or set {KEY}=true to train anyway.",
        )
    logging.getLogger("diptych").warning("%s. Training from it anyway (%s).", text, KEY)


def advice(
    name: str, steps: int, true_guidance: float, keys: tuple[str, str] = ("paint.steps", "paint.true_guidance")
) -> str | None:
    """A warning about steps or guidance that do not suit a step-distilled teacher. None if they do.

    Args:
        keys: the recipe's keys of `steps` and `true_guidance`, for the text.
    """
    if (distilled := examine(name)) is None:
        return None
    of_steps, of_guidance = keys
    changes = [f"{of_steps}={distilled.steps} instead of {steps}"] if steps > MOST else []
    changes += [f"{of_guidance}=1 instead of {true_guidance:g}"] if true_guidance > 1 else []
    if not changes:
        return None
    return f"{distilled.describe(name)}. More of either degrades its images: set {' and '.join(changes)}."


def cached() -> Iterator[tuple[str, str, Distilled | None]]:
    """The pipelines in the hub's cache: (hub name, pipeline class, evidence that it is distilled)."""
    from huggingface_hub.constants import HF_HUB_CACHE

    for index in sorted(Path(HF_HUB_CACHE).glob(f"models--*/snapshots/*/{INDEX}")):
        owner, _, repo = index.parts[-4].removeprefix("models--").partition("--")
        folder = index.parent
        yield f"{owner}/{repo}", class_of(folder), _of(repo, lambda file, at=folder: read_file(at / file))


def _of(name: str, config: Callable[[str], dict[str, Any]]) -> Distilled | None:
    """The evidence in a model's name and configs. `config` returns a JSON file of the model, empty if it is missing."""
    index, transformer = config(INDEX), config("transformer/config.json")
    scheduler = config("scheduler/scheduler_config.json")
    kind = str(index.get("_class_name", ""))
    traits = of(kind)
    if index.get("is_distilled") is True:
        return Distilled(f"{INDEX} has is_distilled: true", traits.steps)
    if traits.distilled:
        return Distilled(f"only such models use {kind}", traits.steps)
    if (used := str(scheduler.get("_class_name", ""))) in SCHEDULERS:
        return Distilled(f"its scheduler is {used}", traits.steps)
    origins = [str(config.get("_name_or_path", "")) for config in (index, transformer, scheduler)]
    for title in (name, *(part for origin in origins for part in _titles(origin))):
        if _named(title):
            number = re.search(rf"(?<![a-z]){_COUNT}(?![a-z])", title.lower())
            return Distilled(f"'{title}' is the name of such a model", int(number[1]) if number else traits.steps)
    if kind.startswith("ZImage") and scheduler.get("shift") == 3.0 and not scheduler.get("use_dynamic_shifting"):
        return Distilled("the shift of its scheduler is 3, Z-Image-Turbo's; the base model's is 6", traits.steps)
    if transformer.get("_class_name") == "FluxTransformer2DModel" and _is_schnell(transformer, scheduler):
        return Distilled("a FLUX.1 transformer without guidance_embeds, like FLUX.1-schnell", traits.steps)
    return None


def _is_schnell(transformer: Mapping[str, Any], scheduler: Mapping[str, Any]) -> bool:
    """Whether a FLUX transformer is FLUX.1-schnell's: 24 heads (small models have fewer), no guidance embedding, and a
    schedule that does not depend on the size."""
    whole = transformer.get("num_attention_heads", 24) == 24
    return whole and not transformer.get("guidance_embeds") and not scheduler.get("use_dynamic_shifting")


def _named(title: str) -> bool:
    """Whether a model's name indicates step distillation."""
    low = title.lower()
    return not _NOT.search(low) and bool(_NAME.search(low) or _KLEIN.search(low))


def _titles(origin: str) -> list[str]:
    """The names of a model in `_name_or_path`: the end of a path or hub name, and the hub name in a path of its
    cache."""
    parts = Path(origin).parts
    return [part for part in parts if part == parts[-1] or part.startswith("models--")]


def _title(folder: Path) -> str:
    """The name of a folder's model: the folder's name, or that of the hub's model for a snapshot in the cache."""
    path = folder.absolute()
    return path.parent.parent.name if path.parent.name == "snapshots" else path.name
