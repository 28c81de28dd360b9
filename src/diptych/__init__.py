"""diptych: Diffusion Self-Distillation. A text-to-image model learns to take a reference from data that it generates.

`Student` is the object that most users need. `Report` shows a run in a notebook. `load` opens a student as a
`DiptychPipeline`, a diffusers pipeline. They are imported on first use, so that `import diptych` is fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from diptych.utils.machine import VERSION as __version__

if TYPE_CHECKING:
    from diptych.apps.student import Student
    from diptych.evaluate.report.notebook import Report
    from diptych.student import load
    from diptych.student.pipeline import DiptychPipeline

__all__ = ["DiptychPipeline", "Report", "Student", "__version__", "load"]
_HOMES = {
    "DiptychPipeline": "student.pipeline",
    "Report": "evaluate.report.notebook",
    "Student": "apps.student",
    "load": "student",
}


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"diptych.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'diptych' has no attribute '{name}'")
