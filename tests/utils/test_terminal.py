"""Images in a terminal, decoded again as the terminals do."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from diptych.utils.terminal import encode, protocol


@pytest.fixture
def image() -> Image.Image:
    values = np.zeros((60, 90, 3), np.uint8)
    values[:, :30], values[:30, 30:], values[30:, 30:] = (250, 10, 20), (0, 255, 0), (51, 102, 204)
    return Image.fromarray(values)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"TERM": "xterm-256color", "KITTY_WINDOW_ID": "1"}, "kitty"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "ghostty"}, "kitty"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}, "iterm"),
        ({"TERM": "xterm-256color", "LC_TERMINAL": "iTerm2"}, "iterm"),
        ({"TERM": "foot"}, "sixel"),
        ({"TERM": "xterm", "TERM_PROGRAM": "mintty"}, "sixel"),
        ({"TERM": "tmux-256color", "TMUX": "x", "KITTY_WINDOW_ID": "1"}, "blocks"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "vscode", "KITTY_WINDOW_ID": "1"}, "blocks"),
        ({"TERM": "xterm", "COLORTERM": "truecolor"}, "blocks"),
        ({"WT_SESSION": "x"}, "blocks"),
        ({"TERM": "xterm-256color", "NO_COLOR": "1"}, None),
        ({"TERM": "dumb"}, None),
        ({"TERM": "linux"}, None),
        ({}, None),
    ],
)
def test_the_protocol_follows_from_the_environment(environment: dict[str, str], expected: str | None) -> None:
    assert protocol(environment) == expected


def test_kitty_gets_a_png_in_chunks() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8))
    text = encode(image, "kitty", columns=30)
    commands = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", text)
    assert "".join(f"\x1b_G{keys};{part}\x1b\\" for keys, part in commands) + "\n" == text
    keys = dict(pair.split("=") for pair in commands[0][0].split(","))
    assert keys == {"a": "T", "f": "100", "q": "2", "c": "30", "r": "10", "m": "1"}
    assert [keys for keys, _ in commands[1:]] == ["m=1"] * (len(commands) - 2) + ["m=0"]
    assert len(commands) > 2 and all(len(part) == 4096 for _, part in commands[:-1])
    sent = Image.open(io.BytesIO(base64.b64decode("".join(part for _, part in commands))))
    assert np.array_equal(np.asarray(sent), np.asarray(image))


def test_iterm_gets_a_png_of_the_size_in_cells(image: Image.Image) -> None:
    match = re.fullmatch(r"\x1b\]1337;File=(.*):(.*)\x07\n", encode(image, "iterm", columns=30))
    assert match is not None
    keys, data = dict(pair.split("=") for pair in match[1].split(";")), base64.b64decode(match[2])
    assert (keys["inline"], keys["width"], keys["height"], int(keys["size"])) == ("1", "30", "10", len(data))
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), np.asarray(image))


def test_half_blocks_have_the_pixels(image: Image.Image) -> None:
    text = encode(image, "blocks", columns=45)
    cells = re.findall(r"\x1b\[38;2;(\d+);(\d+);(\d+);48;2;(\d+);(\d+);(\d+)m▀", text)
    shown = np.array(cells, np.uint8).reshape(15, 45, 2, 3).swapaxes(1, 2).reshape(30, 45, 3)
    assert np.abs(shown[3:12, 3:12].astype(int) - (250, 10, 20)).max() <= 1
    assert np.abs(shown[18:, 18:].astype(int) - (51, 102, 204)).max() <= 1
    assert text.count("\x1b[0m\n") == text.count("\n") == 15, "colors end with each line"
    few = encode(image, "blocks", columns=45, environment={"TERM": "xterm-256color"})
    assert "38;5;68;48;5;68m▀" in few and ";2;" not in few  # 16 + 36·1 + 6·2 + 4


@pytest.mark.parametrize(("size", "columns", "rows"), [((64, 64), 40, 10), ((64, 64), 20, 40), ((9, 300), 40, 10)])
def test_the_image_fits_the_terminal(size: tuple[int, int], columns: int, rows: int) -> None:
    lines = encode(Image.new("RGB", size), "blocks", columns, rows).splitlines()
    widths = {line.count("▀") for line in lines}
    assert len(lines) <= rows and len(widths) == 1 and max(widths) <= columns
    assert len(lines) == rows or widths == {columns}, "and fills it"


def test_sixels_have_the_pixels(image: Image.Image) -> None:
    text = encode(image, "sixel", columns=12)
    shown = decode_sixel(text)
    assert shown.shape == (64, 96, 3)  # 12 and 4 characters of 8 × 16 pixels
    expected = np.asarray(image.resize((96, 64), Image.Resampling.NEAREST)).astype(int)
    assert np.abs(shown - expected).max() <= 2  # sixel colors are in percent


def decode_sixel(text: str) -> np.ndarray:
    """The pixels of a sixel image (height, width, 3)."""
    head = re.match(r'\x1bPq"1;1;(\d+);(\d+)', text)
    assert head is not None and text.endswith("\x1b\\\n")
    width, height = int(head[1]), int(head[2])
    shown = np.full((-(-height // 6) * 6, width, 3), -1)
    colors: dict[int, np.ndarray] = {}
    x = y = 0
    color = np.zeros(3)
    for define, use, count, bits, move in re.findall(
        r"#(\d+;2;\d+;\d+;\d+)|#(\d+)|!(\d+)([?-~])|([$-])", text[head.end() : -3]
    ):
        if define:
            number, _, *rgb = map(int, define.split(";"))
            colors[number] = np.rint(np.array(rgb) * 2.55)
        elif use:
            color = colors[int(use)]
        elif count:
            for row in range(6):
                if (ord(bits) - 63) >> row & 1:
                    shown[y + row, x : x + int(count)] = color
            x += int(count)
        else:
            x, y = 0, y + 6 * (move == "-")
    assert (shown >= 0).all(), "every pixel has a color"
    return shown[:height]
