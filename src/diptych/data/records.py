"""Rows of each stage: arrow schemas, ids and seeds.

prompts → grids → candidates → pairs. A pair's columns start with those of the released data set
(`primecai/dsd_data`: `conditioning`, `image`, `caption`), so that its readers open ours. Image columns are the Hugging
Face `Image` struct `{bytes, path}`, and the schema metadata says so: `datasets.load_dataset("parquet", …)` and the
hub's viewer show images.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa


IMAGE = "image"

# Column name → type, in order. `image` is the struct, `list[string]` a list of strings; the others are arrow types.
PROMPT = {
    "id": "string",
    "prompt": "string",  # for the whole grid
    "panels": "list[string]",  # the caption of each panel, row by row
    "subject": "string",  # kind of the subject, one word or a short phrase
    "task": "string",
    "seed": "int64",
}
GRID = {
    "id": "string",
    "image": IMAGE,
    "prompt_id": "string",
    "prompt": "string",
    "panels": "list[string]",
    "subject": "string",
    "task": "string",
    "seed": "int64",
    "rows": "int64",  # of panels
    "cols": "int64",  # of panels
    "panel_size": "int64",  # pixels
    "model": "string",  # fingerprint of the teacher
}
PAIR = {
    "conditioning": IMAGE,  # the reference panel
    "image": IMAGE,  # the target panel
    "caption": "string",  # of the target
    "instruction": "string",
    "id": "string",
    "grid_id": "string",
    "reference_caption": "string",
    "task": "string",
    "subject": "string",
    "reference_panel": "int64",
    "target_panel": "int64",
    "seed": "int64",
    "similarity": "float64",  # by the judge; higher means more likely the same subject
    "copy_distance": "float64",  # pixels after alignment, 0 = a copy
    "seam": "float64",  # strength of the seam at which the grid was cut
    "kept": "bool",
    "reason": "string",  # "kept", or the first test that failed
    "judge": "string",  # fingerprint of the judge
    "evidence": "string",  # JSON: all other data behind the verdict
}
FAILED = {"stage": "string", "id": "string", "reason": "string", "row": "string"}

COLUMNS = {"prompts": PROMPT, "grids": GRID, "candidates": PAIR, "pairs": PAIR, "failed": FAILED}


def schema(columns: dict[str, str]) -> pa.Schema:
    """The arrow schema of a column table, with the metadata that makes `datasets` decode images."""
    import pyarrow as pa

    types = {
        IMAGE: pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
        "list[string]": pa.list_(pa.string()),
        "string": pa.string(),
        "int64": pa.int64(),
        "float64": pa.float64(),
        "bool": pa.bool_(),
    }
    features: dict[str, Any] = {}
    for name, kind in columns.items():
        if kind == IMAGE:
            features[name] = {"_type": "Image"}
        elif kind == "list[string]":
            features[name] = {"feature": {"dtype": "string", "_type": "Value"}, "_type": "List"}
        else:
            features[name] = {"dtype": kind, "_type": "Value"}
    metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    return pa.schema([pa.field(name, types[kind]) for name, kind in columns.items()], metadata=metadata)


def prompt_id(index: int) -> str:
    """Id of a prompt: the 13th of a run is `p-000012`."""
    return f"p-{index:06d}"


def grid_id(from_prompt: str, image: int = 0) -> str:
    """Id of a grid, by its prompt: `p-000012` → `g-000012`; the second image is `g-000012.1`."""
    return "g-" + from_prompt.partition("-")[2] + (f".{image}" if image else "")


def prompt_of(grid: str) -> str:
    """Common id of all grids of a prompt: `g-000012` for `g-000012` and `g-000012.1`."""
    return re.sub(r"(g-\d+)\.\d+$", r"\1", grid)


def pair_id(from_grid: str, reference: int, target: int) -> str:
    """Id of an ordered pair of a grid's panels: `g-000012`, 0, 1 → `c-000012-01`."""
    return f"c-{from_grid.partition('-')[2]}-{reference}{target}"


def mirrors(pair: str) -> list[str]:
    """Id of the pair of the same two panels in the other order: `c-000012-01` → `c-000012-10`. Three digits can be
    split in two ways, so there are two ids."""
    head, _, panels = pair.rpartition("-")
    if not head or not panels.isdecimal() or len(panels) < 2:
        return []
    cuts = [len(panels) // 2] if len(panels) % 2 == 0 else [len(panels) // 2, len(panels) // 2 + 1]
    return [f"{head}-{panels[cut:]}{panels[:cut]}" for cut in cuts]


def seed_of(run_seed: int, row_id: str, purpose: str = "") -> int:
    """A row's 63-bit seed, from the run's seed and the row's id, so that it does not depend on order or batch.

    `purpose` gives a row several independent seeds (for its template, its noise, …).
    """
    digest = hashlib.sha256(f"{run_seed}\0{row_id}\0{purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
