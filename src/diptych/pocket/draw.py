"""Draws a subject: vector shapes on a canvas three times the panel's size, which is reduced at the end.

Subjects are sketched in a square of −1..1 (y down, feet at +1) and moved into the image by one affine map, so every
kind, face and accessory takes the same pose.
"""

import itertools
import math

import numpy as np
from PIL import Image, ImageDraw

from .world import Identity, Scene

OVERSAMPLE = 3
OUTLINE = (38, 30, 42, 255)
SCALES = {"close": 0.42, "medium": 0.36, "wide": 0.29}
"""Half the subject's height as a fraction of the panel's."""
GROUND = {"close": 0.94, "medium": 0.9, "wide": 0.86}
"""Where its feet stand, as a fraction of the panel's height."""


def rgb(color, gain: float = 1.0) -> tuple[int, int, int, int]:
    """An opaque RGBA color in 0..255 from RGB in 0..1."""
    red, green, blue = (int(255 * min(1.0, max(0.0, channel * gain))) for channel in color)
    return red, green, blue, 255


def oval(x: float, y: float, rx: float, ry: float, power: float = 2.0, steps: int = 28) -> np.ndarray:
    """The points `[steps, 2]` of a superellipse: `power` 2 is an ellipse, larger values are squarer."""
    t = np.linspace(0, 2 * math.pi, steps, endpoint=False)
    c, s = np.cos(t), np.sin(t)
    return np.stack([x + rx * np.sign(c) * np.abs(c) ** (2 / power), y + ry * np.sign(s) * np.abs(s) ** (2 / power)], 1)


def box(x0: float, y0: float, x1: float, y1: float) -> np.ndarray:
    return np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])


class Pen:
    """Draws in subject coordinates on an RGBA canvas, through one affine map."""

    def __init__(self, side: int, matrix: np.ndarray, width: int):
        self.image = Image.new("RGBA", (side, side), (0, 0, 0, 0))
        self.draw = ImageDraw.Draw(self.image)
        self.matrix, self.line_width = matrix, width

    def points(self, shape) -> list[tuple[float, float]]:
        shape = np.asarray(shape, dtype=float)
        return [tuple(p) for p in (shape @ self.matrix[:, :2].T + self.matrix[:, 2]).tolist()]

    def fill(self, shape, color, outline: bool = True) -> None:
        points = self.points(shape)
        self.draw.polygon(points, fill=color)
        if outline:
            self.draw.line([*points, points[0], points[1]], fill=OUTLINE, width=self.line_width, joint="curve")

    def line(self, shape, color=OUTLINE, width: float = 1.0) -> None:
        self.draw.line(self.points(shape), fill=color, width=max(1, round(self.line_width * width)), joint="curve")

    def patterned(self, shape, identity: Identity) -> None:
        """Fills `shape` with the identity's body color and pattern, clipped to the shape."""
        points = self.points(shape)
        side = self.image.size
        layer = Image.new("RGBA", side, rgb(identity.body))
        pattern(ImageDraw.Draw(layer), self, np.asarray(shape), identity)
        mask = Image.new("L", side)
        ImageDraw.Draw(mask).polygon(points, fill=255)
        self.image.paste(layer, mask=mask)
        self.draw.line([*points, points[0], points[1]], fill=OUTLINE, width=self.line_width, joint="curve")


