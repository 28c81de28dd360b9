"""The store publishes whole parts, the manifest last, and rejects what it did not make."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych.data import records
from diptych.data.images import open_image
from diptych.data.store import Dataset, encode
from diptych.errors import UserError
from diptych.utils.io import is_temporary
from raising import raises

PROMPTS = records.schema(records.PROMPT)
PAIRS = records.schema(records.PAIR)


def prompt(i: int, **changes: Any) -> dict[str, Any]:
    row = {"id": records.prompt_id(i), "prompt": f"p {i}", "panels": ["a", "b"], "subject": "cat"}
    return {**row, "task": "subject", "seed": records.seed_of(0, records.prompt_id(i)), **changes}


@pytest.fixture(params=["local", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "set") if request.param == "local" else f"memory://{uuid.uuid4().hex}/set"


def test_rows_come_back_as_they_were_written(url: str, pair_rows: list[dict[str, Any]]) -> None:
    data = Dataset(url, PAIRS)
    data.write_shard(1, pair_rows[2:], "f")
    data.write_shard(0, pair_rows[:2], "f")
    assert data.shards() == [0, 1]
    assert data.read_shard(0) == pair_rows[:2]
    assert list(Dataset(url)) == pair_rows
    assert len(data) == 3
    assert data.columns("id", "kept")[1] == {"id": "c-000001-01", "kept": False}


def test_a_set_is_complete_only_with_its_manifest_and_every_part(url: str) -> None:
    data = Dataset(url, PROMPTS)
    data.write_shard(0, [prompt(0)], "f")
    data.write_shard(1, [prompt(1), prompt(2)], "f")
    assert not data.is_complete() and data.manifest is None
    with raises("run_incomplete", data.url):
        data.manifest_hash()
    data.publish({"fingerprint": "f", "seed": 7})
    assert data.is_complete() and data.is_complete("f") and not data.is_complete("g")
    manifest = Dataset(url).manifest
    assert manifest is not None and manifest["rows"] == 3 and manifest["seed"] == 7
    assert [part["rows"] for part in manifest["parts"]] == [1, 2]
    data.drop_shard(1)
    assert not data.is_complete()
    with raises("path_not_found", "part-00001.parquet"):
        data.verify()


def test_a_part_with_another_fingerprint_is_an_error(url: str) -> None:
    Dataset(url, PROMPTS).write_shard(0, [prompt(0)], "old")
    data = Dataset(url, PROMPTS)
    assert data.shards_done() == {0}
    assert data.shards_done("old") == {0}
    with raises("run_mismatch", "part-00000.parquet", data.url):
        data.shards_done("new")


def test_the_same_rows_make_the_same_bytes_and_manifest(tmp_path: Path, pair_rows: list[dict[str, Any]]) -> None:
    for name in ("a", "b"):
        data = Dataset(tmp_path / name, PAIRS)
        data.write_shard(0, pair_rows, "f")
        data.publish({"fingerprint": "f"})
        time.sleep(0.01)
    for name in ("part-00000.parquet", "manifest.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_changed_part_is_detected_by_its_hash(url: str) -> None:
    data = Dataset(url, PROMPTS)
    data.write_shard(0, [prompt(0)], "f")
    data.publish()
    data.verify()
    data.write_shard(0, [prompt(0, subject="dog")], "f")
    with raises("store_damaged", "part-00000.parquet"):
        data.verify()


def changed(url: str, **changes: Any) -> None:
    """Another part 0 of the same fingerprint that parquet reads without complaint, in place."""
    import fsspec

    part = encode([prompt(0, **changes)], PROMPTS, "f")
    with fsspec.open(f"{url}/part-00000.parquet", "wb") as stream:
        stream.write(part)  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("read", [lambda data: data.read_shard(0), list, lambda data: data.verify()])
def test_rows_are_read_only_from_the_parts_that_the_manifest_names(url: str, read: Any) -> None:
    data = Dataset(url, PROMPTS)
    data.write_shard(0, [prompt(0)], "f")
    data.write_shard(1, [prompt(1)], "f")
    data.publish({"fingerprint": "f"})
    assert Dataset(url).read_shard(0) == [prompt(0)]
    changed(url, subject="dog")
    for again in (data, Dataset(url)):
        with raises("store_damaged", f"{url}/part-00000.parquet"):
            read(again)
    assert data.read_shard(1) == [prompt(1)] and data.columns("id")[0] == {"id": "p-000000"}
    data.unpublish()  # as a stage does that makes the part again
    data.write_shard(0, [prompt(0)], "f")
    data.publish({"fingerprint": "f"})
    assert read(data) != [] and Dataset(url).read_shard(0) == [prompt(0)]


def test_one_flipped_byte_and_swapped_parts_are_detected(tmp_path: Path) -> None:
    data = Dataset(tmp_path, PROMPTS)
    for shard in range(3):
        data.write_shard(shard, [prompt(shard, prompt="x" * 50)], "f")
    data.publish({"fingerprint": "f"})
    assert len(list(data)) == 3
    parts = [tmp_path / data.part_name(shard) for shard in range(3)]
    whole = parts[2].read_bytes()
    for at in range(4, len(whole) - 8, 97):
        parts[2].write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with raises("store_damaged", "part-00002.parquet"):
            data.read_shard(2)
    parts[2].write_bytes(whole)
    parts[0].rename(tmp_path / "x")
    parts[1].rename(parts[0])
    (tmp_path / "x").rename(parts[1])
    assert data.shards_done("f") == {0, 1, 2} and data.is_complete("f")  # nothing else tells them apart
    for shard in (0, 1):
        with pytest.raises(UserError, match=f"part-0000{shard}"):
            data.read_shard(shard)
    assert data.read_shard(2)


def test_a_part_is_hashed_once_in_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diptych.data import store

    data = Dataset(tmp_path, PROMPTS)
    data.write_shard(0, [prompt(0)], "f")
    data.publish({"fingerprint": "f"})
    hashed: list[str] = []
    real = store._Local.sha256
    monkeypatch.setattr(store._Local, "sha256", lambda self, name: hashed.append(name) or real(self, name))
    for reader in (data, data, Dataset(tmp_path)):
        assert reader.read_shard(0) == list(reader) == [prompt(0)]
    assert hashed == ["part-00000.parquet"]


def test_a_manifest_without_hashes_is_damaged(tmp_path: Path) -> None:
    data = Dataset(tmp_path, PROMPTS)
    data.write_shard(0, [prompt(0)], "f")
    for broken in ('{"parts": [{"name": "part-00000.parquet"}]}', '{"rows": 1}', "{"):
        (tmp_path / "manifest.json").write_text(broken)
        with raises("store_damaged", "manifest.json"):
            Dataset(tmp_path).read_shard(0)


def test_a_part_that_is_damaged_inside_is_named(tmp_path: Path) -> None:
    data = Dataset(tmp_path, PROMPTS)
    data.write_shard(0, [prompt(0)], "f")
    part = tmp_path / "part-00000.parquet"
    whole = part.read_bytes()
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    part.write_bytes(whole[:4] + b"\xff" * (footer - 4) + whole[footer:])
    assert data.shards_done("f") == {0}  # its footer is there
    for read in (lambda: data.read_shard(0), lambda: list(data), lambda: data.columns("id")):
        with raises("store_damaged", "part-00000.parquet", "remove"):
            read()


def test_a_part_that_was_cut_is_named(tmp_path: Path) -> None:
    data = Dataset(tmp_path, PROMPTS)
    data.write_shard(0, [prompt(0)], "f")
    part = tmp_path / "part-00000.parquet"
    part.write_bytes(part.read_bytes()[:-20])
    with raises("store_damaged", "part-00000.parquet"):
        data.shards_done("f")
    with raises("path_not_found", "part-00007.parquet"):
        data.read_shard(7)


def test_a_row_with_other_columns_is_an_error(tmp_path: Path) -> None:
    row = prompt(0)
    del row["seed"]
    with pytest.raises(AssertionError, match="seed"):
        Dataset(tmp_path, PROMPTS).write_shard(0, [row], "f")


def test_leftovers_of_killed_writers_are_no_parts_and_are_cleaned(tmp_path: Path) -> None:
    data = Dataset(tmp_path, PROMPTS)
    data.write_shard(0, [prompt(0)], "f")
    leftover = tmp_path / ".part-00001.parquet.123.tmp"
    leftover.write_bytes(b"half")
    assert data.shards() == [0]
    data.clean()
    assert not leftover.exists() and data.shards() == [0]


@given(st.text(max_size=50), st.integers(0, 2**63 - 1), st.lists(st.text(max_size=20), max_size=4))
def test_any_text_survives(text: str, seed: int, panels: list[str]) -> None:
    row = prompt(0, prompt=text, seed=seed, panels=panels)
    data = encode([row], PROMPTS)
    import pyarrow as pa

    assert pq.read_table(pa.BufferReader(data)).to_pylist() == [row]


WRITER = """
import sys
from pathlib import Path
from diptych.data import records
from diptych.data.store import Dataset

