"""The web app with a language model: it writes a story's panels and enhances prompts, or reports an error."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from diptych import Student
from diptych.apps import enhance
from diptych.serve.config import ServerSettings
from llm.chat_server import Act, Call, ChatServer, refuse, say
from serve.browsing import (
    CHROMIUM,
    chromium,
    give,
    open_tab,
    opened,
    pictures,
    playwright,
    visiting,
)
from serve.running import CAT, TOKENS, Running

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")
PLACES = ["on the beach", "in a forest | dark", "on the moon", "in a cave", "asleep in a kitchen"]
LONGER = "a ginger cat with pointed ears on the moon, dim blue light"


def answer(call: Call) -> Act:
    """A model that writes stories and enhances prompts, and is out of order when the idea is to break."""
    if any("break" in call.text(number) for number in range(1, call.turns)):
        return refuse(400, "no such model")
    if "comic" in call.text(0):
        return say({"panels": [{"shows": f"a cat {place}", "says": f"Day {n}."} for n, place in enumerate(PLACES, 1)]})
    return say({"caption": "a ginger cat with pointed ears", "prompt": LONGER})


@pytest.fixture(scope="module")
def model() -> Iterator[ChatServer]:
    server = ChatServer(answer)
    yield server
    server.close()


@pytest.fixture(scope="module")
def app(student: Student, model: ChatServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ((enhance.URL, model.url), (enhance.MODEL, "tiny"), ("NO_PROXY", "127.0.0.1")):
            patch.setenv(name, value)
        running = Running(
            ServerSettings(folder=tmp_path_factory.mktemp("helped"), tokens=TOKENS), student, web_app=True
        )
        yield running
        running.close()


@pytest.fixture(scope="module")
def visitor(app: Running) -> Iterator[Any]:
    with chromium() as browser, visiting(browser, app, "phone") as visitor:
        yield visitor


@pytest.fixture
def page(app: Running, visitor: Any) -> Iterator[Any]:
    with opened(visitor, app) as page:
        yield page


def test_an_idea_becomes_panels_to_change_and_to_draw(page: Any, model: ChatServer) -> None:
    open_tab(page, "Story")
    assert page.get_by_text("has no language model").count() == 0
    panels = page.get_by_label("Panels, one per line")
    page.get_by_role("button", name="Write panels").click()
    playwright.expect(page.get_by_text("Describe the story in a line")).to_be_visible()
    page.get_by_label("Idea").fill("a cat who wants to see the sea")
    page.get_by_label("number input for Panels").locator("visible=true").fill("5")
    page.get_by_role("button", name="Write panels").click()
    playwright.expect(panels).to_have_value("\n".join(
        f"a cat {place.replace('|', '/')} | Day {number}." for number, place in enumerate(PLACES, 1)
    ))  # fmt: skip
    asked = model.calls[-1]
    assert "5 panels" in asked.text(0) and "wants to see the sea" in asked.text(1)
    assert TOKENS["ana"] not in json.dumps([asked.body, asked.headers])

    lines = panels.input_value().splitlines()
    panels.fill("\n".join([*lines[:4], "a cat asleep | Home."]))  # the last one is the user's
    give(page, "story-reference", CAT)
    page.get_by_role("button", name="More settings").locator("visible=true").click()
    page.locator("#story-steps input, #story-steps textarea").fill("2")
    sheet, *images = pictures(page, "#story", "Generate story")
    assert sheet.startswith(b"\x89PNG") and len(images) == 5
    playwright.expect(page.locator("#story figcaption").nth(1)).to_contain_text("a cat in a forest / dark")


def test_a_prompt_is_filled_out_from_the_reference(page: Any, model: ChatServer) -> None:
    prompt = page.locator("#prompt textarea")
    prompt.fill("a cat on the moon")
    page.get_by_role("button", name="Enhance prompt").click()
    playwright.expect(page.get_by_text("Add a reference and a prompt first")).to_be_visible()
    give(page, "reference", CAT)
    page.get_by_role("button", name="Enhance prompt").click()
    playwright.expect(prompt).to_have_value(LONGER)
    shown = model.calls[-1].body["messages"][1]["content"]
    assert any(part["type"] == "image_url" for part in shown)


def test_a_model_that_refuses_is_told_plainly_and_costs_nothing_of_the_page(page: Any) -> None:
    open_tab(page, "Story")
    panels = page.get_by_label("Panels, one per line")
    panels.fill("my own first panel")
    page.get_by_label("Idea").fill("a cat who wants to break out")
    page.get_by_role("button", name="Write panels").click()
    playwright.expect(page.get_by_text("no such model")).to_be_visible()
    playwright.expect(panels).to_have_value("my own first panel")
