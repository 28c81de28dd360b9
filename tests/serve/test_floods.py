"""One who floods the server holds up nobody else: large JSON, large images, full disks, long queues, silence."""

from __future__ import annotations

import io
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from diptych import Student
from diptych.serve.config import Limits, ServerSettings
from diptych.serve.job_store import JobStore
from diptych.serve.limits import Busy, FairShares, Lane
from diptych.utils.documents import parse_request
from serve.running import TOKENS, Running

ANA, BEN = ({"Authorization": f"Bearer {TOKENS[name]}"} for name in ("ana", "ben"))
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def crowded(student: Student, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    limits = Limits(rate=1000, queue=40, kept_bytes=400_000)
    running = Running(ServerSettings(folder=tmp_path_factory.mktemp("crowded"), tokens=TOKENS, limits=limits), student)
    yield running
    running.close()


def noise(side: int, seed: int = 0) -> bytes:
    """A PNG that no compression makes smaller."""
    out = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(out, "PNG", compress_level=0)
    return out.getvalue()


def slowest(running: Running, headers: dict[str, str], during: Callable[[], Any]) -> float:
    """The longest that somebody else waited for an answer meanwhile."""
    worst, ended = [0.0], threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=running.url, headers=headers, timeout=60) as client:
            while not ended.is_set():
                started = time.perf_counter()
                assert client.get("/v1/jobs").status_code == 200
                worst[0] = max(worst[0], time.perf_counter() - started)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        during()
    finally:
        ended.set()
        thread.join()
    return worst[0]


@pytest.mark.parametrize("path", ["generations", "edits"])
def test_a_great_many_unknown_keys_are_refused_before_they_are_read(crowded: Running, path: str) -> None:
    keys = b",".join(b'"k%d":1' % number for number in range(500_000))
    body = b'{"prompt": "a cat", ' + keys + b"}"

    def send() -> None:
        answer = httpx.post(f"{crowded.url}/v1/images/{path}", content=body, headers=ANA | JSON, timeout=60)
        assert answer.status_code == 400 and "values" in answer.json()["error"]["message"] and len(answer.text) < 1000

    started = time.perf_counter()
    assert slowest(crowded, BEN, send) < 2 and time.perf_counter() - started < 4


@pytest.mark.parametrize(
    "value", ["[" * 60 + "]" * 60, "[" + "1," * 2000 + "1]", '{"a":' * 70 + "1" + "}" * 70], ids=len
)
def test_a_request_has_few_values_and_levels(crowded: Running, value: str) -> None:
    body = f'{{"prompt": "a cat", "images": {value}}}'.encode()
    answer = httpx.post(f"{crowded.url}/v1/images/edits", content=body, headers=ANA | JSON, timeout=60)
    assert answer.status_code == 400 and len(answer.text) < 1000


def test_texts_may_be_full_of_commas() -> None:
    prompt = "a cat, a dog: [x] {y}, " * 1000
    assert parse_request(b'{"prompt": "%s", "n": 1}' % prompt.encode()) == {"prompt": prompt, "n": 1}
    with pytest.raises(ValueError, match="values"):
        parse_request(b"[" + b"0," * 1000 + b"0]")


def test_the_rate_is_counted_before_the_body_is_read(student: Student, tmp_path: Path) -> None:
    running = Running(ServerSettings(folder=tmp_path, tokens=TOKENS, limits=Limits(rate=1)), student)
    try:
        url = f"{running.url}/v1/images/generations"
        found = [httpx.post(url, content=b"{", headers=ANA | JSON).status_code for _ in range(2)]
        assert found == [400, 429]
    finally:
        running.close()


def test_large_images_hold_up_neither_requests_nor_small_images(crowded: Running, cat: bytes) -> None:
    out = io.BytesIO()
    Image.new("RGB", (2500, 2500), (200, 90, 10)).save(out, "JPEG")
    found: list[int] = []

    def send() -> None:
        answer = httpx.post(f"{crowded.url}/v1/references", content=out.getvalue(), headers=ANA, timeout=120)
        found.append(answer.status_code)
        assert answer.status_code != 503 or int(answer.headers["retry-after"]) >= 1

    def flood() -> None:
        threads = [threading.Thread(target=send) for _ in range(20)]
        for thread in threads:
            thread.start()
        started = time.perf_counter()
        small = httpx.post(f"{crowded.url}/v1/references", content=cat, headers=BEN, timeout=60)
        assert small.status_code == 201 and time.perf_counter() - started < 2
        for thread in threads:
            thread.join()

    assert slowest(crowded, BEN, flood) < 2
    assert found.count(503) == 12 and found.count(201) == 8  # half of the queue is one owner's


def test_a_lane_has_room_for_several_owners() -> None:
    lane, go = Lane("test", 1.0, 4), threading.Event()
    started = [lane.start("ana", go.wait) for _ in range(2)]
    with pytest.raises(Busy):
        lane.start("ana", go.wait)
    started += [lane.start("ben", go.wait) for _ in range(2)]
    with pytest.raises(Busy):
        lane.start("cid", go.wait)
    go.set()
    assert all(future.result(10) for future in started)
    assert lane.start("ana", lambda: 7).result(10) == 7
    lane.close()


