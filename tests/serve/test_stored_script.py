"""Texts of runs, requests and models in the web app, in Chromium: shown as they were written, and never run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import plain_stages
from diptych import Student
from diptych.data.store import Dataset
from diptych.errors import UserError
from diptych.serve.app import image_tabs
from diptych.serve.config import ServerSettings
from diptych.serve.http import pages
from hostile_text import EVIL, FILE, check
from serve.browsing import CHROMIUM, LIMIT, choose, chromium, open_tab, playwright, visiting, within
from serve.running import TOKENS, Running

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run from somebody who would like to run scripts here."""
    run = plain_stages.judged(tmp_path, monkeypatch, "theirs")
    data = Dataset(run / "candidates")
    texts = {"subject": EVIL, "caption": EVIL, "reference_caption": EVIL}
    manifest = data.manifest or {}
    for shard in data.shards():
        rows = [{**row, **texts, "reason": row["reason"] if row["kept"] else EVIL} for row in data.read_shard(shard)]
        data.write_shard(shard, rows, data.part_fingerprint(shard))
    data.publish({key: value for key, value in manifest.items() if key not in ("format", "rows", "parts")})
    samples = run / "student" / "training" / "samples"
    samples.mkdir(parents=True)
    Image.new("RGB", (8, 8), "red").save(samples / f"step-{FILE}.png")
    (samples.parent / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 1.0, "note": EVIL}) + "\n")
    (run / "report").mkdir()
    (run / "report" / "report.html").write_text(f"<p>{EVIL}</p><iframe src='/app/'></iframe>")
    return run


@pytest.fixture
def app(run: Path, student: Student, tmp_path: Path) -> Iterator[Running]:
    with within(LIMIT):
        running = Running(
            ServerSettings(folder=tmp_path / "serve", tokens=TOKENS, runs=run.parent), student, web_app=True
        )
    yield running
    with within(LIMIT):
        running.close()


def test_the_app_shows_texts_of_a_run_and_runs_none(app: Running) -> None:
    with chromium() as browser, visiting(browser, app, "desk") as visitor, within(LIMIT):
        page = visitor.new_page()
        page.goto(f"{app.url}/app/")
        playwright.expect(page.locator("#about")).to_contain_text("pocket generates")
        open_tab(page, "Data")
        playwright.expect(page.locator("#pairs figure").first).to_be_visible()
        choose(page, "Pairs", EVIL)
        playwright.expect(page.locator("#pairs figcaption b").first).to_contain_text(EVIL)
        page.locator("#pairs button").first.click()
        check(page, f"{EVIL}: {EVIL}")
        open_tab(page, "Runs")
        playwright.expect(page.locator("#run-state figcaption")).to_contain_text(FILE)
        playwright.expect(page.locator("#run-state figure img")).not_to_have_js_property("naturalWidth", 0)
        check(page, f"step-{FILE}")
        page.goto(f"{app.url}/v1/runs/theirs/report")
        assert page.evaluate("window.ran") is None and page.evaluate("self.origin") == "null"
        for state in jobs():
            page.goto("about:blank")
            page.set_content(image_tabs.shown(state, {1: b"a preview"}, EVIL))
            check(page, EVIL)
        page.set_content(pages.error(UserError("internal", EVIL)) + image_tabs.drop(EVIL, EVIL, EVIL))
        check(page, EVIL)


def jobs() -> Iterator[dict[str, Any]]:
    """Jobs of each kind and status, with such a text wherever one has a text."""
    picture = {"id": EVIL, "seed": 1, "text": EVIL, "status": "done", "settings": {"steps": EVIL}}
    for kind in ("story", "relight"):
        for status in ("queued", "running", "failed", "cancelled", "completed"):
            progress = {"done": 1, "of": 2, "step": 1, "steps": 2}
            state = {"id": EVIL, "kind": kind, "status": status, "error": EVIL, "warnings": [EVIL]}
            pictures = [picture, {**picture, "status": "running"}]
            yield {**state, "progress": progress, "pictures": pictures, "waiting_before": 1}
