"""The parts that need no server: the store, tokens, rates, the watermark."""

from __future__ import annotations

import io
import sqlite3
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diptych.errors import UsageError
from diptych.serve import auth, worker
from diptych.serve.job_store import TRIES, JobStore
from diptych.serve.limits import RateLimit
from diptych.serve.runs import Runs
from raising import raises

REQUEST = {"kind": "images", "texts": ["a cat"] * 9, "reference": None, "mask": None, "options": {}}


@pytest.fixture
def store(tmp_path: Path) -> JobStore:
    return JobStore(tmp_path / "jobs.sqlite")


def add(store: JobStore, id: str, settings: str = "s", pictures: int = 1) -> None:
    names = [f"{id}-{n}" for n in range(pictures)]
    store.add("ana", id, REQUEST, settings, list(range(pictures)), names)


def test_equal_settings_are_taken_together_the_oldest_first(store: JobStore) -> None:
    for id, settings in (("a", "s"), ("b", "other"), ("c", "s"), ("d", "s")):
        add(store, id, settings, 2)
    assert [task.picture for task in store.take(3)] == ["a-0", "a-1", "c-0"]
    assert [task.picture for task in store.take(3)] == ["b-0", "b-1"]
    assert [task.picture for task in store.take(3)] == ["c-1", "d-0", "d-1"] and store.take(3) == []


def test_what_ran_when_it_was_killed_waits_again_and_fails_after_some_tries(tmp_path: Path) -> None:
    store = JobStore(tmp_path / "jobs.sqlite")
    add(store, "a", pictures=2)
    store.take(1)
    store.finish("a-0", "PNG", b"drawn", {"seed": 0})
    found = []
    for _ in range(TRIES):
        assert [task.picture for task in store.take(1)] == ["a-1"]
        store.close()  # as after a kill: running images are not reported
        store = JobStore(tmp_path / "jobs.sqlite")
        found.append(store.recover())
    assert found == [(1, 0)] * (TRIES - 1) + [(0, 1)]
    job = store.job("ana", "a")
    assert job and job["status"] == "failed" and "stopped" in job["error"] and job["request"]["code"] == "job_failed"
    assert store.picture("a-0") == ("ana", "PNG", b"drawn")


def test_a_failed_job_has_the_code_of_its_error(store: JobStore) -> None:
    add(store, "a")
    (task,) = store.take(1)
    store.fail(task.job, "Memory ran out.", "memory_insufficient")
    job = store.job("ana", "a")
    assert job and (job["error"], job["request"]) == ("Memory ran out.", {**REQUEST, "code": "memory_insufficient"})


def test_one_server_a_file(store: JobStore) -> None:
    other = sqlite3.connect(store.path, timeout=0)
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        other.execute("SELECT * FROM jobs")
    other.close()
    with raises("path_unsafe", store.path.parent, "--data"):
        JobStore(store.path.parent)


def test_old_jobs_and_references_are_forgotten_but_not_what_is_needed(store: JobStore) -> None:
    store.put_reference("ana", "ref_used", b"png", (1, 1))
    store.put_reference("ana", "ref_mask", b"png", (1, 1))
    store.put_reference("ana", "ref_old", b"png", (1, 1))
    store.add("ana", "open", {**REQUEST, "reference": "ref_used", "mask": "ref_mask"}, "s", [0], ["p"])
    add(store, "ended")
    store.cancel("ana", "ended")
    store.forget(time.time() + 1)
    assert store.job("ana", "ended") is None and store.job("ana", "open")
    assert store.reference("ana", "ref_used") and store.reference("ana", "ref_old") is None
    assert [task.mask for task in store.take(1)] == [b"png"]
    assert store.reference("ben", "ref_used") is None


def test_tokens_come_from_a_file_and_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "tokens"
    file.write_text("# people\nana ana-0123456789abcdef  # first\n\nben-0123456789abcdef\n")
    file.chmod(0o600)
    monkeypatch.setenv(auth.VARIABLE, "cid-0123456789abcdef,dora dora-123456789abcdef")
    found = auth.read(str(file))
    assert list(found) == ["ana", "key2", "key3", "dora"] and found["key2"] == "ben-0123456789abcdef"
    gate = auth.Authenticator(found)
    assert gate.owner("dora-123456789abcdef") == "dora" and gate.owner("dora-123456789abcde") is None
    assert gate.of_session(gate.session("ana")) == "ana"
    assert auth.Authenticator({"ana": "another-token-of-ana"}).of_session(gate.session("ana")) is None
    monkeypatch.delenv(auth.VARIABLE)
    for text in ("short", "a b c", "ana x y", "", "ana ana-0123456789abcdef\nana ben-0123456789abcdef"):
        file.write_text(text)
        with raises("server_config_invalid", file, kind=UsageError) as error:
            auth.read(str(file))
        assert "0123456789abcdef" not in str(error.value)


def test_signed_addresses_end() -> None:
    signer = auth.AddressSigner(b"secret")
    until, signature = (part.partition("=")[2] for part in signer.sign("img_1").split("&"))
    assert signer.fits("img_1", int(until), signature)
    assert not signer.fits("img_2", int(until), signature) and not signer.fits("img_1", int(until) + 1, signature)
    old = auth.AddressSigner(b"secret", seconds=-1).sign("img_1").split("&")
    assert not signer.fits("img_1", int(old[0].partition("=")[2]), old[1].partition("=")[2])


def test_tries_come_back_over_a_minute() -> None:
    now = [0.0]
    rate = RateLimit(60, clock=lambda: now[0])
    assert [rate.take("a") for _ in range(60)] == [0.0] * 60 and rate.take("a") == pytest.approx(1)
    assert rate.take("b") == 0.0
    now[0] = 2.0
    assert rate.take("a") == 0.0 and rate.take("a") == 0.0 and rate.take("a") > 0


@pytest.mark.parametrize("size", [(32, 32), (512, 512)])
def test_the_watermark_is_found_by_its_key_alone_and_through_a_jpeg(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    plain = small.resize(size, Image.Resampling.BICUBIC)
    marked = worker.mark(plain, "ours")
    assert np.abs(np.asarray(marked, np.int16) - np.asarray(plain, np.int16)).max() <= worker.STRENGTH
    assert (
        worker.score(marked, "ours")
        > worker.CERTAIN
        > max(abs(worker.score(plain, "ours")), abs(worker.score(marked, "another")))
    )
    if size[0] > 100:
        out = io.BytesIO()
        marked.save(out, "JPEG", quality=85)
        assert worker.score(Image.open(out), "ours") > worker.CERTAIN


def test_a_run_that_is_not_chosen_or_not_listed_is_an_error(tmp_path: Path) -> None:
    for name, fact in ((None, "run: "), ("", "run: "), ("other", "'other'")):
        with raises("run_not_found", fact, kind=UsageError):
            Runs(tmp_path).of(name)
