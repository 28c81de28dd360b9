"""HTML built from pieces, where all that is not HTML already is escaped.

    tag("p", "3 < 4 & ", tag("b", name), class_="note")      # <p class="note">3 &lt; 4 &amp; <b>…</b></p>

A plain string is text, and `tag` and `html` escape it; what they return is `Html`, which they leave as it is.
"""

from __future__ import annotations

from html import escape as _escape
from typing import Any

_VOID = ("br", "img", "input")


class Html(str):
    """A string that is HTML."""

    __slots__ = ()


def escape(value: Any) -> Html:
    """Text as HTML, in an element or in a quoted attribute."""
    return value if isinstance(value, Html) else Html(_escape(str(value), quote=True))


def html(*parts: Any) -> Html:
    """Pieces one after the other; those that are not `Html` are escaped."""
    return Html("".join(map(escape, parts)))


def tag(name: str, *inner: Any, **attributes: Any) -> Html:
    """An element. `class_` is class, underscores are hyphens, True is an attribute without a value, None and False are
    left out."""
    listed = [
        f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{_escape(str(value), quote=True)}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    ]
    return Html(f"<{name}{''.join(listed)}>" + ("" if name in _VOID else f"{html(*inner)}</{name}>"))
