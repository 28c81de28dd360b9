"""The web app in Chromium: what artists do on its page, at the width of a desk and of a phone."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import plain_stages
from diptych import Student
from diptych.data.store import Dataset
from diptych.serve.settings import Settings
from serve.running import CAT, TOKENS, Running

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [pytest.mark.soak, pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")]
PATIENCE = 60_000  # milliseconds
SHOTS = os.environ.get("DIPTYCH_SCREENSHOTS")  # a folder: what the pages look like is kept there


@pytest.fixture(scope="module")
def app(student: Student, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder, runs = tmp_path_factory.mktemp("app"), tmp_path_factory.mktemp("runs")
    running = Running(Settings(folder=folder, tokens=TOKENS, runs=runs), student, web_app=True)
    yield running
    running.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=[(1280, 900, "light"), (390, 844, "dark")], ids=["desk", "phone"])
def page(request: pytest.FixtureRequest, app: Running, browser: Any) -> Iterator[Any]:
    width, height, scheme = request.param
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    playwright.expect.set_options(timeout=PATIENCE)
    page.faults = []
    page.on("pageerror", lambda error: page.faults.append(str(error)))
    page.on("request", lambda asked: asked.url.startswith((app.url, "data:", "blob:")) or page.faults.append(asked.url))
    page.goto(f"{app.url}/app/")
    page.get_by_label("Your token").fill(TOKENS["ana"])
    page.keyboard.press("Enter")
    playwright.expect(page.locator("#about")).to_contain_text("pocket draws 32×32")
    yield page
    context.close()


def shot(page: Any, name: str) -> None:
    if SHOTS:
        page.screenshot(path=str(Path(SHOTS) / f"{name}-{page.viewport_size['width']}.png"), full_page=True)


def draw(page: Any, seed: str = "") -> tuple[bytes, str]:
    """Presses Draw, and gives the picture that comes and its seed."""
    page.locator("#seed input, #seed textarea").fill(seed)
    before = [image.get_attribute("src") for image in page.locator("#pictures img.done").all()]
    page.get_by_role("button", name="Draw").click()
    page.wait_for_function(
        "before => { const all = document.querySelectorAll('#pictures [data-status=done] img.done');"
        "return all.length && all[0].naturalWidth && !before.includes(all[0].getAttribute('src')) }",
        arg=before,
    )
    image = page.locator("#pictures img.done").first
    used = page.locator("#pictures figcaption").first.inner_text()
    return page.request.get(image.evaluate("image => image.src")).body(), used.split()[1].rstrip(",")


def test_a_reference_and_a_prompt_make_a_picture_and_its_seed_makes_it_again(page: Any) -> None:
    playwright.expect(page.locator("#about")).to_contain_text("small model")
    page.locator(".dq-drop input").set_input_files(str(CAT))
    playwright.expect(page.locator(".dq-drop img")).not_to_have_js_property("naturalWidth", 0)
    page.get_by_label("Prompt").fill("a cat on a spaceport")
    page.get_by_role("button", name="More settings").click()
    page.get_by_label("Steps").fill("4")
    first, seed = draw(page)
    shot(page, "create")
    page.get_by_role("button", name="Use this seed").first.focus()
    page.keyboard.press("Enter")
    playwright.expect(page.locator("#seed input, #seed textarea")).to_have_value(seed)
    again, _ = draw(page, seed)
    pixels = [_pixels(data) for data in (first, again)]
    assert pixels[0] == pixels[1] and _pixels(draw(page, str(int(seed) + 1))[0]) != pixels[0]
    playwright.expect(page.locator("#pictures")).to_contain_text("does not know 'spaceport'")
    assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]
    assert page.faults == []


@pytest.fixture
def runs(app: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A judged run where the server looks for runs."""
    run = plain_stages.judged(tmp_path, monkeypatch, "first")
    (run / "student" / "training").mkdir(parents=True)
    lines = [json.dumps({"step": n, "loss": 1 / n}) for n in range(1, 50)]
    (run / "student" / "training" / "metrics.jsonl").write_text("\n".join(lines))
    assert app.service.runs is not None
    monkeypatch.setattr(app.service.runs, "folder", tmp_path)
    return run


