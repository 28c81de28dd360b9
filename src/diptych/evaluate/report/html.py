"""Pieces of a self-contained page: escaped text, inlined pictures, tables, figures, the page itself.

Nothing is loaded from anywhere: pictures are PNG data URIs, charts are inline SVG (`charts.py`), the style is
`report.css`, there is no script. What a function returns is HTML; what it takes is plain text, escaped here.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
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
