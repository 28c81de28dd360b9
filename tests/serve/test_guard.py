"""What strangers get: nothing without a token, nothing too large, nothing that was meant to hurt."""

from __future__ import annotations

import io
import logging
import socket
import time
import zlib
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from diptych import Student
from diptych.errors import UsageError
from diptych.serve.config import Limits, ServerSettings
from raising import raises
from serve.running import TOKENS, Running

PATHS = ("/v1/models", "/v1/jobs", "/metrics", "/docs", "/openapi.json", "/", "/app/", "/nothing", "/v1/jobs/12345678")
BEARER = {"Authorization": f"Bearer {TOKENS['ana']}"}


def test_nothing_is_served_without_a_token(guarded: Running) -> None:
    wrong = [({}, path) for path in PATHS]
    for authorization in ("Bearer nobody-knows-this", f"Basic {TOKENS['ana']}", "Bearer", TOKENS["ana"]):
        wrong += [({"Authorization": authorization}, path) for path in PATHS[:2]]
    for headers, path in wrong:
        answer = httpx.get(guarded.url + path, headers=headers, timeout=60)
        assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key", path
        assert TOKENS["ana"] not in answer.text
    assert httpx.get(f"{guarded.url}/healthz").json() == {"status": "ok"}
    assert httpx.get(f"{guarded.url}/v1/models", headers=BEARER, timeout=60).status_code == 200


def test_a_browser_logs_in_once_for_app_and_api(guarded: Running) -> None:
    with httpx.Client(base_url=guarded.url, timeout=60) as browser:
        page = browser.get("/app/", headers={"Accept": "text/html"})
        assert page.status_code == 303 and page.headers["location"] == "/login"
        assert browser.post("/login", data={"token": "wrong"}).status_code == 401
        entered = browser.post("/login", data={"token": TOKENS["ben"]})
        cookie = entered.headers["set-cookie"]
        assert "HttpOnly" in cookie and "SameSite=strict" in cookie and TOKENS["ben"] not in cookie
        assert browser.get("/v1/jobs").status_code == 200
        name, until, signature = browser.cookies["diptych_session"].strip('"').split(":")
        for forged in (f"ana:{until}:{signature}", f"{name}:{int(until) + 9}:{signature}", f"{name}:{until}:", ":::"):
            assert httpx.get(f"{guarded.url}/v1/jobs", cookies={"diptych_session": forged}).status_code == 401


def test_guessing_tokens_is_slowed_down(student: Student, tmp_path: Path) -> None:
    running = Running(ServerSettings(folder=tmp_path, tokens=TOKENS, limits=Limits(guesses=5)), student)
    try:
        found = [
            httpx.get(f"{running.url}/v1/jobs", headers={"Authorization": f"Bearer guess-{n}"}).status_code
            for n in range(8)
        ]
        assert found[:5] == [401] * 5 and 429 in found  # a try comes back every 12 seconds
    finally:
        running.close()


def test_pages_elsewhere_get_nothing(client: httpx.Client) -> None:
    assert client.get("/v1/jobs", headers={"Host": "evil.example"}).status_code == 421
    asked = {"prompt": "a cat", "steps": 1}
    for origin in ("https://evil.example", "null", "http://127.0.0.1:1"):
        answer = client.post("/v1/images/generations", json=asked, headers={"Origin": origin})
        assert answer.status_code == 403
    answer = client.options("/v1/jobs", headers={"Origin": "https://evil.example"})
    assert answer.status_code == 403 and "access-control-allow-origin" not in answer.headers


def test_every_answer_has_the_headers_that_browsers_obey(client: httpx.Client) -> None:
    for path in ("/v1/jobs", "/docs", "/nothing"):
        headers = client.get(path).headers
        assert headers["x-content-type-options"] == "nosniff" and headers["x-frame-options"] == "DENY"
        assert "default-src 'none'" in headers["content-security-policy"] and headers["cache-control"] == "no-store"


