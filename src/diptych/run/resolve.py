"""The recipe of a run folder: resolved and frozen when the run begins, and compared when it resumes.

    recipe = freeze(load("recipes/pocket.yaml"), Path("runs/first"))

Keys that a recipe leaves to the machine (`device`, `threads`, precisions, `paint.memory: auto`) are resolved once, by
the machine that paints. A run that takes over stages of another one takes their values as well.
"""

from __future__ import annotations

import functools
import json
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from diptych import recipe as recipes
from diptych.data.engine import Engine, LocalEngine
from diptych.data.places import bring, lock
from diptych.errors import UsageError
from diptych.recipe import tasks
from diptych.recipe.schema import Recipe
from diptych.student.runtime import parallel
from diptych.train.checkpoint import may_change
from diptych.utils.io import write_atomic
from diptych.utils.machine import thread_variables
from diptych.utils.paths import place

# Keys whose `auto` is resolved when a run begins, besides `device` and `threads`. The last depends on the task.
AUTO = (("paint", "dtype"), ("paint", "memory"), ("distill", "precision"), ("distill", "instructions"))


class OtherRecipe(UsageError):
    """A folder of another recipe. The message has the keys that differ and the command that reuses unchanged stages."""

    def __init__(self, folder: Path, differ: str, recipe: str = "RECIPE", more: Sequence[str] = ()) -> None:
        """`recipe` is the recipe's name on the command line, and `more` are its further arguments (`--set …`)."""
        self.folder, self.differ = folder, differ
        command = shlex.join(["diptych", "run", recipe, "--from", str(folder), "--out", free_name(folder), *more])
        super().__init__(
            "recipe_mismatch",
            f"{folder} was made with another recipe: {differ}. Continue with {folder / 'recipe.yaml'}, or choose "
            f"another --out and reuse every stage that does not change: {command}",
        )


def free_name(folder: Path) -> str:
    """Return the first unused name FOLDER-N."""
    return next(name for number in count(2) if not place(name := f"{folder}-{number}").exists())


def freeze(recipe: Recipe, folder: Path, engine: Engine | None = None, source: Recipe | None = None) -> Recipe:
    """Write the resolved recipe to recipe.yaml, or check that the existing one is the same; return it.

    `auto` keys are resolved on the machine that paints (`resolve_auto`), and on a later call they are read from the
    folder. Requirements of a cluster (`ray`) are those of this call, and so are keys of training that do not change its
    weights so far (`train.checkpoint.may_change`). Raises OtherRecipe with the keys that differ.

    `source` is the frozen recipe of a run whose stages this one takes over, with the `auto` keys of its machine.
    """
    path = folder / "recipe.yaml"
    if not path.exists():
        recipe = tasks.resolve(recipe)
        recipe = with_resolved(recipe, source) if source is not None else recipe
        if has_auto(recipe):
            recipe = (engine or LocalEngine()).there("paint", resolve_auto, recipe)
        write_atomic(path, recipe.dump().encode())
        return recipe
    frozen = recipes.load(path)
    wanted = with_resolved(recipe, frozen)
    changed = {key: getattr(recipe.distill, key) for key in may_change(frozen.distill, recipe.distill)}
    before, frozen = frozen, frozen.model_copy(update={"distill": frozen.distill.model_copy(update=changed)})
    if differ := frozen.differences(wanted):
        there, here = frozen.flat(), wanted.flat()
        text = functools.partial(json.dumps, ensure_ascii=False)
        shown = [f"{key} ({text(there.get(key))} there, {text(here.get(key))} here)" for key in differ[:6]]
        more = f" and {len(differ) - 6} more" if len(differ) > 6 else ""
        raise OtherRecipe(folder, f"{', '.join(shown)}{more}")
    if frozen != before:
        write_atomic(path, frozen.dump().encode())
    return frozen.model_copy(update={"ray": recipe.ray})


def with_resolved(recipe: Recipe, frozen: Recipe) -> Recipe:
    """Return a recipe with the `auto` keys of a frozen one."""
    kept: dict[str, Any] = {
        "device": frozen.device if recipe.device == "auto" else recipe.device,
        "threads": frozen.threads if recipe.threads is None else recipe.threads,
    }
    for section, key in AUTO:
        if getattr(mine := kept.get(section, getattr(recipe, section)), key) == "auto":
            kept[section] = mine.model_copy(update={key: getattr(getattr(frozen, section), key)})
    return recipe.model_copy(update=kept)


def has_auto(recipe: Recipe) -> bool:
    """Whether `device`, `threads` or a key of `AUTO` is not resolved."""
    values = [getattr(getattr(recipe, section), key) for section, key in AUTO]
    return recipe.device == "auto" or recipe.threads is None or "auto" in values


def resolve_auto(recipe: Recipe) -> Recipe:
    """Return a recipe with `device`, `threads` and the keys of `AUTO` resolved for this machine."""
    import torch

    from diptych.utils.machine import pick_device, pick_precision

    device = pick_device(recipe.device)
    update: dict[str, Any] = {"device": str(device), "threads": recipe.threads or torch.get_num_threads()}
    for section, key in (("paint", "dtype"), ("distill", "precision")):
        precision, _ = pick_precision(getattr(getattr(recipe, section), key), device)
        update[section] = getattr(recipe, section).model_copy(update={key: precision})
    recipe = recipe.model_copy(update=update)
    if recipe.paint.memory == "auto" and recipe.draws_pairs():
        from diptych.stages.paint import resolve_memory

        memory = resolve_memory(recipe)
        recipe = recipe.model_copy(update={"paint": recipe.paint.model_copy(update={"memory": memory})})
    return recipe


def use_threads(threads: int | None) -> None:
    """Set torch's number of CPU threads. If torch is not loaded, set the variables that it reads later.

    So a call that computes nothing does not need the seconds in which torch loads.
    """
    if threads is None:
        return
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)
    else:
        os.environ |= thread_variables(threads)


@contextmanager
def enter(recipe: Recipe, folder: Path, engine: Engine, trains: bool, source: Recipe | None = None) -> Iterator[Recipe]:
    """Lock the folder inside the block, and yield the recipe that is frozen there.

    If the run trains, the training state of another machine is fetched. `source` is the argument of `freeze`. Of
    several processes, the first locks and freezes, and the others read the frozen recipe.
    """
    if parallel.processes() == 1:
        with lock(folder):
            frozen = freeze(recipe, folder, engine, source)
            if trains:
                bring(folder, "student")
            yield frozen
        return
    from diptych.train.processes import join
    from diptych.utils.machine import pick_device

    processes, _ = join(pick_device(recipe.device))
    with ExitStack() as held:
        held.callback(parallel.leave)  # also after an interrupt: torch's threads must not outlive Python
        with processes.together() as first:
            if first:
                held.enter_context(lock(folder))
                freeze(recipe, folder, engine)
                bring(folder, "student")
        yield recipes.load(folder / "recipe.yaml")
