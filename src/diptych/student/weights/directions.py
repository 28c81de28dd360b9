"""Which weights can be converted into which: one table, read by `convert`, `diptych convert --table` and the docs.

`bits`: the tensors come back bit for bit. `function`: the same function, to float rounding (at most 1e-5 in a
student's latents), in other bits. `refused`: it cannot be done without loss, and `note` says why.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from diptych.errors import UsageError, UserError, nearest

LAYOUTS = {
    "released": "the authors' folder: transformer/ (or transformers/) with c_embedder, and perhaps a LoRA file",
    "folded": "a diffusers folder: transformer/ is a stock FLUX-Control transformer",
    "control-lora": "pytorch_lora_weights.safetensors, which adapts x_embedder too; goes on a teacher",
    "file": "one .safetensors file: diffusers' keys, the released keys, or Black Forest Labs' own keys",
    "gguf": "one .gguf file, quantized or not",
}
STYLES = {"lora-diffusers": "diffusers", "lora-comfyui": "comfyui", "lora-kohya": "kohya"}  # one LoRA file each
FILES = {
    "file": ".safetensors",
    "original": ".safetensors",
    "exported": ".pt2",
    **dict.fromkeys(STYLES, ".safetensors"),
}
TARGETS = ("released", "folded", "control-lora", *FILES)

_Equality = Literal["bits", "function", "refused"]


@dataclass(frozen=True)
class Direction:
    """One row: whether and how weights of layout `source` become weights of layout `target`."""

    source: str
    target: str
    equality: _Equality
    base: bool  # whether the teacher is needed
    note: str


_SAME = "with --dtype (rewritten in another precision) or --fuse"
_SPLIT = "the input bias comes back in its two parts if they were kept; else it goes to x_embedder whole"
_FUSED = "added into the teacher's weights; if those are in half precision, --dtype says whether to round"
_RANKS = "the input layer exactly; other layers only where they differ from the teacher by a low rank"
_CONFIG = "config, settings and bias split go into the file's header"
_DEQUANTIZED = "dequantized, in float32 unless --dtype says otherwise"
_QUANTIZED = (
    "quantizing changed every layer, so the difference from the teacher is no low rank; "
    "use the weights that the GGUF file was made from"
)
_ORIGINAL: tuple[tuple[str, _Equality, bool, str], ...] = (
    ("released", "bits", False, "one file in Black Forest Labs' keys; a LoRA beside the weights must be fused"),
    ("folded", "bits", False, "one file in Black Forest Labs' keys; a LoRA beside the weights must be fused"),
    ("control-lora", "function", True, f"{_FUSED}; Black Forest Labs' keys"),
    ("file", "bits", False, "into Black Forest Labs' keys"),
    ("gguf", "function", False, _DEQUANTIZED),
)
_LORA: dict[str, tuple[_Equality, bool, str]] = {
    "released": ("function", True, _RANKS),
    "folded": ("function", True, _RANKS),
    "control-lora": ("function", False, "any LoRA of a FLUX transformer; the same weight update under other keys"),
    "file": ("function", True, _RANKS),
    "gguf": ("refused", False, _QUANTIZED),
}
_EXPORTED = "a torch.export program in float32, for any number of text and image tokens; compared before it is kept"

DIRECTIONS = (
    Direction("released", "released", "bits", False, _SAME),
    Direction("released", "folded", "bits", False, "the two parts of the input bias are kept beside the weights"),
    Direction("released", "control-lora", "function", True, _RANKS),
    Direction("released", "file", "bits", False, f"{_CONFIG}; a LoRA beside the weights must be fused"),
    Direction("folded", "released", "bits", False, _SPLIT),
    Direction("folded", "folded", "bits", False, f"{_SAME}; with --base the teacher's other parts are added"),
    Direction("folded", "control-lora", "function", True, _RANKS),
    Direction("folded", "file", "bits", False, f"{_CONFIG}; a LoRA beside the weights must be fused"),
    Direction("control-lora", "released", "function", True, _FUSED),
    Direction("control-lora", "folded", "function", True, _FUSED),
    Direction("control-lora", "control-lora", "refused", False, "it is one already: copy the file"),
    Direction("control-lora", "file", "function", True, f"{_FUSED}; {_CONFIG}"),
    Direction("file", "released", "bits", False, _SPLIT),
    Direction("file", "folded", "bits", False, "Black Forest Labs' keys are renamed, and fused layers cut apart"),
    Direction("file", "control-lora", "function", True, _RANKS),
    Direction("file", "file", "bits", False, f"into diffusers' keys; {_CONFIG}"),
    Direction("gguf", "released", "function", False, _DEQUANTIZED),
    Direction("gguf", "folded", "function", False, _DEQUANTIZED),
    Direction(
        "gguf",
        "control-lora",
        "refused",
        False,
        _QUANTIZED,
    ),
    Direction("gguf", "file", "function", False, _DEQUANTIZED),
    *(Direction(source, "original", equality, base, note) for source, equality, base, note in _ORIGINAL),
    *(Direction(source, target, *how) for target in STYLES for source, how in _LORA.items()),
    *(
        Direction(source, "exported", "function", source == "control-lora", _EXPORTED)
        for source in LAYOUTS
        if source != "gguf"
    ),
    Direction("gguf", "exported", "refused", False, "its layers dequantize as they go; convert it to folded first"),
)


def find(source: str, target: str) -> Direction:
    """The table's row; UsageError for a target that does not exist, UserError for a direction that is refused."""
    if target not in TARGETS:
        hint = nearest(target, TARGETS)
        extra = "; GGUF is read, not written" if target == "gguf" else ""
        raise UsageError(f"--to {target}: the targets are {', '.join(TARGETS)}{hint}{extra}")
    row = next(row for row in DIRECTIONS if (row.source, row.target) == (source, target))
    if row.equality == "refused":
        raise UserError(f"{source} → {target} is refused: {row.note}")
    return row


def table() -> str:
    """The table as text."""
    head = f"{'from':<13}{'to':<14}{'keeps':<10}{'base':<6}"
    rows = [f"{r.source:<13}{r.target:<14}{r.equality:<10}{'yes' if r.base else '':<6}{r.note}" for r in DIRECTIONS]
    return "\n".join([head, *rows, "", *(f"{name}: {what}" for name, what in LAYOUTS.items())])
