"""Two plain pages that need no script and no other server: the login, and the API's description."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path
from fastapi.responses import Response

from diptych.apps.audit_page import media_type
from diptych.serve.http import openapi
from diptych.serve.http.error_responses import answer, documented
from diptych.serve.http.image_routes import ServiceDep
from diptych.serve.http.openapi import WORDS
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
            rows = "".join(_row(field) for field in openapi.of_route(schema, path, method))
            parts.append(
                f"<details><summary><code>{method.upper()} {escape(path)}</code></summary>"
                f"<p>{escape(route.get('description', ''))}</p><table>{rows}</table></details>"
            )
    intro = '<p>For machines: <a href="/openapi.json">openapi.json</a>. The app is at <a href="/app/">/app</a>.</p>'
    return page("diptych: API", f"<body><h1>diptych API</h1>{intro}{''.join(parts)}</body>")


def _row(field: openapi.Field) -> str:
    beside = ["required" if field.required else field.where if field.where != "body" else ""]
    beside += [f"{word} <code>{escape(value)}</code>" for word, value in _values(field) if value]
    said = f"{escape(field.allowed)}{''.join(f'; {part}' for part in beside if part)}"
    return (
        f'<tr><td><code>{escape(field.name)}</code></td><td><span class="kind">{said}</span>'
        f"<br>{escape(field.description)}</td></tr>"
    )


def _values(field: openapi.Field) -> tuple[tuple[str, str], ...]:
    return ("default", field.default), ("for instance", field.example)


# `/v1/runs/…`: the pictures, sheets and reports that the web app's Data and Runs tabs show.

# A report is one page with pictures and styles inside, made by the run; scripts in it, if ever, stay without rights.
SANDBOX = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; frame-ancestors 'none'; sandbox"
RunName = Annotated[str, Path(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", json_schema_extra={WORDS: "a run's name"})]
PairId = Annotated[str, Path(pattern=r"^c-[0-9]{1,12}-[0-9]{2,4}$", json_schema_extra={WORDS: "a pair's id"})]
router = APIRouter(prefix="/v1/runs", tags=["runs"], responses=documented(500))


@router.get("/{run}/pairs/{id}/{side}", response_class=Response)
def picture(run: RunName, id: PairId, side: Literal["reference", "target"], service: ServiceDep) -> Response:
    """A panel of a candidate pair."""
    assert service.runs is not None  # these routes are there only with a folder of runs
    data = service.runs.picture(run, id, side)
    return Response(data, media_type=media_type(data), headers={"Cache-Control": "private, max-age=600"})


@router.get("/{run}/sheets/{number}", response_class=Response)
def sheet(run: RunName, number: Annotated[int, Path(ge=0, lt=100_000)], service: ServiceDep) -> Response:
    """A sample sheet of the training, counted from 0."""
    assert service.runs is not None
    sheets = service.runs.sheets(run)
    if number >= len(sheets):
        return answer(404, "there is no such sheet")
    return Response(sheets[number].read_bytes(), media_type="image/png")


@router.get("/{run}/report", response_class=Response)
def report(run: RunName, service: ServiceDep) -> Response:
    """The run's report."""
    assert service.runs is not None
    path = service.runs.report(run)
    if path is None:
        return answer(404, "this run has no report yet")
    headers = {"Content-Security-Policy": SANDBOX}
    return Response(path.read_bytes(), media_type="text/html; charset=utf-8", headers=headers)
