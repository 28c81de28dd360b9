"""The release's fixture on a GPU in float32 and bfloat16: its difference from the release's result (`gpu.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import inference
import measuring
import torch


def run(sheet: measuring.Sheet, device: torch.device, small: bool) -> None:
    sheet.line("float32", lambda: far(device, torch.float32, ("plain",) if small else ("plain", "guided")))
    if device.type == "cuda":
        before = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = False
        sheet.line("float32 without tf32 convolutions", lambda: far(device, torch.float32))
        torch.backends.cudnn.allow_tf32 = before
        sheet.note(cudnn_allow_tf32=before, matmul_allow_tf32=torch.backends.cuda.matmul.allow_tf32)
    if not small:
        sheet.line("bfloat16", lambda: far(device, torch.bfloat16))


def far(device: torch.device, dtype: torch.dtype, cases: Sequence[str] = ("plain", "guided")) -> dict[str, Any]:
    found = inference.golden_on(device, dtype, cases)
    return {f"{way} {case}": numbers for way, cases in found.items() for case, numbers in cases.items()}
