"""`/v1/runs`: a run's pictures, sheets and report, for those who may, and no other file of the machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from PIL import Image

import plain_stages
from diptych import Student
from diptych.data.store import Dataset
from diptych.serve.config import ServerSettings
from serve.running import TOKENS, Running

SECRET = "a file of this machine"
BEARER = {"Authorization": f"Bearer {TOKENS['ana']}"}


@pytest.fixture
def ana(student: Student, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[httpx.Client]:
    """Somebody with a token, at a server that shows one run, with two sheets and a report."""
    run = plain_stages.judged(tmp_path, monkeypatch, "first")
    samples = run / "student" / "training" / "samples"
    samples.mkdir(parents=True)
    for step in (10, 20):
        Image.new("RGB", (step, 8), "red").save(samples / f"step-{step:06d}.png")
    plain_stages.write_report(None, run)
    running = Running(ServerSettings(folder=tmp_path / "serve", tokens=TOKENS, runs=tmp_path), student)
    with httpx.Client(base_url=running.url, headers=BEARER, timeout=60) as client:
        yield client
    running.close()


def test_panels_sheets_and_the_report_are_shown_as_they_are(ana: httpx.Client, tmp_path: Path) -> None:
    pair = next(iter(Dataset(tmp_path / "first" / "candidates")))
    for side, column in (("reference", "conditioning"), ("target", "image")):
        assert ana.get(f"/v1/runs/first/pairs/{pair['id']}/{side}").content == pair[column]["bytes"]
    samples = tmp_path / "first" / "student" / "training" / "samples"
    assert ana.get("/v1/runs/first/sheets/1").content == (samples / "step-000020.png").read_bytes()
    report = ana.get("/v1/runs/first/report")
    assert report.text == "<p>report</p>\n" and report.headers["content-type"].startswith("text/html")
    assert "sandbox" in report.headers["content-security-policy"]  # whatever a run wrote there has no rights here


def test_nothing_else_of_the_machine_is_shown(ana: httpx.Client, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "report").mkdir()
    (tmp_path / "other" / "report" / "report.html").write_text("no run: there is no recipe")
    for path in (
        "other/report",
        "nothing/report",
        "first/sheets/2",
        "..%2f..%2fetc/report",
        "first/pairs/c-000000-99/reference",
        "first/pairs/..%2f..%2frecipe.yaml/reference",
    ):
        answer = ana.get(f"/v1/runs/{path}")
        assert answer.status_code in (400, 404) and "error" in answer.json(), path
    assert ana.get("/v1/runs/first/report", headers={"Authorization": "Bearer nobody-knows-this"}).status_code == 401


def test_links_in_a_run_show_no_other_file(ana: httpx.Client, tmp_path: Path) -> None:
    """A run may come from somebody else. What it links to is neither shown nor written to, by any of its addresses."""
    run = tmp_path / "first"
    (tmp_path / "elsewhere").mkdir()
    for name in ("secret.html", "elsewhere/report.html", "elsewhere/step-000010.png", "elsewhere/recipe.yaml"):
        (tmp_path / name).write_text(SECRET)
    pair = next(iter(Dataset(run / "candidates")))["id"]
    for place, to, path in (
        ("report/report.html", "secret.html", "report"),
        ("report", "elsewhere", "report"),
        ("student/training/samples/step-000010.png", "secret.html", "sheets/0"),
        ("student/training/samples", "elsewhere", "sheets/0"),
        ("student", "elsewhere", "sheets/0"),
        ("candidates/part-00000.parquet", "secret.html", f"pairs/{pair}/target"),
        ("candidates", "elsewhere", f"pairs/{pair}/target"),
        ("recipe.yaml", "elsewhere/recipe.yaml", "report"),
    ):
        kept = tmp_path / "kept"
        (run / place).rename(kept)
        (run / place).symlink_to(tmp_path / to)
        answer = ana.get(f"/v1/runs/first/{path}")
        assert answer.status_code in (400, 404) and "error" in answer.json(), place
        assert SECRET not in answer.text and str(tmp_path) not in answer.text
        (run / place).unlink()
        kept.rename(run / place)
        assert ana.get(f"/v1/runs/first/{path}").status_code == 200
    os.mkfifo(tmp_path / "fifo")
    for place, path in (("report/report.html", "report"), ("student/training/samples/step-000010.png", "sheets/0")):
        (run / place).unlink()
        os.link(tmp_path / "fifo", run / place)
        assert ana.get(f"/v1/runs/first/{path}", timeout=5).status_code in (400, 404)
