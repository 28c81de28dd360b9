"""Parquet from other sources as pairs: columns recognized or named, row groups read in place, local or over fsspec."""

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

from diptych.cli.app import call
from diptych.data.images import encode, open_image
from diptych.data.interop import find
from diptych.data.interop.exporting import export_data
from diptych.data.interop.importing import import_data
from diptych.data.interop.rows import Options
from diptych.data.sources import SHARD, open_pairs, split_of
from diptych.data.store import Dataset
from diptych.errors import UsageError
from diptych.recipe.schema import Data, Distill, Recipe
from diptych.train.prepare import Material
from raising import raises


def png(value: int) -> bytes:
    return encode(Image.fromarray(np.full((8, 8, 3), value % 256, np.uint8)), "PNG")


def table(rows: int, names: tuple[str, str, str] = ("conditioning", "image", "caption")) -> pa.Table:
    """Row n shows color n // 2 (two pairs of each reference) and color n."""
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
def test_the_column_names_of_edit_data_sets_are_recognized(tmp_path: Path, names: tuple[str, str, str]) -> None:
    row = rows_of(open_pairs(str(write(tmp_path / "edits", names=names))))[3]
    assert row["instruction"] == row["caption"] == "a cat, number 3"  # no caption there: the instruction is the text
    assert row["conditioning"]["bytes"] == png(1) and row["image"]["bytes"] == png(3)


def test_columns_of_any_name_can_be_mapped_and_a_wrong_one_is_named(tmp_path: Path) -> None:
    folder = str(write(tmp_path / "odd", names=("before", "after", "words")))
    with raises("row_invalid", "reference", "before, after, words", kind=UsageError):
        open_pairs(folder)
    with raises("row_invalid", "'befor'", "did you mean 'before'", kind=UsageError):
        open_pairs(folder, {"conditioning": "befor"})
    with raises("row_invalid", "text", "caption: NAME", kind=UsageError):
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
    with raises("row_invalid", "'conditioning'", "bytes: null"):
        open_pairs(str(tmp_path / "x.parquet"))
    cells.append({"bytes": png(1), "path": str(secret)})  # pyright: ignore[reportArgumentType]
    pq.write_table(pa.table({"conditioning": cells, "image": cells, "caption": ["a cat"] * 2}), tmp_path / "x.parquet")
    first, second = rows_of(open_pairs(str(tmp_path / "x.parquet")))
    assert second["image"] == {"bytes": png(1), "path": None}
    with raises("image_missing"):
        open_image(first["image"])


def test_data_that_cannot_be_read_is_a_one_line_error(tmp_path: Path) -> None:
    with raises("path_not_found", tmp_path / "missing"):
        open_pairs(str(tmp_path / "missing"))
    with raises("path_not_found", tmp_path, "parquet"):
        open_pairs(str(tmp_path))
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 but not really")
    with raises("store_damaged", "broken.parquet"):
        open_pairs(str(tmp_path))
    with raises("dependency_missing", "nosuch", kind=UsageError):
        open_pairs("nosuch://bucket/data")
    cell = [{"bytes": png(9), "path": None}]
    pq.write_table(pa.table({"conditioning": cell, "image": cell, "caption": ["a cat"]}), tmp_path / "broken.parquet")
    data, whole = open_pairs(str(tmp_path)), (tmp_path / "broken.parquet").read_bytes()
    (tmp_path / "broken.parquet").write_bytes(whole[:4] + b"\xff" * 40 + whole[44:])
    with raises("store_damaged", "broken.parquet"):
        data.read_shard(0)
    (tmp_path / "broken.parquet").unlink()
    with raises("path_not_found", "broken.parquet"):
        data.read_shard(0)


# ---- what is no pair, and which files are read


def odd(folder: Path, rows: int = 40, name: str = "0.parquet", **columns: Any) -> str:
    """A data set of pairs, some columns replaced by lists of values or by arrow arrays."""
    folder.mkdir(exist_ok=True)
    made = table(rows)
    for column, values in columns.items():
        array = values if isinstance(values, (pa.Array, pa.ChunkedArray)) else pa.array(values)
        place = made.schema.get_field_index(column)
        made = made.append_column(column, array) if place < 0 else made.set_column(place, column, array)
    pq.write_table(made, folder / name)
    return str(folder)


