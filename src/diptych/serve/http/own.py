"""`/v1/relights` and `/v1/stories`: what OpenAI has no route for, asked and answered like `/v1/images/edits`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

from diptych.serve.asked import Relit, Story
from diptych.serve.http import forms, job_page
from diptych.serve.http.errors import answer, documented
from diptych.serve.http.images import ACCEPTED, Of, Owner, Pictures, draw
from diptych.serve.http.jobs import JobId

router = APIRouter(prefix="/v1", tags=["relights and stories"])
LIT = {"image": True, "mask": False}
TOLD = {"image": False}
PAGES: dict[int | str, dict[str, Any]] = {
    200: {"content": {media: {"schema": {"type": "string", "format": "binary"}} for media in job_page.MEDIA.values()}}
}


@router.post(
    "/relights",
    response_model=Pictures,
    responses={**documented(415, 500, 504), **ACCEPTED},
    openapi_extra=forms.described(Relit, LIT),
)
async def relights(request: Request, service: Of, owner: Owner) -> Response | Pictures:
    """The scene of `image` under each `light`, everything in its place; a `mask` says what may change."""
    service.limit(owner)
    asked, files = await forms.read(request, Relit, LIT)
    return await draw(service, owner, asked, files["image"], request, "relight", files["mask"])


@router.post(
    "/stories",
    response_model=Pictures,
    responses={**documented(415, 500, 504), **ACCEPTED},
    openapi_extra=forms.described(Story, TOLD),
)
async def stories(request: Request, service: Of, owner: Owner) -> Response | Pictures:
    """Draws the panels of a story of the character in `image`; `/v1/jobs/ID/page` is then the laid-out page."""
    service.limit(owner)
    asked, files = await forms.read(request, Story, TOLD)
    return await draw(service, owner, asked, files["image"], request, "story")


@router.get("/jobs/{id}/page", response_class=Response, responses={**PAGES, **documented(409, 500)})
async def page(
    id: JobId,
    service: Of,
    owner: Owner,
    kind: Annotated[Literal["png", "pdf"], Query(alias="format")] = "png",
) -> Response:
    """A finished job on one page: a story's, as PNG or PDF; other pictures side by side, as PNG."""
    service.limit(owner, stores=False)
    job = service.store.job(owner, id)
    if job is None:
        return answer(404, "there is no such job")
    if job["status"] != "done":
        return answer(409, f"the job is {job['status']}; a page is made of one that is done")
    data = await service.lanes.large.run(owner, job_page.page, service, job, kind)
    headers = {"Cache-Control": "private, max-age=600", "Content-Disposition": f'inline; filename="{id}.{kind}"'}
    return Response(data, media_type=job_page.MEDIA[kind], headers=headers)