def test_people_accept_and_reject_pairs_and_see_what_thresholds_would_keep(runs: Path, page: Any) -> None:
    before = [row["id"] for row in Dataset(runs / "pairs")]
    refused = next(row["id"] for row in Dataset(runs / "candidates") if not row["kept"])
    page.reload()
    page.get_by_role("tab", name="Data").click()
    choose(page, "Run", "first")
    panel = page.locator("#pairs")
    playwright.expect(panel).to_contain_text("pairs")
    playwright.expect(panel.locator("img").first).not_to_have_js_property("naturalWidth", 0)
    shot(page, "data")
    choose(page, "Pairs", "kept")
    panel.locator(f"[data-pair='{before[0]}']").get_by_role("button", name="Reject").click()
    playwright.expect(page.locator("#told")).to_contain_text("0 accepted and 1 rejected")
    choose(page, "Pairs", "refused")
    panel.locator(f"[data-pair='{refused}']").get_by_role("button", name="Accept").focus()
    page.keyboard.press("Enter")
    playwright.expect(page.locator("#told")).to_contain_text("1 accepted and 1 rejected")
    assert [row["id"] for row in Dataset(runs / "pairs")] == before
    page.get_by_role("button", name="Apply decisions").click()
    playwright.expect(page.locator("#told")).to_contain_text("rows to train on")
    assert {row["id"] for row in Dataset(runs / "pairs")} == {*before[1:], refused}

    slider = page.locator("#limit-same input[type=number]")
    playwright.expect(slider).to_have_value("0.3")
    slider.fill("0.6")
    slider.press("Enter")
    playwright.expect(page.locator("#funnel")).to_contain_text("would go")
    page.get_by_label("Name of a new run").fill("stricter")
    page.get_by_role("button", name="Make it").click()
    playwright.expect(page.locator("#funnel")).to_contain_text("The run stricter has")
    assert all(row["similarity"] >= 0.6 or row["id"] == refused for row in Dataset(runs.parent / "stricter" / "pairs"))
    assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]

    page.get_by_role("tab", name="Runs").click()
    state = page.locator("#run-state")
    playwright.expect(state).to_contain_text("candidates")
    playwright.expect(state.get_by_role("img", name="loss")).to_be_visible()
    shot(page, "runs")
    assert page.faults == []


def choose(page: Any, label: str, value: str) -> None:
    """Picks from one of the visible drop-down lists."""
    box = page.get_by_label(label, exact=True).locator("visible=true").first
    box.click()
    page.get_by_role("option", name=value, exact=True).locator("visible=true").first.click()


def _pixels(data: bytes) -> bytes:
    import io

    from PIL import Image

    return Image.open(io.BytesIO(data)).tobytes()


def test_a_wrong_file_and_an_empty_prompt_are_told_plainly(page: Any, tmp_path: Path) -> None:
    wrong = tmp_path / "notes.png"
    wrong.write_text("these are my notes")
    page.locator(".dq-drop input").set_input_files(str(wrong))
    playwright.expect(page.locator(".dq-drop [role=alert]")).to_contain_text(
        "This file cannot be used. image: not an image"
    )
    page.get_by_role("button", name="Draw").click()
    playwright.expect(page.locator("#pictures [role=alert]")).to_contain_text("Say in the prompt")
    shot(page, "wrong")


def test_gradios_own_doors_to_files_are_shut(app: Running) -> None:
    asks = {"Authorization": f"Bearer {TOKENS['ana']}"}
    for path in (
        "file=/etc/passwd",
        "file/etc/passwd",
        "upload",
        "proxy=http://127.0.0.1/",
        "runs",
        "stream/x/y/z/a.b",
    ):
        assert httpx.get(f"{app.url}/app/gradio_api/{path}", headers=asks, timeout=60).status_code == 404
    sent = httpx.post(f"{app.url}/app/gradio_api/upload", files={"files": b"x"}, headers=asks, timeout=60)
    assert sent.status_code == 404
    assert httpx.get(f"{app.url}/app/config", timeout=60).status_code == 401
