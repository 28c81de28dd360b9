"""Training a student: the two-panel objective, its data, and a loop that can be killed at any moment.

distill (front door) · prepare (everything up to the first step) · loop (the steps) · objective (the loss) · schedule
(what a step sees) · cache (what is encoded once) · parts (what is trained) · preference (a last stage) · validate ·
checkpoint, metrics (what survives a kill) · processes (several GPUs) · export (the student's folder and card).
"""

from __future__ import annotations

# Batch sizes where nothing is learnt. They depend on sizes alone, and so do the bytes; `run.plan` reads them too.


def canvases_at_once(height: int, width: int) -> int:
    """How many canvases of this size in pixels are encoded, decoded or drawn together where nothing is learnt from
    them: as many as one of FLUX's is large, and at most 16. Fixed, so that the bytes depend on the size alone."""
    return max(1, min(16, 512 * 1024 // (height * width)))


def captions_at_once(tokens: int) -> int:
    """How many captions of N tokens are encoded together: four of FLUX's, and at most 64."""
    return max(1, min(64, 2048 // tokens))
