"""Rendering of pages: the jinja2 environment with its filters, and the geometry of the charts.

A page is self-contained: images are PNG data URIs, charts are inline SVG (`templates/charts.html.j2`), the style is
`templates/report.css`, and there is no script. Templates escape all text that is not markup, and raise for an unknown
name.
"""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from diptych.data.images import open_image
from diptych.evaluate.scoring import metrics
from diptych.utils.machine import VERSION

if TYPE_CHECKING:
    from jinja2 import Template

FOLDER = Path(__file__).parent
SHOWN = 136  # CSS pixels to which a small image is enlarged, by a whole factor
STORED = 256  # largest side of an image in the page
WIDTH, HEIGHT = 520, 300  # of a chart
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 12, 42  # its margins
ROW = 30  # of `whiskers`


@cache
def words() -> dict[str, Any]:
    """Names of methods, reasons and columns (words.yaml)."""
    import yaml

    return yaml.safe_load((FOLDER / "words.yaml").read_text("utf8"))


@cache
def environment() -> Environment:
    """The templates, their filters and the charts."""
    made = Environment(
        loader=FileSystemLoader(FOLDER / "templates"),
        autoescape=lambda name: name is not None and ".html" in name,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= FILTERS
    made.globals |= {"VERSION": VERSION, "WIDTH": WIDTH, "words": words()}
    made.globals |= {"scatter": scatter, "whiskers": whiskers, "histogram": histogram, "line_chart": lines}
    made.globals |= {"dots": score_dots, "headlines": headline_dots, "Series": Series, "Dot": Dot}
    return made


def template(name: str) -> Template:
    """A template by the name of its file."""
    return environment().get_template(name)


def part(name: str, macro: str, **given: Any) -> Markup:
    """The output of a macro of a template."""
    return Markup(getattr(template(name).module, macro)(**given))


# ---- filters


def named(method: str) -> str:
    """The name of a method in words."""
    return words()["methods"].get(method, [method])[0]


def inlined(image: Any, wide: int = 1) -> dict[str, Any]:
    """An image or its cell as a PNG data URI of at most `STORED` pixels a panel, and its size on the page. Small images
    are enlarged by a whole factor. `wide` is the number of panels side by side."""
    small = (image if hasattr(image, "convert") else open_image(image)).convert("RGB")
    if max(small.size) > STORED * wide:
        small.thumbnail((STORED * wide, STORED))
    factor = max(1, round(SHOWN / (small.width / wide)))
    data = io.BytesIO()
    small.save(data, "PNG", optimize=True)
    source = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
    return {"source": source, "width": small.width * factor, "height": small.height * factor}


def number(value: float | None, digits: int = 2) -> str:
    """`0.42`; a dash for an unknown value."""
    return "–" if value is None or value != value else f"{value:.{digits}f}"


def percent(value: float | None, digits: int = 0) -> str:
    """`42 %`."""
    return "–" if value is None else f"{100 * value:.{digits}f}\u202f%"


def signed(value: float, digits: int = 2) -> str:
    """`+0.42`, `−0.10`, with a true minus; no sign for a value that rounds to 0."""
    text = f"{value:+.{digits}f}".replace("-", "−")
    return text[1:] if not text.strip("+−0.") else text


def digits(value: float | None) -> str:
    """Two significant digits."""
    return "–" if value is None else f"{value:.2g}"


def count(value: float) -> str:
    """`12 345` with thin spaces."""
    return f"{value:,.0f}".replace(",", "\u202f")


def plural(n: int, word: str) -> str:
    """`1 seed`, `3 seeds`."""
    return f"{count(n)} {word}{'' if n == 1 else 's'}"


def duration(seconds: float) -> str:
    """`48 s`, `12 min 30 s`, `3 h 04 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    hours, rest = divmod(whole, 3600)
    return f"{hours} h {rest // 60:02d} min" if hours else f"{rest // 60} min {rest % 60:02d} s"


def p_value(compared: Mapping[str, Any], digits: int = 3) -> str:
    """A comparison's p-value for a column: `0.042`, `< 0.001`, or the reason why there is none."""
    return metrics.format_p(compared, digits).removeprefix("= ")


def bold(text: str) -> Markup:
    """Text with `**words**` in bold."""
    return Markup(re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", str(escape(text))))


def general(value: float) -> str:
    """`0.77`, `1`: without trailing zeros."""
    return f"{value:g}"


def tick(value: float) -> str:
    """The label of a tick."""
    return f"{value / 1000:g}k" if abs(value) >= 10000 else f"{round(value, 6):g}"


FILTERS: dict[str, Callable[..., Any]] = {
    each.__name__: each
    for each in (
        named, inlined, number, percent, signed, digits, count, plural, duration, p_value, bold, general, tick,
    )
}  # fmt: skip


# ---- charts


@dataclass(frozen=True)
class Series:
    """A named line. `color` is a CSS variable's name without `--c-`."""

    label: str
    color: str
    points: Sequence[tuple[float, float]]
    faint: bool = False


@dataclass(frozen=True)
class Dot:
    """A point with its intervals."""

    label: str
    color: str
    x: float
    y: float
    x_ci: Sequence[float] | None = None
    y_ci: Sequence[float] | None = None


class Frame:
    """Data coordinates to drawing coordinates, with ticks."""

    def __init__(
        self, x: tuple[float, float], y: tuple[float, float], height: int = HEIGHT, left: int = LEFT, top: int = TOP
    ) -> None:
        self.x, self.y = _wide(x), _wide(y)
        self.height, self.left, self.top, self.right, self.bottom = height, left, top, WIDTH - RIGHT, height - BOTTOM
        self.middle, self.side = (left + self.right) / 2, (top + self.bottom) / 2
        self.x_ticks, self.y_ticks = ticks(*self.x), ticks(*self.y, 4)

    def px(self, x: float) -> float:
        """The x coordinate in the drawing."""
        low, high = self.x
        return self.left + (x - low) / (high - low) * (self.right - self.left)

    def py(self, y: float) -> float:
        """The y coordinate in the drawing."""
        low, high = self.y
        return self.bottom - (y - low) / (high - low) * (self.bottom - self.top)

    def path(self, points: Iterable[tuple[float, float]]) -> str:
        """A line through points."""
        return "".join(f"{'L' if i else 'M'}{self.px(x):.1f} {self.py(y):.1f}" for i, (x, y) in enumerate(points))


def lines(
    series: Sequence[Series], title: str, x_label: str, y_label: str, caption: str = "", marks: Sequence[Dot] = ()
) -> Markup:
    """Lines on shared axes. With `marks` the axes are those of the unit square."""
    points = [p for s in series for p in s.points if all(map(math.isfinite, p))]
    if not points:
        return Markup()
    top = 1.0 if marks else _high([y for _, y in points])
    across = (0.0, 1.0) if marks else (min(x for x, _ in points), max(x for x, _ in points))
    frame = Frame(across, (min(0.0, *(y for _, y in points)), top))
    paths = [(s.color, s.faint, frame.path((x, min(y, top)) for x, y in s.points)) for s in series]
    ends = "; ".join(f"{s.label} ends at {s.points[-1][1]:.3g}" for s in series if s.points and not s.faint)
    return _chart("lines", f=frame, series=paths, marks=marks, title=title, description=ends, x_label=x_label,
                  y_label=y_label, caption=caption, legend=_legend([*series, *marks]))  # fmt: skip


def scatter(dots: Sequence[Dot], title: str, x_label: str, y_label: str, caption: str = "") -> Markup:
    """Points in the unit square with 95 % bars, over curves of equal product."""
    frame = Frame((0, 1), (0, 1), 360)
    curves = [
        (product, frame.path((x, product / x) for x in (product + (1 - product) * i / 24 for i in range(25))))
        for product in (0.1, 0.2, 0.4, 0.6, 0.8)
    ]
    values = "; ".join(f"{d.label}: {x_label} {d.x:.2f}, {y_label} {d.y:.2f}" for d in dots)
    return _chart("scatter", f=frame, curves=curves, dots=dots, title=title, description=values, x_label=x_label,
                  y_label=y_label, caption=caption, legend=_legend(dots))  # fmt: skip


def whiskers(dots: Sequence[Dot], title: str, x_label: str, caption: str = "") -> Markup:
    """One line for each dot: its x and the 95 % interval."""
    reach = max([d.x_ci[1] if d.x_ci else d.x for d in dots] + [0.1])
    room = WIDTH - 118 - RIGHT  # the last 30 pixels are for the numbers
    frame = Frame((0, reach * 1.02 * room / (room - 30)), (0, 1), 8 + ROW * len(dots) + BOTTOM, left=118, top=8)
    frame.x_ticks = ticks(0, reach)
    values = "; ".join(f"{d.label} {d.x:.2f}" for d in dots)
    return _chart("whiskers", f=frame, dots=dots, title=title, description=values, x_label=x_label, caption=caption)


def histogram(
    values: Sequence[float], mark: float | None, title: str, x_label: str, caption: str = "", bins: int = 32
) -> Markup:
    """The distribution of values. `mark` is a threshold; bars below it are fainter."""
    finite = [v for v in values if math.isfinite(v)]
    if not finite:
        return Markup()
    marked = [*finite, *([] if mark is None else [mark])]
    counts, edges = np.histogram(finite, bins, _wide((min(marked), max(marked))))
    frame = Frame((edges[0], edges[-1]), (0, max(counts)), 220)
    width = frame.px(edges[1]) - LEFT - 1
    boxes = [
        (frame.px(a) + 0.5, frame.py(n), width, frame.py(0) - frame.py(n), mark is not None and (a + b) / 2 < mark)
        for n, a, b in zip(counts, edges, edges[1:], strict=False)
    ]
    above = sum(v >= mark for v in finite) if mark is not None else len(finite)
    text = f"{above} of {len(finite)} at or above the threshold"
    return _chart("histogram", f=frame, boxes=boxes, mark=mark, title=title, description=text, x_label=x_label,
                  caption=caption)  # fmt: skip


def score_dots(methods: Mapping[str, Any], anchors: Mapping[str, Any], colors: Mapping[str, str]) -> list[Dot]:
    """CP and PF of methods and anchors."""
    both = {**methods, **anchors}
    return [Dot(named(n), colors[n], s["cp"], s["pf"], s["ci95"]["cp"], s["ci95"]["pf"]) for n, s in both.items()]


def headline_dots(methods: Mapping[str, Any], colors: Mapping[str, str]) -> list[Dot]:
    """CP·PF of the methods, the best first."""
    ordered = sorted(methods.items(), key=lambda item: -item[1]["cp_pf"])
    return [Dot(named(n), colors[n], s["cp_pf"], 0, s["ci95"]["cp_pf"]) for n, s in ordered]


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round values within [low, high]."""
    raw = (high - low) / max(1, wanted)
    power = 10 ** math.floor(math.log10(raw)) if raw > 0 else 1.0
    step = next((power * k for k in (1, 2, 2.5, 5, 10) if power * k >= raw * 0.999), power * 10)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _high(values: Sequence[float]) -> float:
    """The top of an axis: the largest value, unless a few spikes dwarf the rest."""
    ordered = sorted(values)
    usual = ordered[int(0.97 * (len(ordered) - 1))]
    return ordered[-1] if ordered[-1] <= 1.6 * usual else 1.25 * usual


def _wide(span: tuple[float, float]) -> tuple[float, float]:
    low, high = span
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _legend(items: Sequence[Series | Dot]) -> dict[str, str]:
    return {item.label: item.color for item in items if item.label}


def _chart(kind: str, **given: Any) -> Markup:
    return part("charts.html.j2", kind, **given)
