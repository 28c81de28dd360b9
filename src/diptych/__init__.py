"""diptych: Diffusion Self-Distillation. A text-to-image model learns to take a reference from data it drew itself.

`from diptych import Student` is the one object most people need; it is imported on first use, so that `import diptych`
stays light.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diptych.api import Student

__all__ = ["Student", "__version__"]
__version__ = "0.1.0"


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name == "Student":
        from diptych.api import Student

        return Student
    raise AttributeError(f"module 'diptych' has no attribute '{name}'")
