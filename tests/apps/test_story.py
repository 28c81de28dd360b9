"""Stories: the panels, their seeds, the layout of the page, and the files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from diptych.apps import enhance, story
from diptych.apps.story import write_panels
from diptych.cli import app
from diptych.data.images import read_provenance
from diptych.errors import UsageError
from diptych.llm.endpoint import Endpoint
from llm.chat_server import Serve, say
from raising import raises

TEXTS = ["a cat on the beach", "a cat in a forest | Then it got lost.", "a cat in a cave", "a cat asleep | Home."]


class Painter:
    """Generates one color for each seed, and records its calls."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, str, int]] = []

    def opened(self, reference: Any, background: str = "white") -> Any:
        return Image.open(reference).convert("RGB") if isinstance(reference, (str, Path)) else reference

    def generate(self, reference: Any, prompt: str, *, seed: int, **options: Any) -> Image.Image:
        self.asked.append((reference, prompt, seed))
        image = Image.new("RGB", (32, 32), (40 * (seed % 6), 100, 200))
        image.info = {"prompt": prompt, "seed": seed, "model": "painter", **options}
        return image


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    path = tmp_path / "cat.png"
    Image.new("RGB", (32, 32), (250, 120, 20)).save(path)
    return path


def test_each_panel_is_drawn_from_its_own_text_and_seed(reference: Path) -> None:
    painter = Painter()
    done: list[tuple[int, int]] = []
    page = story.story(painter, reference, TEXTS, seed=7, on_panel=lambda *at: done.append(at), steps=3)  # pyright: ignore
    assert [(prompt, seed) for _, prompt, seed in painter.asked] == [
        ("a cat on the beach", 7),
        ("a cat in a forest", 8),
        ("a cat in a cave", 9),
        ("a cat asleep", 10),
    ]
    assert page.seeds == [7, 8, 9, 10] and done[0] == (0, 4) and done[-1] == (4, 4)
    assert [panel.caption for panel in page.panels] == [
        "a cat on the beach",
        "Then it got lost.",
        "a cat in a cave",
        "Home.",
    ]
    again = Painter()
    story.story(again, reference, TEXTS, seed=[7, 8, 99, 10])  # pyright: ignore
    assert [seed for _, _, seed in again.asked] == [7, 8, 99, 10]
    pictures = {id(picture) for picture, _, _ in painter.asked}
    assert len(pictures) == 1, "the reference is opened once, so that the pipeline can tell a repeated one"


@pytest.mark.parametrize(
    ("texts", "options", "code", "fact"),
    [
        (TEXTS[:3], {}, "option_invalid", "4 to 10 panels, not 3"),
        (TEXTS * 3, {}, "option_invalid", "4 to 10 panels, not 12"),
        ([*TEXTS, " | only words"], {}, "text_empty", " | only words"),
        (TEXTS, {"seed": [1, 2]}, "count_mismatch", "2 seeds for 4 panels"),
        (TEXTS, {"captions": "above"}, "option_invalid", "below, inside, none"),
    ],
)
def test_an_impossible_story_is_rejected_before_anything_is_generated(
    reference: Path, texts: list[str], options: dict[str, Any], code: str, fact: str
) -> None:
    painter = Painter()
    with raises(code, fact, kind=UsageError):
        story.story(painter, reference, texts, **options)  # pyright: ignore
    with raises("option_invalid", -1, kind=UsageError):
        story.story(painter, reference, TEXTS, seed=-1)  # pyright: ignore
    assert not painter.asked


def test_panels_come_from_a_file_without_comments(tmp_path: Path) -> None:
    path = tmp_path / "story.txt"
    path.write_text("# a story\na cat at sea | Day 1.\n\na cat on the moon\n", "utf8")
    assert story.read_panels(path) == [
        story.Panel("a cat at sea", "Day 1."),
        story.Panel("a cat on the moon", "a cat on the moon"),
    ]
    path.write_bytes(b"\xff\xfe")
    with raises("file_format_unknown", "UTF-8", kind=UsageError):
        story.read_panels(path)
    with raises("path_not_found", "none.txt"):
        story.read_panels(tmp_path / "none.txt")


