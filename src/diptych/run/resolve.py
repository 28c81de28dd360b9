"""The recipe of a folder: resolved and frozen when a run begins there, compared when it resumes, and named in full when
it differs.

    recipe = freeze(load("recipes/pocket.yaml"), Path("runs/first"))

What a recipe leaves to the machine (`device`, `threads`, precisions, `paint.memory: auto`) is decided once, by the
machine that paints, or taken from the run whose stages the new one takes over.
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

# Keys whose `auto` is settled by the machine that starts a run, besides `device` and `threads`; the last by the task.
OPEN = (("paint", "dtype"), ("paint", "memory"), ("distill", "precision"), ("distill", "instructions"))


class OtherRecipe(UsageError):
    """A folder that another recipe made: which keys differ, and the command that takes over what they leave alone."""

    def __init__(self, folder: Path, differ: str, recipe: str = "RECIPE", more: Sequence[str] = ()) -> None:
        """`recipe` is the recipe as the command line names it, and `more` its further words (`--set …`)."""
        self.folder, self.differ = folder, differ
        command = shlex.join(["diptych", "run", recipe, "--from", str(folder), "--out", free_name(folder), *more])
        super().__init__(
            f"{folder} was made by another recipe: {differ}; choose another --out, and take over every stage that the "
            f"change leaves as it was: {command}; or continue with {folder / 'recipe.yaml'}"
        )


def free_name(folder: Path) -> str:
    """A name beside a folder's that nothing has yet."""
    return next(name for number in count(2) if not place(name := f"{folder}-{number}").exists())


def freeze(recipe: Recipe, folder: Path, engine: Engine | None = None, source: Recipe | None = None) -> Recipe:
    """Writes the recipe that really runs to recipe.yaml, or checks that the one there is the same.

    What is left open (`settle`) becomes what the machine that paints has, and on a later call what the folder says;
    what is asked of a cluster (`ray`) is this call's, and so are the keys of training that change none of its weights
    so far (`train.checkpoint.may_change`). Raises OtherRecipe with the keys that differ.

    `source` is the frozen recipe of a run whose stages this one takes over: its machine's decisions hold here as well.
    """
    path = folder / "recipe.yaml"
    if not path.exists():
        recipe = tasks.resolve(recipe)
        recipe = decided(recipe, source) if source is not None else recipe
        if unsettled(recipe):
            recipe = (engine or LocalEngine()).there("paint", settle, recipe)
        write_atomic(path, recipe.dump().encode())
        return recipe
    frozen = recipes.load(path)
    wanted = decided(recipe, frozen)
    told = {key: getattr(recipe.distill, key) for key in may_change(frozen.distill, recipe.distill)}
    before, frozen = frozen, frozen.model_copy(update={"distill": frozen.distill.model_copy(update=told)})
    if differ := frozen.differences(wanted):
        there, here = frozen.flat(), wanted.flat()
        text = functools.partial(json.dumps, ensure_ascii=False)
        shown = [f"{key} ({text(there.get(key))} there, {text(here.get(key))} here)" for key in differ[:6]]
        more = f" and {len(differ) - 6} more" if len(differ) > 6 else ""
        raise OtherRecipe(folder, f"{', '.join(shown)}{more}")
    if frozen != before:
        write_atomic(path, frozen.dump().encode())
    return frozen.model_copy(update={"ray": recipe.ray})


def decided(recipe: Recipe, frozen: Recipe) -> Recipe:
    """A recipe whose open keys are as a frozen one has them."""
    kept: dict[str, Any] = {
        "device": frozen.device if recipe.device == "auto" else recipe.device,
        "threads": frozen.threads if recipe.threads is None else recipe.threads,
    }
    for section, key in OPEN:
        if getattr(mine := kept.get(section, getattr(recipe, section)), key) == "auto":
            kept[section] = mine.model_copy(update={key: getattr(getattr(frozen, section), key)})
    return recipe.model_copy(update=kept)


def unsettled(recipe: Recipe) -> bool:
    """Whether a recipe leaves `device`, `threads` or a key of `OPEN` open."""
    asked = [getattr(getattr(recipe, section), key) for section, key in OPEN]
    return recipe.device == "auto" or recipe.threads is None or "auto" in asked


def settle(recipe: Recipe) -> Recipe:
    """`device`, `threads` and the keys of `OPEN`, where they are left open, as what this machine has."""
    import torch

    from diptych.utils.machine import pick_precision

    device = recipe.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    update: dict[str, Any] = {"device": device, "threads": recipe.threads or torch.get_num_threads()}
    for section, key in (("paint", "dtype"), ("distill", "precision")):
        settled, _ = pick_precision(getattr(getattr(recipe, section), key), torch.device(device))
        update[section] = getattr(recipe, section).model_copy(update={key: settled})
    recipe = recipe.model_copy(update=update)
    if recipe.paint.memory == "auto" and recipe.draws_pairs():
        from diptych.stages.paint import resolve_memory

        memory = resolve_memory(recipe)
        recipe = recipe.model_copy(update={"paint": recipe.paint.model_copy(update={"memory": memory})})
    return recipe


def use_threads(threads: int | None) -> None:
    """Tells torch how many CPU threads to use; if it is not loaded yet, it will read so when it is.

    So a call that has nothing to compute does not wait seconds for torch.
    """
    if threads is None:
        return
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)
    else:
        os.environ |= thread_variables(threads)


@contextmanager
def enter(recipe: Recipe, folder: Path, engine: Engine, trains: bool, source: Recipe | None = None) -> Iterator[Recipe]:
    """The folder is this run's alone inside; gives the recipe as it is frozen there. To train, what another machine has
    trained is fetched. `source` is as for `freeze`.

    Of several processes the first locks and freezes, and the others read what it froze.
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
        held.callback(parallel.leave)  # also when stopped: torch's threads must not outlive Python
        with processes.together() as first:
            if first:
                held.enter_context(lock(folder))
                freeze(recipe, folder, engine)
                bring(folder, "student")
        yield recipes.load(folder / "recipe.yaml")
