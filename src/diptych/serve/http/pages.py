"""Two plain pages that need no script and no other server: the login, and the API's description."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path
from fastapi.responses import Response

from diptych.apps.audit import media_type
from diptych.serve.http import openapi
from diptych.serve.http.error_responses import answer, documented
from diptych.serve.http.image_routes import ServiceDep
from diptych.serve.http.openapi import WORDS
from diptych.serve.templates import render

ICON = "/favicon.ico"


def login(wrong: bool = False) -> str:
    """The page that takes a token."""
    return render("login.html", wrong=wrong)


def description(schema: dict[str, Any]) -> str:
    """The routes of an OpenAPI schema, for people: each field with its type and range, its default and an example."""
    routes = [
        {"path": path, "method": method.upper(), "description": route.get("description", ""),
         "fields": openapi.of_route(schema, path, method)}
        for path, methods in schema["paths"].items()
        for method, route in methods.items()
    ]  # fmt: skip
    return render("api.html", routes=routes)


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
