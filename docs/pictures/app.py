"""Screenshots of the web app for docs/serve.md: `python docs/pictures/app.py [runs]`.

`runs` is a folder of runs, as `make demo` makes; without it there are no tabs Data and Runs.

The script starts a server, uses each tab in Chromium, and writes app-TAB-desk.png (light) and app-TAB-phone.png (dark)
beside this file.
"""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

from diptych.utils.paths import packaged

HERE = Path(__file__).parent
REFERENCES = packaged("examples/references")
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync")  # fmt: skip
SIZES = {"desk": (1100, 800, "light"), "phone": (390, 844, "dark")}
TALLEST = 1500  # pixels of a screenshot; the rest below it shows nothing new
PATIENCE = 120_000  # milliseconds
STORY = """a cat on the beach | One morning it set out.
a cat in a forest, dim blue light from above | At night it was lost.
a cat on the moon | Very lost.
a cat sleeping in a kitchen, soft golden light from the left | Home."""


def create(page: Page) -> None:
    give(page, "reference", "cat")
    page.locator("#prompt textarea").fill("a cat on the beach, soft golden light from the left")
    page.locator("#seed input, #seed textarea").fill("7")
    page.get_by_label("number input for Images").locator("visible=true").fill("2")
    run(page, "#pictures", "Generate")


def relight(page: Page) -> None:
    give(page, "relight-reference", "robot")
    for light in ("soft golden light from the left", "dim blue light from above", "bright pink light from the right"):
        page.get_by_label(light).check()
    page.locator("#relight-seed input, #relight-seed textarea").fill("1")
    run(page, "#relit", "Relight")


def story(page: Page) -> None:
    give(page, "story-reference", "cat")
    page.get_by_label("Title").fill("Far from home")
    page.get_by_label("Panels, one per line").fill(STORY)
    page.locator("#story-seed input, #story-seed textarea").fill("3")
    run(page, "#story", "Generate story")


def data(page: Page) -> None:
    expect(page.locator("#pairs img").first).not_to_have_js_property("naturalWidth", 0)


def runs(page: Page) -> None:
    expect(page.locator("#run-state")).to_contain_text("candidates")
    # The page polls, so its network is never idle.
    page.wait_for_function("[...document.images].every(image => image.complete)")
    page.wait_for_timeout(2000)


TABS = {"Create": create, "Relight": relight, "Story": story, "Data": data, "Runs": runs}


def give(page: Page, to: str, reference: str) -> None:
    """Adds a reference to one of the drop zones."""
    zone = page.locator(f".dq-drop[data-to={to}]")
    zone.locator("input").set_input_files(str(REFERENCES / f"{reference}.png"))
    expect(zone.locator("img")).not_to_have_js_property("naturalWidth", 0)


def run(page: Page, where: str, button: str) -> None:
    """Presses a button, and returns when its images are shown."""
    page.get_by_role("button", name=button, exact=True).locator("visible=true").click()
    page.wait_for_function(
        "where => document.querySelector(`${where} [data-status=done]`) && "
        "[...document.querySelectorAll(`${where} img`)].every(image => image.naturalWidth)",
        arg=where,
    )


def keep(page: Page, tab: str, size: str) -> None:
    """Saves the page as a small PNG of at most 256 colors."""
    page.evaluate("document.activeElement?.blur(); window.scrollTo(0, 0)")
    shot = Image.open(io.BytesIO(page.screenshot(full_page=True, animations="disabled"))).convert("RGB")
    shot = shot.crop((0, 0, shot.width, min(shot.height, TALLEST)))
    path = HERE / f"app-{tab.lower()}-{size}.png"
    shot.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    print(path.name, shot.size, f"{path.stat().st_size / 1000:.0f} kB")


def main() -> None:
    given = ["--runs", sys.argv[1]] if len(sys.argv) > 1 else []
    tabs = list(TABS) if given else [name for name in TABS if name not in ("Data", "Runs")]
    command = [sys.executable, "-m", "diptych", "serve", "--port", "0", *given, "--data"]
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as started:
        server = subprocess.Popen([*command, folder], stderr=subprocess.PIPE, text=True)
        try:
            visit(started, server, tabs)
        finally:
            server.terminate()
            server.wait(60)


def visit(started: Any, server: Any, tabs: list[str]) -> None:
    lines: list[str] = []
    while not any("ready" in line for line in lines):
        lines.append(server.stderr.readline())
        assert lines[-1], f"the server ended: {''.join(lines)}"
    address = re.search(r"http://[\w.:]+", "".join(lines))
    assert address is not None
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    browser = started.chromium.launch(executable_path=chromium, args=FLAGS)
    expect.set_options(timeout=PATIENCE)
    for size, (width, height, scheme) in SIZES.items():
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        context.set_default_timeout(PATIENCE)
        for name in tabs:
            page = context.new_page()
            page.goto(f"{address.group()}/app/")
            expect(page.locator("#about")).to_contain_text("generates")
            page.get_by_role("tab", name=name, exact=True).click()
            TABS[name](page)
            keep(page, name, size)
            page.close()
    browser.close()


if __name__ == "__main__":
    main()
