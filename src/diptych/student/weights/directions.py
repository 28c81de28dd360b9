"""Which weights can be converted into which: the table `directions.yaml`, for `convert`, `diptych convert --table` and
the docs. A module without heavy imports, because the command line names the targets in its help."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from diptych.errors import UsageError, UserError, nearest
from diptych.student.settings import Settings
from diptych.utils.documents import facts

STYLES = {"lora-diffusers": "diffusers", "lora-comfyui": "comfyui", "lora-kohya": "kohya"}  # one LoRA file each
FILES = {
    "file": ".safetensors",
    "original": ".safetensors",
    "exported": ".pt2",
    **dict.fromkeys(STYLES, ".safetensors"),
}
_READERS = {  # target: the place of a student's settings, and what reads them
    "folded": ("transformer's config", "diptych reads them; pass them to stock diffusers"),
    "released": ("transformer's config", "diptych reads them; pass them to the authors' code"),
    "exported": ("program's extra file diptych.json", "your sampler can follow them: the program is the transformer"),
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
    """All rows of the table."""
    return tuple(Direction(*row) for row in facts(__file__)["directions"])


def find(source: str, target: str) -> Direction:
    """The row of a direction. UsageError for an unknown target, UserError for a direction that is not supported."""
    if target not in TARGETS:
        hint = "; GGUF can be read but not written" if target == "gguf" else nearest(target, TARGETS)
        raise UsageError("name_unknown", f"Unknown target: --to {target}. Targets are {', '.join(TARGETS)}{hint}")
    row = next(row for row in rows() if (row.source, row.target) == (source, target))
    if row.equality == "refused":
        raise UserError("model_unsupported", f"Cannot convert {source} → {target}: {row.note}.")
    return row


def table() -> str:
    """The table as text, for a terminal."""
    head = f"{'from':<13}{'to':<14}{'keeps':<10}{'base':<6}"
    lines = [f"{r.source:<13}{r.target:<14}{r.equality:<10}{'yes' if r.base else '':<6}{r.note}" for r in rows()]
    return "\n".join([head, *lines, "", *(f"{name}: {what}" for name, what in facts(__file__)["layouts"].items())])


def summary(done: Mapping[str, Any]) -> str:
    """The result of `convert` as text, for a terminal."""
    kept = {
        "bits": "bit for bit",
        "function": "the same function, in other bits",
        "cast": "in another precision",
    }[done["equality"]]
    lora = {
        "none": "",
        "kept": "; the LoRA is beside the weights",
        "fused": "; the LoRA is in the weights",
        "joined": "; the LoRA is part of it",
    }
    open_with = "" if done["complete"] else "; open it with --base and the teacher's folder"
    first = f"{done['source']} → {done['target']}: {done['bytes'] / 1e6:,.1f} MB, {kept}{lora[done['lora']]}{open_with}"
    return "\n".join([first, *_settings_lines(done)])


def _settings_lines(done: Mapping[str, Any]) -> Iterator[str]:
    """The settings that differ from the family's, with what reads them, and the parts that the target leaves out."""
    defaults = Settings().values()
    changed = {name: value for name, value in done["settings"].items() if defaults.get(name) != value}
    if "words" in changed:
        changed["words"] = f"{len(changed['words'])}, lower-case"
    if changed:
        listed = ", ".join(f"{name} {json.dumps(value).replace(chr(34), '')}" for name, value in changed.items())
        where, readers = _READERS.get(done["target"], ("metadata", "diptych reads them; pass them to other programs"))
        yield f"Settings in the {where}: {listed}. Only {readers}."
    if done["left_out"]:
        yield f"Left out, because {done['target']} has only the transformer: {', '.join(done['left_out'])}."
