"""Names for the completion of the shell (`diptych --install-completion`), which itself completes paths.

Each function gets the beginning of a word and returns the names that continue it. Models and other heavy parts are
imported inside, because every press of Tab starts Python.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path


def _starting(names: Callable[[], Iterable[str]]) -> Callable[[str], list[str]]:
    return lambda incomplete: [name for name in names() if name.startswith(incomplete)]


def _recipes() -> list[str]:
    from diptych import recipe

    return recipe.names()


def _tasks() -> list[str]:
    from diptych.recipe import tasks

    return tasks.names()


def _runs() -> list[str]:
    return sorted(str(path.parent) for path in Path("runs").glob("*/recipe.yaml"))


def _students() -> list[str]:
    return ["pocket", *(run for run in _runs() if Path(run, "student").is_dir())]


def _teachers() -> list[str]:
    from diptych.run.plan import sizes

    return ["pocket", *sizes.known()]


def _formats() -> list[str]:
    from diptych.data.interop import FORMATS

    return list(FORMATS)


recipes, tasks, runs = _starting(_recipes), _starting(_tasks), _starting(_runs)
students, teachers, formats = _starting(_students), _starting(_teachers), _starting(_formats)
