"""Training a student: the two-panel objective, its data, and a loop that can be killed at any moment.

- `distill` is the entry point; `prepare` does everything before the first step; `loop` has the steps.
- `objective` has the loss, `schedule` the samples of a step, `cache` the latents and captions.
- `parts` has the trained parameters and the optimizer; `preference` is an optional last stage.
- `validate` measures, `checkpoint` and `metrics` survive a kill, `processes` is for several GPUs.
- `export` writes the student's folder and card.
"""

from __future__ import annotations

# Batch sizes of computations without gradients. They depend only on sizes, so that results do; `run.plan` uses them.


def canvases_at_once(height: int, width: int) -> int:
    """The number of canvases of this size in pixels that are encoded, decoded or generated together: as many pixels as
    one of FLUX's canvases, and at most 16 canvases."""
    return max(1, min(16, 512 * 1024 // (height * width)))


def captions_at_once(tokens: int) -> int:
    """The number of captions of N tokens that are encoded together: as many tokens as four of FLUX's captions, and at
    most 64 captions."""
    return max(1, min(64, 2048 // tokens))
