"""What training takes of other people's pairs, and what it leaves out, which an import refuses alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from diptych.data.images import encode as encode_image
from diptych.data.interop.importing import import_data
from diptych.data.sources import open_pairs
from diptych.data.store import Dataset
from diptych.student.canvas import Canvas
from diptych.train.cache import Latents, build
from raising import raises


def png(value: int) -> bytes:
    return encode_image(Image.fromarray(np.full((8, 8, 3), value % 256, np.uint8)), "PNG")


def odd(folder: Path, rows: int = 40, **columns: Any) -> str:
    """A data set of pairs, some columns replaced or added."""
    folder.mkdir(exist_ok=True)
    made: dict[str, Any] = {
        side: [{"bytes": png(n), "path": None} for n in range(rows)] for side in ("conditioning", "image")
    }
    made |= {"caption": [f"a cat, number {n}" for n in range(rows)]}
    pq.write_table(pa.table(made | columns), folder / "0.parquet")
    return str(folder)


def encoded(folder: str, tmp_path: Path) -> tuple[list[Any], list[dict[str, str]]]:
    """What training makes of a data set: its samples, and the rows that it leaves out."""

    def encode(reference: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return reference.mean((2, 3))[:, None], target.mean((2, 3))[:, None]

    pairs, canvas = open_pairs(folder), Canvas(panel_height=8, panel_width=8, factor=1)
    found = Latents(build(pairs, tmp_path / "latents", encode, [canvas], pairs.fingerprint()))
    return found.samples, found.skipped


def test_rows_without_a_text_or_a_picture_are_left_out_and_counted_by_reason(tmp_path: Path) -> None:
    captions: list[str | None] = [f"a cat, number {n}" for n in range(80)]
    captions[3], captions[5] = None, " \n"
    pictures = [{"bytes": png(n), "path": None} for n in range(80)]
    pictures[7] = {"bytes": None, "path": "/etc/passwd"}  # pyright: ignore[reportArgumentType]
    folder = odd(tmp_path / "data", 80, caption=captions, image=pictures)
    samples, skipped = encoded(folder, tmp_path)
    assert len(samples) == 77 and {sample.caption for sample in samples} == {
        f"a cat, number {n}" for n in range(80) if n not in (3, 5, 7)
    }
    assert [row["id"] for row in skipped] == ["00000-0-3", "00000-0-5", "00000-0-7"]
    assert ["no text" in row["reason"] for row in skipped] == [True, True, False] and "path" in skipped[2]["reason"]
    done = import_data(folder, tmp_path / "out", "parquet", skip=True)
    assert (done["rows"], done["failed"]) == (77, 3)
    with raises("rows_failed", "30 of 40 pairs", "30 times"):
        encoded(odd(tmp_path / "half", caption=[None] * 30 + ["a cat"] * 10), tmp_path)
    with raises("rows_failed", "40 of 40 pairs", "40 times"):
        encoded(odd(tmp_path / "none", caption=pa.nulls(40)), tmp_path)


def test_an_instruction_stands_in_for_a_caption_that_is_missing_or_blank(tmp_path: Path) -> None:
    folder = odd(tmp_path / "data", caption=["", None, "  ", "a cat"] * 10, instruction=["make it blue"] * 40)
    samples, skipped = encoded(folder, tmp_path)
    assert not skipped and [sample.caption for sample in samples[:4]] == ["make it blue"] * 3 + ["a cat"]


def test_pairs_of_a_grid_stay_together_and_ids_may_be_numbers(tmp_path: Path) -> None:
    folder = odd(tmp_path / "data", id=list(range(100, 140)), grid_id=[n // 4 for n in range(40)])
    samples, _ = encoded(folder, tmp_path)
    assert [sample.grid_id for sample in samples] == [str(n // 4) for n in range(40)]
    import_data(folder, tmp_path / "out", "parquet")
    assert [row["id"] for row in Dataset(tmp_path / "out")] == [str(n) for n in range(100, 140)]
    folder = odd(tmp_path / "data", id=[1.0, None] * 20)
    with raises("row_invalid", "row 2 ", "id 1 ", "row 0"):
        import_data(folder, tmp_path / "twice", "parquet")
    with raises("row_invalid", "row 0 ", "1.5"):
        import_data(odd(tmp_path / "data", id=[1.5] * 40), tmp_path / "half", "parquet")
