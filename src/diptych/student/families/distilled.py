"""Finds step-distilled teachers (FLUX.1-schnell, FLUX.2 klein, the Turbo models) from names and configs.

A step-distilled model draws in a few steps and without classifier-free guidance. It no longer predicts the velocity at
every noise level, so a student that is trained from it with the ordinary loss draws gray or blocky images: train from
the base model. Painting with one works with its few steps.

Nothing is downloaded and no weight is read: a hub name is looked up in the hub's cache.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diptych.errors import UsageError
from diptych.utils import models
from diptych.utils.configs import INDEX, class_of, folder_of, read, read_file

KEY = "distill.allow_distilled_teacher"
FEW = 4  # steps, where nothing says how many
MOST = 12  # a step-distilled teacher that is painted with more steps than this is not used as it is made

STEPS: Mapping[str, int] = {
    "ErnieImagePipeline": 8,
    "Krea2Pipeline": 8,
    "SanaSprintPipeline": 2,
    "ZImageOmniPipeline": 8,
    "ZImagePipeline": 8,
}
"""Steps that a pipeline's distilled checkpoints are made for; the others' are `FEW`."""
ALWAYS = ("DreamLiteMobilePipeline", "Flux2KleinKVPipeline", "LatentConsistencyModelPipeline", "SanaSprintPipeline")
"""Pipelines that only distilled models have."""
SCHEDULERS = ("FlowMatchLCMScheduler", "LCMScheduler", "SCMScheduler", "TCDScheduler")
"""Schedulers that only consistency models use."""
_WORDS = "schnell|turbo|lightning|hyper-?(?:sd|flux)|lcm|sprint|tcd|dmd2?|distill(?:ed)?"
_COUNT = r"(?<![0-9])([1-9]|1[0-2])[-_ ]?steps?"
_NAME = re.compile(rf"(?<![a-z])(?:{_WORDS}|{_COUNT})(?![a-z])")
_NOT = re.compile(r"(un|non|de)[-_ ]?distill|not[-_ ]distill")
_KLEIN = re.compile(r"flux\.?2[-_ ]klein(?!.*base)")


@dataclass(frozen=True)
class Distilled:
    """What shows that a teacher is step-distilled, and how many steps it is made for."""

    reason: str
    steps: int

    def describe(self, name: str) -> str:
        return (
            f"the teacher {name} is step-distilled ({self.reason}): it draws in about {self.steps} steps, without "
            "classifier-free guidance"
        )


def examine(name: str) -> Distilled | None:
    """What is known of a teacher by the name that a recipe gives it: a folder, a hub name or `pocket`. None if nothing
    shows that it is distilled."""
    if name in models.BUILT_IN:
        return None
    folder = folder_of(name)
    title = _title(folder) if folder else name.partition("@")[0].rpartition("/")[2]
    return _of(title, lambda file: read(name, file))


def refuse(name: str, allowed: bool) -> None:
    """UsageError for a step-distilled teacher that is to be trained from, a warning where the recipe allows it."""
    if (found := examine(name)) is None:
        return
    text = found.describe(name)
    if not allowed:
        raise UsageError(
            f"{text}. Students that are trained from one draw gray or blocky images. Name the model that it was "
            f"distilled from as the teacher, or set {KEY}=true to train anyway"
        )
    logging.getLogger("diptych").warning("%s; training from it all the same (%s)", text, KEY)


def advice(name: str, steps: int, true_guidance: float, keys: tuple[str, str] = ("paint.steps", "")) -> str | None:
    """What is wrong with how a teacher is to be painted with; None if nothing is.

    Args:
        keys: the recipe's keys of `steps` and `true_guidance`, for the text.
    """
    if (found := examine(name)) is None:
        return None
    of_steps, of_guidance = keys[0], keys[1] or "paint.true_guidance"
    changes = [f"{of_steps}={found.steps} instead of {steps}"] if steps > MOST else []
    changes += [f"{of_guidance}=1 instead of {true_guidance:g}"] if true_guidance > 1 else []
    if not changes:
        return None
    return f"{found.describe(name)}; its images get worse with more of both: set {' and '.join(changes)}"


def cached() -> Iterator[tuple[str, str, Distilled | None]]:
    """The pipelines in the hub's cache: (hub name, pipeline class, what shows that it is distilled)."""
    from huggingface_hub.constants import HF_HUB_CACHE

    for index in sorted(Path(HF_HUB_CACHE).glob(f"models--*/snapshots/*/{INDEX}")):
        owner, _, repo = index.parts[-4].removeprefix("models--").partition("--")
        folder = index.parent
        yield f"{owner}/{repo}", class_of(folder), _of(repo, lambda file, at=folder: read_file(at / file))


def _of(name: str, config: Callable[[str], dict[str, Any]]) -> Distilled | None:
    """What a model's name and its configs show. `config` gives a JSON file of the model, empty if it is not there."""
    index, transformer = config(INDEX), config("transformer/config.json")
    scheduler = config("scheduler/scheduler_config.json")
    kind = str(index.get("_class_name", ""))
    steps = STEPS.get(kind, FEW)
    if index.get("is_distilled") is True:
        return Distilled(f"{INDEX} has is_distilled: true", steps)
    if kind in ALWAYS:
        return Distilled(f"a {kind} is made for such models", steps)
    if (used := str(scheduler.get("_class_name", ""))) in SCHEDULERS:
        return Distilled(f"its scheduler is a {used}", steps)
    origins = [str(config.get("_name_or_path", "")) for config in (index, transformer, scheduler)]
    for title in (name, *(part for origin in origins for part in _titles(origin))):
        if _named(title):
            number = re.search(rf"(?<![a-z]){_COUNT}(?![a-z])", title.lower())
            return Distilled(f"'{title}' is the name of such a model", int(number[1]) if number else steps)
    if kind.startswith("ZImage") and scheduler.get("shift") == 3.0 and not scheduler.get("use_dynamic_shifting"):
        return Distilled("the shift of its scheduler is 3, Z-Image-Turbo's; the base model's is 6", steps)
    if transformer.get("_class_name") == "FluxTransformer2DModel" and _is_schnell(transformer, scheduler):
        return Distilled("a FLUX.1 transformer without guidance_embeds, as FLUX.1-schnell has it", steps)
    return None


def _is_schnell(transformer: Mapping[str, Any], scheduler: Mapping[str, Any]) -> bool:
    """24 heads are FLUX.1's: small models have fewer, and are not distilled for lacking the embedding. A schedule that
    moves with the size is that of a model with many steps."""
    whole = transformer.get("num_attention_heads", 24) == 24
    return whole and not transformer.get("guidance_embeds") and not scheduler.get("use_dynamic_shifting")


def _named(title: str) -> bool:
    """Whether a model's name says that it is step-distilled."""
    low = title.lower()
    return not _NOT.search(low) and bool(_NAME.search(low) or _KLEIN.search(low))


def _titles(origin: str) -> list[str]:
    """What `_name_or_path` calls a model: the end of a path or hub name, and the hub name in a path of its cache."""
    parts = Path(origin).parts
    return [part for part in parts if part == parts[-1] or part.startswith("models--")]


def _title(folder: Path) -> str:
    """What a folder's model is called: its name, or that of the hub's model where it is a snapshot in the cache."""
    path = folder.absolute()
    return path.parent.parent.name if path.parent.name == "snapshots" else path.name
