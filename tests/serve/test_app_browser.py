"""The web app in Chromium: what artists do on its page, at a desk's width and at a phone's, the latter in the dark."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

import plain_stages
from diptych import Student
from diptych.data import records, verdicts
from diptych.data.store import Dataset
from diptych.serve.config import ServerSettings
from serve.browsing import (
    CHROMIUM,
    LIMIT,
    PATIENCE,
    SIZES,
    choose,
    chromium,
    give,
    open_tab,
    opened,
    pictures,
    pixels,
    playwright,
    visiting,
    within,
)
from serve.running import CAT, TOKENS, Running

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")


@pytest.fixture(scope="module")
def app(student: Student, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder, runs = tmp_path_factory.mktemp("app"), tmp_path_factory.mktemp("runs")
    with within(LIMIT):
        running = Running(ServerSettings(folder=folder, tokens=TOKENS, runs=runs), student, web_app=True)
    yield running
    with within(LIMIT):
        running.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module", params=SIZES)
def visitor(request: pytest.FixtureRequest, app: Running, browser: Any) -> Iterator[Any]:
    with visiting(browser, app, request.param) as visitor:
        yield visitor


@pytest.fixture
def page(app: Running, visitor: Any) -> Iterator[Any]:
    with opened(visitor, app) as page:
        yield page


def test_a_reference_and_a_prompt_make_a_picture_and_its_seed_makes_it_again(page: Any) -> None:
    playwright.expect(page.locator("#about")).to_contain_text("small model")
    give(page, "reference", CAT)
    page.locator("#prompt textarea").fill("a cat on a spaceport")
    page.get_by_role("button", name="More settings").locator("visible=true").click()
    page.locator("#steps input, #steps textarea").fill("4")
    seed = page.locator("#seed input, #seed textarea")
    first = pictures(page, "#pictures", "Generate")
    after = page.locator("#pictures .dq-compare img.after")
    playwright.expect(after).to_have_css("clip-path", "inset(0px 0px 0px 0%)")  # the picture covers its reference
    page.get_by_label("from the reference").fill("25")
    playwright.expect(after).to_have_css("clip-path", "inset(0px 0px 0px 75%)")
    page.get_by_role("button", name="Use this seed").first.focus()
    page.keyboard.press("Enter")
    playwright.expect(seed).not_to_have_value("")
    playwright.expect(page.locator("#pictures figcaption")).to_contain_text(f"seed {seed.input_value()}")
    again = pictures(page, "#pictures", "Generate")
    seed.fill(str(int(seed.input_value()) + 1))
    other = pictures(page, "#pictures", "Generate")
    assert pixels(first[0]) == pixels(again[0]) != pixels(other[0])
    playwright.expect(page.locator("#pictures")).to_contain_text("'spaceport'")


CARRY = """([selector, data, kind]) => {
    const carried = new DataTransfer();
    const bytes = Uint8Array.from(atob(data), letter => letter.charCodeAt(0));
    carried.items.add(new File([bytes], "cat.png", { type: "image/png" }));
    const may = { bubbles: true, cancelable: true, dataTransfer: carried, clipboardData: carried };
    const event = kind === "paste" ? new ClipboardEvent(kind, may) : new DragEvent(kind, may);
    document.querySelector(selector).dispatchEvent(event);
}"""


def test_a_reference_is_also_dropped_or_pasted_into_the_open_tab(page: Any) -> None:
    data = base64.b64encode(CAT.read_bytes()).decode()
    create, relight = (page.locator(f".dq-drop[data-to={to}]") for to in ("reference", "relight-reference"))
    page.evaluate(CARRY, [".dq-drop[data-to=reference]", data, "drop"])
    playwright.expect(create.locator("img")).not_to_have_js_property("naturalWidth", 0)
    shown = create.locator("img").get_attribute("src")
    open_tab(page, "Relight")
    page.evaluate(CARRY, ["body", data, "paste"])
    playwright.expect(relight.locator("img")).to_have_attribute("src", shown)  # the same bytes have the same id


def test_what_is_being_drawn_can_be_stopped(page: Any) -> None:
    page.locator("#prompt textarea").fill("a cat")
    page.get_by_role("button", name="More settings").locator("visible=true").click()
    page.locator("#steps input, #steps textarea").fill("100")
    page.get_by_label("number input for Images").locator("visible=true").fill("8")
    page.get_by_role("button", name="Generate", exact=True).click()
    playwright.expect(page.locator("#pictures [role=status]")).to_contain_text("Generating: step")
    playwright.expect(page.locator("#pictures")).to_contain_text("text alone")
    playwright.expect(page.locator("#pictures img[alt=preview]").first).to_be_visible()
    page.get_by_role("button", name="Stop", exact=True).locator("visible=true").click()
    playwright.expect(page.locator("#pictures [role=status]")).to_contain_text("Stopped")


def test_a_picture_is_relit_under_several_lights_where_its_mask_is_white(page: Any, tmp_path: Path) -> None:
    open_tab(page, "Relight")
    playwright.expect(page.get_by_text("Only the light changes")).to_contain_text("small model")
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
    strip = page.get_by_role("link", name="Save as a strip").get_attribute("href")
    saved = page.request.get(page.evaluate("path => new URL(path, location).href", strip), timeout=PATIENCE)
    assert Image.open(io.BytesIO(saved.body())).width == 2 * side + 2


def test_a_story_of_four_panels_becomes_a_page_to_save(page: Any) -> None:
    open_tab(page, "Story")
    playwright.expect(page.get_by_text("has no language model")).to_be_visible()
    give(page, "story-reference", CAT)
    page.get_by_label("Title").fill("Far from home")
    lines = ["a cat on the beach | Day one.", "a cat in a forest", "a cat on the moon"]
    panels = page.get_by_label("Panels, one per line")
    panels.fill("\n".join(lines))
    page.get_by_role("button", name="More settings").locator("visible=true").click()
    page.locator("#story-steps input, #story-steps textarea").fill("2")
    page.get_by_role("button", name="Generate story").click()
    playwright.expect(page.locator("#story [role=alert]")).to_contain_text("4 to 10 panels, not 3")
    panels.fill("\n".join([*lines, "a cat sleeping in a kitchen | Home."]))
    sheet, *images = pictures(page, "#story", "Generate story")
    assert len(images) == 4 and len({pixels(data) for data in images}) == 4
    told = Image.open(io.BytesIO(sheet))
    assert told.width == 1240 and json.loads(told.info["diptych"])["title"] == "Far from home"
    link = page.get_by_role("link", name="Save as PDF").get_attribute("href")
    saved = page.request.get(page.evaluate("path => new URL(path, location).href", link), timeout=PATIENCE)
    assert saved.body().startswith(b"%PDF")
    page.get_by_role("button", name="Use these seeds").click()
    seeds = page.locator("#story-seed input, #story-seed textarea").input_value().split()
    assert len(seeds) == 4
    page.locator("#story-seed input, #story-seed textarea").fill(" ".join([*seeds[:3], "7"]))
    _, *again = pictures(page, "#story", "Generate story")
    equal = [pixels(a) == pixels(b) for a, b in zip(images, again, strict=True)]
    assert equal == [True, True, True, False]


@pytest.fixture
def runs(app: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A judged run where the server looks for runs."""
    run = plain_stages.judged(tmp_path, monkeypatch, "first")
    (run / "student" / "training").mkdir(parents=True)
    lines = [json.dumps({"step": n, "loss": 1 / n}) for n in range(1, 50)]
    (run / "student" / "training" / "metrics.jsonl").write_text("\n".join(lines))
    (run / "student" / "training" / "samples").mkdir()
    Image.new("RGB", (64, 32), "teal").save(run / "student" / "training" / "samples" / "step-000040.png")
    plain_stages.write_report(None, run)
    assert app.service.runs is not None
    monkeypatch.setattr(app.service.runs, "folder", tmp_path)
    return run


