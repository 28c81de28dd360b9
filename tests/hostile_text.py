"""Text as an attacker writes it, and how to see in a browser that none of it ran."""

from __future__ import annotations

from typing import Any

RAN = "window.ran=1"
EVIL = f'"\'><img src=x onerror="{RAN}"><script>{RAN}</script><svg onload={RAN}>'
# Where it may be a file's name too.
FILE = f'2" onload="{RAN}" onerror="{RAN}" x="'
_SCRIPTS = """() => [...document.querySelectorAll("*")].flatMap(element =>
    [...element.attributes].filter(one => one.name.startsWith("on") || one.value.trim().startsWith("javascript:"))
        .map(one => `${element.tagName} ${one.name}=${one.value}`))"""


def check(page: Any, *shown: str) -> None:
    """Fails if a text ran, or became an element's handler, or is not `shown` as it was written."""
    text = page.evaluate("document.documentElement.textContent")
    for words in shown:
        assert words in text, words
    assert not [found for found in page.evaluate(_SCRIPTS) if "ran=1" in found]
    assert page.evaluate("window.ran") is None