def pattern(draw: ImageDraw.ImageDraw, pen: Pen, shape: np.ndarray, identity: Identity) -> None:
    """Draws the identity's pattern over the extent of a shape."""
    kind, color = identity.pattern, rgb(identity.second)
    (x0, y0), (x1, y1) = shape.min(0), shape.max(0)
    cx, cy, w, h = (x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0
    step = 0.36 + 0.24 * identity.pattern_scale

    def polygon(points) -> None:
        draw.polygon(pen.points(points), fill=color)

    angle = math.radians(identity.pattern_angle)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    if kind == "stripes":
        for k in range(-5, 6):
            polygon(box(-2.0, k * step - step * 0.24, 2.0, k * step + step * 0.24) @ turn.T + np.array((cx, cy)))
    elif kind == "spots":
        for i, j in itertools.product(range(-4, 5), repeat=2):
            center = turn @ np.array([(i + 0.5 * (j % 2)) * step * 1.25, j * step * 1.1]) + (cx, cy)
            if x0 - 0.2 < center[0] < x1 + 0.2 and y0 - 0.2 < center[1] < y1 + 0.2:
                polygon(oval(center[0], center[1], step * 0.34, step * 0.34, steps=12))
    elif kind == "checks":
        for i, j in itertools.product(range(-4, 5), repeat=2):
            if (i + j) % 2 == 0:
                polygon(box(i * step, j * step, (i + 1) * step, (j + 1) * step) + np.array((cx, cy)))
    elif kind == "belly":
        size = 0.28 + 0.14 * identity.pattern_scale
        polygon(oval(cx, cy + h * 0.24, w * size, h * size))
    elif kind == "half":
        polygon(box(-2, y0 + h * (0.38 + 0.28 * identity.pattern_scale), 2, 2))
    elif kind == "patch":
        side = 1 if identity.pattern_angle > 90 else -1
        polygon(oval(cx + side * w * 0.3, cy - h * 0.14, w * (0.2 + 0.16 * identity.pattern_scale), h * 0.34))


def span(low: float, high: float, t: float) -> float:
    """The value between `low` and `high` at the fraction `t`."""
    return low + (high - low) * t


# The sketch of each kind returns (face center x, y, face size, top x, y): the places of the eyes and the hat.


def blob(p: Pen, i: Identity):
    w, h = span(0.68, 0.98, i.width), span(0.6, 0.92, i.height)
    for x in (-0.45, 0.45) if i.limb > 0.4 else (-0.5, 0.0, 0.5):
        p.fill(oval(x * w, 0.9, 0.17, 0.12), rgb(i.body, 0.7))
    p.patterned(oval(0, 0.9 - h, w, h, span(1.7, 4.5, i.roundness)), i)
    return 0, 0.75 - h, 0.95, 0, 0.92 - 2 * h


def cat(p: Pen, i: Identity):
    w, h = span(0.6, 0.85, i.width), span(0.55, 0.75, i.height)
    tail = span(0.2, 0.75, i.limb)
    p.line([(w * 0.8, 0.7), (w + 0.2, 0.6), (w + 0.24, 0.6 - tail)], rgb(i.body, 0.75), 3.4)
    for x in (-0.5, -0.18, 0.18, 0.5):
        p.fill(oval(x * w, 0.86, 0.13, 0.16), rgb(i.body, 0.75))
    ear = span(0.3, 0.6, i.roundness)
    for s in (-1, 1):
        p.fill(
            [(s * w * 0.95, 0.85 - h * 1.1), (s * w * 0.75, 0.62 - 2 * h - ear), (s * w * 0.12, 0.95 - 2 * h)],
            rgb(i.second if i.marks > 0.5 else i.body, 0.9),
        )
    p.patterned(oval(0, 0.85 - h, w, h, 2.5), i)
    fx, fy = 0, 0.72 - h
    for s in (-1, 1):
        for d in (0.05, 0.2):
            p.line([(s * w * 0.5, fy + 0.25 + d), (s * w * 1.18, fy + 0.16 + d * 1.6)], width=0.6)
    return fx, fy, 0.9, 0, 0.9 - 2 * h


def robot(p: Pen, i: Identity):
    w, h = span(0.5, 0.72, i.width), span(0.34, 0.48, i.height)
    power = span(3.5, 9, i.roundness)
    for s in (-1, 1):
        p.fill(box(s * w * 0.55 - 0.12, 0.6, s * w * 0.55 + 0.12, 0.98), rgb(i.second, 0.75))
        p.fill(oval(s * (w + 0.16), 0.25, 0.13, span(0.2, 0.4, i.limb), 4), rgb(i.second, 0.9))
    p.patterned(oval(0, 0.32, w, 0.42, power), i)
    hw = w * span(0.75, 1.15, i.marks)
    p.fill(oval(0, -0.12 - h, hw, h, power), rgb(i.body, 0.92))
    p.fill(box(-hw - 0.1, -0.28 - h, -hw, 0.0 - h), rgb(i.second))
    p.fill(box(hw, -0.28 - h, hw + 0.1, 0.0 - h), rgb(i.second))
    return 0, -0.17 - h, 0.8, 0, -0.12 - 2 * h


def bird(p: Pen, i: Identity):
    w, h = span(0.55, 0.78, i.width), span(0.55, 0.74, i.height)
    cy = 0.62 - h
    for x in (-0.16, 0.16):
        p.line([(x, 0.55), (x, 0.95), (x - 0.14, 0.97)], rgb((0.85, 0.55, 0.15)), 1.6)
    p.fill([(w * 0.7, cy), (w + span(0.25, 0.5, i.limb), cy - 0.3), (w + 0.2, cy + 0.25)], rgb(i.second, 0.85))
    p.patterned(oval(0, cy, w, h, span(1.8, 2.6, i.roundness)), i)
    beak = span(0.28, 0.55, i.marks)
    p.fill([(-w * 0.82, cy - 0.32), (-w - beak, cy - 0.12), (-w * 0.85, cy + 0.04)], rgb((1.0, 0.65, 0.12)))
    p.fill(oval(0.26 * w, cy + 0.2, w * 0.42, h * 0.34), rgb(i.second))
    return -0.26 * w, cy - 0.2, 0.66, -0.05, cy - h * 0.98


def fish(p: Pen, i: Identity):
    w, h = span(0.66, 0.9, i.width), span(0.42, 0.68, i.height)
    tail = span(0.3, 0.5, i.limb)
    p.fill([(w * 0.8, 0.2), (w + tail, -0.25), (w + tail * 0.6, 0.2), (w + tail, 0.65)], rgb(i.second))
    p.fill([(-0.25, 0.3 - h), (0.15, -0.05 - h * span(1.1, 1.5, i.marks)), (0.45, 0.35 - h)], rgb(i.second, 0.85))
    p.fill([(-0.1, 0.1 + h), (0.25, 0.35 + h), (0.4, 0.05 + h)], rgb(i.second, 0.85))
    p.patterned(oval(0, 0.2, w, h, span(1.6, 2.6, i.roundness)), i)
    return -0.42 * w, 0.1, 0.72, -0.2, 0.22 - h


def mushroom(p: Pen, i: Identity):
    w, h = span(0.7, 1.02, i.width), span(0.5, 0.75, i.height)
    stem = span(0.26, 0.44, i.limb)
    p.fill([(-stem, -0.1), (stem, -0.1), (stem * 1.25, 0.95), (-stem * 1.25, 0.95)], rgb((0.96, 0.9, 0.78)))
    t = np.linspace(math.pi, 2 * math.pi, 20)
    power = 2 / span(1.5, 3.2, i.roundness)
    cap = np.stack(
        [w * np.sign(np.cos(t)) * np.abs(np.cos(t)) ** power, 0.12 - 2 * h * 0.85 * np.abs(np.sin(t)) ** power], 1
    )
    p.patterned(np.concatenate([cap, [(w * 0.6, 0.24), (-w * 0.6, 0.24)]]), i)
    return 0, 0.48, 0.6, 0, 0.12 - 1.7 * h


def teapot(p: Pen, i: Identity):
    w, h = span(0.55, 0.75, i.width), span(0.48, 0.66, i.height)
    cy = 0.92 - h
    p.line(oval(w + 0.12, cy - 0.05, span(0.18, 0.32, i.limb), h * 0.55), rgb(i.second, 0.8), 3.2)
    p.fill([(-w * 0.75, cy + 0.25), (-w - 0.42, cy - 0.42), (-w - 0.2, cy - 0.5), (-w * 0.8, cy - 0.15)], rgb(i.second))
    p.patterned(oval(0, cy, w, h, span(1.9, 3.2, i.roundness)), i)
    p.fill(oval(0, cy - h, w * 0.55, 0.13), rgb(i.second))
    p.fill(oval(0, cy - h - 0.17, 0.12, 0.12), rgb(i.accent))
    return 0, cy - 0.08, 0.8, 0, cy - h - 0.2


def car(p: Pen, i: Identity):
    w, h = span(0.85, 1.05, i.width), span(0.26, 0.4, i.height)
    roof = span(0.36, 0.62, i.roundness)
    top = 0.7 - 2 * h
    p.fill(
        [(-w * 0.62, top + 0.05), (-w * 0.4, top - roof), (w * 0.38, top - roof), (w * 0.66, top + 0.05)], rgb(i.second)
    )
    p.fill(
        [(-w * 0.46, top), (-w * 0.32, top - roof * 0.72), (w * 0.3, top - roof * 0.72), (w * 0.48, top)],
        rgb((0.72, 0.88, 0.96)),
    )
    p.patterned(oval(0, 0.7 - h, w, h, span(3, 6, i.marks)), i)
    wheel = span(0.2, 0.3, i.limb)
    for s in (-1, 1):
        p.fill(oval(s * w * 0.55, 0.95 - wheel, wheel, wheel), (52, 48, 56, 255))
        p.fill(oval(s * w * 0.55, 0.95 - wheel, wheel * 0.45, wheel * 0.45), rgb(i.accent), outline=False)
    return -0.1, 0.62 - h, 0.62, 0, top - roof


def house(p: Pen, i: Identity):
    w, h = span(0.6, 0.8, i.width), span(0.42, 0.58, i.height)
    top = 0.95 - 2 * h
    if i.limb > 0.4:
        p.fill(box(w * 0.3, top - 0.75, w * 0.55, top - 0.1), rgb(i.second, 0.6))
    p.patterned(box(-w, top, w, 0.95), i)
    peak = span(0.5, 0.85, i.roundness)
    p.fill([(-w - 0.2, top + 0.05), (0, top - peak), (w + 0.2, top + 0.05)], rgb(i.second))
    side = 1 if i.marks > 0.5 else -1
    p.fill(box(side * w * 0.35 - 0.16, 0.5, side * w * 0.35 + 0.16, 0.95), rgb(i.accent, 0.8))
    return 0, top + 0.26, 0.72, 0, top - peak


def cactus(p: Pen, i: Identity):
    w, h = span(0.32, 0.5, i.width), span(0.72, 0.92, i.height)
    for s in (-1, 1):
        y = span(0.1, 0.35, i.limb) * s + 0.05
        p.fill(oval(s * (w + 0.12), y + 0.08, 0.26, 0.14, 3), rgb(i.body, 0.85))
        p.fill(oval(s * (w + 0.28), y - 0.18, 0.15, span(0.24, 0.4, i.marks), 3), rgb(i.body, 0.85))
    p.patterned(oval(0, 0.92 - h, w, h, span(2.2, 3.5, i.roundness)), i)
    for k in range(4):
        for s in (-1, 1):
            y = 0.75 - k * h * 0.42
            p.line([(s * w * 0.9, y), (s * (w + 0.13), y - 0.07)], width=0.7)
    return 0, 0.72 - h, 0.66, 0, 0.92 - 2 * h


def snail(p: Pen, i: Identity):
    w, h = span(0.5, 0.68, i.width), span(0.5, 0.66, i.height)
    p.fill([(-0.95, 0.6), (-0.7, 0.45), (-0.4, 0.7), (0.9, 0.75), (1.08, 0.95), (-0.85, 0.95)], rgb(i.second))
    for x in (-0.9, -0.66):
        p.line([(x, 0.6), (x - 0.08, span(0.3, 0.0, i.limb))], rgb(i.second, 0.8), 2.0)
    p.patterned(oval(0.2, 0.85 - h, w, h, span(1.8, 2.6, i.roundness)), i)
    t = np.linspace(0, span(3.2, 5.2, i.marks) * math.pi, 36)
    r = np.linspace(0.05, 0.82, 36)
    p.line(np.stack([0.2 + w * r * np.cos(t), 0.85 - h + h * r * np.sin(t)], 1), width=0.9)
    return -0.72, 0.66, 0.46, 0.2, 0.85 - 2 * h


def rocket(p: Pen, i: Identity):
    w, h = span(0.34, 0.5, i.width), span(0.72, 0.9, i.height)
    fin = span(0.28, 0.5, i.limb)
    for s in (-1, 1):
        p.fill([(s * w * 0.7, 0.15), (s * (w + fin), 0.85), (s * w * 0.6, 0.72)], rgb(i.second))
    p.fill([(-w * 0.5, 0.7), (0, 1.0), (w * 0.5, 0.7)], rgb((1.0, 0.6, 0.1)))
    t = np.linspace(0, math.pi, 16)
    nose = np.stack([w * np.cos(t), -0.15 - (h * span(0.9, 1.15, i.roundness)) * np.sin(t) ** 0.9], 1)
    p.patterned(np.concatenate([nose, [(-w * 0.9, 0.75), (w * 0.9, 0.75)]]), i)
    p.line([(-w, span(0.3, 0.5, i.marks)), (w, span(0.3, 0.5, i.marks))], rgb(i.second, 0.8), 2.2)
    return 0, -0.1, 0.66, 0, -0.12 - h


SKETCHES = {f.__name__: f for f in (blob, cat, robot, bird, fish, mushroom, teapot, car, house, cactus, snail, rocket)}


def face(p: Pen, i: Identity, x: float, y: float, size: float, asleep: bool) -> None:
    """Draws eyes and mouth; (x, y) is the center of the face."""
    radius = size * span(0.17, 0.26, i.eye_size)
    gap = size * span(0.28, 0.46, i.eye_gap)
    centers = {1: (0.0,), 2: (-gap, gap), 3: (-gap * 1.25, 0.0, gap * 1.25)}[i.eyes]
    if i.eyes == 1:
        radius *= 1.4
    for dx in centers:
        if asleep:
            arc = np.linspace(0.15 * math.pi, 0.85 * math.pi, 7)
            p.line(np.stack([x + dx + radius * np.cos(arc), y + radius * 0.8 * np.sin(arc)], 1), width=1.2)
        else:
            p.fill(oval(x + dx, y, radius, radius, steps=16), (250, 250, 250, 255))
            p.fill(
                oval(x + dx - radius * 0.15, y + radius * 0.1, radius * 0.55, radius * 0.6, steps=12),
                (30, 26, 40, 255),
                outline=False,
            )
    my, mw = y + size * 0.36, size * 0.22
    if i.mouth == "smile":
        arc = np.linspace(0.1 * math.pi, 0.9 * math.pi, 8)
        p.line(np.stack([x + mw * np.cos(arc), my - 0.05 + mw * 0.6 * np.sin(arc)], 1))
    elif i.mouth == "open":
        p.fill(oval(x, my, mw * 0.6, mw * 0.6, steps=14), (150, 40, 50, 255))
    elif i.mouth == "flat":
        p.line([(x - mw, my), (x + mw, my)])
    elif i.mouth == "fang":
        p.line([(x - mw, my), (x + mw, my)])
        p.fill([(x + mw * 0.1, my), (x + mw * 0.7, my), (x + mw * 0.4, my + mw * 0.9)], (250, 250, 250, 255))
    else:
        p.line([(x - mw * 0.4, my), (x + mw * 0.4, my)], width=1.4)


def accessory(p: Pen, i: Identity, fx: float, fy: float, size: float, tx: float, ty: float) -> None:
    """Draws the accessory; (fx, fy) is the center of the face, (tx, ty) the top of the head."""
    color, dark = rgb(i.accent), rgb(i.accent, 0.7)
    if i.accessory == "hat":
        p.fill(box(tx - 0.26, ty - 0.5, tx + 0.26, ty + 0.04), color)
        p.fill(box(tx - 0.46, ty - 0.02, tx + 0.46, ty + 0.1), dark)
    elif i.accessory == "cap":
        t = np.linspace(math.pi, 2 * math.pi, 12)
        p.fill(np.stack([tx + 0.38 * np.cos(t), ty + 0.1 + 0.36 * np.sin(t)], 1), color)
        p.fill(box(tx - 0.68, ty + 0.03, tx - 0.2, ty + 0.14), dark)
    elif i.accessory == "bow":
        for s in (-1, 1):
            p.fill([(tx, ty), (tx + s * 0.36, ty - 0.22), (tx + s * 0.36, ty + 0.18)], color)
        p.fill(oval(tx, ty, 0.1, 0.1, steps=10), dark)
    elif i.accessory == "antenna":
        p.line([(tx, ty + 0.05), (tx + 0.06, ty - 0.34)], width=1.3)
        p.fill(oval(tx + 0.06, ty - 0.42, 0.13, 0.13, steps=12), color)
    elif i.accessory == "scarf":
        y = fy + size * 0.62
        p.fill(oval(fx, y, size * 0.62, 0.11, 3), color)
        p.fill(box(fx + size * 0.22, y, fx + size * 0.44, y + 0.36), dark)
    elif i.accessory == "glasses":
        for s in (-1, 1):
            p.line(oval(fx + s * size * 0.34, fy, size * 0.28, size * 0.26, 3, 16).tolist() * 2, color, 1.5)
        p.line([(fx - size * 0.08, fy), (fx + size * 0.08, fy)], color, 1.5)
    elif i.accessory == "crown":
        left = [(-0.34, 0.08), (-0.4, -0.36), (-0.17, -0.14)]
        right = [(-x, y) for x, y in reversed(left)]
        p.fill([(tx + x, ty + y) for x, y in (*left, (0, -0.44), *right)], color)
    elif i.accessory == "sprout":
        p.line([(tx, ty + 0.05), (tx, ty - 0.24)], rgb((0.2, 0.5, 0.2)), 1.5)
        for s in (-1, 1):
            p.fill(oval(tx + s * 0.2, ty - 0.3, 0.2, 0.11, steps=14), color)


def paint(identity: Identity, scene: Scene, size: int) -> tuple[Image.Image, tuple[float, float, float]]:
    """Draws the subject alone.

    Returns an RGBA image of `size`×`size` with colors premultiplied by alpha, and the ground under the subject, `(x, y,
    half width)` as fractions of the panel.
    """
    side = size * OVERSAMPLE
    half = SCALES[scene.framing] * side
    feet = GROUND[scene.framing] * side
    degrees, lift, sx, sy = scene.tilt, 0.0, 1.0, 1.0
    if scene.pose == "jumping":
        lift, sx, sy = 0.42 if scene.framing != "close" else 0.2, 0.95, 1.05
    elif scene.pose == "leaning":
        degrees += 27.0 * scene.facing
    elif scene.pose == "sleeping":
        sx, sy = 1.12, 0.8
    elif scene.pose == "upside down":
        degrees += 180.0
    center_y = feet - half * (sy if scene.pose == "sleeping" else 1.0) - lift * half
    angle = math.radians(degrees)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    linear = turn @ np.diag([half * sx * scene.facing, half * sy])
    matrix = np.concatenate([linear, [[scene.x * side], [center_y]]], 1)
    pen = Pen(side, matrix, max(2, round(half * 0.045)))
    fx, fy, fsize, tx, ty = SKETCHES[identity.kind](pen, identity)
    asleep = scene.pose == "sleeping"
    face(pen, identity, fx, fy, fsize, asleep)
    accessory(pen, identity, fx, fy, fsize, tx, ty)
    if asleep:
        for k in range(2):
            zx, zy, z = 0.75 + 0.28 * k, -0.85 - 0.3 * k, 0.16 + 0.05 * k
            pen.line(
                [(zx - z, zy - z), (zx + z, zy - z), (zx - z, zy + z), (zx + z, zy + z)], (250, 250, 250, 255), 1.2
            )
    alpha = pen.image.getchannel("A")
    rgb_image = Image.new("RGB", pen.image.size)
    rgb_image.paste(pen.image.convert("RGB"), mask=alpha)
    small = rgb_image.reduce(OVERSAMPLE)
    small.putalpha(alpha.reduce(OVERSAMPLE))
    return small, (scene.x, feet / side, half / side)
