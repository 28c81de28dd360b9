"""Canvases with known panels, to test how grids are cut: grids as teachers paint them, and images that are not grids.

    canvas = make(seed=0, index=17)
    canvas.image, canvas.boxes       # the image, and the boxes of its panels; none if it is not a grid

A panel is a scene: ground and sky, light that falls off sideways, texture of several sizes, clutter and a subject. The
panels of a grid are separate scenes around one subject. `KINDS` lists the other properties of a canvas. A third of the
canvases is unchanged, a third is softened as by a decoder, and a third is compressed as JPEG. Canvas `index` of a seed
is the same on every machine with the same numpy and Pillow.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

KINDS = {  # what a canvas shows → how many of each hundred
    "plain": 11,  # panels side by side, evenly
    "off-centre": 12,  # seams up to a sixteenth of a panel from their even place
    "border": 10,  # one flat colour around the canvas
    "gutter": 11,  # a flat stripe between panels
    "border and gutter": 9,
    "shared background": 12,  # panels in one room: the same colours, horizon and light, so that seams are faint
    "pole or door at the seam": 11,  # a strong edge just beside a seam
    "one picture": 8,  # no grid: one scene over the whole canvas
    "one picture, pole or door": 10,  # the same with a strong edge where a seam would be
    "fewer panels": 6,  # no grid as asked: 1×2 for 2×2, 1×3 or 1×4
}
NO_GRID = ("one picture", "one picture, pole or door", "fewer panels")
LAYOUTS = ((1, 2), (2, 2), (1, 3), (1, 4))
SIZES = (64, 64, 256, 256, 512)  # pixels of a panel's side, each as likely
FLAT = ((255, 255, 255), (0, 0, 0), (242, 238, 226), (128, 128, 128), (24, 26, 40))  # of borders and gutters

Box = tuple[int, int, int, int]  # left, top, right, bottom


@dataclass(frozen=True)
class Canvas:
    """An image for a prompt of rows×cols panels, and the panels' true boxes in reading order; none if not a grid."""

    kind: str
    image: Image.Image
    rows: int
    cols: int
    panel_size: int
    boxes: tuple[Box, ...]
    finish: str  # "as drawn", "softened" or "JPEG"


@dataclass(frozen=True)
class Room:
    """The properties that panels of one place share."""

    sky: np.ndarray
    ground: np.ndarray
    horizon: float
    softness: float  # of the horizon, in panels
    fall: float  # of light from left to right
    coarse: float  # texture, levels of 255
    fine: float
    grain: float


def make(
    seed: int,
    index: int,
    kind: str | None = None,
    size: int | None = None,
    layout: tuple[int, int] | None = None,
) -> Canvas:
    """Canvas `index` of a seed. Kind, panel size and layout (rows, columns) are random unless given."""
    rng = np.random.default_rng([seed, index])
    lot = str(rng.choice(list(KINDS), p=np.array(list(KINDS.values())) / 100))
    drawn = int(rng.choice(SIZES))
    kind, size = kind or lot, size or drawn
    laid = LAYOUTS[rng.integers(1 if kind == "fewer panels" else 0, len(LAYOUTS))]
    rows, cols = layout or laid
    width, height = cols * size, rows * size
    flat = tuple(int(v) for v in FLAT[rng.integers(len(FLAT))])
    if kind in NO_GRID:
        pixels = _fewer(rng, width, height, size) if kind == "fewer panels" else _one(rng, kind, width, height, size)
        xs, ys = [], []
        canvas = Image.fromarray(pixels)
    else:
        edge = _pixels(rng, 0.02, 0.06, size, 2) if "border" in kind else 0
        gap = _pixels(rng, 0.02, 0.08, size, 3) if "gutter" in kind else 0
        off = size // 16 if kind == "off-centre" else 0
        xs, ys = (_spans(rng, side, parts, edge, gap, off) for side, parts in ((width, cols), (height, rows)))
        canvas = Image.new("RGB", (width, height), flat)
        subject, room = _Subject.draw(rng), _room(rng, shared=kind == "shared background")
        for number, (top, bottom) in enumerate(ys):
            for place, (left, right) in enumerate(xs):
                own = room if kind == "shared background" else _room(rng)
                panel = _scene(rng, own, right - left, bottom - top, size, [subject])
                if kind == "pole or door at the seam":
                    # Beside the seam that this panel shares with the next; the last has its own on its left.
                    away = _pixels(rng, 0.03, 0.12, size, 2)
                    at = away if place == cols - 1 else right - left - away
                    if number == 0 or rng.random() < 0.5:
                        panel = _false_edge(rng, panel, at, size, inwards=1 if place == cols - 1 else -1)
                canvas.paste(Image.fromarray(panel), (left, top))
    boxes = tuple((left, top, right, bottom) for top, bottom in ys for left, right in xs)
    finish = ("as drawn", "softened", "JPEG")[index % 3]
    return Canvas(kind, _finished(rng, canvas, finish, size), rows, cols, size, boxes, finish)


