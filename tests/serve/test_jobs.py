"""Jobs: progress beside a waiting request, cancellation, names, a full queue, and whose is whose."""

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
import torch
from PIL import Image

from diptych import Student
from diptych.serve.config import Limits, ServerSettings
from diptych.student.pipeline import DiptychPipeline
from serve.running import CAT, TOKENS, Running

LONG = {"prompt": "a cat", "steps": 60, "wait": False}


def events(client: httpx.Client, id: str, **query: Any) -> list[tuple[str, dict[str, Any]]]:
    found, name = [], ""
    with client.stream("GET", f"/v1/jobs/{id}/events", params=query) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        for line in response.iter_lines():
            if line.startswith("event: "):
                name = line.removeprefix("event: ")
            elif line.startswith("data: "):
                found.append((name, json.loads(line.removeprefix("data: "))))
    return found


def test_progress_comes_by_events_beside_the_request_that_waits(server: Running, client: httpx.Client) -> None:
    ours = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120)
    answer: list[Any] = []

    def ask() -> None:
        extra = {"steps": 12, "job": "beside-it", "partial_images": 1}
        answer.append(ours.images.edit(image=CAT.open("rb"), prompt="a cat at night", extra_body=extra))

    thread = threading.Thread(target=ask)
    thread.start()
    while client.get("/v1/jobs/beside-it").status_code == 404:
        pass
    found = events(client, "beside-it", previews=True)
    thread.join()
    steps = [state["progress"]["step"] for name, state in found if name == "progress"]
    assert steps == sorted(steps) and max(steps) > 1 and found[-1][0] == "done"
    assert any(name == "preview" for name, _ in found)
    again = client.get("/v1/jobs/beside-it/images").json()
    assert again["data"][0]["b64_json"] == answer[0].data[0].b64_json and again["job"] == "beside-it"


