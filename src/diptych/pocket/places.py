"""Draws the background of a scene: the place, its prop and its weather, under neutral light.

Every place is a short function that draws on a canvas three times the panel's size; `layout` moves its hills, trees and
windows. Weather and season change the color of plants and add rain, snow or leaves, so one scene can be rendered again
in another season.
"""

import numpy as np
from PIL import Image, ImageDraw

from .draw import GROUND, OUTLINE, OVERSAMPLE, SCALES
from .world import INDOOR, Scene

SKIES = {
    "meadow": ((120, 190, 245), (205, 232, 250)),
    "beach": ((95, 185, 245), (200, 235, 250)),
    "forest": ((150, 195, 190), (190, 215, 190)),
    "desert": ((245, 205, 135), (250, 225, 170)),
    "city": ((165, 185, 215), (215, 220, 230)),
    "mountains": ((105, 160, 225), (205, 220, 240)),
    "seabed": ((40, 130, 190), (15, 60, 125)),
    "moon": ((12, 12, 32), (30, 28, 58)),
    "kitchen": ((245, 225, 190), (238, 212, 175)),
    "library": ((120, 78, 56), (105, 68, 50)),
    "cave": ((58, 50, 62), (78, 66, 74)),
    "castle": ((185, 195, 225), (225, 215, 225)),
}
GROUNDS = {
    "meadow": (105, 190, 80),
    "beach": (240, 218, 160),
    "forest": (78, 120, 62),
    "desert": (225, 165, 92),
    "city": (128, 128, 136),
    "mountains": (130, 165, 105),
    "seabed": (205, 190, 140),
    "moon": (165, 165, 178),
    "kitchen": (176, 120, 82),
    "library": (150, 42, 52),
    "cave": (92, 78, 72),
    "castle": (150, 150, 162),
}
FOLIAGE = {
    "clear": (62, 140, 62),
    "rain": (52, 118, 62),
    "fog": (92, 138, 100),
    "snow": (205, 222, 228),
    "autumn": (214, 108, 34),
    "spring": (242, 156, 190),
}
GREEN_GROUND = {"snow": (238, 243, 250), "autumn": (186, 150, 70), "spring": (140, 210, 95), "rain": (84, 150, 76)}
BOOKS = ((190, 60, 55), (60, 110, 170), (225, 190, 90), (70, 140, 95), (230, 225, 210))
HORIZON = 0.62


