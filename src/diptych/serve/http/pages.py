"""Two plain pages that need no script and no other server: the login, and the API's description."""

from __future__ import annotations

from typing import Any

from diptych.serve import fields
from diptych.utils.markup import escape

ICON = "/favicon.ico"
STYLE = """<style>
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }
body { max-width: 46rem; margin: 2rem auto; padding: 0 1rem }
input, button { font: inherit; padding: .5rem; width: 100%; box-sizing: border-box; margin: .25rem 0 }
code { background: color-mix(in srgb, currentColor 10%, transparent); padding: 0 .2em }
table { border-collapse: collapse; width: 100% } td { vertical-align: top; padding: .2rem .6rem .2rem 0 }
summary { cursor: pointer; padding: .3rem 0 } .wrong { color: #c33 } .kind { font-size: .9em; opacity: .8 }
</style>"""


def page(title: str, body: str) -> str:
    """A whole page."""
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f'<link rel="icon" type="image/svg+xml" href="{ICON}">'
    return f'<!doctype html><html lang="en"><head>{head}<title>{escape(title)}</title>{STYLE}</head>{body}</html>'


def login(wrong: bool = False) -> str:
    """The page that takes a token."""
    said = '<p class="wrong" role="alert">This token is not known here.</p>' if wrong else ""
    return page(
        "diptych: log in",
        f"""<body><h1>diptych</h1>{said}<form method="post" action="/login">
<label for="token">Your token</label>
<input id="token" name="token" type="password" autocomplete="current-password" required autofocus>
<button>Log in</button></form></body>""",
    )


def description(schema: dict[str, Any]) -> str:
    """The routes of an OpenAPI schema, for people: each field with its type and range, its default and an example."""
    parts = []
    for path, methods in schema["paths"].items():
        for method, route in methods.items():
            rows = "".join(_row(field) for field in fields.of_route(schema, path, method))
            parts.append(
                f"<details><summary><code>{method.upper()} {escape(path)}</code></summary>"
                f"<p>{escape(route.get('description', ''))}</p><table>{rows}</table></details>"
            )
    intro = '<p>For machines: <a href="/openapi.json">openapi.json</a>. The app is at <a href="/app/">/app</a>.</p>'
    return page("diptych: API", f"<body><h1>diptych API</h1>{intro}{''.join(parts)}</body>")


def _row(field: fields.Field) -> str:
    beside = ["required" if field.required else field.where if field.where != "body" else ""]
    beside += [f"{word} <code>{escape(value)}</code>" for word, value in _values(field) if value]
    said = f"{escape(field.allowed)}{''.join(f'; {part}' for part in beside if part)}"
    return (
        f'<tr><td><code>{escape(field.name)}</code></td><td><span class="kind">{said}</span>'
        f"<br>{escape(field.description)}</td></tr>"
    )


def _values(field: fields.Field) -> tuple[tuple[str, str], ...]:
    return ("default", field.default), ("for instance", field.example)
