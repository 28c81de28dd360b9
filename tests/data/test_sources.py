"""Other people's parquet as pairs: columns found or named, row groups read in place, local or over fsspec."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diptych.data.images import encode, open_image
from diptych.data.sources import SHARD, open_pairs
from diptych.errors import UsageError, UserError


def png(value: int) -> bytes:
    return encode(Image.fromarray(np.full((8, 8, 3), value % 256, np.uint8)), "PNG")


def table(rows: int, names: tuple[str, str, str] = ("conditioning", "image", "caption")) -> pa.Table:
    """Row n shows colour n // 2 (two pairs of each reference) and colour n."""
    reference, target, text = names
    cells = {reference: [{"bytes": png(n // 2), "path": None} for n in range(rows)]}
    cells |= {target: [{"bytes": png(n), "path": None} for n in range(rows)]}
    return pa.table({**cells, text: [f"a cat, number {n}" for n in range(rows)]})


def write(folder: Path, rows: int = 10, group: int = 4, **names: Any) -> Path:
    folder.mkdir(exist_ok=True)
    pq.write_table(table(rows, **names), folder / "train-00000-of-00001.parquet", row_group_size=group)
    return folder


def rows_of(data: Any) -> list[dict[str, Any]]:
    return [row for shard in data.shards() for row in data.read_shard(shard)]


def test_the_released_data_set_is_read_as_it_is(tmp_path: Path) -> None:
    data = open_pairs(str(write(tmp_path / "dsd_data")))
    rows = rows_of(data)
    assert len(data) == len(rows) == 10 and [data.rows_in(shard) for shard in data.shards()] == [4, 4, 2]
    assert [row["caption"] for row in rows] == [f"a cat, number {n}" for n in range(10)]
    for n, row in enumerate(rows):
        seen = [np.asarray(open_image(row[side]))[0, 0, 0] for side in ("conditioning", "image")]
        assert seen == [n // 2, n]
    assert len({row["id"] for row in rows}) == 10 and len({row["grid_id"] for row in rows}) == 5


@pytest.mark.parametrize(
    "names", [("original_image", "edited_image", "edit_prompt"), ("input_image", "image", "instruction")]
)
def test_the_names_that_edit_data_sets_use_are_known(tmp_path: Path, names: tuple[str, str, str]) -> None:
    row = rows_of(open_pairs(str(write(tmp_path / "edits", names=names))))[3]
    assert row["instruction"] == row["caption"] == "a cat, number 3"  # no caption there: the instruction is the text
    assert row["conditioning"]["bytes"] == png(1) and row["image"]["bytes"] == png(3)


def test_columns_of_any_name_can_be_mapped_and_a_wrong_one_is_named(tmp_path: Path) -> None:
    folder = str(write(tmp_path / "odd", names=("before", "after", "words")))
    with pytest.raises(UsageError, match=r"which column is the reference picture.*it has: before, after, words"):
        open_pairs(folder)
    with pytest.raises(UsageError, match=r"no column 'befor'; did you mean 'before'"):
        open_pairs(folder, {"conditioning": "befor"})
    with pytest.raises(UsageError, match="which column is the text"):
        open_pairs(folder, {"conditioning": "before", "image": "after"})
    columns = {"conditioning": "before", "image": "after", "caption": "words"}
    assert rows_of(open_pairs(folder, columns))[2]["caption"] == "a cat, number 2"


def test_any_fsspec_address_is_read_in_place_and_large_row_groups_are_cut(tmp_path: Path) -> None:
    local = write(tmp_path / "local", rows=SHARD + 5, group=1000)
    address = f"memory://{uuid.uuid4().hex}"
    fsspec.filesystem("memory").put(str(local), address, recursive=True)
    there, here = open_pairs(address), open_pairs(str(local))
    assert [there.rows_in(shard) for shard in there.shards()] == [SHARD, 5]
    assert rows_of(there) == rows_of(here) and there.fingerprint() == here.fingerprint()


def test_the_fingerprint_follows_the_data_and_the_columns(tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    before = open_pairs(str(folder)).fingerprint()
    assert before == open_pairs(str(folder)).fingerprint()
    assert before != open_pairs(str(folder), {"caption": "caption"}).fingerprint()
    write(folder, rows=11)
    assert before != open_pairs(str(folder)).fingerprint()


def test_a_path_in_a_row_is_not_opened(tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(9))
    cells = [{"bytes": None, "path": str(secret)}]
    pq.write_table(pa.table({"conditioning": cells, "image": cells, "caption": ["a cat"]}), tmp_path / "x.parquet")
    (row,) = rows_of(open_pairs(str(tmp_path / "x.parquet")))
    with pytest.raises(UserError, match="empty"):
        open_image(row["image"])


def test_what_cannot_be_read_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such data; give a run's folder"):
        open_pairs(str(tmp_path / "missing"))
    with pytest.raises(UserError, match="holds no parquet files"):
        open_pairs(str(tmp_path))
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(UserError, match=r"broken\.parquet is not a readable parquet file"):
        open_pairs(str(tmp_path))
    with pytest.raises(UsageError, match="nosuch"):
        open_pairs("nosuch://bucket/data")
    cell = [{"bytes": png(9), "path": None}]
    pq.write_table(pa.table({"conditioning": cell, "image": cell, "caption": ["a cat"]}), tmp_path / "broken.parquet")
    data, whole = open_pairs(str(tmp_path)), (tmp_path / "broken.parquet").read_bytes()
    (tmp_path / "broken.parquet").write_bytes(whole[:4] + b"\xff" * 40 + whole[44:])
    with pytest.raises(UserError, match=r"broken\.parquet is not a readable parquet file"):
        data.read_shard(0)
    (tmp_path / "broken.parquet").unlink()
    with pytest.raises(UserError, match=r"broken\.parquet is missing"):
        data.read_shard(0)
