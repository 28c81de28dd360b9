"""Data in and out: 1,000 rows through every format and back, kills, damage, and what other loaders read."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import tomllib
from collections.abc import Callable
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diptych.cli.app import call
from diptych.data import records
from diptych.data.images import encode
from diptych.data.interop import FORMATS, find
from diptych.data.interop.exporting import export_data
from diptych.data.interop.importing import import_data
from diptych.data.interop.rows import Options
from diptych.data.sources import open_pairs
from diptych.data.store import Dataset
from diptych.errors import UsageError, UserError
from raising import raises

ROWS = 1000
KINDS = ("PNG", "JPEG", "WEBP")


@cache
def picture(value: int, kind: str) -> bytes:
    return encode(Image.fromarray(np.full((8, 8, 3), value % 256, np.uint8)), kind)


def row(n: int) -> dict[str, Any]:
    """A pair whose every column says which it is; PNG, JPEG and WebP by turns; some without an instruction."""
    return {
        "conditioning": {"bytes": picture(n // 2, KINDS[n % 3]), "path": None},
        "image": {"bytes": picture(n, KINDS[(n + 1) % 3]), "path": None},
        "caption": f"a cat, number {n} — «ñ»,\u2028 “quoted”",
        "instruction": f"show cat {n}" if n % 5 else "",
        "id": f"c-{n:06d}-01",
        "grid_id": f"g-{n:06d}",
        "reference_caption": f"a cat in a box {n}",
        "task": "subject",
        "subject": "cat",
        "reference_panel": 0,
        "target_panel": 1,
        "seed": 2**62 + n,
        "similarity": None if n % 7 == 0 else 0.5 + n / 3,
        "copy_distance": n / 7,
        "seam": 1.0,
        "kept": True,
        "reason": "kept",
        "judge": "ab" * 32,
        "evidence": json.dumps({"n": n}),
    }


def write(folder: Path, rows: list[dict[str, Any]], shard: int = 128) -> Path:
    data = Dataset(folder, records.schema(records.PAIR))
    for number, first in enumerate(range(0, len(rows), shard)):
        data.write_shard(number, rows[first : first + shard])
    data.publish()
    return folder


@pytest.fixture(scope="module")
def thousand(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("thousand") / "pairs", [row(n) for n in range(ROWS)])


@pytest.fixture
def few(tmp_path: Path) -> Path:
    return write(tmp_path / "few", [row(n) for n in range(6)], shard=4)


@pytest.mark.parametrize("name", FORMATS)
def test_a_thousand_rows_go_out_and_come_back_the_same(name: str, thousand: Path, tmp_path: Path) -> None:
    out = export_data(str(thousand), tmp_path / "out", name, verify=False)
    assert out["rows"] == ROWS and not out["verified"]
    back = import_data(str(tmp_path / "out"), tmp_path / "back", name)
    assert back["rows"] == ROWS and back["failed"] == 0
    result = {one["id"]: one for one in Dataset(tmp_path / "back")}
    for n in range(ROWS):
        wanted, got = row(n), result[f"c-{n:06d}-01"]
        if not FORMATS[name].whole:  # these formats store images, a name and one text
            assert got["caption"] == wanted["caption"]
            wanted, got = ({key: one[key] for key in ("conditioning", "image")} for one in (wanted, got))
        assert got == wanted


@pytest.mark.parametrize("name", FORMATS)
def test_training_and_a_second_export_take_an_import_as_it_is(name: str, few: Path, tmp_path: Path) -> None:
    assert export_data(str(few), tmp_path / "out", name)["verified"]
    import_data(str(tmp_path / "out"), tmp_path / "back", name)
    pairs = open_pairs(str(tmp_path / "back"))
    assert len(pairs) == 6 and pairs.read_shard(0)[0]["caption"]
    again = export_data(str(tmp_path / "back"), tmp_path / "again", name)
    assert again["rows"] == 6
    card = (tmp_path / "again" / "README.md").read_text("utf8")
    assert "license:" in card and "| pairs | 6 |" in card and "Check the license" in card


@pytest.mark.parametrize("name", FORMATS)
def test_the_instruction_can_be_the_text(name: str, few: Path, tmp_path: Path) -> None:
    options = Options(text="instruction")
    export_data(str(few), tmp_path / "out", name, options)
    import_data(str(tmp_path / "out"), tmp_path / "back", name, options)
    result = {one["id"]: one for one in Dataset(tmp_path / "back")}
    assert result["c-000003-01"]["instruction"] == "show cat 3"
    if not FORMATS[name].whole:  # row 5 has no instruction: its caption is its text
        assert result["c-000005-01"]["instruction"] == row(5)["caption"]


@pytest.mark.parametrize(("name", "loader"), [(n, n) for n in ("parquet", "webdataset", "imagefolder")])
def test_the_datasets_library_reads_what_is_written(name: str, loader: str, tmp_path: Path) -> None:
    from datasets import load_dataset

    folder = tmp_path / "out"
    rows = [row(3 * n) for n in range(6)]  # of one image format, which its tar reader needs
    export_data(str(write(tmp_path / "pairs", rows)), folder, name)
    ending = {"parquet": "*.parquet", "webdataset": "*.tar"}.get(name)
    files: dict[str, Any] = {"data_files": str(folder / ending)} if ending else {"data_dir": str(folder)}
    data = load_dataset(loader, split="train", cache_dir=str(tmp_path / "cache"), **files)
    assert len(data) == 6
    shown = data[3]
    target = shown["image"] if "image" in shown else next(v for k, v in shown.items() if k.startswith("image."))
    assert abs(int(np.asarray(target)[0, 0, 0]) - 9) <= 1  # a JPEG
    assert row(9)["caption"] in (shown.get("caption"), (shown.get("json") or {}).get("caption"))


def test_the_webdataset_library_reads_what_is_written(few: Path, tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")

    export_data(str(few), tmp_path / "out", "webdataset")
    tars = sorted(str(path) for path in (tmp_path / "out").glob("*.tar"))
    samples = [sample for tar in tars for sample in webdataset.WebDataset(tar, shardshuffle=False)]
    assert [sample["__key__"] for sample in samples] == [f"c-{n:06d}-01" for n in range(6)]
    assert samples[3]["conditioning.png"] == row(3)["conditioning"]["bytes"]
    assert samples[3]["txt"].decode() == row(3)["caption"]


def test_the_columns_of_edit_data_are_there_for_others(few: Path, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    export_data(str(few), tmp_path / "out", "edit-parquet")
    table = pq.read_table(sorted((tmp_path / "out").glob("*.parquet"))[0]).to_pylist()
    assert list(table[0])[:3] == ["original_image", "edit_prompt", "edited_image"]
    assert table[1]["edit_prompt"] == "show cat 1" and table[0]["edit_prompt"] == row(0)["caption"]


def test_other_trainers_find_what_they_look_for(few: Path, tmp_path: Path) -> None:
    for name in ("ai-toolkit", "simpletuner", "uno"):
        export_data(str(few), tmp_path / name, name)
    stem = "c-000003-01"
    toolkit = tmp_path / "ai-toolkit"
    assert (toolkit / "control" / f"{stem}.png").read_bytes() == row(3)["conditioning"]["bytes"]
    assert (toolkit / "target" / f"{stem}.jpg").read_bytes() == row(3)["image"]["bytes"]
    assert (toolkit / "target" / f"{stem}.txt").read_text("utf8").strip() == row(3)["caption"]
    backends = {each["id"]: each for each in json.loads((tmp_path / "simpletuner/multidatabackend.json").read_text())}
    reference = backends[backends["targets"]["conditioning_data"]]
    assert reference["dataset_type"] == "conditioning" and Path(reference["instance_data_dir"], f"{stem}.png").is_file()
    assert Path(backends["targets"]["instance_data_dir"], f"{stem}.txt").is_file()
    (item,) = (i for i in json.loads((tmp_path / "uno/data.json").read_text()) if i["diptych"]["id"] == stem)
    assert item["prompt"] == row(3)["caption"]
    # As UNO's loader joins them.
    assert [(tmp_path / "uno" / path).is_file() for path in (*item["image_paths"], item["image_tgt_path"])] == [
        True
    ] * 2


def test_musubi_tuner_opens_every_path_from_any_folder(few: Path, tmp_path: Path) -> None:
    export_data(str(few), tmp_path / "out", "musubi")
    (dataset,) = tomllib.loads((tmp_path / "out/dataset.toml").read_text("utf8"))["datasets"]
    assert dataset["resolution"] == [8, 8] and not Path(dataset["cache_directory"]).is_relative_to(tmp_path / "out")
    lines = [json.loads(line) for line in Path(dataset["image_jsonl_file"]).read_bytes().split(b"\n") if line]
    assert [line["caption"] for line in lines] == [row(n)["caption"] for n in range(6)]
    for n, line in enumerate(lines):
        assert Path(line["image_path"]).read_bytes() == row(n)["image"]["bytes"]
        assert Path(line["control_path"]).read_bytes() == row(n)["conditioning"]["bytes"]
    # A folder that moved is still read.
    (tmp_path / "out").rename(tmp_path / "moved")
    assert import_data(str(tmp_path / "moved"), tmp_path / "back", "musubi")["rows"] == 6


def test_diffsynth_finds_the_reference_under_both_names(few: Path, tmp_path: Path) -> None:
    import pandas

    export_data(str(few), tmp_path / "out", "diffsynth")
    table = pandas.read_csv(tmp_path / "out/metadata.csv")  # as DiffSynth-Studio reads it
    assert list(table.columns) == ["image", "prompt", "edit_image", "kontext_images"]
    assert list(table["prompt"]) == [row(n)["caption"] for n in range(6)]
    for column, side in (("image", "image"), ("edit_image", "conditioning"), ("kontext_images", "conditioning")):
        found = [(tmp_path / "out" / str(name)).read_bytes() for name in table[column]]
        assert found == [row(n)[side]["bytes"] for n in range(6)]


def test_onetrainer_finds_a_reference_beside_each_image(few: Path, tmp_path: Path) -> None:
    export_data(str(few), tmp_path / "out", "onetrainer")
    (concept,) = json.loads((tmp_path / "out/concepts.json").read_text("utf8"))
    folder = Path(concept["path"])
    images = [p for p in sorted(folder.iterdir()) if p.suffix != ".txt" and not p.stem.endswith("-condlabel")]
    assert len(images) == 6
    for n, path in enumerate(images):
        assert path.read_bytes() == row(n)["image"]["bytes"]
        reference = path.with_name(f"{path.stem}-condlabel.png")  # the only name that OneTrainer looks for
        assert reference.read_bytes() == row(n)["conditioning"]["bytes"]
        # Each line of the file is a prompt.
        assert path.with_suffix(".txt").read_text("utf8").strip().split("\n") == [row(n)["caption"]]


@pytest.mark.parametrize(
    ("name", "reference", "target", "text"),
    [
        ("parquet", "conditioning", "image", "caption"),
        ("imagefolder", "conditioning", "image", "caption"),
        ("edit-parquet", "original_image", "edited_image", "edit_prompt"),
    ],
)
def test_the_scripts_of_diffusers_find_their_columns(
    name: str, reference: str, target: str, text: str, few: Path, tmp_path: Path
) -> None:
    from datasets import load_dataset

    export_data(str(few), tmp_path / "out", name)
    # As the scripts open --dataset_name: the folder, with its card, and no loader.
    data = load_dataset(str(tmp_path / "out"), None, cache_dir=str(tmp_path / "cache"))["train"]
    assert {reference, target, text} <= set(data.column_names)
    images, references, texts = ([data[i][column] for i in range(6)] for column in (target, reference, text))
    wanted = [
        row(n)["instruction"] or row(n)["caption"] if text == "edit_prompt" else row(n)["caption"] for n in range(6)
    ]
    assert texts == wanted
    for n in range(6):
        for shown, value in ((images[n], n), (references[n], n // 2)):
            assert isinstance(shown, Image.Image) and abs(int(np.asarray(shown)[0, 0, 0]) - value) <= 2


def test_a_row_that_curation_rejected_is_not_exported(tmp_path: Path) -> None:
    rows = [row(n) | ({"kept": False, "reason": "same"} if n == 1 else {}) for n in range(3)]
    export_data(str(write(tmp_path / "pairs", rows)), tmp_path / "out", "imagefolder")
    lines = [json.loads(line) for line in (tmp_path / "out/metadata.jsonl").read_bytes().split(b"\n") if line]
    assert [line["id"] for line in lines] == ["c-000000-01", "c-000002-01"]


def test_ids_that_files_cannot_have_and_ids_that_repeat(tmp_path: Path) -> None:
    odd = [row(0) | {"id": "../up"}, row(1) | {"id": "a b.c"}]
    export_data(str(write(tmp_path / "odd", odd)), tmp_path / "out", "webdataset")
    import_data(str(tmp_path / "out"), tmp_path / "back", "webdataset")
    assert [one["id"] for one in Dataset(tmp_path / "back")] == ["../up", "a b.c"]
    export_data(str(tmp_path / "odd"), tmp_path / "files", "ai-toolkit")
    assert sorted(p.name for p in (tmp_path / "files/control").iterdir()) == ["row-000000.png", "row-000001.jpg"]
    twice = write(tmp_path / "twice", [row(0), row(1) | {"id": "C-000000-01"}])
    with raises("output_collision", "C-000000-01"):
        export_data(str(twice), tmp_path / "never", "uno")


# ---- what is not ours


def test_other_peoples_rows_keep_what_they_say_beside(tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir()
    for name in ("before", "after"):
        (folder / f"{name}.png").write_bytes(picture(len(name), "PNG"))
    line = {"source_file_name": "before.png", "file_name": "after.png", "prompt": "make it blue", "score": 4.5}
    (folder / "metadata.jsonl").write_text(json.dumps(line) + "\n\n")
    with raises("row_invalid", "reference", "source, image, prompt", kind=UsageError):
        import_data(str(folder), tmp_path / "no", "imagefolder")
    options = Options({"conditioning": "source", "instruction": "prompt"}, task="instruction")
    import_data(str(folder), tmp_path / "pairs", "imagefolder", options, license="cc-by-4.0")
    (got,) = Dataset(tmp_path / "pairs")
    assert got["instruction"] == got["caption"] == "make it blue" and got["task"] == "instruction"
    assert got["conditioning"] == {"bytes": picture(6, "PNG"), "path": None} and got["id"] == "i-000000"
    assert json.loads(got["evidence"]) == {"imported": {"score": 4.5}} and got["similarity"] is None
    assert "license: cc-by-4.0" in (tmp_path / "pairs/README.md").read_text("utf8")


def test_pairs_of_the_original_uno_and_of_simpletuner(tmp_path: Path) -> None:
    for folder in ("refs", "edited"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "one.png").write_bytes(picture(len(folder), "PNG"))
    (tmp_path / "edited/one.txt").write_text("a red hat\n")
    items = [{"image_path": "refs/one.png", "prompt": "a hat", "image_tgt_path": "edited/one.png"}]
    (tmp_path / "uno.json").write_text(json.dumps(items))
    import_data(str(tmp_path / "uno.json"), tmp_path / "a", "uno")
    backends = [
        {"id": "e", "instance_data_dir": "/data/edited", "conditioning_data": ["r"], "caption_strategy": "textfile"},
        {"id": "r", "instance_data_dir": "refs", "conditioning_type": "reference_strict"},
        {"id": "texts", "dataset_type": "text_embeds"},
    ]
    (tmp_path / "backend.json").write_text(json.dumps(backends))
    import_data(str(tmp_path / "backend.json"), tmp_path / "b", "simpletuner")
    (one,), (two,) = Dataset(tmp_path / "a"), Dataset(tmp_path / "b")
    assert (one["caption"], two["caption"]) == ("a hat", "a red hat")
    assert one["image"] == two["image"] and one["conditioning"] == two["conditioning"]


# ---- damage: every format says which row and why


def _break_file(pattern: str, data: bytes | None) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        path = sorted(folder.glob(pattern))[3]
        path.unlink() if data is None else path.write_bytes(data)

    return act


def _edit_list(name: str, change: Callable[[list[Any]], Any]) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        path = folder / name
        if name.endswith(".jsonl"):
            items = [json.loads(line) for line in path.read_bytes().split(b"\n") if line]
            change(items)
            path.write_text("\n".join(item if isinstance(item, str) else json.dumps(item) for item in items))
        else:
            items = json.loads(path.read_text())
            change(items)
            path.write_text(json.dumps(items))

    return act


def _edit_csv(n: int, key: str, value: str) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        with (folder / "metadata.csv").open(newline="", encoding="utf8") as file:
            rows = list(csv.DictReader(file))
        rows[n][key] = value
        with (folder / "metadata.csv").open("w", newline="", encoding="utf8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)

    return act


def _set(n: int, key: str, value: Any) -> Callable[[list[Any]], Any]:
    return lambda items: items[n].update({key: value})


def _retar(change: Callable[[str, bytes], bytes | None]) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        path = sorted(folder.glob("*.tar"))[0]
        with tarfile.open(path) as tar:
            members = [(m.name, tar.extractfile(m).read()) for m in tar]  # pyright: ignore
        with tarfile.open(path, "w") as tar:
            for name, data in members:
                if (data := change(name, data)) is not None:  # pyright: ignore
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, BytesIO(data))

    return act


def _reparquet(column: str, value: Any) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = sorted(folder.glob("*.parquet"))[0]
        rows = pq.read_table(path).to_pylist()
        rows[3][column] = value
        pq.write_table(pa.Table.from_pylist(rows), path)

    return act


CUT = picture(3, "PNG")[:45]
DAMAGE: list[tuple[str, Callable[[Path], None], str, list[str]]] = [
    ("parquet", _reparquet("image", {"bytes": CUT, "path": None}), "image_unreadable", ["image: "]),
    ("parquet", _reparquet("image", {"bytes": None, "path": "/etc/x"}), "image_missing", ["image", "path"]),
    ("parquet", _reparquet("caption", None), "row_invalid", []),
    ("edit-parquet", _reparquet("edited_image", None), "image_missing", ["image: "]),
    (
        "webdataset",
        _retar(lambda n, d: None if n.startswith("c-000003-01.image") else d),
        "image_missing",
        ["sample 3: c-000003-01", "image: "],
    ),
    ("webdataset", _retar(lambda n, d: b"{" if n == "c-000003-01.json" else d), "json_invalid", ["json"]),
    (
        "imagefolder",
        _edit_list("metadata.jsonl", lambda i: i.__setitem__(3, "{not json")),
        "json_invalid",
        ["(metadata.jsonl:4)"],
    ),
    (
        "imagefolder",
        _edit_list("metadata.jsonl", _set(3, "image_file_name", "../../secret.png")),
        "path_unsafe",
        ["../../secret.png"],
    ),
    ("imagefolder", _edit_list("metadata.jsonl", _set(3, "seed", "many")), "row_invalid", ["seed", '"many"']),
    ("imagefolder", _edit_list("metadata.jsonl", _set(3, "caption", "\ud800")), "row_invalid", ["caption"]),
    ("imagefolder", _break_file("image/*", b""), "image_missing", ["image: "]),
    ("ai-toolkit", _break_file("control/*", None), "image_missing", ["c-000003-01", "control/"]),
    ("ai-toolkit", _break_file("target/*.txt", b"\xff\xfe"), "file_format_unknown", ["UTF-8"]),
    ("ai-toolkit", _break_file("target/*.txt", b"  \n"), "row_invalid", ["caption"]),
    ("simpletuner", _break_file("image/*.txt", None), "path_not_found", ["c-000003-01.txt"]),
    ("simpletuner", _break_file("conditioning/*", b"MZ"), "image_unreadable", ["conditioning: "]),
    ("uno", _edit_list("data.json", _set(3, "image_paths", ["a.png", "b.png"])), "row_invalid", ["item 3", "2 "]),
    ("uno", _edit_list("data.json", _set(3, "image_tgt_path", "/etc/passwd")), "path_unsafe", ["/etc/passwd"]),
    ("uno", _edit_list("data.json", _set(3, "image_tgt_path", None)), "row_invalid", ["null"]),
    ("musubi", _edit_list("metadata.jsonl", _set(3, "control_path_1", "b.png")), "row_invalid", ["jsonl:4)", "2 "]),
    ("musubi", _edit_list("metadata.jsonl", _set(3, "image_path", "../../up.png")), "path_unsafe", ["../../up.png"]),
    ("musubi", _edit_list("metadata.jsonl", _set(3, "image_path", "/etc/ssl/x")), "path_not_found", ["ssl/x"]),
    ("musubi", _edit_list("metadata.jsonl", lambda i: i.__setitem__(3, "[1]")), "json_invalid", ["list"]),
    ("diffsynth", _edit_csv(3, "edit_image", "../up.png"), "path_unsafe", ["metadata.csv:5", "../up.png"]),
    ("diffsynth", _edit_csv(3, "prompt", " "), "row_invalid", ["caption"]),
    ("diffsynth", _break_file("image/*", b"MZ"), "image_unreadable", ["image: "]),
    ("onetrainer", _break_file("images/*-condlabel.png", None), "image_missing", ["c-000003-01-condlabel.png"]),
    ("onetrainer", _break_file("images/*.txt", None), "path_not_found", ["c-000003-01.txt"]),
]


@pytest.mark.parametrize(
    ("name", "damage", "code", "facts"), DAMAGE, ids=[f"{name}-{i}" for i, (name, *_) in enumerate(DAMAGE)]
)
def test_a_malformed_row_is_an_error_with_its_number_and_the_reason(
    name: str, damage: Callable[[Path], None], code: str, facts: list[str], tmp_path: Path
) -> None:
    pairs = write(tmp_path / "pairs", [row(n) | {"instruction": ""} for n in range(6)])
    export_data(str(pairs), tmp_path / "out", name, verify=False)
    damage(tmp_path / "out")
    with raises(code, f"{name} row 3 (", *facts):
        import_data(str(tmp_path / "out"), tmp_path / "back", name)
    assert not (tmp_path / "back/manifest.json").exists()
    done = import_data(str(tmp_path / "out"), tmp_path / "some", name, skip=True)
    assert (done["rows"], done["failed"]) == (5, 1)
    (lost,) = Dataset(tmp_path / "some/failed/import")
    assert "row 3" in lost["reason"] and len(open_pairs(str(tmp_path / "some"))) == 5


def test_a_link_out_of_the_folder_is_not_followed(few: Path, tmp_path: Path) -> None:
    export_data(str(few), tmp_path / "out", "imagefolder")
    victim = sorted((tmp_path / "out/image").iterdir())[3]
    (tmp_path / "secret.png").write_bytes(picture(1, "PNG"))
    victim.unlink()
    victim.symlink_to(tmp_path / "secret.png")
    with raises("path_unsafe", "row 3 "):
        import_data(str(tmp_path / "out"), tmp_path / "back", "imagefolder")


@pytest.mark.parametrize("name", FORMATS)
def test_a_path_without_the_format_is_a_one_line_error(name: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for place in ("missing", "empty"):
        with pytest.raises(UserError, match=place) as caught:
            find(name).open(str(tmp_path / place), Options())
        assert caught.value.code == "path_not_found" and "\n" not in str(caught.value)


def test_a_tar_that_is_cut_short_says_where(few: Path, tmp_path: Path) -> None:
    export_data(str(few), tmp_path / "out", "webdataset")
    first = sorted((tmp_path / "out").glob("*.tar"))[0]
    whole = first.read_bytes()
    for length in (3000, 1024 + 512):  # in the middle of a block; where an image should begin
        first.write_bytes(whole[:length])
        with raises("file_damaged", "train-00000.tar", "incomplete"):
            import_data(str(tmp_path / "out"), tmp_path / "back", "webdataset")


def test_a_verified_export_detects_a_faulty_disk(few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diptych.data.interop import folders

    honest = folders.put_small

    def lying(path: Path, data: bytes) -> None:
        honest(path, picture(99, "PNG") if path.name == "c-000003-01.png" else data)

    monkeypatch.setattr(folders, "put_small", lying)
    with raises("file_damaged", "c-000003-01"):
        export_data(str(few), tmp_path / "out", "ai-toolkit")
    assert not (tmp_path / "out/diptych.json").exists()


# ---- again, and after a kill


def test_a_finished_one_is_left_alone_and_another_is_an_error(few: Path, tmp_path: Path) -> None:
    export_data(str(few), tmp_path / "out", "uno")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*") if p.name != ".lock"}
    assert export_data(str(few), tmp_path / "out", "uno")["rows"] == 6
    import_data(str(tmp_path / "out"), tmp_path / "back", "uno")
    parts = {p: p.stat().st_mtime_ns for p in (tmp_path / "back").rglob("part-*")}
    import_data(str(tmp_path / "out"), tmp_path / "back", "uno")
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*") if p.name != ".lock"}
    assert parts == {p: p.stat().st_mtime_ns for p in (tmp_path / "back").rglob("part-*")}
    with raises("output_exists", tmp_path / "out", kind=UsageError):
        export_data(str(few), tmp_path / "out", "imagefolder")
    with raises("run_mismatch", tmp_path / "back"):
        import_data(str(tmp_path / "out"), tmp_path / "back", "uno", Options(task="relight"))
    with raises("output_exists", few.parent, kind=UsageError):
        import_data(str(tmp_path / "out"), few.parent, "uno")


@pytest.mark.parametrize("verb", ["export", "import"])
def test_killed_at_any_moment_it_continues_to_the_same_bytes(verb: str, thousand: Path, tmp_path: Path) -> None:
    name = "imagefolder"
    source, whole, out = thousand, tmp_path / "whole", tmp_path / "killed"
    if verb == "import":
        source = tmp_path / "source"
        export_data(str(thousand), source, name, verify=False)
        import_data(str(source), whole, name)
    else:
        export_data(str(thousand), whole, name)
    command = [sys.executable, "-m", "diptych", "data", verb, str(source), "--format", name, "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ})
    started = "part-00000.parquet" if verb == "import" else ".export/00000.json"
    deadline = time.monotonic() + 120
    while not (out / started).exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (out / started).exists()
    unfinished = not (out / ("manifest.json" if verb == "import" else "diptych.json")).exists()
    assert unfinished, "the kill came too late to say anything"
    kept = (out / started).read_bytes()
    assert call(["data", verb, str(source), "--format", name, "--out", str(out), "--json"]) == 0
    if verb == "import":
        assert (out / started).read_bytes() == kept

    def files(folder: Path) -> dict[str, bytes]:
        result = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        return {path: data for path, data in result.items() if path != ".lock"}

    assert files(out) == files(whole)


def test_the_command_says_what_it_did(few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["data", "export", str(few), "--format", "uno", "--out", str(tmp_path / "uno"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 6
    assert call(["data", "import", str(tmp_path / "uno"), "--format", "uno", "--out", str(tmp_path / "back")]) == 0
    assert capsys.readouterr().out.splitlines() == ["6 pairs", str(tmp_path / "back")]
    assert call(["data", "export", str(few), "--format", "unno", "--out", str(tmp_path / "x")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error[name_unknown]: ") and "did you mean 'uno'?" in err
    bad = ["data", "import", str(few), "--format", "parquet", "--out", str(tmp_path / "x")]
    assert call([*bad, "--column", "imag=x"]) == 2 and "did you mean 'image'" in capsys.readouterr().err
    assert call([*bad, "--text", "words"]) == 2 and call([*bad, "--task", "subjct"]) == 2
    shutil.rmtree(few)
    assert call(bad) == 1


def test_the_card_of_a_runs_pairs_has_its_funnel_models_and_thresholds(tmp_path: Path) -> None:
    import judged_run
    from known_truth import STEPS

    judged_run.make(tmp_path / "run", STEPS, copies=6, seamless=4)
    out = export_data(str(tmp_path / "run"), tmp_path / "out", "parquet")
    card = (tmp_path / "out/README.md").read_text("utf8")
    for wanted in ("## Funnel", "| kept |", "## Thresholds", "| same |", "| teacher | pocket", "license: apache-2.0"):
        assert wanted in card
    assert f"| pairs | {out['rows']:,} |" in card