def test_a_job_that_fails_has_the_code_of_its_error(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("tried to allocate 20 GiB")

    monkeypatch.setattr(DiptychPipeline, "__call__", full)
    answer = client.post("/v1/images/generations", json={"prompt": "a cat", "steps": 1, "job": "out-of-memory"})
    job = client.get("/v1/jobs/out-of-memory").json()
    error = answer.json()["error"]
    assert (answer.status_code, job["status"]) == (400, "failed")
    assert (error["message"], error["code"], job["code"]) == (job["error"], *["memory_insufficient"] * 2)


def test_a_job_that_is_given_up_stops_at_once(client: httpx.Client) -> None:
    first = client.post("/v1/images/generations", json=LONG)
    second = client.post("/v1/images/generations", json={**LONG, "prompt": "a dog"})
    assert first.status_code == second.status_code == 202
    for job in (second.json(), first.json()):
        assert client.delete(f"/v1/jobs/{job['id']}").json()["status"] == "cancelled"
    assert client.delete(f"/v1/jobs/{first.json()['id']}").status_code == 409
    after = client.post("/v1/images/generations", json={"prompt": "a cat", "steps": 1})
    assert after.status_code == 200
    assert events(client, first.json()["id"])[-1][0] == "cancelled"
    assert client.get(f"/v1/jobs/{first.json()['id']}/images").json()["error"]["code"] == "job_failed"


def test_a_request_sent_again_under_its_name_finds_its_job(client: httpx.Client) -> None:
    asked = {"prompt": "a cat", "steps": 1, "job": "my-own-name"}
    first, second = (client.post("/v1/images/generations", json=asked).json() for _ in range(2))
    assert first["data"] == second["data"]  # the random seed is chosen once
    at_once = client.post("/v1/images/generations", json={**asked, "wait": False})
    assert at_once.status_code == 202 and at_once.json()["status"] == "done"  # how to answer names no other request
    other = client.post("/v1/images/generations", json={**asked, "prompt": "a dog"})
    assert other.status_code == 400 and other.json()["error"]["param"] == "job"
    names = [job["id"] for job in client.get("/v1/jobs").json()["data"]]
    assert names.count("my-own-name") == 1


def test_a_full_queue_says_when_to_come_again(student: Student, tmp_path: Any) -> None:
    running = Running(ServerSettings(folder=tmp_path, batch=1, limits=Limits(queue=3)), student)
    try:
        with httpx.Client(base_url=running.url, timeout=60) as client:
            answers = [client.post("/v1/images/generations", json={**LONG, "seed": n}) for n in range(8)]
            full = answers[-1]
            assert answers[0].status_code == 202 and full.status_code == 429
            assert int(full.headers["retry-after"]) >= 1 and full.json()["error"]["type"] == "rate_limit_error"
            for answer in answers:
                if answer.status_code == 202:
                    client.delete(f"/v1/jobs/{answer.json()['id']}")
    finally:
        running.close()


def test_each_device_has_a_worker_and_they_share_what_waits(student: Student, tmp_path: Any) -> None:
    running = Running(ServerSettings(folder=tmp_path, devices=("cpu", "cpu"), batch=1), None)
    try:
        first, second = running.service.workers
        assert first.student is not second.student and first.student is not None
        guesses = [worker.seconds for worker in running.service.workers]
        asked = {"prompt": "a cat at night", "n": 8, "seed": 3, "steps": 6}
        answer = httpx.post(f"{running.url}/v1/images/generations", json=asked, timeout=120).json()
        assert [worker.seconds != guess for worker, guess in zip((first, second), guesses, strict=True)] == [True, True]
        drawn = [Image.open(io.BytesIO(base64.b64decode(made["b64_json"]))) for made in answer["data"]]
        wanted = student.generate(None, "a cat at night", seed=list(range(3, 11)), steps=6)
        for picture, image in zip(drawn, wanted, strict=True):
            assert np.array_equal(np.asarray(picture), np.asarray(image))
    finally:
        running.close()


def test_a_request_that_waits_too_long_is_told_so_and_given_up_unless_it_has_a_name(
    student: Student, tmp_path: Any
) -> None:
    running = Running(ServerSettings(folder=tmp_path, limits=Limits(wait_seconds=0.2)), student)
    try:
        with httpx.Client(base_url=running.url, timeout=60) as client:
            late = client.post("/v1/images/generations", json={"prompt": "a cat", "steps": 90})
            named = client.post("/v1/images/generations", json={"prompt": "a dog", "steps": 90, "job": "go-on-with-it"})
            for answer in (late, named):
                assert answer.status_code == 504 and answer.json()["error"]["code"] == "job_timeout"
            found = {job["prompt"]: job["status"] for job in client.get("/v1/jobs").json()["data"]}
            assert found["a cat"] == "cancelled" and found["a dog"] in ("queued", "running")
    finally:
        running.close()


def test_nobody_reaches_what_is_anothers(guarded: Running, cat: bytes) -> None:
    ana, ben = (
        httpx.Client(base_url=guarded.url, headers={"Authorization": f"Bearer {TOKENS[who]}"}, timeout=60)
        for who in ("ana", "ben")
    )
    job = ana.post("/v1/images/generations", json={"prompt": "a cat", "steps": 1, "job": "the-job-of-ana"}).json()
    reference = ana.post("/v1/references", content=cat).json()["id"]
    picture = job["data"][0]["id"]
    for path in ("jobs/the-job-of-ana", "jobs/the-job-of-ana/images", "jobs/the-job-of-ana/events"):
        assert ana.get(f"/v1/{path}").status_code == 200 and ben.get(f"/v1/{path}").status_code == 404
    for path in (f"pictures/{picture}", f"references/{reference}"):
        assert ana.get(f"/v1/{path}").status_code == 200 and ben.get(f"/v1/{path}").status_code == 404
    assert ben.delete("/v1/jobs/the-job-of-ana").status_code == 404 and ben.get("/v1/jobs").json()["data"] == []
    own = ben.post("/v1/images/generations", json={"prompt": "a dog", "steps": 1, "job": "the-job-of-ana"})
    assert own.status_code == 200  # names are separate for each owner
    signed = ana.get("/v1/jobs/the-job-of-ana/images", params={"response_format": "url"}).json()["data"][0]["url"]
    assert httpx.get(signed).status_code == 200
    assert httpx.get(signed.replace("signature=", "signature=0")[:-1]).status_code == 401
    assert httpx.get(signed.partition("?")[0]).status_code == 401
