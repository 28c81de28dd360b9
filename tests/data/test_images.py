"""Any image becomes upright RGB or a one-line error; saved images have their provenance inside."""

from __future__ import annotations

import io
import struct
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diptych.data import images
from diptych.data.images import (
    broken_seal,
    check_image,
    encode,
    encode_png,
    image_cell,
    open_image,
    read_provenance,
    save_image,
    to_rgb,
)
from diptych.data.seal import jpeg_end
from diptych.errors import UsageError, UserError
from raising import raises


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def gradient(size: tuple[int, int] = (32, 16)) -> Image.Image:
    across = np.linspace(0, 255, size[0]).astype(np.uint8)
    down = np.linspace(0, 255, size[1]).astype(np.uint8)
    x, y = np.meshgrid(across, down)
    return Image.fromarray(np.stack([x, y, 255 - x], axis=-1))


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims a huge size."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


def test_bytes_paths_and_row_cells_open_alike(tmp_path: Path) -> None:
    image = gradient()
    path = tmp_path / "ñ «a».png"
    image.save(path)
    for source in (path, str(path), path.read_bytes(), image_cell(image)):
        assert open_image(source).tobytes() == image.tobytes()


def test_the_path_in_a_row_is_a_name_and_never_opened(tmp_path: Path) -> None:
    path = save_image(Image.new("RGB", (8, 8)), tmp_path / "secret.png")
    with raises("image_missing"):
        open_image({"bytes": None, "path": str(path)})


@pytest.mark.parametrize("megapixels", [(10_000, 10_000), (60_000, 60_000), (2**31 - 1, 2**31 - 1)])
def test_a_bomb_is_rejected_before_it_is_decoded(megapixels: tuple[int, int]) -> None:
    started = time.monotonic()
    with raises("image_too_large", "bomb.png", "megapixels"):
        open_image(bomb(*megapixels), name="bomb.png")
    assert time.monotonic() - started < 1


def test_a_file_with_too_many_bytes_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "big.png"
    with path.open("wb") as stream:
        stream.truncate(300 * 2**20)  # sparse
    with raises("image_too_large", "big.png", "300 MiB", "200 MiB"):
        open_image(path)
    with raises("image_too_large"):
        open_image(encoded(gradient()), max_bytes=10)


@pytest.mark.parametrize(
    ("data", "fact"),
    [
        (b"", "empty"),
        (b"hello, I am not an image", "PNG, JPEG"),
        (b"\x89PNG\r\n\x1a\n", ""),
        (encoded(gradient((256, 256)))[:400], "damaged"),
        (encoded(gradient((256, 256)), "JPEG")[:900], "damaged"),
        (encoded(gradient((256, 256)), "WEBP")[:-100], ""),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "PNG, JPEG"),
    ],
)
def test_a_damaged_image_is_a_one_line_error(data: bytes, fact: str) -> None:
    with raises("image_unreadable", "x.png: ", fact) as caught:
        open_image(data, name="x.png")
    assert "\n" not in str(caught.value)


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    with raises("image_not_found", tmp_path / "nope.png"):
        open_image(tmp_path / "nope.png")
    with raises("path_wrong_kind", tmp_path):
        open_image(tmp_path)


@settings(max_examples=150)
@given(st.data())
def test_a_damaged_file_opens_or_is_a_user_error(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"]))
    good = bytearray(encoded(gradient(), kind))
    for _ in range(data.draw(st.integers(1, 8))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(good)))
    try:
        assert open_image(bytes(good[:cut])).mode == "RGB"
    except UserError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(orientation: int) -> None:
    upright = gradient((40, 24))
    undo = {
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }
    stored = upright
    for step in undo.get(orientation, []):
        stored = stored.transpose(step)
    exif = Image.Exif()
    exif[0x0112] = orientation
    opened = open_image(encoded(stored, exif=exif.tobytes()))
    assert opened.size == upright.size and opened.tobytes() == upright.tobytes()


def test_alpha_is_laid_over_white() -> None:
    rgba = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    rgba.putpixel((1, 0), (0, 0, 0, 128))
    opened = open_image(encoded(rgba))
    assert opened.getpixel((0, 0)) == (255, 255, 255)
    assert opened.getpixel((1, 0)) == (127, 127, 127)


