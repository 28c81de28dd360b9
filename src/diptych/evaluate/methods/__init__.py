"""What answers a suite: students, baselines and anchors, by name. Adding a method is adding one class to `METHODS`.

`base` says what a method is, `students` holds the models that are evaluated, `baselines` what needs no training;
`tuning` trains a LoRA for each subject, `adapter` an image-embedding adapter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from diptych import recipe as recipes
from diptych.errors import UsageError, nearest
from diptych.evaluate.evaluation import POCKET, Evaluation
from diptych.evaluate.methods.baselines import Copy, Inpaint, Other, Stock, TextOnly, Truth
from diptych.evaluate.methods.common import Context, Method
from diptych.evaluate.methods.students import OtherStudent, RunStudent, StudentShipped, locate

if TYPE_CHECKING:
    from diptych.recipe.schema import Evaluate

ANCHORS = ("truth", "other")
TRAINED = ("tuned", "adapter")  # baselines that train the teacher
STUDENTS = ("student", "student_shipped")  # methods of a run; elsewhere they are models


def _tuned(context: Context) -> dict[str, Method]:
    from diptych.evaluate.methods.tuning import sweep

    return sweep(context)


def _adapter(context: Context) -> Method:
    from diptych.evaluate.methods.adapter import ImageAdapter

    return ImageAdapter(context)


METHODS: dict[str, Callable[[Context], Method | dict[str, Method]]] = {
    "text_only": TextOnly,
    "copy": Copy,
    "inpaint": Inpaint,
    "student": RunStudent,
    "student_shipped": StudentShipped,
    "tuned": _tuned,
    "adapter": _adapter,
    "pipeline": Stock,
    "truth": Truth,
    "other": Other,
}


def drawn(settings: Evaluate) -> list[str]:
    """The methods that a recipe asks for and, with its yardsticks, the anchors, each once: what draws every sample."""
    return list(dict.fromkeys([*settings.methods, *(ANCHORS if settings.yardsticks else ())]))


def named(name: str, context: Context) -> dict[str, Method]:
    """The methods that a recipe's name stands for: one of that name, or the several of a sweep."""
    made = METHODS[name](context)
    return made if isinstance(made, dict) else {name: made}


def gather(evaluation: Evaluation, context: Context, anchors: bool) -> dict[str, Method]:
    """The evaluation's models and baselines by name, then the anchors of a suite that has the truth.

    UsageError for a baseline that is none, or that needs a teacher that is not named.
    """
    found: dict[str, Method] = {}
    for name, place in evaluation.models.items():
        where, run = locate(place)
        base = evaluation.base or (recipes.load(run / "recipe.yaml").teacher if run else None)
        found[name] = OtherStudent(name, where, base, context, evaluation)
    known = [name for name in METHODS if name not in (*ANCHORS, *STUDENTS)]
    for name in evaluation.baselines:
        if name not in known:
            if name in STUDENTS:
                raise UsageError(f"--baseline {name}: is a model here; write --model RUN, or --model {POCKET}")
            raise UsageError(f"unknown baseline '{name}'; known: {', '.join(known)}{nearest(name, known)}")
        if name in found:
            raise UsageError(f"a model is called {name}, as a baseline is; name it: --model NAME=MODEL")
        found |= named(name, context)
        drawn_by_it = name in TRAINED or isinstance(found.get(name), TextOnly)
        if drawn_by_it and evaluation.base is None and evaluation.data is not None:
            raise UsageError(f"--baseline {name} draws with the teacher; name it with --base")
    for name in ANCHORS if anchors else ():
        if name in found:
            raise UsageError(f"a model is called {name}, as an anchor is; name it: --model NAME=MODEL")
        found |= named(name, context)
    return found
