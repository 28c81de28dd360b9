"""The audit's page in a browser, labelled by keyboard and mouse. Needs Playwright and chromium."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from diptych.apps import audit
from diptych.apps.audit import AuditServer, serve
from diptych.data import labels
from hostile_text import EVIL, check

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")


@pytest.fixture
def server(known: tuple[Path, dict[str, str]]) -> Iterator[AuditServer]:
    server = AuditServer(audit.draw(known[0], 6, 0), labels.Labels(known[0] / "audit" / "labels.jsonl"), "me", {})
    thread = threading.Thread(target=serve, args=(server,))
    thread.start()
    yield server
    server.shutdown()
    thread.join(60)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.parametrize(("width", "height"), [(1200, 900), (390, 844)], ids=["wide", "phone"])
def test_a_sample_is_labelled_by_keyboard_and_mouse(
    server: AuditServer, browser: Any, width: int, height: int, known: tuple[Path, dict[str, str]]
) -> None:
    page = browser.new_page(viewport={"width": width, "height": height})
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.goto(server.url)
    shown = page.locator("#ask")
    for number, act in enumerate(("s", "d", "u"), 1):
        playwright.expect(shown).to_contain_text(f"Pair {number}:")
        page.keyboard.press(act)
    playwright.expect(shown).to_contain_text("Pair 4:")
    for side in ("reference", "target"):
        playwright.expect(page.locator(f"#{side}")).not_to_have_js_property("naturalWidth", 0)
    assert page.evaluate("document.documentElement.scrollWidth") <= width  # nothing to scroll sideways
    page.get_by_role("button", name="same").click()
    playwright.expect(shown).to_contain_text("Pair 5:")
    page.keyboard.press("ArrowLeft")
    playwright.expect(shown).to_contain_text("Pair 4:")
    playwright.expect(page.get_by_role("button", name="same")).to_have_attribute("aria-pressed", "true")
    page.get_by_role("button", name="finish").click()
    playwright.expect(page.locator("#title")).to_contain_text("Finished")
    kept = labels.read(known[0] / "audit" / "labels.jsonl")["me"]
    assert [kept[pair.id] for pair in server.sample.pairs[:4]] == ["same", "different", "unsure", "same"] and not faults
    page.close()


def test_a_label_given_before_the_last_is_stored_is_for_the_pair_that_was_shown(
    server: AuditServer, browser: Any
) -> None:
    page = browser.new_page()
    page.route("**/label", lambda route: (page.wait_for_timeout(300), route.continue_()))
    page.goto(server.url)
    playwright.expect(page.locator("#ask")).to_contain_text("Pair 1:")
    page.keyboard.press("s")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    playwright.expect(page.locator("#count")).to_contain_text("1 of 6")
    playwright.expect(page.locator("#ask")).to_contain_text("Pair 3:")
    playwright.expect(page.get_by_role("button", name="same")).to_have_attribute("aria-pressed", "false")
    page.close()


def test_no_text_of_a_run_is_run(server: AuditServer, browser: Any) -> None:
    pairs = tuple(replace(pair, id=EVIL if number else pair.id, subject=EVIL)
                  for number, pair in enumerate(server.sample.pairs[:2]))  # fmt: skip
    server.sample = replace(server.sample, pairs=pairs, question=EVIL)
    server.ids, server.labeller = {pair.id for pair in pairs}, EVIL
    page = browser.new_page()
    page.goto(server.url)
    playwright.expect(page.locator("#ask")).to_contain_text(EVIL)
    page.keyboard.press("s")
    playwright.expect(page.locator("#ask")).to_contain_text("Pair 2:")
    page.get_by_text("What counts as the same").click()
    check(page, EVIL)
    page.keyboard.press("d")
    playwright.expect(page.locator("#count")).to_contain_text("all done")
    assert server.answers == {pairs[0].id: "same", EVIL: "different"}
    check(page, EVIL)
    page.close()
