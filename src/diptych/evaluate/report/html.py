"""Pieces of a self-contained page: escaped text, inlined pictures, tables, figures, the page itself.

Nothing is loaded from anywhere: pictures are PNG data URIs, charts are inline SVG (`charts.py`), the style is
`report.css`, there is no script. What a function returns is HTML; what it takes is plain text, escaped here.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diptych.utils.markup import escape as text

if TYPE_CHECKING:
    from PIL.Image import Image

SHOWN = 136  # CSS pixels that a small picture is enlarged to, by a whole factor
# No script, and nothing from anywhere, whatever the files of a run say.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
STORED = 256  # largest side of a picture as it is stored in the page


def tag(name: str, inner: str = "", **attributes: Any) -> str:
    """An element; `class_` is class, underscores are hyphens, None and False are left out."""
    listed = [
        f' {key.rstrip("_").replace("_", "-")}="{text(value)}"'
        for key, value in attributes.items()
        if value is not None and value is not False
    ]
    return f"<{name}{''.join(listed)}>{inner}</{name}>"


def paragraph(*inner: str, class_: str | None = None) -> str:
    """A paragraph of HTML pieces."""
    return tag("p", " ".join(inner), class_=class_)


def picture(image: Image, alt: str, shown: int = SHOWN, wide: int = 1) -> str:
    """An inlined picture. Small ones are enlarged by a whole factor with their pixels kept square; `wide` panels."""
    small = image.convert("RGB")
    if max(small.size) > STORED * wide:
        small.thumbnail((STORED * wide, STORED))
    factor = max(1, round(shown / (small.width / wide)))
    data = io.BytesIO()
    small.save(data, "PNG", optimize=True)
    source = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
    width, height = small.width * factor, small.height * factor
    size = f'width="{width}" height="{height}" style="max-width:min({width}px,100%)"'
    return f'<img class="px" src="{source}" alt="{text(alt)}" {size} loading="lazy" decoding="async">'


def figure(inner: str, caption: str = "", class_: str | None = None) -> str:
    """A figure of HTML with a caption of HTML."""
    return tag("figure", inner + (tag("figcaption", caption) if caption else ""), class_=class_)


def strip(figures: Iterable[str], class_: str = "strip") -> str:
    """Figures side by side, as many as fit."""
    return tag("div", "".join(figures), class_=class_)


def table(
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    caption: str = "",
    muted: frozenset[int] | set[int] = frozenset(),
) -> str:
    """A table of HTML cells that scrolls sideways where it must; the first cell of a row is its heading."""
    top = "".join(tag("th", cell, scope="col") for cell in head)
    body = []
    for number, row in enumerate(rows):
        first, *rest = row
        cells = tag("th", first, scope="row") + "".join(tag("td", cell) for cell in rest)
        body.append(tag("tr", cells, class_="muted" if number in muted else None))
    said = tag("caption", caption) if caption else ""
    whole = tag("table", said + tag("thead", tag("tr", top)) + tag("tbody", "".join(body)))
    aloud = text(caption or head[0] or "table")
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{aloud}">{whole}</div>'


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """Short facts as a list of terms and HTML values."""
    return tag("dl", "".join(tag("div", tag("dt", text(k)) + tag("dd", v)) for k, v in pairs), class_="facts")


def details(summary: str, inner: str) -> str:
    """Something to open."""
    return tag("details", tag("summary", text(summary)) + inner)


def missing(what: str, how: str) -> str:
    """Says that something is not there, and how it comes."""
    return tag("p", f"{text(what)} {text(how)}", class_="missing")


def number(value: float | None, digits: int = 2) -> str:
    """`0.42`; a dash for what is not known."""
    return "–" if value is None or value != value else f"{value:.{digits}f}"


def percent(value: float | None, digits: int = 0) -> str:
    """`42 %`."""
    return "–" if value is None else f"{100 * value:.{digits}f}\u202f%"


def between(ci: Sequence[float] | None, digits: int = 2) -> str:
    """A 95 % interval, small."""
    if not ci:
        return ""
    low, high = (signed(value, digits) if ci[0] < 0 else f"{value:.{digits}f}" for value in ci)
    return f'<span class="ci">{low} to {high}</span>' if ci[0] < 0 else f'<span class="ci">{low}–{high}</span>'


def share_range(ci: Sequence[float] | None) -> str:
    """A 95 % interval of a share, in percent, small."""
    return f'<span class="ci">{100 * ci[0]:.0f}–{percent(ci[1])}</span>' if ci else ""


def signed(value: float, digits: int = 2) -> str:
    """`+0.42`, `−0.10`, with a true minus; no sign for what rounds to nothing."""
    said = f"{value:+.{digits}f}".replace("-", "−")
    return said[1:] if not said.strip("+−0.") else said


def plural(n: int, word: str) -> str:
    """`1 seed`, `3 seeds`."""
    return f"{count(n)} {word}{'' if n == 1 else 's'}"


def count(value: float) -> str:
    """`12 345` with thin spaces."""
    return f"{value:,.0f}".replace(",", "\u202f")


def page(title: str, header: str, sections: Sequence[tuple[str, str, str]], footer: str) -> str:
    """The page: `sections` are (anchor, heading, HTML)."""
    style = (Path(__file__).parent / "report.css").read_text("utf8")
    links = "".join(tag("li", tag("a", text(heading), href=f"#{anchor}")) for anchor, heading, _ in sections)
    body = "".join(
        tag("section", tag("h2", text(heading), id=f"{anchor}-h") + inner, id=anchor, aria_labelledby=f"{anchor}-h")
        for anchor, heading, inner in sections
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{text(title)}</title><style>{style}</style></head><body>"
        f"<header>{header}</header>"
        f'<nav aria-label="Contents"><ol>{links}</ol></nav><main>{body}</main><footer>{footer}</footer></body></html>\n'
    )


# Charts as inline SVG: lines, a scatter with intervals, dots with whiskers, a histogram. Colours are the page's
# variables (`--c-NAME` in report.css), so that a chart follows light and dark. Every chart has a title and a
# description for those who cannot see it; its legend is HTML below it, so that it wraps on a phone.

WIDTH, HEIGHT = 520, 300
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 12, 42


@dataclass(frozen=True)
class Series:
    """A named line. `colour` is a CSS variable's name without `--c-`."""

    label: str
    colour: str
    points: Sequence[tuple[float, float]]
    faint: bool = False


