"""A user's text files: UTF-8 with or without a byte order mark; every reader rejects anything else."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from diptych import recipe
from diptych.apps import story
from diptych.apps.batch.requests import read_rows
from diptych.data import labels
from diptych.data.images import encode
from diptych.data.interop import find
from diptych.data.interop.rows import Options
from diptych.errors import UsageError, UserError
from diptych.evaluate import ablations, evaluation, suites
from diptych.evaluate.scoring import agreement
from diptych.evaluate.suites import images
from diptych.recipe import tasks
from diptych.serve import auth
from diptych.stages.write import seeds, vocabulary
from diptych.utils.documents import decode, read_lines, stream_lines
from raising import raises

PNG = encode(Image.new("RGB", (8, 8)), "PNG")
OTHERS = {
    "utf-16": ("UTF-16", "line 1, byte 1"),
    "utf-16-le": ("UTF-16", "line 1, byte 2"),
    "utf-16-be": ("UTF-16", "line 1, byte 1"),
    "utf-32": ("UTF-32", "line 1, byte 1"),
    "latin-1": ("Latin-1", "line 2, byte 10"),
    "cp1252": ("WINDOWS-1252", "line 2, byte 10"),
}


@pytest.mark.parametrize("encoding", OTHERS)
def test_another_encoding_is_refused_with_its_name_the_place_and_what_to_do(encoding: str) -> None:
    name, place = OTHERS[encoding]
    for read in (
        lambda data: decode(data, "captions.txt"),
        lambda data: list(stream_lines(BytesIO(data), "captions.txt")),
    ):
        with raises("file_format_unknown", name, f"captions.txt, {place}", "iconv -f ", kind=UsageError) as caught:
            read("a dog\na big café\n".encode(encoding))
        assert "\n" not in str(caught.value)


def test_a_japanese_file_is_not_called_latin() -> None:
    with raises("file_format_unknown", "a.txt") as caught:
        decode("浜辺の猫".encode("shift_jis"), "a.txt")
    assert "Latin" not in str(caught.value)
    with raises("file_format_unknown", "binary data"):
        decode(b"a cat\0", "a.txt")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_marks_and_line_ends_are_no_part_of_the_text(end: str, tmp_path: Path) -> None:
    joined = "".join(f"\ufeff{line}{end}" for line in ("a café", "b\u2028c", "")).encode()
    assert decode(joined, "x") == "a café\nb\u2028c\n\n"
    (tmp_path / "a.txt").write_bytes(joined)
    assert read_lines(tmp_path / "a.txt") == list(stream_lines(BytesIO(joined), "x")) == ["a café", "b\u2028c", ""]
    assert list(stream_lines(BytesIO(b""), "x")) == []


# ---- every door


def _pairs(folder: Path, name: str) -> list[dict[str, Any]]:
    return [entry.load() for entry in find(name).open(str(folder), Options()).entries(0)]


def _toolkit(folder: Path, text: bytes) -> str:
    for side in ("control", "target"):
        (folder / side).mkdir()
        (folder / side / "1.png").write_bytes(PNG)
    (folder / "target/1.txt").write_bytes(text)
    return _pairs(folder, "ai-toolkit")[0]["caption"]


def _listed(name: str, wrap: Callable[[str], str], file: str) -> Callable[[Path, bytes], str]:
    def read(folder: Path, text: bytes) -> str:
        (folder / "a.png").write_bytes(PNG)
        (folder / file).write_bytes(text)
        return _pairs(folder, name)[0]["caption"]

    read.wrap = wrap  # pyright: ignore[reportFunctionMemberAccess]
    return read


def _tar(member: str, wrap: Callable[[str], str]) -> Callable[[Path, bytes], str]:
    def read(folder: Path, text: bytes) -> str:
        with tarfile.open(folder / "a.tar", "w") as tar:
            for name, data in (("1.conditioning.png", PNG), ("1.image.png", PNG), (f"1.{member}", text)):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, BytesIO(data))
        return _pairs(folder, "webdataset")[0]["caption"]

    read.wrap = wrap  # pyright: ignore[reportFunctionMemberAccess]
    return read


def _file(name: str, wrap: Callable[[str], str], read: Callable[[Path], str]) -> Callable[[Path, bytes], str]:
    def door(folder: Path, text: bytes) -> str:
        (folder / name).write_bytes(text)
        return read(folder / name)

    door.wrap = wrap  # pyright: ignore[reportFunctionMemberAccess]
    return door


def _plain(text: str) -> str:
    return text + "\n"


def _yaml(name: str, key: str) -> Callable[[str], str]:
    """A file that ships, with the text under `key`."""
    shipped = Path(tasks.__file__).parents[2] / name
    lines = shipped.read_text("utf8").splitlines()
    (at,) = (n for n, line in enumerate(lines) if line.startswith(f"{key}:"))
    return lambda text: "\n".join([*lines[:at], f"{key}: {text}", *lines[at + 1 :]])


def _csv(text: str) -> str:
    return f"id,label\n{text},same\n"


def _own(path: Path) -> str:
    (path.parent / "references").mkdir()
    (path.parent / "references/a.png").write_bytes(PNG)
    suite = images.open_suite("folder", str(path.parent), size=8)
    return suite.samples(1, 1)[0].prompt


CAPTION = {"conditioning_file_name": "a.png", "image_file_name": "a.png"}
UNO = {"image_paths": ["a.png"], "image_tgt_path": "a.png"}


def _json(**rest: Any) -> Callable[[str], str]:
    key = next(key for key, value in rest.items() if value is None)
    return lambda text: json.dumps({**rest, key: text}, ensure_ascii=False) + "\n"


DOORS: dict[str, Any] = {
    "seed captions": _file("a.txt", _plain, lambda path: seeds.read(str(path)).texts[0]),
    "seed captions, JSONL": _file("a.jsonl", _json(caption=None), lambda path: seeds.read(str(path)).texts[0]),
    "panels": _file("a.txt", _plain, lambda path: story.read_panels(path)[0].prompt),
    "batch": _file("a.jsonl", _json(prompt=None), lambda path: next(read_rows(path))[1]["prompt"]),
    "recipe": _file("a.yaml", lambda text: f"name: {text}\n", lambda path: recipe.load(path).name),
    "task": _file(
        "a.yaml", _yaml("recipe/tasks/subject.yaml", "description"), lambda path: tasks.load(str(path)).description
    ),
    "vocabulary": _file(
        "a.yaml",
        _yaml("stages/write/vocabulary/photo.yaml", "description"),
        lambda path: vocabulary.load(str(path)).description,
    ),
    "suite": _file("a.yaml", lambda text: f"name: {text}\n", lambda path: suites.read(str(path))["name"]),
    "evaluation": _file(
        "evaluation.yaml", lambda text: f"suite: {text}\n", lambda path: evaluation.read(path.parent)["suite"]
    ),
    "prompts of a suite": _file("prompts.txt", _plain, _own),
    "sheet": _file("a.csv", _csv, lambda path: next(iter(labels.read_sheet(path)))),
    "labels": _file("a.jsonl", _json(id=None, label="same", labeller="x"), lambda p: next(iter(labels.read(p)["x"]))),
    "ratings": _file("a.jsonl", _json(id=None, value=1), lambda p: next(iter(agreement.read_ratings(p)["human"]))),
    "imagefolder": _listed("imagefolder", _json(**CAPTION, caption=None), "metadata.jsonl"),
    "uno": _listed("uno", lambda text: f"[{_json(**UNO, prompt=None)(text)}]", "data.json"),
    "ai-toolkit": _toolkit,
    "webdataset": _tar("txt", _plain),
    "webdataset, JSON": _tar("json", _json(caption=None)),
}


@pytest.mark.parametrize("door", DOORS)
def test_every_door_takes_utf_8_with_a_mark_and_nothing_else(door: str, tmp_path: Path) -> None:
    read = DOORS[door]
    wrap = getattr(read, "wrap", _plain)

    def through(encoding: str, folder: str) -> str:
        (tmp_path / folder).mkdir()
        return read(tmp_path / folder, wrap("café").encode(encoding))

    assert through("utf8", "plain") == through("utf-8-sig", "marked") == "café"
    for encoding, name in (("latin-1", "Latin-1"), ("utf-16", "UTF-16")):
        with pytest.raises(UserError, match=f"line [0-9]+, byte [0-9]+.*{name}.*iconv"):  # wrapped by some, so any code
            through(encoding, encoding)


def test_a_token_file_with_a_mark_and_a_study_with_another_encoding(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_bytes("anna 0123456789abcdef\n".encode("utf-8-sig"))
    file.chmod(0o600)
    assert auth.read(str(file)) == {"anna": "0123456789abcdef"}
    file.write_bytes("anna 0123456789abcdef\n".encode("utf-16"))
    with raises("file_format_unknown", "UTF-16") as caught:
        auth.read(str(file))
    assert "0123" not in str(caught.value)
    (tmp_path / "study.yaml").write_bytes("name: é".encode("latin-1"))
    with raises("file_format_unknown", "Latin-1"):
        ablations.load(str(tmp_path / "study.yaml"))
