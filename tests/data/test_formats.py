"""Formats of phones and browsers are opened, or the error says what to install; other files in a folder are listed."""

from __future__ import annotations

import io
import logging
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, features

from diptych.apps.batch import plan
from diptych.data import formats
from diptych.data.formats import pictures_in
from diptych.data.images import check_image, encode, open_image
from diptych.data.interop import find
from diptych.data.interop.rows import Options
from diptych.evaluate.suites import images
from raising import raises

RED = Image.new("RGB", (32, 16), (200, 30, 40))


def encoded(kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    RED.save(out, kind, **options)
    return out.getvalue()


def box(brand: bytes, *compatible: bytes) -> bytes:
    """The first box of a file of the ISO family, and nothing that could be decoded."""
    content = brand + bytes(4) + b"".join(compatible)
    return (8 + len(content)).to_bytes(4, "big") + b"ftyp" + content + bytes(64)


def near_red(image: Image.Image) -> bool:
    pixel = image.getpixel((16, 8))
    assert isinstance(pixel, tuple)
    return image.size == RED.size and all(abs(a - b) <= 12 for a, b in zip(pixel, (200, 30, 40), strict=True))


def test_heic_is_opened_where_its_plug_in_is_installed(tmp_path: Path) -> None:
    pytest.importorskip("pillow_heif").register_heif_opener()
    exif = Image.Exif()
    exif[0x0112] = 6  # cameras also write the rotation that the decoder has applied
    path = tmp_path / "IMG_0001.HEIC"
    RED.save(path, "HEIF", quality=95, exif=exif)
    assert near_red(open_image(path)) and check_image(path)
    assert near_red(open_image(path.read_bytes(), formats=("PNG", "HEIF")))
    with raises("image_unreadable", path, "(PNG)"):
        open_image(path, formats=("PNG",))
    with raises("image_too_large"):
        open_image(path, max_pixels=100)


@pytest.mark.parametrize("brands", [(b"heic", b"mif1"), (b"mif1", b"heic"), (b"msf1", b"hevc")])
def test_without_the_plug_in_the_message_names_what_to_install(
    tmp_path: Path, brands: tuple[bytes, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "_register_heif", lambda: False)  # as where it is not installed
    path = tmp_path / "cat.heic"
    path.write_bytes(box(*brands))
    for look in (open_image, check_image):
        with raises("dependency_missing", "cat.heic", "pip install 'diptych[heic]'"):
            look(path)


def test_without_the_plug_in_other_formats_work() -> None:
    code = """
        import sys
        sys.modules["pillow_heif"] = None  # not installed
        from diptych.data.formats import open_header
        from diptych.errors import UserError
        try:
            open_header(bytes.fromhex("00000018") + b"ftypheic" + bytes(4) + b"mif1heic", "x")
        except UserError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert "diptych[heic]" in done.stdout


def test_avif_and_jfif_are_opened_and_a_pillow_without_avif_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cat.jfif").write_bytes(encoded("JPEG", quality=95))
    assert near_red(open_image(tmp_path / "cat.jfif"))
    Image.init()
    if features.check("avif"):
        assert near_red(open_image(encoded("AVIF", quality=90)))
        monkeypatch.delitem(Image.OPEN, "AVIF")
        monkeypatch.setattr(Image, "ID", [name for name in Image.ID if name != "AVIF"])
    with raises("dependency_missing", "AVIF", "Pillow 11.3"):
        open_image(box(b"avif", b"mif1"))


def test_what_needs_no_plug_in_is_opened_where_heif_is_one_of_the_formats() -> None:
    assert near_red(open_image(encoded("PNG"), formats=("HEIF", "PNG")))
    with raises("image_unreadable", "HEIF, PNG"):
        open_image(b"GIF89a", formats=("HEIF", "PNG"))


def test_the_error_for_other_files_lists_the_formats(tmp_path: Path) -> None:
    (tmp_path / "film.png").write_bytes(box(b"isom", b"mp42"))
    for look in (open_image, check_image):
        with raises("image_unreadable", "film.png", "PNG, ", "HEIC"):
            look(tmp_path / "film.png")


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    folder = tmp_path / "references"
    folder.mkdir()
    for name in ("a.png", "b.JFIF", "c.jpe", "d.HEIC", "e.avif"):
        (folder / name).write_bytes(encoded("JPEG"))
    for name in ("notes.docx", "f.psd", ".DS_Store", "g"):
        (folder / name).write_bytes(b"x")
    (folder / "old").mkdir()
    (folder / "old/h.png").write_bytes(encoded("PNG"))
    return folder


def said(caplog: pytest.LogCaptureFixture) -> str:
    (record,) = (record for record in caplog.records if record.levelno == logging.WARNING)
    return record.getMessage()


def test_a_folder_of_references_names_what_it_leaves_out(mixed: Path, caplog: pytest.LogCaptureFixture) -> None:
    result = plan({"reference": str(mixed), "prompt": "a cat"}, None, str(mixed.parent / "out/"))
    assert [request.reference.name for request in result.requests if request.reference] == [
        "a.png",
        "b.JFIF",
        "c.jpe",
        "d.HEIC",
        "e.avif",
    ]
    message = said(caplog)
    assert "4 of 9" in message and all(name in message for name in ("notes.docx", "f.psd", "g", "old/"))
    assert ".DS_Store" not in message
    caplog.clear()
    for number in range(20):
        (mixed / f"{number}.raw").write_bytes(b"x")
    assert len(pictures_in(mixed)) == 5 and "24 of 29" in said(caplog) and "and 19 more" in caplog.text


def test_a_suite_of_local_images_lists_them_too(mixed: Path, caplog: pytest.LogCaptureFixture) -> None:
    (mixed / "a.txt").write_text("a red thing\nat the beach")
    (mixed.parent / "prompts.txt").write_text("on the moon")
    suite = images.open_suite("folder", str(mixed.parent), size=16)
    assert len(suite.subjects) == 6
    assert all(name in said(caplog) for name in ("notes.docx", "f.psd")) and "a.txt" not in caplog.text


def test_folders_of_pairs_name_them_too(mixed: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(mixed, mixed.parent / "control")
    (mixed.parent / "target").mkdir()
    for name in ("a", "b", "c", "d", "e"):
        (mixed.parent / f"target/{name}.png").write_bytes(encode(RED, "PNG"))
        (mixed.parent / f"target/{name}.txt").write_text("a cat")
    assert len(find("ai-toolkit").open(str(mixed.parent), Options())) == 5
    assert "f.psd" in said(caplog) and "a.txt" not in caplog.text
