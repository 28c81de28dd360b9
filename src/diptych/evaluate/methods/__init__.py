"""Methods by name: students, baselines and anchors. To add a method, add a class to `METHODS`.

`common` defines a method. `students` has the models to evaluate, `baselines` the methods without training, `tuning` a
LoRA for each subject, and `adapter` an image-embedding adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeVar

from diptych import recipe as recipes
from diptych.errors import UsageError, UserError, nearest
from diptych.evaluate.evaluation import POCKET, Evaluation
from diptych.evaluate.methods.baselines import Copy, Inpaint, Other, Stock, TextOnly, Truth
from diptych.evaluate.methods.common import Context, Method
from diptych.evaluate.methods.students import OtherStudent, PackagedStudent, RunStudent, locate

if TYPE_CHECKING:
    from diptych.recipe.schema import Evaluate

_Method = TypeVar("_Method", bound=Method)

ANCHORS = ("truth", "other")
TRAINED = ("tuned", "adapter")  # baselines that train the teacher
STUDENTS = ("student", "student_shipped")  # methods of a run; an evaluation has models instead


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
    "student_shipped": PackagedStudent,
    "tuned": _tuned,
    "adapter": _adapter,
    "pipeline": Stock,
    "truth": Truth,
    "other": Other,
}


def method_names(settings: Evaluate) -> list[str]:
    """The methods of a recipe and, with its yardsticks, the anchors, each once."""
    return list(dict.fromkeys([*settings.methods, *(ANCHORS if settings.yardsticks else ())]))


def build(name: str, context: Context) -> dict[str, Method]:
    """The methods that a name in a recipe stands for: one of that name, or all of a sweep."""
    made = METHODS[name](context)
    return made if isinstance(made, dict) else {name: made}


def available(methods: Mapping[str, _Method]) -> tuple[dict[str, _Method], dict[str, str]]:
    """The methods whose weights are there; and a packaged student that is not installed, with the reason.

    UserError if the weights of another method are missing.
    """
    usable: dict[str, _Method] = {}
    skipped: dict[str, str] = {}
    for name, method in methods.items():
        try:
            method.fingerprint()
        except UserError as error:
            if name != "student_shipped":
                raise
            skipped[name] = str(error)
            continue
        usable[name] = method
    return usable, skipped


def of_evaluation(evaluation: Evaluation, context: Context, anchors: bool) -> dict[str, Method]:
    """The models and baselines of an evaluation by name, then the anchors if the suite has them.

    UsageError for an unknown baseline, a name used twice, or a baseline that needs a teacher when none is set.
    """
    methods: dict[str, Method] = {}
    for name, model in evaluation.models.items():
        weights, run = locate(model)
        base = evaluation.base or (recipes.load(run / "recipe.yaml").teacher if run else None)
        methods[name] = OtherStudent(name, weights, base, context, evaluation)
    known = [name for name in METHODS if name not in (*ANCHORS, *STUDENTS)]
    for name in (*evaluation.baselines, *(ANCHORS if anchors else ())):
        if name in STUDENTS and name not in known:
            hint = f"Pass --model RUN, or --model {POCKET}."
            raise UsageError("option_unsuited", f"--baseline {name}: this is a model, not a baseline. {hint}")
        if name not in (*known, *ANCHORS) or (name in ANCHORS and name in evaluation.baselines):
            hint = nearest(name, known)
            raise UsageError("name_unknown", f"Unknown baseline '{name}'. Known baselines: {', '.join(known)}{hint}")
        if name in methods:
            message = f"Two methods have the name {name}. Rename the model: --model NAME=MODEL."
            raise UsageError("output_collision", message)
        methods |= build(name, context)
        needs_teacher = name in TRAINED or isinstance(methods.get(name), TextOnly)
        if needs_teacher and evaluation.base is None and evaluation.data is not None:
            raise UsageError("option_missing", f"--baseline {name} generates with the teacher. Pass it with --base.")
    return methods
