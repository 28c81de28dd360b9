"""Training a student: the two-panel objective, its data, and a loop that can be killed at any moment.

distill (entry point) · prepare (everything before the first step) · loop (the steps) · objective (the loss) · schedule
(the samples of a step) · cache (latents and captions) · parts (trained parameters, optimizer) · preference (an optional
last stage) · validate · checkpoint, metrics (they survive a kill) · processes (several GPUs) · export (the student's
folder and card).
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