def test_alpha_is_put_over_a_chosen_color() -> None:
    rgba = Image.new("RGBA", (1, 1), (255, 0, 0, 0))
    for name, seen in (("black", (0, 0, 0)), ("#102030", (16, 32, 48)), ("hsl(0, 100%, 50%)", (255, 0, 0))):
        assert open_image(encoded(rgba), background=name).getpixel((0, 0)) == seen
    with raises("option_invalid", "'blackk'", "did you mean 'black'", kind=UsageError):
        to_rgb(rgba, "blackk")


def test_of_an_animation_the_first_frame_is_taken() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    for kind in ("GIF", "WEBP", "PNG"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=50, **options)
        assert Image.open(io.BytesIO(data)).n_frames == 2  # pyright: ignore[reportAttributeAccessIssue]
        assert open_image(data).getpixel((4, 4)) == (255, 0, 0)


def test_an_embedded_profile_is_applied_once_and_a_broken_one_not_at_all() -> None:
    from PIL import ImageCms

    grey = Image.new("RGB", (1, 1), (100, 100, 100))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert open_image(encoded(grey, icc_profile=srgb)).getpixel((0, 0)) == (100, 100, 100)
    assert open_image(encoded(grey, icc_profile=b"no profile")).getpixel((0, 0)) == (100, 100, 100)
    lab = ImageCms.createProfile("LAB")  # not a profile for RGB values: ignored as well
    assert open_image(encoded(grey, icc_profile=ImageCms.ImageCmsProfile(lab).tobytes())).mode == "RGB"
    wide = open_image(encoded(Image.new("RGB", (1, 1), (0, 255, 0)), icc_profile=linear_rgb()))
    assert wide.info == {} and to_rgb(wide) is wide
    middle = open_image(encoded(Image.new("RGB", (1, 1), (55, 55, 55)), icc_profile=linear_rgb())).getpixel((0, 0))
    assert isinstance(middle, tuple) and all(abs(value - 128) <= 2 for value in middle)  # linear light 0.216


def linear_rgb() -> bytes:
    """The sRGB profile with its curves made straight and its name changed."""
    from PIL import ImageCms

    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for tag in range(struct.unpack(">I", data[128:132])[0]):
        name, at, size = struct.unpack(">4sII", data[132 + 12 * tag : 144 + 12 * tag])
        if name in (b"rTRC", b"gTRC", b"bTRC"):
            data[at : at + 12] = b"curv" + bytes(4) + struct.pack(">I", 0)
        if name == b"desc":
            data[at : at + size] = data[at : at + size].replace(b"s\0R\0G\0B", b"l\0i\0n\0e")
    return bytes(data)


def test_an_image_that_is_already_plain_is_not_copied() -> None:
    image = gradient()
    assert to_rgb(image) is image


def test_checking_an_image_decodes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encoded(gradient((256, 256)))[:400])  # incomplete, which only decoding would show
    assert len(check_image(path)) == 64
    cases = ((b"", "image_unreadable"), (b"text", "image_unreadable"), (bomb(10_000, 10_000), "image_too_large"))
    for data, code in cases:
        path.write_bytes(data)
        with raises(code, path):
            check_image(path)
    with raises("image_not_found", tmp_path / "none.png"):
        check_image(tmp_path / "none.png")


def test_a_transparent_palette_is_laid_over_white() -> None:
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.putpixel((1, 0), 1)
    for kind in ("PNG", "GIF"):
        opened = open_image(encoded(palette, kind, transparency=0))
        assert opened.getpixel((0, 0)) == (255, 255, 255)
        assert opened.getpixel((1, 0)) == (0, 255, 0)


def test_grey_with_alpha_one_bit_and_cmyk_are_read() -> None:
    assert open_image(encoded(Image.new("LA", (1, 1), (0, 0)))).getpixel((0, 0)) == (255, 255, 255)
    assert open_image(encoded(Image.new("1", (1, 1), 1))).getpixel((0, 0)) == (255, 255, 255)
    red = open_image(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95)).getpixel((4, 4))
    assert isinstance(red, tuple) and red[0] > 240 and max(red[1:]) < 15