@dataclass(frozen=True)
class Dot:
    """A point with its intervals."""

    label: str
    colour: str
    x: float
    y: float
    x_ci: Sequence[float] | None = None
    y_ci: Sequence[float] | None = None


class _Frame:
    """Data coordinates to drawing coordinates, with axes."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float], height: int = HEIGHT) -> None:
        self.x, self.y = _wide(x), _wide(y)
        self.height = height

    def px(self, x: float) -> float:
        low, high = self.x
        return LEFT + (x - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def py(self, y: float) -> float:
        low, high = self.y
        return self.height - BOTTOM - (y - low) / (high - low) * (self.height - TOP - BOTTOM)

    def axes(self, x_label: str, y_label: str) -> str:
        bottom = self.height - BOTTOM
        parts = [f'<path class="axis" d="M{LEFT} {TOP}V{bottom}H{WIDTH - RIGHT}"/>']
        for x in ticks(*self.x):
            parts.append(f'<text x="{self.px(x):.1f}" y="{bottom + 17}" text-anchor="middle">{label(x)}</text>')
        for y in ticks(*self.y, 4):
            at = self.py(y)
            parts.append(f'<path class="guide" d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>')
            parts.append(f'<text x="{LEFT - 7}" y="{at + 4:.1f}" text-anchor="end">{label(y)}</text>')
        middle = (LEFT + WIDTH - RIGHT) / 2
        parts.append(f'<text x="{middle:.0f}" y="{self.height - 4}" text-anchor="middle">{text(x_label)}</text>')
        side = (TOP + bottom) / 2
        turn = f'transform="rotate(-90 11 {side:.0f})"'
        parts.append(f'<text x="11" y="{side:.0f}" text-anchor="middle" {turn}>{text(y_label)}</text>')
        return "".join(parts)


def lines(
    series: Sequence[Series], title: str, x_label: str, y_label: str, caption: str = "", marks: Sequence[Dot] = ()
) -> str:
    """Lines over a shared pair of axes, which `marks` make the unit square's."""
    points = [p for s in series for p in s.points if all(map(math.isfinite, p))]
    if not points:
        return ""
    top = 1.0 if marks else _high([y for _, y in points])
    across = (0.0, 1.0) if marks else (min(x for x, _ in points), max(x for x, _ in points))
    frame = _Frame(across, (min(0.0, *(y for _, y in points)), top))
    drawn = []
    for s in series:
        path = "".join(
            f"{'L' if i else 'M'}{frame.px(x):.1f} {frame.py(min(y, top)):.1f}" for i, (x, y) in enumerate(s.points)
        )
        css = "line faint" if s.faint else "line"
        drawn.append(f'<path class="{css}" style="stroke:var(--c-{text(s.colour)})" d="{path}"/>')
    for dot in marks:
        at = f'cx="{frame.px(dot.x):.1f}" cy="{frame.py(dot.y):.1f}" r="5"'
        drawn.append(f'<circle {at} style="fill:var(--c-{text(dot.colour)})"/>')
    ends = "; ".join(f"{s.label} ends at {s.points[-1][1]:.3g}" for s in series if s.points and not s.faint)
    return _chart(frame.axes(x_label, y_label) + "".join(drawn), title, ends, _legend([*series, *marks]), caption)


