"""The server's pages and the web app's fragments as Jinja2 templates; every value is escaped.

render("job.html", job=state)      # HTML as a string
"""

from __future__ import annotations

from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("diptych.serve"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render(name: str, **values: Any) -> str:
    """A template of this folder, filled in."""
    return _environment().get_template(name).render(values)


def error(text: object) -> str:
    """An error message, as the web app shows it."""
    return render("message.html", text=text, role="alert")


def status(text: str, command: str = "") -> str:
    """A status message, with a command to run after it."""
    return render("message.html", text=text, role="status", command=command)
