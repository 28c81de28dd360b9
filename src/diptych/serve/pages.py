"""Two plain pages that need no script and no other server: the login, and the API's description."""

from __future__ import annotations

from html import escape
from typing import Any

STYLE = """<style>
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }
body { max-width: 46rem; margin: 2rem auto; padding: 0 1rem }
input, button { font: inherit; padding: .5rem; width: 100%; box-sizing: border-box; margin: .25rem 0 }
code { background: color-mix(in srgb, currentColor 10%, transparent); padding: 0 .2em }
table { border-collapse: collapse; width: 100% } td { vertical-align: top; padding: .2rem .6rem .2rem 0 }
summary { cursor: pointer; padding: .3rem 0 } .wrong { color: #c33 }
</style>"""


def page(title: str, body: str) -> str:
    """A whole page."""
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
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
    """The routes of an OpenAPI schema, for people."""
    parts = []
    for path, methods in schema["paths"].items():
        for method, route in methods.items():
            fields = _fields(schema, route)
            table = "".join(f"<tr><td><code>{escape(n)}</code></td><td>{escape(d)}</td></tr>" for n, d in fields)
            parts.append(
                f"<details><summary><code>{method.upper()} {escape(path)}</code></summary>"
                f"<p>{escape(route.get('description', ''))}</p><table>{table}</table></details>"
            )
    intro = '<p>For machines: <a href="/openapi.json">openapi.json</a>. The app is at <a href="/app/">/app</a>.</p>'
    return page("diptych: API", f"<body><h1>diptych API</h1>{intro}{''.join(parts)}</body>")


def _fields(schema: dict[str, Any], route: dict[str, Any]) -> list[tuple[str, str]]:
    found = [(p["name"], p.get("description", "")) for p in route.get("parameters", [])]
    for content in route.get("requestBody", {}).get("content", {}).values():
        body = content.get("schema", {})
        if "$ref" in body:
            body = schema["components"]["schemas"][body["$ref"].rpartition("/")[2]]
        found += [(name, field.get("description", "")) for name, field in body.get("properties", {}).items()]
    return found