class _Easel:
    """A canvas in panel units (0..1), with the random numbers of the scene."""

    def __init__(self, scene: Scene, size: int):
        self.side = size * OVERSAMPLE
        self.scene = scene
        self.rng = np.random.default_rng(scene.layout)
        self.image = Image.new("RGB", (self.side, self.side))
        self.draw = ImageDraw.Draw(self.image)
        self.line = max(2, self.side // 96)
        self.foliage = FOLIAGE[scene.weather]

    def sky(self) -> None:
        top, bottom = (np.array(c, dtype=float) for c in SKIES[self.scene.place])
        if self.scene.weather in ("rain", "snow", "fog"):
            top, bottom = (c * 0.45 + np.array((190, 195, 205)) * 0.55 for c in (top, bottom))
        t = np.linspace(0, 1, self.side)[:, None]
        rows = np.clip(top + (bottom - top) * np.clip(t / HORIZON, 0, 1), 0, 255).astype(np.uint8)
        self.image.paste(Image.fromarray(np.broadcast_to(rows[:, None], (self.side, self.side, 3)).copy()))

    def ground(self, color=None) -> None:
        base = np.array(color or GROUNDS[self.scene.place], dtype=float)
        if self.scene.weather == "snow" and self.scene.place not in INDOOR:
            base = base * 0.2 + np.array((240, 244, 250)) * 0.8
        self.box(0, HORIZON, 1, 1, tuple(int(c) for c in base))
        self.box(0, 0.82, 1, 1, tuple(int(c * 0.93) for c in base))

    def box(self, x0, y0, x1, y1, fill, outline=None) -> None:
        s = self.side
        self.draw.rectangle([x0 * s, y0 * s, x1 * s, y1 * s], fill=fill, outline=outline, width=self.line)

    def oval(self, x, y, rx, ry, fill, outline=None) -> None:
        s = self.side
        self.draw.ellipse(
            [(x - rx) * s, (y - ry) * s, (x + rx) * s, (y + ry) * s], fill=fill, outline=outline, width=self.line
        )

    def shape(self, points, fill, outline=None) -> None:
        self.draw.polygon(
            [(x * self.side, y * self.side) for x, y in points], fill=fill, outline=outline, width=self.line
        )

    def stroke(self, points, fill, width: float = 1.0) -> None:
        self.draw.line(
            [(x * self.side, y * self.side) for x, y in points], fill=fill, width=max(1, round(self.line * width))
        )

    def spread(self, count: int, low: float = 0.02, high: float = 0.98) -> np.ndarray:
        """`count` random positions along the horizon, roughly evenly spaced."""
        return np.linspace(low, high, count) + self.rng.uniform(-0.5, 0.5, count) * (high - low) / count


def _meadow(e: _Easel) -> None:
    hills = tuple(int(c * 0.85) for c in GREEN_GROUND.get(e.scene.weather, GROUNDS["meadow"]))
    for x in e.spread(3):
        e.oval(x, HORIZON + 0.05, 0.3, e.rng.uniform(0.1, 0.2), hills)
    e.ground(GREEN_GROUND.get(e.scene.weather))
    for x in e.spread(9):
        color = [(250, 240, 120), (250, 150, 170), (245, 245, 250)][int(e.rng.integers(3))]
        y = e.rng.uniform(HORIZON + 0.05, 0.98)
        e.oval(x, y, 0.014, 0.014, color)


def _beach(e: _Easel) -> None:
    e.box(0, 0.5, 1, 0.66, (40, 130, 200))
    for y in (0.54, 0.59):
        for x in e.spread(4):
            e.stroke([(x, y), (x + 0.09, y)], (170, 215, 240))
    e.ground()
    x = float(e.rng.choice([0.08, 0.92]))
    lean = 0.07 if x < 0.5 else -0.07
    e.stroke([(x, 0.72), (x + lean, 0.3)], (130, 92, 58), 4)
    for dx, dy in ((-0.16, 0.04), (-0.1, -0.09), (0.1, -0.09), (0.16, 0.04)):
        e.shape([(x + lean, 0.3), (x + lean + dx, 0.3 + dy), (x + lean + dx * 0.4, 0.34 + dy * 0.3)], e.foliage)


def _forest(e: _Easel) -> None:
    for x in e.spread(6):
        height = e.rng.uniform(0.36, 0.56)
        e.box(x - 0.018, HORIZON - 0.12, x + 0.018, HORIZON + 0.03, (92, 64, 44))
        for k in range(3):
            y = HORIZON - 0.05 - k * height * 0.27
            w = 0.13 - 0.03 * k
            e.shape(
                [(x - w, y), (x, y - height * 0.42), (x + w, y)], tuple(int(c * (0.72 + 0.12 * k)) for c in e.foliage)
            )
    e.ground({"autumn": (150, 98, 52), "spring": (110, 160, 78)}.get(e.scene.weather))


def _desert(e: _Easel) -> None:
    for x in e.spread(2):
        e.shape([(x - 0.5, HORIZON + 0.03), (x, e.rng.uniform(0.38, 0.5)), (x + 0.5, HORIZON + 0.03)], (214, 150, 84))
    e.ground()
    for y in (0.7, 0.78, 0.9):
        x = e.rng.uniform(0, 0.6)
        e.stroke([(x, y), (x + 0.16, y - 0.015), (x + 0.34, y)], (200, 140, 72))


def _city(e: _Easel) -> None:
    x = -0.05
    while x < 1.0:
        w, h = e.rng.uniform(0.13, 0.22), e.rng.uniform(0.22, 0.52)
        gray = int(e.rng.integers(75, 135))
        e.box(x, HORIZON - h, x + w, HORIZON, (gray, gray - 5, gray + 12))
        for wx in np.arange(x + 0.03, x + w - 0.03, 0.055):
            for wy in np.arange(HORIZON - h + 0.04, HORIZON - 0.05, 0.08):
                if e.rng.random() < 0.7:
                    e.box(wx, wy, wx + 0.025, wy + 0.04, (250, 225, 130))
        x += w + 0.01
    e.ground()
    for x in np.arange(0.05, 1, 0.25):
        e.box(x, 0.89, x + 0.13, 0.91, (230, 230, 225))


def _mountains(e: _Easel) -> None:
    for x in e.spread(3, 0.1, 0.9):
        top, w = e.rng.uniform(0.14, 0.3), e.rng.uniform(0.25, 0.36)
        e.shape([(x - w, HORIZON + 0.02), (x, top), (x + w, HORIZON + 0.02)], (112, 118, 150))
        f = 0.34
        e.shape(
            [(x - w * f, top + (HORIZON - top) * f), (x, top), (x + w * f, top + (HORIZON - top) * f), (x, top + 0.09)],
            (245, 248, 252),
        )
    e.ground(GREEN_GROUND.get(e.scene.weather))


def _seabed(e: _Easel) -> None:
    for x in e.spread(5):
        h = e.rng.uniform(0.18, 0.36)
        color = [(35, 130, 90), (220, 100, 110), (150, 90, 170)][int(e.rng.integers(3))]
        e.stroke([(x, 0.68), (x + 0.03, 0.68 - h * 0.33), (x - 0.03, 0.68 - h * 0.66), (x + 0.02, 0.68 - h)], color, 3)
    e.ground()
    for x in e.spread(7):
        y, r = e.rng.uniform(0.06, 0.55), e.rng.uniform(0.012, 0.028)
        e.oval(x, y, r, r, None, (190, 230, 245))


def _moon(e: _Easel) -> None:
    for _ in range(26):
        x, y = e.rng.random(), e.rng.uniform(0, HORIZON)
        e.oval(x, y, 0.007, 0.007, (245, 245, 230))
    x = e.rng.uniform(0.12, 0.88)
    e.oval(x, 0.17, 0.1, 0.1, (70, 130, 210))
    e.oval(x - 0.02, 0.15, 0.04, 0.03, (90, 180, 110))
    e.ground()
    for x in e.spread(4):
        e.oval(x, e.rng.uniform(0.7, 0.96), 0.07, 0.025, (128, 128, 142))


def _kitchen(e: _Easel) -> None:
    for y in (0.2, 0.34, 0.48):
        e.stroke([(0, y), (1, y)], (226, 196, 156))
    x = float(e.rng.choice([0.1, 0.62]))
    e.box(x, 0.08, x + 0.27, 0.36, (165, 215, 245), (250, 250, 250))
    e.stroke([(x + 0.135, 0.08), (x + 0.135, 0.36)], (250, 250, 250))
    side = 0.72 - x
    e.box(side, 0.1, side + 0.24, 0.3, (190, 90, 70), (120, 55, 45))
    e.box(0, 0.5, 1, HORIZON, (95, 150, 160))
    e.box(0, 0.48, 1, 0.52, (235, 235, 230))
    e.ground()
    for x in np.arange(0, 1.01, 0.25):
        e.stroke([(x, HORIZON), (0.5 + (x - 0.5) * 1.8, 1)], (146, 96, 64))


def _library(e: _Easel) -> None:
    for y in (0.02, 0.22, 0.42):
        e.box(0, y + 0.17, 1, y + 0.2, (74, 46, 34))
        x = 0.0
        while x < 1:
            w, h = e.rng.uniform(0.03, 0.06), e.rng.uniform(0.11, 0.16)
            color = BOOKS[int(e.rng.integers(5))]
            if e.rng.random() < 0.88:
                e.box(x, y + 0.17 - h, x + w, y + 0.17, color)
            x += w + 0.008
    e.ground()


def _cave(e: _Easel) -> None:
    e.oval(0.5 + e.rng.uniform(-0.15, 0.15), 0.45, 0.27, 0.3, (150, 175, 195))
    for x in e.spread(6):
        h = e.rng.uniform(0.1, 0.3)
        e.shape([(x - 0.07, 0), (x, h), (x + 0.07, 0)], (40, 34, 44))
    for x in (0.04, 0.96):
        h = e.rng.uniform(0.12, 0.25)
        e.shape([(x - 0.1, HORIZON + 0.03), (x, HORIZON - h), (x + 0.1, HORIZON + 0.03)], (66, 56, 62))
    e.ground()
    for x in e.spread(3):
        e.shape([(x - 0.025, 0.68), (x, 0.58), (x + 0.025, 0.68)], (120, 220, 230))


def _castle(e: _Easel) -> None:
    stone, dark = (172, 166, 176), (128, 122, 136)
    for x in (float(e.rng.uniform(0.06, 0.16)), float(e.rng.uniform(0.84, 0.94))):
        top = e.rng.uniform(0.2, 0.3)
        e.box(x - 0.09, top, x + 0.09, HORIZON, stone, dark)
        e.shape([(x - 0.12, top), (x, top - 0.17), (x + 0.12, top)], (90, 70, 150))
        e.box(x - 0.02, top + 0.09, x + 0.02, top + 0.18, (60, 55, 75))
    e.box(0, 0.46, 1, HORIZON, stone, dark)
    for x in np.arange(0.0, 1, 0.13):
        e.box(x, 0.41, x + 0.07, 0.47, stone)
    e.shape([(0.4, HORIZON), (0.4, 0.54), (0.5, 0.49), (0.6, 0.54), (0.6, HORIZON)], (88, 62, 50))
    e.ground()
    for y in (0.72, 0.86):
        for x in np.arange(0, 1, 0.22):
            e.stroke([(x, y), (x + 0.12, y)], (130, 130, 144))


_DRAW = (
    _meadow, _beach, _forest, _desert, _city, _mountains, _seabed, _moon, _kitchen, _library, _cave, _castle,
)  # fmt: skip
_PLACES = {function.__name__.removeprefix("_"): function for function in _DRAW}


def _prop(e: _Easel, scene: Scene) -> None:
    side = -1 if scene.x > 0.5 else 1
    x = scene.x + side * (SCALES[scene.framing] * 0.95 + 0.12)
    x = min(0.89, max(0.11, x))
    y = GROUND[scene.framing] + 0.03
    k = {"close": 1.15, "medium": 1.0, "wide": 0.85}[scene.framing]

    def at(points):
        return [(x + px * k, y + py * k) for px, py in points]

    def oval(px, py, rx, ry, fill):
        e.oval(x + px * k, y + py * k, rx * k, ry * k, fill, OUTLINE)

    if scene.prop == "ball":
        oval(0, -0.1, 0.1, 0.1, (235, 60, 60))
        e.shape(at([(-0.095, -0.13), (0.095, -0.13), (0.095, -0.07), (-0.095, -0.07)]), (250, 250, 250))
    elif scene.prop == "balloon":
        e.stroke(at([(0, -0.05), (0.02, -0.36)]), OUTLINE)
        oval(0.02, -0.5, 0.1, 0.13, (235, 50, 90))
    elif scene.prop == "flower":
        e.stroke(at([(0, 0), (0, -0.22)]), (50, 130, 50), 2)
        for dx, dy in ((-0.06, 0), (0.06, 0), (0, -0.06), (0, 0.06)):
            oval(dx, -0.26 + dy, 0.05, 0.05, (250, 200, 60))
        oval(0, -0.26, 0.04, 0.04, (150, 80, 40))
    elif scene.prop == "umbrella":
        e.stroke(at([(0, 0), (0, -0.3)]), OUTLINE, 1.5)
        e.shape(at([(-0.17, -0.26), (-0.12, -0.37), (0, -0.43), (0.12, -0.37), (0.17, -0.26)]), (80, 90, 220), OUTLINE)
    elif scene.prop == "book":
        e.shape(at([(-0.13, -0.16), (0, -0.12), (0, 0.0), (-0.13, -0.04)]), (245, 240, 225), OUTLINE)
        e.shape(at([(0.13, -0.16), (0, -0.12), (0, 0.0), (0.13, -0.04)]), (225, 60, 60), OUTLINE)
    elif scene.prop == "cake":
        e.shape(at([(-0.12, -0.15), (0.12, -0.15), (0.12, 0), (-0.12, 0)]), (250, 200, 215), OUTLINE)
        e.shape(at([(-0.12, -0.15), (0.12, -0.15), (0.12, -0.1), (-0.12, -0.1)]), (120, 70, 45))
        e.stroke(at([(0, -0.15), (0, -0.25)]), (245, 245, 120), 2)
    elif scene.prop == "lamp":
        e.stroke(at([(0, 0), (0, -0.3)]), (70, 60, 70), 2)
        e.shape(at([(-0.11, -0.26), (-0.06, -0.42), (0.06, -0.42), (0.11, -0.26)]), (255, 240, 150), OUTLINE)


def paint(scene: Scene, size: int) -> tuple[np.ndarray, float]:
    """Draws the place and its prop under neutral light. Returns float `[size, size, 3]` in 0..1, and the horizon as a
    fraction of the height."""
    easel = _Easel(scene, size)
    easel.sky()
    _PLACES[scene.place](easel)
    if scene.prop != "none":
        _prop(easel, scene)
    small = easel.image.reduce(OVERSAMPLE)
    return np.asarray(small, dtype=np.float32) / 255.0, HORIZON


def weather(pixels: np.ndarray, scene: Scene) -> np.ndarray:
    """Adds rain, fog, snow, leaves or blossom. `pixels` is uint8 `[size, size, 3]`."""
    if scene.weather == "clear":
        return pixels
    size = pixels.shape[0]
    if scene.weather == "fog":
        height = np.linspace(0.25, 0.45, size, dtype=np.float32)[:, None, None]
        return (pixels * (1 - height) + 222 * height).astype(np.uint8)
    rng = np.random.default_rng(scene.layout + 1)
    side = size * 4
    unit = side / 128
    image = Image.fromarray(pixels).resize((side, side))
    draw = ImageDraw.Draw(image)
    count = {"rain": 20, "snow": 30, "autumn": 14, "spring": 16}[scene.weather]
    for x, y in rng.random((count, 2)) * side:
        if scene.weather == "rain":
            draw.line([(x, y), (x - 3 * unit, y + 11 * unit)], fill=(205, 220, 240), width=round(1.3 * unit))
            continue
        color = {"snow": (252, 253, 255), "autumn": (228, 110, 30), "spring": (250, 165, 200)}[scene.weather]
        wide, high = (1.9, 1.9) if scene.weather == "snow" else (2.7, 1.9)
        draw.ellipse([x - wide * unit, y - high * unit, x + wide * unit, y + high * unit], fill=color)
    return np.asarray(image.reduce(4))
