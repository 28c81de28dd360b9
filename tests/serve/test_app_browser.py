"""The web app in Chromium: what artists do on its page, at the width of a desk and of a phone, the latter in the dark.

Nothing here can wait for ever: each wait of the browser ends after PATIENCE, and a test, whatever it does, after LIMIT.
"""

from __future__ import annotations

import io
import json
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

import plain_stages
from diptych import Student
from diptych.data.store import Dataset
from diptych.serve.settings import Settings
from serve.running import CAT, TOKENS, Running

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")
PATIENCE = 30_000  # milliseconds
LIMIT = 120  # seconds
# Without the last four, Debian's Chromium asks for updates, and holds its own connections back where no net is.
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip
SIZES = {"desk": (1280, 900, "light"), "phone": (390, 844, "dark")}


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """Fails what takes longer, also where a wait has no time-out of its own."""

    def late(number: int, frame: Any) -> None:
        raise TimeoutError(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def app(student: Student, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder, runs = tmp_path_factory.mktemp("app"), tmp_path_factory.mktemp("runs")
    with within(LIMIT):
        running = Running(Settings(folder=folder, tokens=TOKENS, runs=runs), student, web_app=True)
    yield running
    with within(LIMIT):
        running.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS, timeout=PATIENCE)
        playwright.expect.set_options(timeout=PATIENCE)
        yield browser
        with within(LIMIT):
            browser.close()


@pytest.fixture(scope="module", params=SIZES.values(), ids=list(SIZES))
def visitor(request: pytest.FixtureRequest, app: Running, browser: Any) -> Iterator[Any]:
    """Somebody with a screen of one size, who has logged in."""
    width, height, scheme = request.param
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    context.set_default_timeout(PATIENCE)
    with within(LIMIT):
        page = context.new_page()
        page.goto(f"{app.url}/app/")
        page.get_by_label("Your token").fill(TOKENS["ana"])
        page.keyboard.press("Enter")
        playwright.expect(page.locator("#about")).to_contain_text("pocket draws")
        page.close()
    yield context
    with within(LIMIT):
        context.close()


@pytest.fixture
def page(app: Running, visitor: Any) -> Iterator[Any]:
    """A fresh page of the app. In the end it must have had no fault, asked nobody else, and fitted the screen."""
    with within(LIMIT):
        page = visitor.new_page()
        faults: list[str] = []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda asked: asked.url.startswith((app.url, "data:", "blob:")) or faults.append(asked.url))
        page.goto(f"{app.url}/app/")
        playwright.expect(page.locator("#about")).to_contain_text("pocket draws")
        yield page
        assert faults == []
        assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]
        page.close()


def open_tab(page: Any, name: str) -> None:
    """Opens a tab by keyboard."""
    page.get_by_role("tab", name=name, exact=True).focus()
    page.keyboard.press("Enter")


def give(page: Any, to: str, file: Path) -> None:
    """Chooses a file for a drop zone, and waits until it is shown."""
    zone = page.locator(f".dq-drop[data-to={to}]")
    zone.locator("input").set_input_files(str(file))
    playwright.expect(zone.locator("img")).not_to_have_js_property("naturalWidth", 0)


def pictures(page: Any, where: str, button: str) -> list[bytes]:
    """Presses a button by keyboard, and gives the pictures of the job that is then done."""
    before = [image.get_attribute("src") for image in page.locator(f"{where} img.done").all()]
    page.get_by_role("button", name=button, exact=True).locator("visible=true").focus()
    page.keyboard.press("Enter")
    page.wait_for_function(
        "([where, before]) => { const all = [...document.querySelectorAll(`${where} img.done`)];"
        "return document.querySelector(`${where} [data-status=done]`) && all.length && all.every(i => i.naturalWidth)"
        " && !before.includes(all[0].getAttribute('src')) }",
        arg=[where, before],
    )
    found = page.locator(f"{where} img.done").evaluate_all("images => images.map(image => image.src)")
    return [page.request.get(address, timeout=PATIENCE).body() for address in found]


def pixels(data: bytes) -> bytes:
    return Image.open(io.BytesIO(data)).tobytes()


def test_a_reference_and_a_prompt_make_a_picture_and_its_seed_makes_it_again(page: Any) -> None:
    playwright.expect(page.locator("#about")).to_contain_text("small model")
    give(page, "reference", CAT)
    page.locator("#prompt textarea").fill("a cat on a spaceport")
    page.get_by_role("button", name="More settings").locator("visible=true").click()
    page.locator("#steps input, #steps textarea").fill("4")
    seed = page.locator("#seed input, #seed textarea")
    first = pictures(page, "#pictures", "Draw")
    page.get_by_role("button", name="Use this seed").first.focus()
    page.keyboard.press("Enter")
    playwright.expect(seed).not_to_have_value("")
    playwright.expect(page.locator("#pictures figcaption")).to_contain_text(f"seed {seed.input_value()}")
    again = pictures(page, "#pictures", "Draw")
    seed.fill(str(int(seed.input_value()) + 1))
    other = pictures(page, "#pictures", "Draw")
    assert pixels(first[0]) == pixels(again[0]) != pixels(other[0])
    playwright.expect(page.locator("#pictures")).to_contain_text("does not know 'spaceport'")