def test_sixteen_bit_and_float_grey_are_scaled_not_clipped() -> None:
    ramp = np.array([[0, 32768, 65535]], dtype=np.uint16)
    for image, kind in (
        (Image.fromarray(ramp), "PNG"),
        (Image.fromarray(ramp), "TIFF"),
        (Image.fromarray((ramp / 65535).astype(np.float32)), "TIFF"),
    ):
        values = np.asarray(open_image(encoded(image, kind)))[0, :, 0]
        assert values.tolist() == [0, 128, 255]


def test_the_same_image_makes_the_same_png() -> None:
    first, again = gradient(), gradient()
    again.info["dpi"] = (72, 72)  # what a file brought along must not show
    again.info["icc_profile"] = b"x"
    provenance = {"seed": 1, "prompt": "a cat"}
    assert encode_png(first, provenance) == encode_png(again, provenance)
    assert encode_png(first) != encode_png(first, provenance)


def test_provenance_comes_back_in_any_language(tmp_path: Path) -> None:
    provenance = {"prompt": "un gato — 猫\nline two", "seed": 2**62, "model": {"sha256": "ab"}, "guidance": 1.5}
    path = save_image(gradient(), tmp_path / "new" / "a.png", provenance)
    assert read_provenance(path) == provenance
    text = Image.open(path).info["parameters"]
    assert text.startswith("un gato") and f"seed: {2**62}" in text
    assert read_provenance(save_image(gradient(), tmp_path / "b.png")) is None
    assert open_image(path).tobytes() == gradient().tobytes()


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.jpg", "A.JPEG"])
def test_every_kind_of_file_says_what_made_it(tmp_path: Path, name: str) -> None:
    provenance = {"prompt": "un gato — 猫", "seed": 2**62, "model": {"sha256": "ab"}}
    path = save_image(gradient(), tmp_path / name, provenance)
    assert read_provenance(path) == provenance
    assert Image.open(path).format == images.KINDS[path.suffix.lower()]
    seen = np.asarray(open_image(path)).astype(int)
    assert np.abs(seen - np.asarray(gradient())).max() <= (6 if "j" in name.lower() else 0)  # PNG and WebP lose nothing
    assert read_provenance(save_image(gradient(), tmp_path / f"plain-{name}")) is None
    kind = images.KINDS[path.suffix.lower()]
    assert encode(gradient(), kind, provenance) == encode(gradient(), kind, provenance) == path.read_bytes()


@pytest.mark.parametrize(("kind", "most"), [("PNG", 0), ("WEBP", 0), ("JPEG", 6)])
def test_a_cell_is_of_the_requested_kind(kind: str, most: int) -> None:
    cell = image_cell(gradient(), "c-000012-0", kind)
    assert Image.open(io.BytesIO(cell["bytes"])).format == kind and cell["path"] == "c-000012-0"
    seen = np.asarray(open_image(cell)).astype(int)
    assert np.abs(seen - np.asarray(gradient())).max() <= most
    assert image_cell(gradient())["bytes"] == encode_png(gradient())


def test_other_comments_are_not_provenance(tmp_path: Path) -> None:
    for number, comment in enumerate((b"ASCII\0\0\0{broken", b"ASCII\0\0\0[1]", b"UNICODE\0h\0i", b"ASCII\0\0\0{}")):
        exif = Image.Exif()
        exif.get_ifd(0x8769)[0x9286] = comment
        path = tmp_path / f"{number}.jpg"
        gradient().save(path, exif=exif.tobytes())
        assert read_provenance(path) is None


def test_a_jpeg_refuses_provenance_that_it_cannot_hold(tmp_path: Path) -> None:
    long = {"prompt": "x" * 70_000}
    with raises("image_unwritable", "PNG or WebP"):
        save_image(gradient(), tmp_path / "a.jpg", long)
    assert read_provenance(save_image(gradient(), tmp_path / "a.webp", long)) == long


def test_saving_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_image(gradient(), tmp_path / "a.png", {"seed": 1})
    before = path.read_bytes()

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(UserError, match="No space left"):
        save_image(gradient((64, 64)), path, {"seed": 2})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("name", "fact"), [("a.gif", ".png, .webp or .jpg"), ("file/b.png", "file/b.png")])