@pytest.mark.parametrize("count", range(story.MIN_PANELS, story.MAX_PANELS + 1))
def test_every_panel_is_on_the_page_whole_and_in_order(count: int) -> None:
    colours = [(20 * i + 10, 250 - 20 * i, 90) for i in range(count)]
    page = story.lay_out([Image.new("RGB", (32, 32), c) for c in colours], [""] * count, captions="none", width=400)
    pixels = np.asarray(page)
    centres = []
    for colour in colours:
        y, x = np.nonzero((pixels == colour).all(2))
        wide, tall = int(x.max() - x.min()) + 1, int(y.max() - y.min()) + 1
        assert abs(wide - tall) <= 1 and wide > 70, "square, and not covered by a neighbour"
        centres.append((round((y.min() + y.max()) / 2), round((x.min() + x.max()) / 2)))
    assert centres == sorted(centres), "rows from the top, panels from the left"
    assert page.width == 400 and (pixels[:, :20] == 255).all() and (pixels[-20:] == 255).all()


@pytest.mark.parametrize("captions", ["below", "inside"])
def test_words_stay_in_their_place(captions: str) -> None:
    texts = ["word " * 30, "Donaudampfschifffahrtsgesellschaftskapitaensmuetzenabzeichen" * 2, "short", ""]
    grey = (90, 90, 90)
    page = np.asarray(story.lay_out([Image.new("RGB", (64, 64), grey)] * 4, texts, captions=captions, width=600))
    plain = np.asarray(story.lay_out([Image.new("RGB", (64, 64), grey)] * 4, [""] * 4, captions="none", width=600))
    assert (page.shape[0] > plain.shape[0]) == (captions == "below")
    cell = (600 - 2 * story.MARGIN - story.GUTTER) // 2
    between = page[:, story.MARGIN + cell : story.MARGIN + cell + story.GUTTER]
    assert (between == 255).all() and (page[:, -story.MARGIN + 1 :] == 255).all(), "no word leaves its panel's column"
    if captions == "inside":
        assert (page != plain).any()