def test_a_picture_is_relit_under_several_lights_where_its_mask_is_white(page: Any, tmp_path: Path) -> None:
    open_tab(page, "Relight")
    playwright.expect(page.get_by_text("only the light is drawn anew")).to_contain_text("beyond it")
    give(page, "relight-reference", CAT)
    cat = Image.open(CAT).convert("RGB")
    mask = Image.new("L", cat.size, 0)
    mask.paste(255, (0, 0, cat.width // 2, cat.height))
    mask.save(tmp_path / "mask.png")
    page.get_by_role("button", name="Keep a part").click()
    give(page, "relight-mask", tmp_path / "mask.png")
    page.get_by_label("dim blue light from above").check()
    page.get_by_label("Other lights").fill("bright pink light from the left\n")
    page.get_by_role("button", name="More settings").locator("visible=true").click()
    page.locator("#relight-steps input, #relight-steps textarea").fill("4")
    blue, pink = pictures(page, "#relit", "Relight")
    playwright.expect(page.locator("#relit figcaption").last).to_contain_text("bright pink light from the left")
    assert pixels(blue) != pixels(pink)
    side = Image.open(io.BytesIO(blue)).width
    right = (side // 2 + 1, 0, side, side)
    kept = [Image.open(io.BytesIO(data)).convert("RGB").crop(right).tobytes() for data in (blue, pink)]
    assert kept[0] == kept[1]  # the black half stays
    strip = page.get_by_role("link", name="Save all as one strip").get_attribute("href")
    saved = page.request.get(page.evaluate("path => new URL(path, location).href", strip), timeout=PATIENCE)
    assert Image.open(io.BytesIO(saved.body())).width == 2 * side + 2


def test_a_story_of_four_panels_becomes_a_page_to_save(page: Any) -> None:
    open_tab(page, "Story")
    playwright.expect(page.get_by_text("No language model is set up here")).to_be_visible()
    give(page, "story-reference", CAT)
    page.get_by_label("Title").fill("Far from home")
    lines = ["a cat on the beach | Day one.", "a cat in a forest", "a cat on the moon"]
    panels = page.get_by_label("Panels, one a line")
    panels.fill("\n".join(lines))
    page.get_by_role("button", name="More settings").locator("visible=true").click()
    page.locator("#story-steps input, #story-steps textarea").fill("2")
    page.get_by_role("button", name="Draw the story").click()
    playwright.expect(page.locator("#story [role=alert]")).to_contain_text("4 to 10 panels, not 3")
    panels.fill("\n".join([*lines, "a cat sleeping in a kitchen | Home."]))
    sheet, *drawn = pictures(page, "#story", "Draw the story")
    assert len(drawn) == 4 and len({pixels(data) for data in drawn}) == 4
    told = Image.open(io.BytesIO(sheet))
    assert told.width == 1240 and json.loads(told.info["diptych"])["title"] == "Far from home"
    link = page.get_by_role("link", name="Save as PDF").get_attribute("href")
    saved = page.request.get(page.evaluate("path => new URL(path, location).href", link), timeout=PATIENCE)
    assert saved.body().startswith(b"%PDF")
    page.get_by_role("button", name="Use these seeds").click()
    seeds = page.locator("#story-seed input, #story-seed textarea").input_value().split()
    assert len(seeds) == 4
    page.locator("#story-seed input, #story-seed textarea").fill(" ".join([*seeds[:3], "7"]))
    _, *again = pictures(page, "#story", "Draw the story")
    equal = [pixels(a) == pixels(b) for a, b in zip(drawn, again, strict=True)]
    assert equal == [True, True, True, False]


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
    open_tab(page, "Data")
    choose(page, "Run", "first")
    panel = page.locator("#pairs")
    playwright.expect(panel).to_contain_text("pairs")
    playwright.expect(panel.locator("img").first).not_to_have_js_property("naturalWidth", 0)
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

    open_tab(page, "Runs")
    state = page.locator("#run-state")
    playwright.expect(state).to_contain_text("candidates")
    playwright.expect(state.get_by_role("img", name="loss")).to_be_visible()


def choose(page: Any, label: str, value: str) -> None:
    """Picks from one of the visible drop-down lists."""
    box = page.get_by_label(label, exact=True).locator("visible=true").first
    box.click()
    page.get_by_role("option", name=value, exact=True).locator("visible=true").first.click()


def test_a_wrong_file_and_an_empty_prompt_are_told_plainly(page: Any, tmp_path: Path) -> None:
    wrong = tmp_path / "notes.png"
    wrong.write_text("these are my notes")
    zone = page.locator(".dq-drop[data-to=reference]")
    zone.locator("input").set_input_files(str(wrong))
    playwright.expect(zone.locator("[role=alert]")).to_contain_text("This file cannot be used. image: not an image")
    page.get_by_role("button", name="Draw", exact=True).click()
    playwright.expect(page.locator("#pictures [role=alert]")).to_contain_text("Say in the prompt")


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