def test_a_path_that_cannot_be_written_is_named(tmp_path: Path, name: str, fact: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=fact):
        save_image(gradient(), tmp_path / name)


def test_the_limit_is_below_what_hurts() -> None:
    assert images.MAX_PIXELS < 100_000_000


def profile(kind: str, gamma: float | None, name: str = "sRGB IEC61966-2.1") -> bytes:
    """An ICC profile called `name` of a gamma (None: the sRGB curve), for RGB, gray or CMYK values.

    RGB has sRGB's primaries. CMYK is a press on which only K prints, and gray rises with 1 - K.
    """
    from PIL import ImageCms

    def text(kind: bytes) -> bytes:
        raw = name.encode("utf-16-be")
        return kind + bytes(4) + struct.pack(">II2s2sII", 1, 12, b"en", b"US", len(raw), 28) + raw

    made = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    tags: dict[bytes, bytes] = {}
    for tag in range(struct.unpack(">I", made[128:132])[0]):
        key, at, size = struct.unpack(">4sII", made[132 + 12 * tag : 144 + 12 * tag])
        tags[key] = bytes(made[at : at + size])
    tags[b"desc"] = text(b"mluc")
    if gamma is not None:
        curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)
        tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    header = made[:128]
    if kind == "GRAY":
        header[16:20] = b"GRAY"
        tags = {key: tags[key] for key in (b"desc", b"wtpt")} | {b"kTRC": tags[b"rTRC"]}
    if kind == "CMYK":
        header[12:24] = b"prtrCMYKLab "
        header[8:12] = b"\x02\x40\0\0"
        # Two grid points an axis, K fastest: white, then black; the other inks change nothing.
        line = bytes(range(256))
        lut = (
            b"mft1"
            + bytes(4)
            + bytes([4, 3, 2, 0])
            + struct.pack(">9i", *[v << 16 for v in (1, 0, 0, 0, 1, 0, 0, 0, 1)])
        )
        lut += line * 4 + bytes([255, 128, 128, 0, 128, 128]) * 8 + line * 3
        tags = {b"desc": tags[b"desc"], b"wtpt": tags[b"wtpt"], b"A2B0": lut}
    table, body = struct.pack(">I", len(tags)), b""
    for key, data in tags.items():
        table += struct.pack(">4sII", key, 128 + 4 + 12 * len(tags) + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    header[0:4] = struct.pack(">I", 128 + len(table) + len(body))
    return bytes(header) + table + body


def level(image: Image.Image, kind: str = "PNG", **options: Any) -> tuple[int, ...]:
    value = open_image(encoded(image, kind, **options)).getpixel((0, 0))
    assert isinstance(value, tuple)
    return tuple(int(v) for v in value)


def palette(value: int) -> Image.Image:
    image = Image.new("P", (1, 1), 0)
    image.putpalette([value] * 3)
    return image


@pytest.mark.parametrize(
    ("image", "kind", "options"),
    [
        (Image.new("RGB", (1, 1), (55, 55, 55)), "RGB", {}),
        (Image.new("RGBA", (1, 1), (55, 55, 55, 255)), "RGB", {}),
        (palette(55), "RGB", {}),
        (Image.new("L", (1, 1), 55), "RGB", {}),
        (Image.new("L", (1, 1), 55), "GRAY", {}),
        (Image.new("LA", (1, 1), (55, 255)), "GRAY", {}),
        (Image.fromarray(np.full((1, 1), 55 * 257, np.uint16)), "GRAY", {}),
        (Image.fromarray(np.full((1, 1), 55 * 257, np.uint16)), "GRAY", {"kind": "TIFF"}),
        (Image.fromarray(np.full((1, 1), 55 / 255, np.float32)), "GRAY", {"kind": "TIFF"}),
        (Image.new("RGB", (8, 8), (55, 55, 55)), "RGB", {"kind": "JPEG", "quality": 100}),
        (Image.new("RGB", (8, 8), (55, 55, 55)), "RGB", {"kind": "WEBP", "lossless": True}),
        (Image.new("L", (8, 8), 55), "GRAY", {"kind": "JPEG", "quality": 100}),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else None,
)
def test_a_profile_counts_by_what_it_does_whatever_it_is_called(image: Image.Image, kind: str, options: Any) -> None:
    for name in ("sRGB IEC61966-2.1", "my camera"):
        linear = level(image, **options, icc_profile=profile(kind, 1.0, name))
        assert all(abs(value - 128) <= 1 for value in linear), (name, linear)
        assert level(image, **options, icc_profile=profile(kind, None, name)) == (55, 55, 55)


def test_an_srgb_profile_of_any_name_leaves_every_pixel() -> None:
    image = gradient()
    assert open_image(encoded(image, icc_profile=profile("RGB", None, "whatever"))).tobytes() == image.tobytes()


def test_transparency_is_read_from_the_values_in_the_file_and_applied_after_the_profile() -> None:
    image = Image.new("RGB", (2, 1), (55, 55, 55))
    image.putpixel((1, 0), (60, 60, 60))
    linear = profile("RGB", 1.0)
    opened = open_image(encoded(image, icc_profile=linear, transparency=(60, 60, 60)), background="#373737")
    assert opened.getpixel((1, 0)) == (55, 55, 55) and abs(np.asarray(opened)[0, 0, 0] - 128.0) <= 1
    deep = Image.fromarray(np.array([[0, 9]], dtype=np.uint16))
    assert np.asarray(open_image(encoded(deep, transparency=0)))[0, :, 0].tolist() == [255, 0]


def test_a_press_profile_and_lab_values_become_srgb() -> None:
    half = Image.new("CMYK", (8, 8), (0, 0, 0, 128))
    for kind, options in (("TIFF", {}), ("JPEG", {"quality": 100})):
        # Half way between the profile's black and white is lightness 50, which in sRGB is 119.
        assert all(abs(v - 119) <= 3 for v in level(half, kind, **options, icc_profile=profile("CMYK", None)))
        assert level(half, kind, **options, icc_profile=profile("RGB", 1.0))[0] == level(half, kind, **options)[0]
    gray = Image.merge("LAB", [Image.new("L", (1, 1), value) for value in (128, 128, 128)])
    assert all(abs(v - 119) <= 2 for v in level(gray, "TIFF"))


@pytest.mark.parametrize(
    ("values", "seen"),
    [
        ([0.0, 0.5, 1.0, 1.5], [0, 128, 255, 255]),  # highlights
        ([0.0, 0.5, 1.0, 2.0, 8.0], [0, 128, 255, 255, 255]),
        ([0.25] * 200 + [300.0], [64] * 200 + [255]),  # one lamp
        ([0.0, 127.5, 255.0], [0, 128, 255]),
        ([0.0, 3.0, 200.0], [0, 3, 200]),
        ([0.0, 32768.0, 65535.0], [0, 128, 255]),
        ([-1.0, np.nan, np.inf, 1.0], [0, 0, 255, 255]),
    ],
)
def test_float_grey_above_one_is_not_black(values: list[float], seen: list[int]) -> None:
    image = Image.fromarray(np.array([values], dtype=np.float32))
    assert np.asarray(open_image(encoded(image, "TIFF")))[0, :, 0].tolist() == seen


def test_whole_numbers_of_24_bits_are_not_black() -> None:
    image = Image.fromarray(np.array([[0, 2**23, 2**24 - 1]], dtype=np.int32))
    assert np.asarray(open_image(encoded(image, "TIFF")))[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("progressive", [False, True])
def test_bytes_behind_the_end_of_a_jpeg_are_not_a_changed_image(progressive: bool, tmp_path: Path) -> None:
    noise = Image.effect_noise((64, 48), 90).convert("RGB")
    sealed = encode(noise, "JPEG", {"prompt": "x"})
    assert jpeg_end(sealed) == len(sealed)
    assert broken_seal(sealed + b"\0") == [] == broken_seal(sealed + sealed)
    changed = bytearray(sealed)
    changed[-20] ^= 1
    assert broken_seal(bytes(changed)) == ["image data"]
    other = encoded(noise, "JPEG", progressive=progressive, restart_marker_blocks=3)
    assert jpeg_end(other + b"\xff\xd9tail") == len(other)
