"""Pages from Jinja2 templates, which escape every value: the login, the API's description, and the fragments of the web
app. The first two need no script and no other server. The routes for files of runs are here too.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Annotated, Any, Literal

from fastapi import APIRouter, FastAPI, Path, Request
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from jinja2 import Environment, PackageLoader, StrictUndefined

from diptych.apps.audit import media_type
from diptych.serve.auth import COOKIE, SESSION_SECONDS, Authenticator
from diptych.serve.http import openapi
from diptych.serve.http.error_responses import documented
from diptych.serve.http.guard import APP, client_of, cookie_of, too_many_guesses
from diptych.serve.http.image_routes import ServiceDep
from diptych.serve.limits import Refused
from diptych.serve.request_models import WORDS

ICON = "/favicon.ico"


def description(schema: dict[str, Any]) -> str:
    """Returns an OpenAPI schema as HTML: each route's fields with type, range, default and example."""
    routes = [
        {"path": path, "method": method.upper(), "description": route.get("description", ""),
         "fields": openapi.of_route(schema, path, method)}
        for path, methods in schema["paths"].items()
        for method, route in methods.items()
    ]  # fmt: skip
    return render("api.html", routes=routes)


# `/v1/runs/…`: the images, sheets and reports of the web app's Data and Runs tabs.

# A report is one page with its images and styles inside, written by the run. Scripts in it would get no rights.
SANDBOX = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; frame-ancestors 'none'; sandbox"
RunName = Annotated[str, Path(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", json_schema_extra={WORDS: "a run's name"})]
PairId = Annotated[str, Path(pattern=r"^c-[0-9]{1,12}-[0-9]{2,4}$", json_schema_extra={WORDS: "a pair's id"})]
run_router = APIRouter(prefix="/v1/runs", tags=["runs"], responses=documented(500))


@run_router.get("/{run}/pairs/{id}/{side}", response_class=Response)
def picture(run: RunName, id: PairId, side: Literal["reference", "target"], service: ServiceDep) -> Response:
    """Returns a panel of a candidate pair."""
    assert service.runs is not None  # these routes exist only with a folder of runs
    data = service.runs.picture(run, id, side)
    return Response(data, media_type=media_type(data), headers={"Cache-Control": "private, max-age=600"})


@run_router.get("/{run}/sheets/{number}", response_class=Response)
def sheet(run: RunName, number: Annotated[int, Path(ge=0, lt=100_000)], service: ServiceDep) -> Response:
    """Returns a sample sheet of the training, counted from 0."""
    assert service.runs is not None
    sheets = service.runs.sheets(run)
    if number >= len(sheets):
        raise Refused("path_not_found", f"The run has {len(sheets)} sample sheets, counted from 0.", 404)
    return Response(sheets[number].read_bytes(), media_type="image/png")


@run_router.get("/{run}/report", response_class=Response)
def report(run: RunName, service: ServiceDep) -> Response:
    """Returns the run's report."""
    assert service.runs is not None
    path = service.runs.report(run)
    if path is None:
        raise Refused("run_incomplete", "The run has no report yet.", 404)
    headers = {"Content-Security-Policy": SANDBOX}
    return Response(path.read_bytes(), media_type="text/html; charset=utf-8", headers=headers)


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
    """Renders a template of this package."""
    return _environment().get_template(name).render(values)


def error(text: object) -> str:
    """Returns an error message as HTML for the web app."""
    return render("message.html", text=text, role="alert")


def status(text: str, command: str = "") -> str:
    """Returns a status message as HTML, with a command to run after it."""
    return render("message.html", text=text, role="status", command=command)


def add(app: FastAPI, gate: Authenticator) -> None:
    """Adds the pages outside the API: the login, the API's description, the icon."""

    @app.get("/", include_in_schema=False)
    async def root() -> Response:
        return RedirectResponse(f"{APP}/", 303)

    @app.get(ICON, include_in_schema=False)
    async def favicon() -> Response:
        return Response(
            (files("diptych.serve.app") / "icon.svg").read_bytes(),
            media_type="image/svg+xml",
            headers={"Cache-Control": "max-age=86400"},
        )

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(description(app.openapi()))

    @app.get("/openapi.json", include_in_schema=False)
    async def schema() -> JSONResponse:
        return JSONResponse(app.openapi())

    @app.get("/login", include_in_schema=False)
    async def login_page() -> HTMLResponse:
        return HTMLResponse(render("login.html", wrong=False))

    @app.post("/login", include_in_schema=False)
    async def login(request: Request) -> Response:
        async with request.form(max_files=0, max_fields=4, max_part_size=2**14) as form:
            owner = gate.owner(str(form.get("token", "")).strip())
        if owner is None:
            if seconds := gate.guessed(client_of(request.scope)):
                return too_many_guesses(seconds)
            return HTMLResponse(render("login.html", wrong=True), 401)
        response = RedirectResponse(f"{APP}/", 303)
        secure = request.url.scheme == "https"
        response.set_cookie(
            COOKIE, gate.session(owner), SESSION_SECONDS, httponly=True, samesite="strict", secure=secure
        )
        return response

    @app.post("/logout", include_in_schema=False)
    def logout(request: Request) -> Response:
        gate.revoke(cookie_of(request.headers))
        response = RedirectResponse("/login", 303)
        response.delete_cookie(COOKIE)
        return response
