"""Relights and stories over HTTP: equal to the library's, with the limits and the privacy of every job."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from diptych import Student
from diptych.apps.story import story
from serve.running import CAT, TOKENS, Running

LIGHTS = ["soft golden light from the left", "dim blue light from above"]
PANELS = [
    "a cat on the beach | Day one.",
    "a cat in a forest | Lost.",
    "a cat on the moon | Very lost.",
    "a cat sleeping",
]


def png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def pixels(image: Any) -> np.ndarray:
    return np.asarray(image.convert("RGB"), np.int16)


def drawn(answer: httpx.Response) -> list[Image.Image]:
    assert answer.status_code == 200, answer.text
    return [Image.open(io.BytesIO(base64.b64decode(made["b64_json"]))) for made in answer.json()["data"]]


def left_half_may_change() -> Image.Image:
    with Image.open(CAT) as cat:
        mask = Image.new("L", cat.size, 0)
    mask.paste(255, (0, 0, mask.width // 2, mask.height))
    return mask


def test_relit_pictures_are_those_of_the_library_and_their_page_is_a_strip(
    client: httpx.Client, student: Student, cat: bytes
) -> None:
    files = {"image": cat, "mask": png(left_half_may_change())}
    answer = client.post("/v1/relights", files=files, data={"light": LIGHTS, "seed": 3, "steps": 2, "detail": 0.5})
    wanted = student.relight(CAT, LIGHTS, mask=left_half_may_change(), seed=3, steps=2, detail=0.5)
    made = drawn(answer)
    for picture, image in zip(made, wanted, strict=True):
        assert np.array_equal(pixels(picture), pixels(image))
    assert not np.array_equal(pixels(made[0]), pixels(made[1]))
    told = json.loads(made[1].info["diptych"])
    assert (told["light"], told["task"], told["detail"], told["seed"]) == (LIGHTS[1], "relight", 0.5, 3)
    assert told["digital_source_type"].endswith("/compositeWithTrainedAlgorithmicMedia")
    page = client.get(f"/v1/jobs/{answer.json()['job']}/page")
    strip = Image.open(io.BytesIO(page.content))
    side = student.pipeline.default_panel_size
    assert strip.size == (2 * side + 2, side) and np.array_equal(pixels(strip)[:, :side], pixels(made[0]))
    refused = client.get(f"/v1/jobs/{answer.json()['job']}/page", params={"format": "pdf"})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "format"


def test_a_story_is_the_page_of_the_library_as_png_and_pdf(client: httpx.Client, student: Student, cat: bytes) -> None:
    given = {"panel": PANELS, "title": "Far from home", "seed": 3, "steps": 2}
    answer = client.post("/v1/stories", files={"image": cat}, data=given)
    wanted = story(student, CAT, PANELS, title="Far from home", seed=3, steps=2)
    assert [made["seed"] for made in answer.json()["data"]] == wanted.seeds == [3, 4, 5, 6]
    for picture, image in zip(drawn(answer), wanted.images, strict=True):
        assert np.abs(pixels(picture) - pixels(image)).max() <= 1  # a batch rounds differently
    address = f"/v1/jobs/{answer.json()['job']}/page"
    page = Image.open(io.BytesIO(client.get(address).content))
    assert page.size == wanted.page.size and np.abs(pixels(page) - pixels(wanted.page)).max() <= 3
    told = json.loads(page.info["diptych"])
    assert told["title"] == "Far from home" and told["panels"][0] == {
        "prompt": "a cat on the beach",
        "caption": "Day one.",
    }
    pdf = client.get(address, params={"format": "pdf"})
    assert pdf.headers["content-type"] == "application/pdf" and pdf.content.startswith(b"%PDF")
    again = client.post("/v1/stories", files={"image": cat}, data={**given, "panel_seed": [3, 4, 99, 6]})
    first, second = drawn(answer), drawn(again)
    equal = [bool((np.abs(pixels(a) - pixels(b)) <= 1).all()) for a, b in zip(first, second, strict=True)]
    assert equal == [True, True, False, True]


@pytest.mark.parametrize(
    ("route", "files", "given", "says", "param"),
    [
        ("relights", {}, {"light": LIGHTS}, "one image", "image"),
        ("relights", {"image": CAT.read_bytes()}, {}, "light: ", "light"),
        ("relights", {"image": CAT.read_bytes()}, {"light": " "}, "empty", None),
        (
            "relights",
            {"image": CAT.read_bytes()},
            {"light": LIGHTS, "detail": 2},
            'a number from 0 to 1, not "2"',
            "detail",
        ),
        ("relights", {"image": CAT.read_bytes()}, {"light": LIGHTS, "n": 6}, "at most 10", "n"),
        ("relights", {"image": CAT.read_bytes()}, {"ligth": LIGHTS[0]}, "did you mean 'light'", "ligth"),
        (
            "relights",
            {"image": CAT.read_bytes(), "mask": png(Image.new("L", (9, 9)))},
            {"light": "dim"},
            "9×9",
            None,
        ),
        ("stories", {}, {"panel": PANELS[:3]}, "4 to 10 panels, not 3", None),
        ("stories", {}, {"panel": [*PANELS, "| says"]}, "'| says'", None),
        ("stories", {}, {"panel": [*PANELS, "a cat | \U00012000"]}, "font", None),
        ("stories", {}, {"panel": PANELS, "panel_seed": [1, 2]}, "2 seeds for 4 panels", None),
        ("stories", {"mask": CAT.read_bytes()}, {"panel": PANELS}, "takes image", "mask"),
    ],
)
def test_wrong_use_is_rejected_and_makes_no_job(
    client: httpx.Client, route: str, files: dict[str, bytes], given: dict[str, Any], says: str, param: str | None
) -> None:
    before = client.get("/v1/jobs").json()["data"]
    fields = [(name, (None, text)) for name, value in given.items() for text in listed(value)]
    answer = client.post(f"/v1/{route}", files=[*files.items(), *fields])
    error = answer.json()["error"]
    assert answer.status_code == 400 and says in error["message"] and (param is None or error["param"] == param)
    assert client.get("/v1/jobs").json()["data"] == before


def listed(value: Any) -> list[str]:
    return [str(one) for one in value] if isinstance(value, list) else [str(value)]


def test_a_page_is_its_owners_and_only_of_a_job_that_is_done(guarded: Running, cat: bytes) -> None:
    ana, ben = (
        httpx.Client(base_url=guarded.url, headers={"Authorization": f"Bearer {TOKENS[who]}"}, timeout=120)
        for who in ("ana", "ben")
    )
    given = {"light": LIGHTS, "steps": 1, "job": "relit-by-ana"}
    assert ana.post("/v1/relights", files={"image": cat}, data=given).status_code == 200
    assert ana.get("/v1/jobs/relit-by-ana").json()["kind"] == "relight"
    assert ana.get("/v1/jobs/relit-by-ana/page").status_code == 200
    assert ben.get("/v1/jobs/relit-by-ana/page").status_code == 404
    long = {"light": LIGHTS[0], "steps": 90, "wait": "false", "job": "given-up-by-ana"}
    assert ana.post("/v1/relights", files={"image": cat}, data=long).status_code == 202
    assert ana.get("/v1/jobs/given-up-by-ana/page").status_code == 409
    assert ana.delete("/v1/jobs/given-up-by-ana").json()["status"] == "cancelled"