def scatter(dots: Sequence[Dot], title: str, x_label: str, y_label: str, caption: str = "") -> str:
    """Points in the unit square with 95 % bars, over curves of equal product."""
    frame = _Frame((0, 1), (0, 1), 360)
    parts = [frame.axes(x_label, y_label)]
    for product in (0.1, 0.2, 0.4, 0.6, 0.8):
        steps = [product + (1 - product) * i / 24 for i in range(25)]
        path = "".join(f"{'L' if i else 'M'}{frame.px(x):.1f} {frame.py(product / x):.1f}" for i, x in enumerate(steps))
        parts.append(f'<path class="guide" d="{path}"/>')
        parts.append(
            f'<text x="{WIDTH - RIGHT + 2}" y="{frame.py(product) - 3:.1f}" text-anchor="end">{product:g}</text>'
        )
    for dot in dots:
        x, y = frame.px(dot.x), frame.py(dot.y)
        colour = f"var(--c-{text(dot.colour)})"
        if dot.x_ci:
            span = f"M{frame.px(dot.x_ci[0]):.1f} {y:.1f}H{frame.px(dot.x_ci[1]):.1f}"
            parts.append(f'<path class="line" style="stroke:{colour}" d="{span}"/>')
        if dot.y_ci:
            span = f"M{x:.1f} {frame.py(dot.y_ci[0]):.1f}V{frame.py(dot.y_ci[1]):.1f}"
            parts.append(f'<path class="line" style="stroke:{colour}" d="{span}"/>')
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" style="fill:{colour}"/>')
    said = "; ".join(f"{d.label}: {x_label} {d.x:.2f}, {y_label} {d.y:.2f}" for d in dots)
    return _chart("".join(parts), title, said, _legend(dots), caption, 360)


def whiskers(dots: Sequence[Dot], title: str, x_label: str, caption: str = "") -> str:
    """One line for each dot: its x and the 95 % interval."""
    step, top = 30, 8
    height = top + step * len(dots) + BOTTOM
    reach = max([d.x_ci[1] if d.x_ci else d.x for d in dots] + [0.1])
    left = 118
    scale = (WIDTH - left - RIGHT - 30) / (reach * 1.02)
    parts = []
    for x in ticks(0, reach):
        at = left + x * scale
        parts.append(f'<path class="guide" d="M{at:.1f} {top}V{height - BOTTOM}"/>')
        parts.append(f'<text x="{at:.1f}" y="{height - BOTTOM + 17}" text-anchor="middle">{label(x)}</text>')
    for i, dot in enumerate(dots):
        y = top + step * (i + 0.5)
        colour = f"var(--c-{text(dot.colour)})"
        if dot.x_ci:
            span = f"M{left + dot.x_ci[0] * scale:.1f} {y}H{left + dot.x_ci[1] * scale:.1f}"
            parts.append(f'<path class="line" style="stroke:{colour};stroke-width:2.5" d="{span}"/>')
        parts.append(f'<circle cx="{left + dot.x * scale:.1f}" cy="{y}" r="5" style="fill:{colour}"/>')
        parts.append(f'<text class="strong" x="{left - 12}" y="{y + 4}" text-anchor="end">{text(dot.label)}</text>')
        end = max(dot.x_ci[1] if dot.x_ci else 0, dot.x)
        parts.append(f'<text x="{left + end * scale + 9:.1f}" y="{y + 4}">{dot.x:.2f}</text>')
    parts.append(
        f'<text x="{(left + WIDTH - RIGHT) / 2:.0f}" y="{height - 4}" text-anchor="middle">{text(x_label)}</text>'
    )
    said = "; ".join(f"{d.label} {d.x:.2f}" for d in dots)
    return _chart("".join(parts), title, said, "", caption, height)


