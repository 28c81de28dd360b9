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
INVALID = "request_invalid"


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
    ("given", "code", "fact", "param"),
    [
        ({"prompt": "a cat", "stepss": 3}, INVALID, "did you mean 'steps'", "stepss"),
        ({"prompt": "a cat", "size": "1024x1024"}, "size_invalid", "1024x1024", "size"),
        ({"prompt": "a cat", "steps": 101}, INVALID, "at most 100 are allowed, not 101", "steps"),
        ({"prompt": "a cat", "n": 11}, INVALID, "10", "n"),
        ({"prompt": "a cat", "quality": "hd"}, INVALID, "'hd'", "quality"),
        ({"prompt": "a cat", "steps": "many"}, INVALID, 'a whole number from 1 to 100, not "many"', "steps"),
        ({"prompt": "a cat", "steps": 2.5}, INVALID, "a whole number from 1 to 100, not 2.5", "steps"),
        ({"prompt": "a cat", "n": 0}, INVALID, "a whole number from 1 to 10, not 0", "n"),
        ({"prompt": "a cat", "size": "12x"}, INVALID, "WIDTHxHEIGHT in pixels, one number, or auto", "size"),
        ({"prompt": "a cat", "output_format": "pngg"}, INVALID, 'png, webp or jpeg, not "pngg"; did you mean', None),
        ({"prompt": "a cat", "wait": "perhaps"}, INVALID, "true or false", "wait"),
        ({"prompt": "a cat", "job": "x"}, INVALID, "8 to 64 letters", "job"),
        ({"prompt": "a cat", "input_fidelity": "hgih"}, INVALID, 'low or high, not "hgih"; did you mean', None),
        ({"prompt": ["a cat"]}, INVALID, "text", "prompt"),
        ({}, INVALID, "text", "prompt"),
        ({"prompt": "   "}, "text_empty", "prompt", None),
        ({"prompt": "a cat" * 1000}, "text_invalid", "4,000", "prompt"),
        ({"prompt": "a cat", "reference": "https://example.com/cat.png"}, INVALID, "base64", "reference"),
        ({"prompt": "a cat", "reference": "file:///etc/passwd"}, INVALID, "base64", "reference"),
        ({"prompt": "a cat", "reference": "/etc/passwd"}, INVALID, "base64", "reference"),
        ({"prompt": "a cat", "background": "no color"}, "option_invalid", "no color", None),
    ],
)
def test_wrong_use_is_reported_in_openais_shape_with_the_code(
    client: httpx.Client, given: dict[str, Any], code: str, fact: str, param: str | None
) -> None:
    answer = client.post("/v1/images/generations", json=given)
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["type"] == "invalid_request_error"
    assert fact in error["message"] and error["code"] == code and (param is None or error["param"] == param)


def test_the_openai_client_raises_errors_with_our_codes(ours: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="image"):
        ours.images.edit(image=("cat.png", b"no picture at all"), prompt="a cat")
    with pytest.raises(openai.BadRequestError, match="mask") as refused:
        ours.images.edit(image=CAT.open("rb"), mask=CAT.open("rb"), prompt="a cat")
    assert (refused.value.code, refused.value.param) == (INVALID, "mask")


def test_a_model_is_retrieved_by_its_name(ours: openai.OpenAI) -> None:
    (listed,) = ours.models.list().data
    assert ours.models.retrieve("pocket") == listed and listed.id == "pocket"
    for other in ("gpt-image-2", "primecai/dsd_model"):
        with pytest.raises(openai.NotFoundError, match="'pocket'") as refused:
            ours.models.retrieve(other)
        assert refused.value.code == "model_not_found" and refused.value.param == "model"


