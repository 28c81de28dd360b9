"""The official OpenAI client against a running server, with the shipped model."""

from __future__ import annotations

import base64
import io
import json
import threading
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from diptych import Student
from serve.running import CAT, Running

QUICK = {"steps": 2, "seed": 5}


@pytest.fixture
def ours(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120, max_retries=0)


def opened(b64: str | None) -> Image.Image:
    assert b64
    return Image.open(io.BytesIO(base64.b64decode(b64)))


def same(a: Any, b: Any) -> bool:
    return bool((np.asarray(a) == np.asarray(b)).all())


def side(student: Student) -> int:
    return student.pipeline.default_panel_size


def test_an_edit_is_the_picture_that_the_library_draws(ours: openai.OpenAI, student: Student) -> None:
    answer: Any = ours.images.edit(
        image=CAT.open("rb"), prompt="a cat on a beach", n=2, response_format="b64_json", extra_body=QUICK
    )
    wanted = student.generate(CAT, "a cat on a beach", seed=[5, 6], steps=2)
    assert [picture.seed for picture in answer.data] == [5, 6] and answer.size == "{0}x{0}".format(side(student))
    for picture, image in zip(answer.data, wanted, strict=True):
        drawn = opened(picture.b64_json)
        # Drawn together, the library one by one: rounding may differ by a level of 255.
        assert np.abs(np.asarray(drawn, np.int16) - np.asarray(image, np.int16)).max() <= 1
        told = json.loads(drawn.info["diptych"])
        assert (told["prompt"], told["steps"], told["model"]) == ("a cat on a beach", 2, "pocket")
        assert told["seed"] == picture.seed and told["digital_source_type"].endswith("/trainedAlgorithmicMedia")


def test_a_generation_takes_a_reference_as_base64_or_none(ours: openai.OpenAI, student: Student, cat: bytes) -> None:
    reference = "data:image/png;base64," + base64.b64encode(cat).decode()
    for given, wanted in ((reference, CAT), (None, None)):
        extra = {**QUICK, **({"reference": given} if given else {})}
        answer: Any = ours.images.generate(prompt="a cat at night", extra_body=extra)
        assert same(opened(answer.data[0].b64_json), student.generate(wanted, "a cat at night", seed=5, steps=2))


def test_an_address_opens_without_a_token(ours: openai.OpenAI, student: Student) -> None:
    size: Any = f"{side(student)}x{side(student)}"
    answer: Any = ours.images.generate(
        prompt="a cat", response_format="url", output_format="webp", extra_body=QUICK, size=size
    )
    fetched = httpx.get(answer.data[0].url, timeout=60)
    assert fetched.headers["content-type"] == "image/webp"
    assert Image.open(io.BytesIO(fetched.content)).size == (side(student), side(student))


def test_the_stream_is_openais(ours: openai.OpenAI, student: Student) -> None:
    extra = {"steps": 4, "seed": 5}
    found: list[Any] = list(ours.images.generate(prompt="a cat", stream=True, partial_images=2, extra_body=extra))
    assert found[-1].type == "image_generation.completed"
    assert {event.type for event in found[:-1]} == {"image_generation.partial_image"} and 1 <= len(found[:-1]) <= 2
    assert opened(found[0].b64_json).size == (side(student), side(student))
    assert same(opened(found[-1].b64_json), student.generate(None, "a cat", seed=5, steps=4))


def test_requests_that_come_together_are_drawn_together_and_alike(server: Running, student: Student) -> None:
    prompts = [f"a cat {place}" for place in ("on a beach", "in a forest", "at night", "in the snow")]
    drawn: dict[str, Any] = {}

    def ask(prompt: str) -> None:
        one = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120, max_retries=0)
        drawn[prompt] = one.images.edit(image=CAT.open("rb"), prompt=prompt, extra_body={"steps": 3, "seed": 1})

    threads = [threading.Thread(target=ask, args=(prompt,)) for prompt in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sums = {
        s.labels["le"]: s.value for m in server.service.metrics.batch.collect() for s in m.samples if "le" in s.labels
    }
    assert sums["+Inf"] > sums["1.0"], "nothing was drawn together"
    for prompt in prompts:
        alone = np.asarray(student.generate(CAT, prompt, seed=1, steps=3), np.int16)
        assert np.abs(np.asarray(opened(drawn[prompt].data[0].b64_json), np.int16) - alone).max() <= 1


@pytest.mark.parametrize(
    ("given", "says", "param"),
    [
        ({"prompt": "a cat", "stepss": 3}, "did you mean 'steps'", "stepss"),
        ({"prompt": "a cat", "size": "1024x1024"}, "is too large; this model draws", "size"),
        ({"prompt": "a cat", "steps": 101}, "at most 100", "steps"),
        ({"prompt": "a cat", "n": 11}, "at most 10", "n"),
        ({"prompt": "a cat", "quality": "hd"}, "nothing this model can do", "quality"),
        ({"prompt": "   "}, "the prompt is empty", None),
        ({"prompt": "a cat", "reference": "https://example.com/cat.png"}, "fetches nothing", "reference"),
        ({"prompt": "a cat", "reference": "file:///etc/passwd"}, "fetches nothing", "reference"),
        ({"prompt": "a cat", "reference": "/etc/passwd"}, "not base64", "reference"),
        ({"prompt": "a cat", "background": "no colour"}, "unknown colour", None),
    ],
)
def test_wrong_use_is_told_in_openais_shape(
    client: httpx.Client, given: dict[str, Any], says: str, param: str | None
) -> None:
    answer = client.post("/v1/images/generations", json=given)
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["type"] == "invalid_request_error"
    assert says in error["message"] and error["param"] == param


def test_the_client_raises_its_own_errors(ours: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="not an image"):
        ours.images.edit(image=("cat.png", b"no picture at all"), prompt="a cat")
    with pytest.raises(openai.BadRequestError, match="drawn anew"):
        ours.images.edit(image=CAT.open("rb"), mask=CAT.open("rb"), prompt="a cat")
