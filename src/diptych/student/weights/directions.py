"""Which weights can be converted into which: the table `directions.yaml`, read by `convert`, `diptych convert --table`
and the docs. Imports nothing heavy: the command line names the targets in its help."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

from diptych.errors import UsageError, UserError, nearest
from diptych.utils.documents import facts

STYLES = {"lora-diffusers": "diffusers", "lora-comfyui": "comfyui", "lora-kohya": "kohya"}  # one LoRA file each
FILES = {
    "file": ".safetensors",
    "original": ".safetensors",
    "exported": ".pt2",
    **dict.fromkeys(STYLES, ".safetensors"),
}
TARGETS = ("released", "folded", "control-lora", *FILES)


@dataclass(frozen=True)
class Direction:
    """One row: whether and how weights of layout `source` become weights of layout `target`."""

    source: str
    target: str
    equality: Literal["bits", "function", "refused"]
    base: bool  # whether the teacher is needed
    note: str


@cache
def rows() -> tuple[Direction, ...]:
    """The table."""
    return tuple(Direction(*row) for row in facts(__file__)["directions"])


def find(source: str, target: str) -> Direction:
    """The table's row; UsageError for a target that does not exist, UserError for a direction that is refused."""
    if target not in TARGETS:
        hint = nearest(target, TARGETS)
        extra = "; GGUF is read, not written" if target == "gguf" else ""
        raise UsageError(f"--to {target}: the targets are {', '.join(TARGETS)}{hint}{extra}")
    row = next(row for row in rows() if (row.source, row.target) == (source, target))
    if row.equality == "refused":
        raise UserError(f"{source} → {target} is refused: {row.note}")
    return row


def table() -> str:
    """The table as text."""
    head = f"{'from':<13}{'to':<14}{'keeps':<10}{'base':<6}"
    lines = [f"{r.source:<13}{r.target:<14}{r.equality:<10}{'yes' if r.base else '':<6}{r.note}" for r in rows()]
    return "\n".join([head, *lines, "", *(f"{name}: {what}" for name, what in facts(__file__)["layouts"].items())])