def tolerance(panel_size: int) -> int:
    """Allowed error of a panel's edge in pixels: 1/128 of its side, at least 1. A decoder smears an edge over two
    or three pixels of 512, and models look at a panel in patches of 8 to 16."""
    return max(1, panel_size // 128)


def fault(canvas: Canvas, strength: float, boxes: Sequence[Box], threshold: float = 0.0) -> str:
    """The fault of a cut of a canvas, or `""`. A `strength` below `threshold` means that the cutter rejects it."""
    if not canvas.boxes:
        return "taken for a grid" if strength >= threshold else ""
    if strength < threshold:
        return "refused"
    if len(boxes) != len(canvas.boxes):
        return f"{len(boxes)} panels for {len(canvas.boxes)}"
    off = max(abs(a - b) for box, true in zip(boxes, canvas.boxes, strict=True) for a, b in zip(box, true, strict=True))
    return f"off by {off} px" if off > tolerance(canvas.panel_size) else ""


def _pixels(rng: np.random.Generator, low: float, high: float, size: int, least: int) -> int:
    """A length between two shares of a panel."""
    return max(least, round(rng.uniform(low, high) * size))


def _spans(rng: np.random.Generator, side: int, parts: int, edge: int, gap: int, off: int) -> list[tuple[int, int]]:
    """The starts and ends of the panels along one axis."""
    inner = side - 2 * edge - (parts - 1) * gap
    starts = [inner * k // parts for k in range(parts + 1)]
    if off:
        moves = rng.integers(min(off, max(2, off // 3)), off + 1, parts - 1) * rng.choice((-1, 1), parts - 1)
        starts[1:-1] = [start + int(move) for start, move in zip(starts[1:-1], moves, strict=True)]
    return [(edge + a + k * gap, edge + b + k * gap) for k, (a, b) in enumerate(pairwise(starts))]


def _one(rng: np.random.Generator, kind: str, width: int, height: int, size: int) -> np.ndarray:
    """One scene over the whole canvas, with a false edge within a tenth of a panel of every seam's even place."""
    count = max(1, round(width / size))
    pixels = _scene(rng, _room(rng), width, height, size, [_Subject.draw(rng) for _ in range(count)])
    if kind == "one picture, pole or door":
        for at in range(size, width, size):
            pixels = _false_edge(rng, pixels, at + int(rng.uniform(-0.1, 0.1) * size), size)
    return pixels


def _fewer(rng: np.random.Generator, width: int, height: int, size: int) -> np.ndarray:
    """Two images side by side, each half as wide as the canvas, or a third where the half would be a seam."""
    at = width // 2 if width // size % 2 or height > size else width // 3 + size // 6
    subject = _Subject.draw(rng)
    return np.concatenate([_scene(rng, _room(rng), w, height, size, [subject]) for w in (at, width - at)], 1)


# ---- scenes


@dataclass(frozen=True)
class _Subject:
    """A figure that panels share: a body, a head, two eyes."""

    body: tuple[int, int, int]
    head: tuple[int, int, int]
    girth: float

    @classmethod
    def draw(cls, rng: np.random.Generator) -> _Subject:
        return cls(_colour(rng), _colour(rng), float(rng.uniform(0.14, 0.24)))

    def paint(self, brush: ImageDraw.ImageDraw, x: float, y: float, size: float) -> None:
        r = self.girth * size
        brush.ellipse((x - r, y - r, x + r, y + 1.3 * r), fill=self.body)
        brush.ellipse((x - 0.6 * r, y - 1.7 * r, x + 0.6 * r, y - 0.5 * r), fill=self.head)
        for side in (-0.25, 0.25):
            eye = 0.1 * r
            brush.ellipse((x + side * r - eye, y - 1.2 * r - eye, x + side * r + eye, y - 1.2 * r + eye), fill="black")


def _colour(rng: np.random.Generator, low: int = 20, high: int = 236) -> tuple[int, int, int]:
    red, green, blue = (int(v) for v in rng.integers(low, high, 3))
    return red, green, blue


def _room(rng: np.random.Generator, shared: bool = False) -> Room:
    """A random place. One that panels share has enough light from one side to make their seams visible."""
    fall = rng.choice((-1, 1)) * rng.uniform(0.12, 0.3) if shared else rng.uniform(-0.25, 0.25)
    return Room(
        np.array(_colour(rng, 60, 236), np.float32),
        np.array(_colour(rng, 30, 200), np.float32),
        float(rng.uniform(0.35, 0.75)),
        float(rng.uniform(0.02, 0.3)),
        float(fall),
        float(rng.uniform(3, 10 if shared else 22)),
        float(rng.uniform(2, 8 if shared else 16)),
        float(rng.uniform(1, 4 if shared else 8)),
    )


def _scene(
    rng: np.random.Generator, room: Room, width: int, height: int, size: int, subjects: list[_Subject]
) -> np.ndarray:
    """An image uint8 (height, width, 3); `size` is the unit of length of its parts."""
    y = np.linspace(0, 1, height, dtype=np.float32)
    ground = (0.5 + 0.5 * np.tanh((y - room.horizon) / (0.5 * room.softness)))[:, None]
    column = room.sky + (room.ground - room.sky) * ground
    picture = Image.fromarray(column[:, None].astype(np.uint8)).resize((width, height), Image.Resampling.NEAREST)
    brush = ImageDraw.Draw(picture)
    across = max(1, round(width / size))
    for _ in range(5 * across):
        x, low = rng.uniform(0, width), rng.uniform(0.3, 1) * height
        w, h = rng.uniform(0.05, 0.3, 2) * size
        box = (x - w / 2, low - h, x + w / 2, low)
        if rng.random() < 0.5:
            brush.ellipse(box, fill=_colour(rng))
        else:
            brush.rectangle(box, fill=_colour(rng))
    for k, subject in enumerate(subjects):
        x = (k + rng.uniform(0.3, 0.7)) * width / len(subjects)
        subject.paint(brush, x, rng.uniform(0.45, 0.65) * height, size)
    light = np.linspace(1 - room.fall / 2, 1 + room.fall / 2, width, dtype=np.float32)[:, None]
    pixels = np.asarray(picture, np.float32) * light
    pixels += _texture(rng, width, height, size, 8, room.coarse)
    pixels += _texture(rng, width, height, size, 32, room.fine)
    pixels += (rng.integers(-100, 101, (height, width, 1), np.int8) * np.float32(room.grain / 100)).astype(np.float32)
    return pixels.clip(0, 255).astype(np.uint8)


def _texture(rng: np.random.Generator, width: int, height: int, size: int, cells: int, levels: float) -> np.ndarray:
    """Noise (height, width, 3) with `cells` patches along a panel's side and an amplitude of `levels`, mostly gray."""
    shape = (max(2, cells * height // size), max(2, cells * width // size))
    noise = rng.normal(128, 50, (*shape, 1)) + rng.normal(0, 15, (*shape, 3))
    small = Image.fromarray(noise.clip(0, 255).astype(np.uint8))
    large = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), np.float32)
    return (large - 128) * np.float32(levels / 50)


def _false_edge(rng: np.random.Generator, pixels: np.ndarray, at: int, size: int, inwards: int = 0) -> np.ndarray:
    """A pole from top to bottom, or a door, with an edge at column `at`; to its right or left (`inwards` 1 or -1)."""
    pixels = pixels.copy()
    side = inwards or int(rng.choice((-1, 1)))
    if rng.random() < 0.5:
        thick = _pixels(rng, 0.03, 0.08, size, 2)
        left, right = max(0, min(at, at + side * thick)), min(pixels.shape[1], max(at, at + side * thick))
        round_light = np.sin(np.linspace(0.5, 2.6, max(1, right - left), dtype=np.float32))[None, :, None]
        _fill(rng, pixels, (left, 0, right, len(pixels)), _far(rng, pixels, at), round_light)
        return pixels
    wide, jamb = _pixels(rng, 0.25, 0.45, size, 8), _pixels(rng, 0.015, 0.04, size, 1)
    left, right = max(0, min(at, at + side * wide)), min(pixels.shape[1], max(at, at + side * wide))
    bottom = round(len(pixels) * rng.uniform(0.85, 1.0))
    top = bottom - round(rng.uniform(0.55, 0.8) * min(len(pixels), 1.5 * size))
    frame = _far(rng, pixels, at)
    _fill(rng, pixels, (left, max(0, top), right, bottom), frame)
    _fill(rng, pixels, (left + jamb, max(0, top) + jamb, right - jamb, bottom), _colour(rng))
    return pixels


def _far(rng: np.random.Generator, pixels: np.ndarray, at: int) -> tuple[int, int, int]:
    """A color that contrasts with column `at`."""
    here = pixels[:, min(max(at, 0), pixels.shape[1] - 1)].mean(0)
    tries = [_colour(rng, 0, 256) for _ in range(6)]
    return max(tries, key=lambda colour: float(np.abs(np.array(colour) - here).sum()))


def _fill(
    rng: np.random.Generator,
    pixels: np.ndarray,
    box: Box,
    colour: tuple[int, int, int],
    light: np.ndarray | float = 1.0,
) -> None:
    left, top, right, bottom = box
    if right > left and bottom > top:
        grain = rng.normal(0, 5, (bottom - top, right - left, 1)).astype(np.float32)
        pixels[top:bottom, left:right] = (np.array(colour, np.float32) * light + grain).clip(0, 255).astype(np.uint8)


def _finished(rng: np.random.Generator, image: Image.Image, finish: str, size: int) -> Image.Image:
    if finish == "softened":
        return image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.5 if size < 256 else 1.0)))
    if finish == "JPEG":
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=int(rng.integers(88, 97)), subsampling=0)
        return Image.open(stream).convert("RGB")
    return image


def contact_sheet(canvases: list[Canvas], width: int = 1536, row: int = 128) -> Image.Image:
    """Canvases side by side, `row` pixels high, their panels framed in red: to look at before they are trusted."""
    pictures = []
    for canvas in canvases:
        picture = canvas.image.copy()
        brush = ImageDraw.Draw(picture)
        for left, top, right, bottom in canvas.boxes:
            brush.rectangle((left, top, right - 1, bottom - 1), outline="red", width=max(1, canvas.panel_size // 128))
        pictures.append(picture.resize((max(1, picture.width * row // picture.height), row)))
    lines: list[list[Image.Image]] = [[]]
    for picture in pictures:
        if lines[-1] and sum(p.width + 6 for p in lines[-1]) + picture.width > width:
            lines.append([])
        lines[-1].append(picture)
    sheet = Image.new("RGB", (width, len(lines) * (row + 6)), (90, 0, 90))
    for number, line in enumerate(lines):
        lefts = [0, *accumulate(p.width + 6 for p in line)]
        for picture, left in zip(line, lefts, strict=False):
            sheet.paste(picture, (left, number * (row + 6)))
    return sheet
