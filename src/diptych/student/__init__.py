"""The student: a transformer that takes a reference image, and the pipeline around it.

`load` opens a student from any layout, and `save` writes an ordinary diffusers folder. The other modules are `canvas`
(panels, fit), `pipeline` and `sampler`, `weights` (reading, folding, LoRA, converting), `runtime` (memory, speed) and
`families`. Nothing heavy is imported before use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diptych.student.loading import load, save

__all__ = ["load", "save"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from diptych.student import loading

        return getattr(loading, name)
    raise AttributeError(f"module 'diptych.student' has no attribute '{name}'")