def test_quality_is_a_share_of_the_models_own_steps_and_steps_go_before_it(
    ours: openai.OpenAI, student: Student
) -> None:
    own = int(student.sampling["steps"])
    for quality, steps in (("low", own // 2), ("medium", own), ("auto", own), ("high", 2 * own)):
        answer: Any = ours.images.generate(prompt="a cat", quality=quality, extra_body={"seed": 5})  # pyright: ignore
        assert (answer.quality, answer.settings["steps"], answer.warnings) == (quality, steps, [])
    answer = ours.images.edit(image=CAT.open("rb"), prompt="a cat", quality="high", extra_body=QUICK)
    assert answer.settings["steps"] == 2 and "steps is given" in answer.warnings[0]


def test_options_of_openais_models_are_taken_and_what_does_nothing_is_said(ours: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"prompt": "a cat", "safety_identifier": "u-1", "extra_body": QUICK}
    high: Any = ours.images.edit(image=CAT.open("rb"), input_fidelity="high", **asked)
    assert high.warnings == []
    answer: Any = ours.images.edit(image=CAT.open("rb"), input_fidelity="low", background="transparent", **asked)
    assert answer.background == "opaque" and opened(answer.data[0].b64_json).mode == "RGB"
    assert ["input_fidelity" in line or "background" in line for line in answer.warnings] == [True, True]
    assert answer.data[0].b64_json and same(opened(answer.data[0].b64_json), opened(high.data[0].b64_json))


def test_an_edit_may_be_json_with_the_picture_inside(client: httpx.Client, cat: bytes) -> None:
    plain = base64.b64encode(cat).decode()
    url = f"data:image/png;base64,{plain}"
    asked = {"prompt": "a cat at night", **QUICK}
    wanted = client.post("/v1/images/edits", files={"image": cat}, data=asked).json()["data"][0]["b64_json"]
    for given in ({"image": plain}, {"image": [url]}, {"images": [{"image_url": url}]}):
        answer = client.post("/v1/images/edits", json={**asked, **given})
        assert answer.status_code == 200 and same(opened(answer.json()["data"][0]["b64_json"]), opened(wanted))


@pytest.mark.parametrize(
    ("given", "code", "fact", "param"),
    [
        ({}, INVALID, "not 0", "image"),
        ({"image": ["YQ==", "YQ=="]}, INVALID, "not 2", "image"),
        ({"image": "https://example.com/cat.png"}, INVALID, "base64", "image"),
        ({"image": "not base64!"}, INVALID, "base64", "image"),
        ({"images": [{"file_id": "file-1"}]}, INVALID, "image_url", "images"),
        ({"image": "YQ==", "mask": "YQ=="}, INVALID, "'mask'", "mask"),
        ({"image": 3}, INVALID, "text or a list of values, each text, not 3", None),
        (b"{", "json_invalid", "", None),
        (b"[" * 100_000, "json_invalid", "", None),
        (b"[]", "json_invalid", "", None),
    ],
    ids=str,
)
def test_a_wrong_edit_in_json_is_rejected(
    client: httpx.Client, given: Any, code: str, fact: str, param: str | None
) -> None:
    json_ = {"Content-Type": "application/json"}
    body = given if isinstance(given, bytes) else json.dumps({"prompt": "a cat", **given}).encode()
    answer = client.post("/v1/images/edits", content=body, headers=json_)
    error = answer.json()["error"]
    assert answer.status_code == 400 and fact in error["message"] and error["code"] == code
    assert param is None or error["param"] == param


def test_answers_jobs_and_streams_have_the_warnings_that_the_log_has(
    ours: openai.OpenAI, client: httpx.Client, student: Student, caplog: pytest.LogCaptureFixture
) -> None:
    long = "a cat on a spaceport " + "and a cat " * 200
    asked: dict[str, Any] = {
        "prompt": long,
        "negative_prompt": "rain",
        "size": "32x48",
        "steps": 1,
        "image_guidance": 1,
    }
    asked |= {"text_guidance": 1, "job": "with-warnings"}
    quiet = Student(student.pipeline, "pocket")
    student.pipeline._truncated.clear()
    with caplog.at_level("WARNING"):
        options = {key: asked[key] for key in ("negative_prompt", "steps", "image_guidance", "text_guidance")}
        quiet.generate(None, long, size=(32, 48), **options)
    said = {record.getMessage() for record in caplog.records if record.name.startswith("diptych")}
    answer = client.post("/v1/images/generations", json=asked).json()
    assert set(answer["warnings"]) == said == set(answer["data"][0]["warnings"]) and len(said) == 4
    assert all(any(word in line for line in said) for word in ("'spaceport'", "not read", "32×48", "negative prompt"))
    job = client.get("/v1/jobs/with-warnings").json()
    assert job["warnings"] == answer["warnings"] == job["pictures"][0]["warnings"]
    extra = {"steps": 1, "job": "with-warnings-too"}
    *_, last = ours.images.generate(prompt="a cat on a spaceport", stream=True, extra_body=extra)
    found: Any = last
    assert "'spaceport'" in found.warnings[0] and len(found.warnings) == 1
    relit = client.post(
        "/v1/relights",
        files={"image": CAT.read_bytes()},
        data={"light": ["dim blue light from above", "glimmering light"], "steps": 1},
    ).json()
    assert [bool(made["warnings"]) for made in relit["data"]] == [False, True]
    assert relit["warnings"] == relit["data"][1]["warnings"] and "'glimmering'" in relit["warnings"][0]