def test_what_is_kept_for_one_token_is_limited_by_what_is_stored(crowded: Running) -> None:
    found = []
    with httpx.Client(base_url=crowded.url, headers=ANA, timeout=60) as client:
        for seed in range(20):
            sent = io.BytesIO()
            Image.open(io.BytesIO(noise(200, seed))).save(sent, "JPEG", quality=5)
            found.append(client.post("/v1/references", content=sent.getvalue()))
            assert len(sent.getvalue()) < 10_000  # as PNG it is several times that
        codes = [answer.status_code for answer in found]
        assert codes[0] == 201 and codes[-1] == 413 and codes == sorted(codes)
        assert found[-1].json()["error"]["code"] == "quota_exceeded"
        assert crowded.service.store.kept("ana") <= 400_000
    other = httpx.post(f"{crowded.url}/v1/references", content=noise(20), headers=BEN, timeout=60)
    assert other.status_code == 201


def test_what_is_kept_is_counted_over_a_restart_and_less_once_it_expires(tmp_path: Path) -> None:
    store = JobStore(tmp_path / "jobs.sqlite")
    request = {"texts": ["a cat"], "reference": None, "mask": None}
    for _ in range(2):  # the same picture is kept once
        store.put_reference("ana", "ref", b"x" * 1000, (1, 1))
    store.add("ana", "job", request, "s", [0], ["picture"])
    store.take(1)
    store.finish("picture", "PNG", b"y" * 500, {})
    kept = store.kept("ana")
    assert 1500 < kept < 1700 and store.kept("ben") == 0
    store.close()
    store = JobStore(tmp_path / "jobs.sqlite")
    assert store.kept("ana") == kept
    store.forget(time.time() + 10)
    assert store.kept("ana") == 0
    store.close()


def test_owners_take_turns_and_dear_pictures_count_more() -> None:
    shares = FairShares()
    waiting = {"ana": [(f"a{n}", 1.0) for n in range(9)], "ben": [(f"b{n}", 3.0) for n in range(9)]}
    turns = [owner for owner, _ in shares.choose(waiting, 8)]
    assert turns.count("ana") == 6 and turns.count("ben") == 2
    again = FairShares()
    assert [item for _, item in again.choose({"ana": [(n, 1.0) for n in range(100)]}, 100)] == list(range(100))
    # Who comes now has waited for nothing yet, and is next.
    both = {"ana": [("old", 1.0)], "ben": [("new", 1.0)]}
    assert again.first(["ana", "ben"]) == "ben" and again.choose(both, 1) == [("ben", "new")]


def test_a_long_queue_of_one_comes_after_the_first_of_another(student: Student, tmp_path: Path) -> None:
    settings = ServerSettings(folder=tmp_path, tokens=TOKENS, batch=2, limits=Limits(queue=40))
    running = Running(settings, student)
    try:
        with httpx.Client(base_url=running.url, timeout=60) as client:
            asked = {"prompt": "a cat", "steps": 20, "wait": False}
            url = "/v1/images/generations"
            flood = [client.post(url, json={**asked, "n": 10, "seed": n}, headers=ANA) for n in range(5)]
            assert [answer.status_code for answer in flood] == [202] * 4 + [429]
            other = client.post(url, json={**asked, "steps": 2}, headers=BEN)
            assert other.status_code == 202 and other.json()["waiting_before"] <= 2
            job = f"/v1/jobs/{other.json()['id']}"
            while client.get(job, headers=BEN).json()["status"] != "done":
                time.sleep(0.02)
            states = [client.get(f"/v1/jobs/{answer.json()['id']}", headers=ANA).json() for answer in flood[:4]]
            assert sum(state["progress"]["done"] for state in states) <= 8
            for state in states:
                client.delete(f"/v1/jobs/{state['id']}", headers=ANA)
    finally:
        running.close()


def test_silent_connections_keep_nobody_out(guarded: Running) -> None:
    silent = [socket.create_connection(("127.0.0.1", guarded.port)) for _ in range(1100)]
    try:
        for connection in silent[::7]:
            connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n") if connection.fileno() > 0 else None
        with httpx.Client(base_url=guarded.url, headers=ANA, timeout=30) as client:
            for path in ("/healthz", "/v1/jobs", "/v1/models"):
                assert client.get(path).status_code == 200
    finally:
        for connection in silent:
            connection.close()


def test_strangers_send_little(guarded: Running) -> None:
    token = {"token": "x" * 100_000}
    assert httpx.post(f"{guarded.url}/login", data=token).status_code == 413
    chunks = (b"x=1&" * 10_000 for _ in range(4))  # of no stated length
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    assert httpx.post(f"{guarded.url}/login", content=chunks, headers=form).status_code in (400, 413)


def test_many_requests_of_one_are_refused_to_that_one_alone(student: Student, tmp_path: Path) -> None:
    running = Running(ServerSettings(folder=tmp_path, tokens=TOKENS, limits=Limits(requests=3)), student)
    head = "POST /v1/references HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 9\r\n"
    slow = [socket.create_connection(("127.0.0.1", running.port)) for _ in range(3)]
    try:
        for connection in slow:
            connection.sendall(f"{head}Authorization: {ANA['Authorization']}\r\n\r\nx".encode())
        until = time.monotonic() + 10
        while (refused := httpx.get(f"{running.url}/v1/jobs", headers=ANA)).status_code == 200:
            assert time.monotonic() < until
        assert refused.status_code == 503 and "retry-after" in refused.headers
        assert httpx.get(f"{running.url}/v1/jobs", headers=BEN).status_code == 200
        assert httpx.get(f"{running.url}/readyz", headers=ANA).status_code == 200
    finally:
        for connection in slow:
            connection.close()
        running.close()