def test_a_long_text_is_wrapped_and_loses_nothing() -> None:
    font = story._font(None, 24)
    text = "once upon a time there was a " + "w" * 90 + " cat"
    lines = story.wrap(text, font, 200)
    assert all(font.getlength(line) <= 200 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")


def test_letters_that_no_font_has_are_refused_and_a_font_that_has_them_is_found(tmp_path: Path) -> None:
    assert story.font_for(["Plain words, it's said: “so”."[:27]]) is None
    assert story.lacking("aé漢", None)[-1] == "漢"
    with raises("option_invalid", "𓀀", kind=UsageError):
        story.font_for(["𓀀"])
    with raises("path_unreadable", tmp_path / "none.ttf"):
        story.font_for(["a"], tmp_path / "none.ttf")


def test_a_page_is_saved_with_what_made_it_and_always_the_same(reference: Path, tmp_path: Path) -> None:
    page = story.story(Painter(), reference, TEXTS, seed=3, title="Far from home")  # pyright: ignore
    png = page.save(tmp_path / "new" / "page.png")
    told = read_provenance(png)
    assert told is not None and told["seeds"] == [3, 4, 5, 6] and told["model"] == "painter" and "seed" not in told
    assert told["panels"][1] == {"prompt": "a cat in a forest", "caption": "Then it got lost."}
    first, second = (page.save(tmp_path / f"{name}.pdf").read_bytes() for name in "ab")
    assert first == second and first.startswith(b"%PDF") and b"Date" not in first
    assert b"/Title (\xfe\xff" + "Far from home)".encode("utf-16-be")[:-2] in first
    assert '"caption": "Then it got lost."'.encode("utf-16-be") in first
    with raises("file_format_unknown", "page.doc", kind=UsageError):
        page.save(tmp_path / "page.doc")


def test_a_title_and_captions_are_drawn() -> None:
    pictures = [Image.new("RGB", (32, 32), (200, 0, 0))] * 4
    bare, titled = (story.lay_out(pictures, [""] * 4, title=t, captions="none") for t in ("", "A title"))
    assert titled.height > bare.height
    head = np.asarray(titled)[: titled.height - bare.height + story.MARGIN]
    assert (head < 128).any(), "there is ink above the first row"


def test_a_language_model_writes_the_panels_of_an_idea(serve: Serve) -> None:
    told = [{"shows": f"a cat in place {i},\n dim light", "says": f"Day {i} — gone|lost."} for i in range(5)]
    replies = iter([{"panels": told[:3]}, {"panels": told}])
    server = serve(lambda call: say(next(replies)))
    endpoint = Endpoint(base_url=server.url, model="tiny", timeout=20.0, backoff=0.01, retries=1)
    panels = write_panels("a cat who wants to see the sea", 5, endpoint)
    assert len(server.calls) == 2, "too few panels are asked for again"
    assert panels[4] == story.Panel("a cat in place 4, dim light", "Day 4 - gone/lost.")
    assert "5 panels" in server.calls[0].text(0) and "wants to see the sea" in server.calls[0].text(1)
    with raises("reply_invalid"):
        write_panels("x", 4, Endpoint(base_url=serve(lambda call: say("no")).url, model="t", backoff=0.01, retries=0))


@pytest.mark.parametrize(
    "again",
    [
        {"shows": "A cat on the pier, in rain!", "says": "Day two."},
        {"shows": "a cat at home, warm lamp light", "says": "day ONE"},
        {"shows": "a cat on the pier in rain again", "says": "Day two."},
    ],
)
def test_a_story_with_a_panel_twice_is_sent_back(serve: Serve, again: dict[str, str]) -> None:
    first = {"shows": "a cat on the pier in rain", "says": "Day one."}
    other = [{"shows": f"a cat in {place}", "says": f"So: {place}."} for place in ("a boat at dawn", "a snowy wood")]
    last = {"shows": "a cat asleep by a fire", "says": "Home."}
    replies = iter([{"panels": [first, *other, again]}, {"panels": [first, *other, last]}])
    server = serve(lambda call: say(next(replies)))
    endpoint = Endpoint(base_url=server.url, model="tiny", timeout=20.0, backoff=0.01, retries=1)
    assert write_panels("a cat", 4, endpoint)[-1] == story.Panel("a cat asleep by a fire", "Home.")
    assert len(server.calls) == 2


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--panel", "a", "--idea", "b"], "--panel and --idea"),
        ([], "error[option_missing]"),
        (["--panel", "a"], "4 to 10 panels, not 1"),
        (["--idea", "a cat at sea"], "--llm-endpoint"),
        ([x for text in TEXTS for x in ("--panel", text)] + ["--out", "page.doc"], ".png"),
        ([x for text in TEXTS for x in ("--panel", text)] + ["--speed", "fastr"], "fastr"),
    ],
)
def test_the_command_refuses_in_one_line(
    reference: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, more: list[str], says: str
) -> None:
    for name in (enhance.URL, enhance.MODEL):
        monkeypatch.delenv(name, raising=False)
    assert app.call(["story", "--reference", str(reference), *more]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_the_pocket_student_draws_a_story_and_one_panel_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    from diptych import Student
    from diptych.utils.paths import packaged

    loaded = Student.load("pocket", device="cpu", progress_bar=False)
    monkeypatch.setattr(Student, "load", lambda *_, **__: loaded)
    command = ["story", "--reference", str(packaged("examples") / "references" / "cat.png"), "--steps", "1"]
    command += [x for text in TEXTS for x in ("--panel", text)]
    assert app.call([*command, "--out", "one.png", "--out", "one.pdf"]) == 0
    captured = capsys.readouterr()
    assert captured.out.split() == ["one.png", "one.pdf"] and "--seed 3" in captured.err
    seeds = [x for seed in (0, 1, 50, 3) for x in ("--seed", str(seed))]
    assert app.call([*command, *seeds, "--out", "two.png", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["out"] == ["two.png"] and found["provenance"]["seeds"] == [0, 1, 50, 3]
    one, two = (np.asarray(Image.open(name)).astype(int) for name in ("one.png", "two.png"))
    changed = np.abs(one - two).max(2) > 0
    y, x = np.nonzero(changed)
    assert changed.any() and y.min() > one.shape[0] // 2 and x.max() < one.shape[1] // 2, "only the third panel"
    assert Path("one.pdf").read_bytes().startswith(b"%PDF")


def test_a_tiny_picture_keeps_its_pixels() -> None:
    small = Image.new("RGB", (8, 8), "white")
    ImageDraw.Draw(small).point((3, 3), "black")
    large = np.asarray(story.enlarge(small, 400).convert("L"))
    assert large.shape == (400, 400) and large[175, 175] < 10 and (large[:140] > 245).all()