data = Dataset(sys.argv[1], records.schema(records.PROMPT))
print("ready", flush=True)
for shard in range(10_000):
    text = str(shard) * 2_000_000
    row = {"id": str(shard), "prompt": text, "panels": [], "subject": "", "task": "", "seed": shard}
    data.write_shard(shard, [row] * 3, "f")
"""


def test_a_writer_killed_in_the_middle_of_a_part_leaves_only_whole_parts(tmp_path: Path) -> None:
    for attempt in range(10):  # the part may be renamed between the look and the kill: then once more
        folder = tmp_path / str(attempt)
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(folder)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        while not (list(folder.glob("*.parquet")) and any(is_temporary(path.name) for path in folder.glob(".*"))):
            assert process.poll() is None, "the writer ended by itself"
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        data = Dataset(folder)
        assert data.manifest is None
        shards = data.shards_done("f")
        assert shards
        for shard in shards:
            assert [row["seed"] for row in data.read_shard(shard)] == [shard] * 3
        others = [path.name for path in folder.iterdir() if path.suffix != ".parquet"]
        assert all(is_temporary(name) for name in others)
        if others:
            return
    pytest.fail("no kill left an unfinished part")


def test_the_real_datasets_library_opens_pairs_as_images(
    tmp_path: Path, pair_rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    data = Dataset(tmp_path / "pairs", PAIRS)
    data.write_shard(0, pair_rows[:2], "f")
    data.write_shard(1, pair_rows[2:], "f")
    data.publish()
    files = str(tmp_path / "pairs" / "*.parquet")
    loaded = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded.column_names == list(records.PAIR)
    assert loaded.column_names[:3] == ["conditioning", "image", "caption"]
    assert isinstance(loaded.features["image"], datasets.Image)
    assert loaded[2]["conditioning"].getpixel((0, 0)) == (200, 2, 0)
    assert loaded[2]["caption"] == pair_rows[2]["caption"] and loaded[2]["seed"] == 2**62 + 2
    prompts = Dataset(tmp_path / "prompts", PROMPTS)
    prompts.write_shard(0, [prompt(0)])
    files = str(tmp_path / "prompts" / "*.parquet")
    loaded = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded[0]["panels"] == ["a", "b"]


def test_the_metadata_says_which_columns_are_images() -> None:
    features = json.loads((PAIRS.metadata or {})[b"huggingface"])["info"]["features"]
    assert [name for name, kind in features.items() if kind["_type"] == "Image"] == ["conditioning", "image"]
    assert list(features) == PAIRS.names


def test_an_image_cell_opens(pair_rows: list[dict[str, Any]]) -> None:
    assert open_image(pair_rows[1]["image"]).getpixel((0, 0)) == (0, 1, 200)