def histogram(
    values: Sequence[float], mark: float | None, title: str, x_label: str, caption: str = "", bins: int = 32
) -> str:
    """How values are spread; `mark` is a threshold, and what lies below it is fainter."""
    finite = [v for v in values if math.isfinite(v)]
    if not finite:
        return ""
    low, high = _wide(
        (min([*finite, *([mark] if mark is not None else [])]), max([*finite, *([mark] if mark else [])]))
    )
    width = (high - low) / bins
    counts = [0] * bins
    for value in finite:
        counts[min(bins - 1, int((value - low) / width))] += 1
    frame = _Frame((low, high), (0, max(counts)), 220)
    parts = [frame.axes(x_label, "pairs")]
    for i, n in enumerate(counts):
        x, y = frame.px(low + i * width), frame.py(n)
        below = mark is not None and low + (i + 0.5) * width < mark
        colour, css = ("total", "faint") if below else ("truth", "")
        across, up = frame.px(low + width) - LEFT - 1, frame.py(0) - y
        box = f'x="{x + 0.5:.1f}" y="{y:.1f}" width="{across:.1f}" height="{up:.1f}"'
        parts.append(f'<rect class="{css}" {box} style="fill:var(--c-{colour})"/>')
    if mark is not None:
        parts.append(f'<path class="mark" d="M{frame.px(mark):.1f} {TOP}V{frame.py(0):.1f}"/>')
    above = sum(v >= mark for v in finite) if mark is not None else len(finite)
    return _chart("".join(parts), title, f"{above} of {len(finite)} at or above the threshold", "", caption, 220)


def bars(rows: Sequence[tuple[str, float, str, str]]) -> str:
    """Horizontal bars in HTML: (name, value, what to write, note)."""
    most = max((value for _, value, _, _ in rows), default=0) or 1
    drawn = []
    for name, value, said, note in rows:
        fill = f'<span class="fill" style="width:{100 * value / most:.1f}%"></span>'
        small = f"<small>{note}</small>" if note else ""
        head = f"<span><b>{text(said)}</b> {text(name)}</span>"
        drawn.append(f'<div>{head}<span class="track" aria-hidden="true">{fill}</span>{small}</div>')
    return tag("div", "".join(drawn), class_="bars")


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round values within [low, high]."""
    raw = (high - low) / max(1, wanted)
    power = 10 ** math.floor(math.log10(raw)) if raw > 0 else 1.0
    step = next((power * k for k in (1, 2, 2.5, 5, 10) if power * k >= raw * 0.999), power * 10)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def label(value: float) -> str:
    """A tick's text."""
    if value and abs(value) >= 10000:
        return f"{value / 1000:g}k"
    return f"{round(value, 6):g}"


def _high(values: Sequence[float]) -> float:
    """The top of an axis: the largest value, unless a few spikes dwarf the rest."""
    ordered = sorted(values)
    usual = ordered[int(0.97 * (len(ordered) - 1))]
    return ordered[-1] if ordered[-1] <= 1.6 * usual else 1.25 * usual


def _wide(span: tuple[float, float]) -> tuple[float, float]:
    low, high = span
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _legend(items: Sequence[Series | Dot]) -> str:
    seen = {item.label: item.colour for item in items if item.label}
    rows = "".join(
        f'<li><i style="background:var(--c-{text(colour)})"></i>{text(name)}</li>' for name, colour in seen.items()
    )
    return tag("ul", rows, class_="legend")


def _chart(inner: str, title: str, description: str, legend: str, caption: str, height: int = HEIGHT) -> str:
    said = f"<title>{text(title)}</title><desc>{text(description)}</desc>"
    aloud = text(f"{title}. {description}")
    svg = f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{aloud}">{said}{inner}</svg>'
    below = tag("b", text(title)) + (f". {caption}" if caption else "")
    return figure(svg + legend, below, class_="chart")
