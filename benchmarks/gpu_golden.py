"""The release's fixture on a GPU in float32 and bfloat16, and how far it is from what the release computed (`gpu.py`)."""

from __future__ import annotations

from typing import Any

import inference
import measuring
import torch


def run(sheet: measuring.Sheet, device: torch.device, small: bool) -> None:
    sheet.line("float32", lambda: far(device, torch.float32))
    if device.type == "cuda":
        before = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = False
        sheet.line("float32 without tf32 convolutions", lambda: far(device, torch.float32))
        torch.backends.cudnn.allow_tf32 = before
        sheet.note(cudnn_allow_tf32=before, matmul_allow_tf32=torch.backends.cuda.matmul.allow_tf32)
    if not small:
        sheet.line("bfloat16", lambda: far(device, torch.bfloat16))


def far(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    found = inference.golden_on(device, dtype)
    return {f"{way} {case}": numbers for way, cases in found.items() for case, numbers in cases.items()}
