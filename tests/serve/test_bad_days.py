"""A full disk, a worker that dies, a file that goes away, a clock that jumps: the server reports it and recovers."""

from __future__ import annotations

import ctypes
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from diptych import Student
from diptych.serve.config import ServerSettings
from diptych.serve.database import Clock
from diptych.serve.service import Service
from serve.running import Running

SOON = 5.0  # seconds
DAY = 86_400.0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.name != "posix" or os.geteuid() != 0:
        pytest.skip("only root may mount a small disk")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def soon(holds: Callable[[], bool]) -> bool:
    until = time.monotonic() + SOON
    while time.monotonic() < until:
        if holds():
            return True
        time.sleep(0.05)
    return False


def fill(file: Path) -> None:
    with file.open("wb") as out:
        try:
            while True:
                out.write(bytes(2**16))
                out.flush()
        except OSError:
            pass


def test_a_full_disk_is_said_with_its_reason_and_drawing_goes_on_once_there_is_room(
    student: Student, small_disk: Path, cat: bytes
) -> None:
    running = Running(ServerSettings(folder=small_disk / "data", batch=1), student)
    try:
        with httpx.Client(base_url=running.url, timeout=60) as client:
            done = client.post("/v1/images/generations", json={"prompt": "a cat", "steps": 1}).json()["job"]
            asked = {"prompt": "a cat", "steps": 10, "n": 4, "wait": False, "job": "before-the-full-disk"}
            assert client.post("/v1/images/generations", json=asked).status_code == 202
            fill(small_disk / "filler")
            assert soon(lambda: client.get("/readyz").status_code == 503)
            assert "full" in client.get("/readyz").json()["error"]["message"]
            new = {"prompt": "a dog", "steps": 1}
            for answer in (
                client.post("/v1/images/generations", json=new),
                client.post("/v1/references", content=cat),
                client.post("/v1/images/edits", files={"image": cat}, data={"prompt": "a cat"}),
            ):
                assert answer.status_code == 507 and "full" in answer.json()["error"]["message"]
                assert answer.json()["error"]["code"] == "storage_full" and "retry-after" in answer.headers
            assert client.get("/v1/jobs/before-the-full-disk").json()["status"] in ("queued", "running")
            for path in ("", "/images", "/page", "/events"):  # what is there can be read
                assert client.get(f"/v1/jobs/{done}{path}").status_code == 200
            (small_disk / "filler").unlink()
            assert soon(lambda: client.get("/readyz").status_code == 200)
            again = client.post("/v1/images/generations", json={**asked, "wait": True})
            assert again.status_code == 200 and len(again.json()["data"]) == 4
            assert client.post("/v1/images/generations", json=new).status_code == 200
    finally:
        running.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_worker_that_dies_is_seen_and_started_again_and_its_job_is_drawn(student: Student, tmp_path: Path) -> None:
    running = Running(ServerSettings(folder=tmp_path), student)
    try:
        with httpx.Client(base_url=running.url, timeout=60) as client:
            asked = {"prompt": "a cat", "steps": 60, "wait": False, "job": "in-its-hands"}
            client.post("/v1/images/generations", json=asked)
            assert soon(lambda: client.get("/v1/jobs/in-its-hands").json()["progress"]["step"] > 1)
            (thread,) = (thread for thread in threading.enumerate() if thread.name == "diptych-worker")
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit))
            assert soon(lambda: client.get("/readyz").status_code == 503)
            assert soon(lambda: client.get("/readyz").status_code == 200)
            assert client.post("/v1/images/generations", json={**asked, "wait": True}).status_code == 200
    finally:
        running.close()


def test_an_error_outside_of_drawing_ends_no_worker(
    student: Student, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = Running(ServerSettings(folder=tmp_path), student)
    try:
        with httpx.Client(base_url=running.url, timeout=60) as client:
            with monkeypatch.context() as patch:
                patch.setattr(running.service.store, "take", lambda most: 1 / 0)
                assert soon(lambda: client.get("/readyz").status_code == 503)
                asked = {"prompt": "a cat", "steps": 1, "wait": False, "job": "taken-meanwhile"}
                assert client.post("/v1/images/generations", json=asked).status_code == 202
            assert soon(lambda: client.get("/readyz").status_code == 200)
            assert soon(lambda: client.get("/v1/jobs/taken-meanwhile").json()["status"] == "done")
    finally:
        running.close()


@pytest.mark.parametrize("name", ["jobs.sqlite", "jobs.sqlite-wal"])
def test_a_file_that_is_removed_or_replaced_is_noticed(student: Student, tmp_path: Path, name: str) -> None:
    running = Running(ServerSettings(folder=tmp_path / "data"), student)
    file, away = tmp_path / "data" / name, tmp_path / "away"
    asked = {"prompt": "a cat", "steps": 1}
    try:
        with httpx.Client(base_url=running.url, timeout=60) as client:
            for replaced in (False, True):
                file.rename(away)
                if replaced:
                    file.write_bytes(b"")
                assert soon(lambda: client.get("/readyz").status_code == 503)
                answer = client.post("/v1/images/generations", json=asked)
                assert answer.status_code == 503 and name in answer.json()["error"]["message"]
                away.rename(file)
                assert soon(lambda: client.get("/readyz").status_code == 200)
                assert client.post("/v1/images/generations", json=asked).status_code == 200
    finally:
        running.close()


def test_a_clock_that_is_a_day_ahead_for_a_minute_deletes_no_job(tmp_path: Path) -> None:
    wall, steady = [10 * DAY], [5.0]
    service = Service(ServerSettings(folder=tmp_path))
    service.clock = service.store.clock = clock = Clock(600, lambda: wall[0], lambda: steady[0])
    request = {"kind": "images", "texts": ["a cat"], "reference": None, "mask": None, "options": {}}

    def ended(id: str) -> bool:
        service.store.add("ana", id, request, "s", [0], [f"picture-{id}"])
        return service.store.cancel("ana", id)

    def kept(*ids: str, after: float) -> bool:
        wall[0], steady[0] = wall[0] + after, steady[0] + after
        service._swept = -1e9
        service.sweep()
        return all(service.store.job("ana", id) is not None for id in ids)

    assert ended("before") and kept("before", after=700)
    for jump in (1.5 * DAY, -1.5 * DAY):
        wall[0] += jump
        assert ended(f"meanwhile{jump}") and kept("before", f"meanwhile{jump}", after=30)
        wall[0] -= jump
        assert kept("before", f"meanwhile{jump}", after=30) and kept("before", f"meanwhile{jump}", after=700)
    assert abs(clock.now() - wall[0]) < 1
    wall[0] += 2 * DAY  # it stays there: this was no mistake
    assert kept("before", after=300) and not kept("before", after=700)
    service.store.close()