LISTS = pa.array([["a", "b"]] * 40)
WRONG: dict[str, tuple[str, Any, str]] = {
    "captions as lists": ("caption", LISTS, "list<"),
    "captions as numbers": ("caption", pa.array(range(40)), "int64"),
    "captions as structs": ("caption", pa.array([{"en": "a cat"}] * 40), "struct<"),
    "captions as bytes": ("caption", pa.array([b"a cat"] * 40), "binary"),
    "pictures as paths": ("image", pa.array(["cat.png"] * 40), "string"),
    "pictures as urls in structs": ("image", pa.array([{"src": "https://x"}] * 40), "struct<"),
    "several pictures a row": ("conditioning", pa.array([[{"bytes": b"x", "path": None}]] * 40), "list<"),
    "pictures that are null everywhere": ("conditioning", pa.nulls(40), "null"),
    "pictures as base64": ("conditioning", pa.array([{"bytes": "aGk=", "path": None}] * 40), "struct<"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_column_of_another_type_is_an_error_for_training_and_import(what: str, tmp_path: Path) -> None:
    column, values, holds = WRONG[what]
    folder = odd(tmp_path / "data", **{column: values})
    for read in (
        lambda: open_pairs(folder),
        lambda: import_data(folder, tmp_path / "out", "parquet"),
        lambda: export_data(folder, tmp_path / "out", "uno"),
    ):
        with raises("row_invalid", f"'{column}'", holds, "0.parquet", kind=UsageError):
            read()
    assert not list(tmp_path.glob("out/*.parquet"))


def test_a_type_that_changes_between_files_is_an_error_with_the_file(tmp_path: Path) -> None:
    odd(tmp_path / "data", name="0.parquet")
    with raises("row_invalid", "1.parquet", "'caption'"):
        open_pairs(odd(tmp_path / "data", name="1.parquet", caption=LISTS))
    more = pa.array(["a cat"] * 40, pa.large_string())
    pictures = table(40)["image"].to_pylist()
    words = pa.array(["a cat", "a dog"] * 20).dictionary_encode()
    folder = odd(tmp_path / "data", name="1.parquet", caption=more, image=pa.array([row["bytes"] for row in pictures]))
    folder = odd(tmp_path / "data", name="2.parquet", caption=words)
    folder = odd(tmp_path / "data", name="3.parquet", rows=0)
    assert len(open_pairs(folder)) == 120 and rows_of(open_pairs(folder))[81]["caption"] == "a dog"
    assert rows_of(open_pairs(folder))[41]["image"]["bytes"] == png(1)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-00000-of-00001.parquet", "train"),
        ("data/test-00000-of-00001-7d2e9f.parquet", "test"),
        ("default/validation/0000.parquet", "validation"),
        ("x/dev.parquet", "validation"),
        ("my_test_2.parquet", "test"),
        ("train/train_eval.parquet", "test"),
        ("aesthetic-00000-of-00010.parquet", "aesthetic"),
        ("latest.parquet", ""),
        ("part-00000.parquet", ""),
        ("0000.parquet", ""),
        ("training.tar.gz", "train"),
    ],
)
def test_a_files_name_says_its_split(name: str, split: str) -> None:
    assert split_of(name) == split


def captions(data: Any) -> list[str]:
    return sorted({row["caption"] for row in rows_of(data)})


def test_test_and_validation_files_are_not_trained_on_unless_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for split in ("train", "test", "validation"):
        folder = odd(tmp_path / "data", name=f"{split}-00000-of-00001.parquet", caption=[split] * 40)
    assert captions(open_pairs(folder)) == ["train"] and "test (1 of 3 files)" in caplog.text
    caplog.clear()
    assert captions(open_pairs(folder, split="test")) == ["test"]
    assert captions(open_pairs(folder, split="val")) == ["validation"]
    assert len(captions(open_pairs(folder, split="all"))) == 3
    assert captions(open_pairs(f"{folder}/test-00000-of-00001.parquet")) == ["test"] and not caplog.records
    with raises("name_unknown", "'holdout'", "train", kind=UsageError):
        open_pairs(folder, split="holdout")
    assert import_data(folder, tmp_path / "a", "parquet")["rows"] == 40
    assert call(["data", "import", folder, "--format", "parquet", "--split", "all", "--out", str(tmp_path / "b")]) == 0
    assert len(Dataset(tmp_path / "b")) == 120
    with raises("name_unknown", "'test'", kind=UsageError):
        open_pairs(str(tmp_path / "b"), split="test")


def test_where_no_file_is_clearly_to_train_on_a_split_must_be_named(tmp_path: Path) -> None:
    folder = odd(tmp_path / "data", name="test.parquet")
    with raises("option_missing", kind=UsageError):
        open_pairs(folder)
    folder = odd(tmp_path / "data", name="0.parquet")
    assert len(open_pairs(folder)) == 40
    one = odd(tmp_path / "one", name="aesthetic-00000-of-00001.parquet")
    assert len(open_pairs(one)) == 40
    with raises("option_missing", kind=UsageError):
        open_pairs(odd(tmp_path / "one", name="plain-00000-of-00001.parquet"))


def test_the_splits_of_tars_and_folders_count_too(tmp_path: Path) -> None:
    source = odd(tmp_path / "data")
    export_data(source, tmp_path / "tars", "webdataset", verify=False)
    (tar,) = (tmp_path / "tars").glob("*.tar")
    (tmp_path / "tars/test-00000.tar").write_bytes(tar.read_bytes())
    assert len(find("webdataset").open(str(tmp_path / "tars"), Options())) == 40
    assert len(find("webdataset").open(str(tmp_path / "tars"), Options(split="all"))) == 80
    export_data(source, tmp_path / "images/train", "imagefolder", verify=False)
    with raises("path_not_found", "metadata.jsonl", "train"):
        find("imagefolder").open(str(tmp_path / "images"), Options())


def test_a_recipe_names_the_split(tmp_path: Path) -> None:
    for split in ("train", "test"):
        folder = odd(tmp_path / "data", name=f"{split}.parquet", rows=20 if split == "test" else 10)
    named = Recipe(name="x", distill=Distill(data=[Data(path=folder, split="test")]))
    plain = Recipe(name="x", distill=Distill(data=[Data(path=folder)]))
    assert [len(Material.open(recipe, None).sets[0]) for recipe in (plain, named)] == [10, 20]
    assert Material.open(plain, None).fingerprint() != Material.open(named, None).fingerprint()
