"""What the tests of the web app's page share: a browser in which nothing waits for ever, and what people do in it.

Each wait of the browser ends after PATIENCE, and a test, whatever it does, after LIMIT.
"""

from __future__ import annotations

import io
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from serve.running import TOKENS, Running

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
PATIENCE = 30_000  # milliseconds
LIMIT = 120  # seconds
# Without the last four, Debian's Chromium requests updates, and delays connections without a network.
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip
SIZES = {"desk": (1280, 900, "light"), "phone": (390, 844, "dark")}


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """Fails a test that takes longer, also where a wait has no time-out."""

    def late(number: int, frame: Any) -> None:
        raise TimeoutError(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser."""
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS, timeout=PATIENCE)
        playwright.expect.set_options(timeout=PATIENCE)
        yield browser
        with within(LIMIT):
            browser.close()


@contextmanager
def visiting(browser: Any, app: Running, size: str) -> Iterator[Any]:
    """Somebody with a screen of one size, who has logged in."""
    width, height, scheme = SIZES[size]
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    context.set_default_timeout(PATIENCE)
    with within(LIMIT):
        page = context.new_page()
        page.goto(f"{app.url}/app/")
        page.get_by_label("Token").fill(TOKENS["ana"])
        page.keyboard.press("Enter")
        playwright.expect(page.locator("#about")).to_contain_text("pocket generates")
        page.close()
    yield context
    with within(LIMIT):
        context.close()


@contextmanager
def opened(visitor: Any, app: Running) -> Iterator[Any]:
    """A new page of the app. At the end it must have had no error, no request elsewhere, and fit the screen."""
    with within(LIMIT):
        page = visitor.new_page()
        faults: list[str] = []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda asked: asked.url.startswith((app.url, "data:", "blob:")) or faults.append(asked.url))
        page.on("response", lambda got: got.status < 400 or "/app/" not in got.url or faults.append(got.url))
        page.goto(f"{app.url}/app/")
        playwright.expect(page.locator("#about")).to_contain_text("pocket generates")
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


def choose(page: Any, label: str, value: str) -> None:
    """Picks from one of the visible drop-down lists."""
    box = page.get_by_label(label, exact=True).locator("visible=true").first
    box.click()
    page.get_by_role("option", name=value, exact=True).locator("visible=true").first.click()