def test_people_accept_and_reject_pairs_and_see_what_thresholds_would_keep(runs: Path, page: Any) -> None:
    whole = {path: path.read_bytes() for path in runs.rglob("*") if path.is_file()}
    before = [row["id"] for row in Dataset(runs / "pairs")]
    refused = next(row["id"] for row in Dataset(runs / "candidates") if not row["kept"])
    gone, come = ([id, *records.mirrors(id)] for id in (before[0], refused))
    open_tab(page, "Data")
    choose(page, "Run", "first")
    panel = page.locator("#pairs")
    playwright.expect(panel).to_contain_text("pairs")
    playwright.expect(panel.locator("img").first).not_to_have_js_property("naturalWidth", 0)
    choose(page, "Pairs", "accepted")
    panel.locator(f"[data-pair='{before[0]}']").get_by_role("button", name="Reject").click()
    playwright.expect(page.locator("#decisions")).to_contain_text("0 accepted and 1 rejected")
    for id in gone:
        card = panel.locator(f"[data-pair='{id}']")
        playwright.expect(card).to_contain_text(verdicts.REJECTED)
        playwright.expect(card).not_to_contain_text("accepted")
        playwright.expect(card.get_by_role("button", name="Reject")).to_have_attribute("aria-pressed", "true")
    choose(page, "Pairs", "rejected")
    playwright.expect(panel.locator(f"[data-pair='{refused}']")).to_contain_text("rejected: different")
    panel.locator(f"[data-pair='{refused}']").get_by_role("button", name="Accept").focus()
    page.keyboard.press("Enter")
    playwright.expect(page.locator("#decisions")).to_contain_text("1 accepted and 1 rejected")
    page.get_by_role("button", name="Apply decisions").click()
    playwright.expect(page.locator("#decisions")).to_contain_text("The run first-decided has")
    assert {row["id"] for row in Dataset(runs.parent / "first-decided" / "pairs")} == {*before, *come} - {*gone}
    assert {path: path.read_bytes() for path in whole} == whole  # the run itself is as it was

    slider = page.locator("#limit-same input[type=number]")
    playwright.expect(slider).to_have_value("0.3")
    slider.fill("0.6")
    slider.press("Enter")
    playwright.expect(page.locator("#funnel")).to_contain_text("more rejected")
    page.get_by_label("Name of a new run").fill("stricter")
    page.get_by_role("button", name="Start run").click()
    playwright.expect(page.locator("#funnel")).to_contain_text("The run stricter has")
    stricter = list(Dataset(runs.parent / "stricter" / "pairs"))
    assert stricter and all(row["similarity"] >= 0.6 or row["id"] in come for row in stricter)
    choose(page, "Run", "first-decided")
    page.get_by_role("button", name="Apply decisions").click()
    playwright.expect(page.locator("#decisions [role=alert]")).to_contain_text("has all decisions already")

    open_tab(page, "Runs")
    state = page.locator("#run-state")
    playwright.expect(state).to_contain_text("candidates")
    playwright.expect(state.get_by_role("img", name="loss")).to_be_visible()
    playwright.expect(state.get_by_role("img", name="samples, step-000040")).not_to_have_js_property("naturalWidth", 0)
    with page.expect_popup() as report:
        state.get_by_role("link", name="Report").click()
    playwright.expect(report.value.locator("p")).to_have_text("report")


def test_a_wrong_file_and_an_empty_prompt_are_told_plainly(page: Any, tmp_path: Path) -> None:
    wrong = tmp_path / "notes.png"
    wrong.write_text("these are my notes")
    zone = page.locator(".dq-drop[data-to=reference]")
    zone.locator("input").set_input_files(str(wrong))
    playwright.expect(zone.locator("[role=alert]")).to_contain_text("This file cannot be used. image: ")
    page.get_by_role("button", name="Generate", exact=True).click()
    playwright.expect(page.locator("#pictures [role=alert]")).to_contain_text("Write a prompt")


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
