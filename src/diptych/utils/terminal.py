"""Images in a terminal: kitty's graphics protocol, iTerm2's inline images, sixels, or half blocks in color.

    print(encode(image, "blocks", columns=48))

The protocol follows from environment variables (`protocol`), because a question to the terminal may stay unanswered.
Sources: sw.kovidgoyal.net/kitty/graphics-protocol, iterm2.com/documentation-images.html, and the VT340's manual.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

CHUNK = 4096  # characters of base64 in one kitty command
CELL = 8  # width of a character in pixels, to scale sixels; it is twice as high
COLORS = 128  # of a sixel image


def protocol(environment: Mapping[str, str]) -> str | None:
    """`kitty`, `iterm`, `sixel`, `blocks`, or None for a terminal without colors."""
    term, program = environment.get("TERM", ""), environment.get("TERM_PROGRAM", "")
    inside = "TMUX" in environment or term.startswith(("screen", "tmux"))  # these do not pass images on
    if not inside and program != "vscode":
        if "KITTY_WINDOW_ID" in environment or "kitty" in term or "ghostty" in f"{term} {program}":
            return "kitty"
        if program in ("iTerm.app", "WezTerm") or environment.get("LC_TERMINAL") == "iTerm2":
            return "iterm"
        if program == "mintty" or term.startswith(("foot", "mlterm", "contour", "yaft")) or "sixel" in term:
            return "sixel"
    if environment.get("NO_COLOR"):
        return None
    return "blocks" if _true_color(environment) or "256color" in term else None


def _true_color(environment: Mapping[str, str]) -> bool:
    return environment.get("COLORTERM", "") in ("truecolor", "24bit") or "WT_SESSION" in environment


def encode(image: Image, name: str, columns: int, rows: int = 24, environment: Mapping[str, str] | None = None) -> str:
    """The image as text for a terminal, in at most `columns` and `rows` characters, with a line end.

    Args:
        name: a protocol.
        environment: with blocks, whether the terminal has 16 million colors. None means that it has.
    """
    image = image.convert("RGB")
    width, height = image.size
    # A character is about twice as high as it is wide.
    scale = min(columns / width, 2 * rows / height)
    columns, rows = max(1, round(width * scale)), max(1, round(height * scale / 2))
    if name == "kitty":
        return _kitty(image, columns, rows)
    if name == "iterm":
        data = _png(image)
        size = f"width={columns};height={rows};preserveAspectRatio=1;size={len(data)}"
        return f"\x1b]1337;File=inline=1;{size}:{base64.b64encode(data).decode()}\x07\n"
    if name == "sixel":
        return _sixel(_resized(image, (columns * CELL, rows * 2 * CELL)))
    return _blocks(_resized(image, (columns, 2 * rows)), environment is None or _true_color(environment))


def _resized(image: Image, size: tuple[int, int]) -> Image:
    from PIL.Image import Resampling

    larger = size[0] >= image.width
    return image.resize(size, Resampling.NEAREST if larger else Resampling.LANCZOS)


def _png(image: Image) -> bytes:
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


def _kitty(image: Image, columns: int, rows: int) -> str:
    text = base64.b64encode(_png(image)).decode()
    parts = [text[i : i + CHUNK] for i in range(0, len(text), CHUNK)]
    keys = f"a=T,f=100,q=2,c={columns},r={rows},"  # transmit and show a PNG; no answer
    commands = [
        f"\x1b_G{'' if number else keys}m={int(number < len(parts) - 1)};{part}\x1b\\"
        for number, part in enumerate(parts)
    ]
    return "".join(commands) + "\n"


def _blocks(image: Image, true_color: bool) -> str:
    """Two pixels in each character: the upper half block has the color of the upper one, its background the lower."""

    def color(place: int, at: tuple[int, int]) -> str:
        rgb: Any = image.getpixel(at)
        if true_color:
            return f"{place};2;{rgb[0]};{rgb[1]};{rgb[2]}"
        red, green, blue = (round(value / 51) for value in rgb)  # the cube of 6 × 6 × 6 colors
        return f"{place};5;{16 + 36 * red + 6 * green + blue}"

    lines = []
    for y in range(0, image.height, 2):
        cells = (f"\x1b[{color(38, (x, y))};{color(48, (x, y + 1))}m▀" for x in range(image.width))
        lines.append("".join(cells) + "\x1b[0m\n")
    return "".join(lines)


def _sixel(image: Image) -> str:
    """Bands of six rows. Each color of a band is a line of characters whose bits are the rows that have the color."""
    import numpy as np

    palette = image.quantize(COLORS)
    values = np.asarray(palette)
    values = np.pad(values, ((0, -len(values) % 6), (0, 0)), mode="edge")
    colors = np.asarray(palette.getpalette()).reshape(-1, 3)
    out = [f'\x1bPq"1;1;{image.width};{image.height}']
    out += [f"#{n};2;{r};{g};{b}" for n, (r, g, b) in enumerate(np.rint(colors / 2.55).astype(int))]
    for top in range(0, len(values), 6):
        band = values[top : top + 6]
        lines = []
        for color in np.unique(band):
            bits = ((band == color) << np.arange(6)[:, None]).sum(axis=0) + 63
            edges = np.flatnonzero(np.diff(bits)) + 1
            starts, ends = [0, *edges], [*edges, len(bits)]
            runs = (f"!{end - start}{chr(bits[start])}" for start, end in zip(starts, ends, strict=True))
            lines.append(f"#{color}{''.join(runs)}")
        out.append("$".join(lines) + "-")  # $ returns to the start of the band, - goes to the next one
    return "".join(out) + "\x1b\\\n"