def png_header(width: int, height: int) -> bytes:
    """A PNG of these sizes whose pixels, black, take few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    ihdr = width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\0\0\0"
    rows = zlib.compress(b"\0" * min(10**7, (3 * width + 1) * height))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", ihdr) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "code", "fact"),
    [
        (png_header(60_000, 60_000), "image_too_large", "25"),
        (png_header(8_000, 8_000), "image_too_large", "25"),
        (b"GIF89a", "image_unreadable", ""),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "image_unreadable", "PNG"),
        (b"II*\0" + b"\0" * 64, "image_unreadable", "PNG"),
        (b"", "image_unreadable", "empty"),
        (b"\x80\x04\x95(cos\nsystem\n", "image_unreadable", "PNG"),
    ],
    ids=["bomb", "large", "cut", "eps", "tiff", "empty", "pickle"],
)
def test_hostile_images_are_rejected_before_they_are_decoded(
    client: httpx.Client, data: bytes, code: str, fact: str
) -> None:
    started = time.monotonic()
    answer = client.post("/v1/images/edits", files={"image": ("../../x.png", data)}, data={"prompt": "a cat"})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, code, "image") and fact in error["message"]
    assert time.monotonic() - started < 20


def test_an_avif_that_breaks_its_decoder_is_rejected_like_any_damaged_image(client: httpx.Client, cat: bytes) -> None:
    out = io.BytesIO()
    Image.open(io.BytesIO(cat)).save(out, "AVIF")
    head, mark, planes = out.getvalue().partition(b"mdat")
    answer = client.post("/v1/references", content=head + mark + bytes(len(planes)))
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "image_unreadable"


def test_what_is_too_large_is_refused_by_its_length_and_by_its_bytes(student: Student, tmp_path: Path) -> None:
    running = Running(ServerSettings(folder=tmp_path, limits=Limits(upload_bytes=50_000, body_seconds=3)), student)
    try:
        answer = httpx.post(f"{running.url}/v1/references", content=b"x" * 60_000)
        assert answer.status_code == 413 and answer.json()["error"]["type"] == "request_too_large"
        chunks = (b"x" * 10_000 for _ in range(9))  # of no stated length
        assert httpx.post(f"{running.url}/v1/references", content=chunks).status_code == 413
        with socket.create_connection(("127.0.0.1", running.port)) as slow:
            slow.sendall(b"POST /v1/references HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100\r\n\r\nx")
            slow.settimeout(30)
            assert b" 408 " in slow.recv(1000)
    finally:
        running.close()


def test_who_sends_no_request_is_hung_up_on_and_who_waits_for_an_answer_is_not(
    student: Student, tmp_path: Path
) -> None:
    running = Running(ServerSettings(folder=tmp_path, limits=Limits(head_seconds=1)), student)
    head, rest = b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n", b"\r\n"

    def hung_up(*sent: bytes) -> float:
        """Seconds until the server closes, after these bytes; an answer must come to each whole head."""
        with socket.create_connection(("127.0.0.1", running.port), timeout=30) as client:
            for part in sent:
                client.sendall(part)
                answer = b""
                while part.endswith(rest * 2) and not answer.endswith(b"}"):
                    answer += client.recv(10_000)
            started = time.monotonic()
            assert client.recv(10_000) == b""
            return time.monotonic() - started

    try:
        for sent in ((), (head,), (head + rest, head)):
            assert 0.5 < hung_up(*sent) < 10  # uvicorn keeps idle connections for 15 seconds, and these for ever
        job = {"prompt": "a cat", "steps": 90}
        started = time.monotonic()
        answer = httpx.post(f"{running.url}/v1/images/generations", json=job, timeout=120)
        assert answer.status_code == 200 and time.monotonic() - started > 1
    finally:
        running.close()


def test_nothing_but_the_jobs_file_is_written(server: Running, client: httpx.Client, cat: bytes) -> None:
    client.post("/v1/images/edits", files={"image": ("../../../evil.png", cat)}, data={"prompt": "a cat", "steps": "1"})
    files = {path.name for path in server.service.settings.folder.rglob("*")}
    assert files <= {"jobs.sqlite", "jobs.sqlite-wal", "jobs.sqlite-shm"}


def test_a_key_that_asks_too_often_waits(student: Student, tmp_path: Path, cat: bytes) -> None:
    running = Running(ServerSettings(folder=tmp_path, tokens=TOKENS, limits=Limits(rate=3)), student)
    try:
        found = [httpx.post(f"{running.url}/v1/references", content=cat, headers=BEARER) for _ in range(4)]
        assert [answer.status_code for answer in found] == [201, 201, 201, 429]
        assert 1 <= int(found[-1].headers["retry-after"]) <= 21
        other = {"Authorization": f"Bearer {TOKENS['ben']}"}
        assert httpx.post(f"{running.url}/v1/references", content=cat, headers=other).status_code == 201
    finally:
        running.close()


def test_tokens_are_in_no_log(guarded: Running, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        httpx.get(f"{guarded.url}/v1/jobs", headers=BEARER)
        httpx.post(f"{guarded.url}/login", data={"token": TOKENS["ana"]})
        metrics = httpx.get(f"{guarded.url}/metrics", headers=BEARER).text
    secrets: list[Any] = list(TOKENS.values())
    assert not any(token in caplog.text or token in metrics for token in secrets)
    assert not any(token in repr(guarded.service.settings) for token in secrets)


def test_other_machines_are_let_in_only_with_tokens(tmp_path: Path) -> None:
    with raises("server_config_invalid", "0.0.0.0", "--token-file", kind=UsageError):
        ServerSettings(folder=tmp_path, host="0.0.0.0")
    ServerSettings(folder=tmp_path, host="0.0.0.0", tokens=TOKENS)


def test_an_upright_picture_passes(client: httpx.Client) -> None:
    out = io.BytesIO()
    Image.new("RGBA", (40, 30), (200, 0, 0, 0)).save(out, "WEBP")
    assert client.post("/v1/references", content=out.getvalue()).status_code == 201
