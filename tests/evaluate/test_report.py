"""The report is one self-contained file that shows what a run has, and reports what is missing."""

from __future__ import annotations

import base64
import io
import itertools
import json
import re
import shutil
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_world as tiny
from PIL import Image

from diptych.data import funnel, places, records
from diptych.data.engine import failed_row
from diptych.data.store import Dataset
from diptych.errors import UsageError
from diptych.evaluate.report import galleries, run_report
from diptych.evaluate.report.gather import Run
from diptych.evaluate.report.notebook import Report, style
from diptych.evaluate.report.render import Dot, Series, histogram, lines, percent, scatter, ticks, whiskers, words
from diptych.evaluate.scoring import curation
from diptych.evaluate.scoring.curation import Witness
from diptych.recipe.schema import Recipe
from hostile_text import EVIL, FILE, RAN, check
from raising import raises

VOID = {"meta", "img", "br", "path", "circle", "rect"}


class Page(HTMLParser):
    """A page's elements; fails on one that is not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.words += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.found if name == tag]


@pytest.fixture
def recipe(teacher: Path, judge_folders: Path) -> Recipe:
    return tiny.make_recipe(teacher, judge_folders)


@pytest.fixture
def full(evaluated: Path, tmp_path: Path) -> Path:
    """A run with data, a training log, scores and times."""
    run = tmp_path / "run"
    shutil.copytree(evaluated, run)
    tiny.make_data(run, 12)
    training = run / "student" / "training"
    (training / "samples").mkdir(parents=True)
    Image.new("RGB", (192, 128), (9, 99, 199)).save(training / "samples" / "step-000080.png")
    levels = {str(s / 10): 1 - s / 20 for s in (1, 5, 9)}
    rows: list[dict[str, Any]] = [{"step": i, "left": 2 / i, "right": 3 / i} for i in range(1, 81)]
    for i in (40, 80):
        rows[i - 1]["validation"] = {"loss": 1.0, "left": levels, "right": levels, "reference_influence": 0.004}
    (training / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 81, "le')
    (training / "summary.json").write_text(
        json.dumps({"summary": {"steps": 80, "pairs": 12}, "made_by": {"base": "ab"}})
    )
    places.append(run, "start", machine={"system": "Linux", "cores": 2}, versions={"torch": "2"})
    for stage, seconds in (("write", 0.4), ("paint", 75.0), ("distill", 3700.0)):
        places.append(run, "stage", stage=stage, seconds=seconds)
    return run


def page_of(recipe: Recipe, run: Path) -> Page:
    path = run_report.write(recipe, run)
    assert path == run / "report" / "report.html"
    return Page(path.read_text("utf8"))


def test_a_full_run_is_shown_stage_by_stage(recipe: Recipe, full: Path) -> None:
    page = page_of(recipe, full)
    assert "missing" not in {attrs.get("class") for _, attrs in page.found}
    sections = [attrs["id"] for attrs in page.all("section")]
    assert sections == [anchor for anchor, *_ in run_report.PARTS if anchor != "relight"]
    for text in (
        "Paired comparisons", "12 prompts", "Rejected", "Validation loss, right panel", "Held-out kinds", "1 h 01 min",
        "precision is", "held-out kinds", "sha256", "image_guidance",
        "Influence of the reference", "ignores its reference", "+0.40%",
    ):  # fmt: skip
        assert text in page.words, text
    labels = [attrs["aria-label"] for attrs in page.all("svg")]
    assert len(labels) >= 6 and all(labels)


def test_the_report_opens_with_every_image_of_the_student(recipe: Recipe, full: Path) -> None:
    run = Run(recipe, full)
    view = galleries.gallery(run)
    lines = [*view["first"], *view["rest"]]
    shown = {cell["row"]["id"] for line in lines for cell in line["cells"]}
    assert shown == {id for method, id in run.scores if method == "student"} and len(shown) > 3
    for line in lines:
        assert len({cell["row"]["identity"] for cell in line["cells"]}) == 1
    assert view["total"] == len(lines) and len(view["first"]) <= galleries.OPENING
    page = page_of(recipe, full)
    assert next(attrs["id"] for attrs in page.all("section")) == "gallery"
    assert "How the student learned" in page.words and "a kind that was not in training" in page.words


def test_a_failed_image_has_its_place_in_the_gallery(recipe: Recipe, full: Path) -> None:
    data = Dataset(full / "samples" / "student")
    rows = data.read_shard(0)
    manifest = {key: value for key, value in (data.manifest or {}).items() if key not in ("format", "rows", "parts")}
    data.write_shard(0, rows[1:], data.part_fingerprint(0))
    data.publish(manifest)
    view = galleries.gallery(Run(recipe, full))
    cells = [cell for line in [*view["first"], *view["rest"]] for cell in line["cells"]]
    assert [cell["line"]["id"] for cell in cells if cell["row"] is None] == [rows[0]["id"]]
    assert "failed" in page_of(recipe, full).words


def test_the_sheets_of_a_training_become_one_strip() -> None:
    def sheet(step: int) -> Image.Image:
        made = Image.new("RGB", (24, 80), (200, 0, 0))
        made.paste((0, 0, step), (16, 0, 24, 80))
        return made

    steps, strip = galleries.learned([(step, sheet(step)) for step in range(10, 90, 10)]) or (
        [],
        Image.new("RGB", (1, 1)),
    )
    assert steps == [10, 20, 40, 50, 70, 80]
    assert strip.size == (8 * 8, 4 * 8)
    colors = [strip.getpixel((8 * column + 4, 20)) for column in range(8)]
    assert colors == [(200, 0, 0)] * 2 + [(0, 0, step) for step in steps]
    assert galleries.learned([]) is None
    only = galleries.learned([(7, sheet(7))])
    assert only is not None and only[0] == [7] and only[1].width == 24


def test_a_pair_that_repeats_another_is_not_counted_as_kept(recipe: Recipe, full: Path) -> None:
    pairs = Dataset(full / "pairs", records.schema(records.PAIR))
    rows = pairs.read_shard(0)
    again = [failed_row("select", row, f"duplicate of {rows[0]['id']}: embedding") for row in rows[2:4]]
    Dataset(full / "failed/select", records.schema(records.FAILED)).write_shard(0, again, "tiny")
    pairs.write_shard(0, rows[:2] + rows[4:], "tiny")
    kept = len(rows) - 2
    page = page_of(recipe, full)
    assert f"Of 24 candidates {kept} were accepted, {percent(kept / 24)}" in page.words
    duplicate = words()["reasons"]["duplicate: embedding"]
    assert f"2: {duplicate}" in page.words
    assert page.words.count(f"Rejected: {duplicate}") == 1  # one example of it is shown
    found = curation.on_grids(full, lambda images: np.ones((len(images), 2)), Witness(0.5, hit=1.0, false_alarm=0.0))
    assert found is not None and found["kept"] == kept and found["reasons"]["duplicate: embedding"] == 2


def test_the_page_loads_nothing(recipe: Recipe, full: Path) -> None:
    text = run_report.write(recipe, full).read_text("utf8")
    page = Page(text)
    assert not page.all("script") and not page.all("link") and not page.all("iframe")
    for _, attrs in page.found:
        for key in ("src", "href"):
            value = attrs.get(key) or ""
            assert value == "" or value.startswith(("data:image/png;base64,", "#"))
    assert "url(" not in text and "@import" not in text


def test_every_image_is_a_png_with_a_description(recipe: Recipe, full: Path) -> None:
    pictures = page_of(recipe, full).all("img")
    assert len(pictures) > 40
    for attrs in pictures:
        assert attrs["alt"] and attrs["width"] and attrs["height"]
        data = base64.b64decode((attrs["src"] or "").partition(",")[2])
        assert Image.open(io.BytesIO(data)).format == "PNG"


def test_headings_step_down_one_at_a_time(recipe: Recipe, full: Path) -> None:
    levels = [int(tag[1]) for tag, _ in page_of(recipe, full).found if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))


def test_an_empty_run_says_what_is_missing_and_how_it_comes(recipe: Recipe, tmp_path: Path) -> None:
    page = page_of(recipe, tmp_path)
    for stage in ("write", "paint", "curate", "distill", "evaluate"):
        assert f"diptych {stage}" in page.words
    assert "| pairs | none yet |" in (tmp_path / "report" / "report.md").read_text()


def test_a_damaged_file_costs_its_part_and_not_the_page(recipe: Recipe, full: Path) -> None:
    (full / "grids" / "part-00000.parquet").write_bytes(b"not parquet")
    broken = json.loads((full / "report" / "metrics.json").read_text())
    del broken["methods"]["student"]["ci95"]
    broken["judges"] = {"scorer": []}
    (full / "report" / "metrics.json").write_text(json.dumps(broken))
    page = page_of(recipe, full)
    assert "Cannot read this section" in page.words and "Cannot show this section" in page.words
    assert "12 prompts" in page.words and "Validation loss" in page.words


def test_words_from_data_are_shown_and_never_run(recipe: Recipe, full: Path) -> None:
    """In every file that a report reads, in Chromium, which would run them."""
    for name in ("prompts", "grids", "candidates"):
        data = Dataset(full / name)
        manifest = {
            key: value for key, value in (data.manifest or {}).items() if key not in ("format", "rows", "parts")
        }
        for shard in data.shards():
            rows = [{key: hostile(value, key) for key, value in row.items()} for row in data.read_shard(shard)]
            data.write_shard(shard, rows, data.part_fingerprint(shard))
        data.publish(manifest)
    metrics = full / "report" / "metrics.json"
    metrics.write_text(json.dumps(hostile(json.loads(metrics.read_text()), "")))
    sheet = full / "student" / "training" / "samples" / "step-000080.png"
    shutil.copy(sheet, sheet.with_name(f"step-{FILE}.png"))  # not a step: it is left out
    places.append(full, "start", machine={"system": EVIL, EVIL: 2}, versions={EVIL: EVIL})
    named = recipe.model_copy(update={"teacher": EVIL, "name": EVIL})
    page_of(named, full)  # and all elements are closed
    path = run_report.write(named, full)
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or pytest.skip("there is no chromium")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(path.as_uri())
        check(page, EVIL, f"teacher {EVIL}")
        # Should a text ever come through: the page itself allows no script.
        page.evaluate(f"document.body.append(Object.assign(document.createElement('script'), {{text: '{RAN}'}}))")
        assert page.evaluate("window.ran") is None
        browser.close()


def hostile(value: Any, key: str) -> Any:
    """The same with a text of an attacker's in place of every text that names nothing else."""
    if isinstance(value, dict):
        return {key: hostile(one, key) for key, one in value.items()}
    if isinstance(value, list):
        return [hostile(one, key) for one in value]
    free = ("prompt", "subject", "caption", "reference_caption", "reason", "name", "device", "processor", "kind")
    return EVIL if isinstance(value, str) and key in free and value != "kept" else value


def test_the_markdown_has_the_scores(recipe: Recipe, full: Path) -> None:
    run_report.write(recipe, full)
    text = (full / "report" / "report.md").read_text("utf8")
    assert (
        "| inpaint |" in text and "| true re-render |" in text and "precision" in text and "<" not in text.split("#")[1]
    )


def test_writing_twice_gives_the_same_page(recipe: Recipe, full: Path) -> None:
    first = run_report.write(recipe, full).read_bytes()
    assert run_report.write(recipe, full).read_bytes() == first


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(3, 4021) == pytest.approx([1000, 2000, 3000, 4000])
    for low, high in ((0, 1e-6), (-5, 5), (0.4, 0.40001)):
        found = ticks(low, high)
        assert 2 <= len(found) <= 12 and low <= found[0] + 1e-9 and found[-1] <= high + 1e-9


def test_charts_stand_one_point_none_and_nan() -> None:
    assert lines([Series("a", "left", [])], "t", "x", "y") == ""
    assert histogram([], 0.5, "t", "x") == "" and histogram([float("nan")], None, "t", "x") == ""
    assert "nan" not in lines([Series("a", "left", [(1, 2.0)])], "t", "x", "y")
    assert "nan" not in histogram([0.5], 0.5, "t", "x")
    for chart in (scatter([Dot("a", "copy", 1.0, 0.0)], "t", "x", "y"), whiskers([Dot("a", "copy", 0, 0)], "t", "x")):
        Page(chart)


def test_the_run_s_student_is_the_headline_and_the_packaged_one_is_named_as_such(recipe: Recipe, full: Path) -> None:
    path = full / "report" / "metrics.json"
    found = json.loads(path.read_text())
    found["methods"]["student"] |= {"cp_pf": 0.111}
    found["methods"]["student_shipped"] = found["methods"]["student"] | {"cp_pf": 0.577}
    path.write_text(json.dumps(found))
    first, _, rest = run_report.headline(Run(recipe, full)).partition("**0.11**")
    assert "this run’s student" in first and "0.58" not in first and "packaged student" in rest and "0.58" in rest
    del found["methods"]["student"]
    path.write_text(json.dumps(found))
    assert "packaged student (not this run’s)" in run_report.headline(Run(recipe, full))


def test_grids_and_pairs_are_counted_apart(recipe: Recipe, full: Path) -> None:
    candidates = Dataset(full / "candidates", records.schema(records.PAIR))
    rows = candidates.read_shard(0)
    seamless = {row["grid_id"] for row in rows[:6]}
    bad = {"kept": False, "reason": "seam", "seam": -1.0}
    candidates.write_shard(0, [row | bad if row["grid_id"] in seamless else row for row in rows], "tiny")
    steps = {step["name"]: step for step in funnel.measure(with_recipe(recipe, full))["steps"]}
    assert (steps["cut"]["count"], steps["cut"]["unit"], steps["pre-filtered"]["unit"]) == (9, "grids", "pairs")
    bars = {name: (number, note) for name, _, number, note in run_report.funnel(Run(recipe, full), reasons_of(full))}
    number, note = bars["grids cut and judged"]
    assert number == "9" and "3 grids without a clear seam" in note and "18 ordered pairs" in note
    assert "seam" not in bars["accepted pairs"][1]
    pytest.importorskip("gradio", reason="the extra `serve` is not installed")
    from diptych.serve.app.run_tabs import described
    from diptych.serve.runs import Runs

    shown = described(Runs(full.parent), full.name)
    assert "9 grids" in shown and f"{steps['pre-filtered']['count']} pairs" in shown


def with_recipe(recipe: Recipe, run: Path) -> Path:
    (run / "recipe.yaml").write_text(recipe.dump())
    return run


def reasons_of(run: Path) -> Counter[str]:
    return Counter(row["reason"] for row in Dataset(run / "candidates").columns("reason"))


def test_a_notebook_shows_the_parts_of_a_run(recipe: Recipe, full: Path, tmp_path: Path) -> None:
    (full / "recipe.yaml").write_text(recipe.dump())
    report = Report(full)
    page = page_of(recipe, full)
    parts = {
        "header": report, "grids": report.grids(3), "funnel": report.funnel(), "pairs": report.pairs(6),
        "training": report.training(), "images": report.images(), "scores": report.scores(),
    }  # fmt: skip
    shown = {name: Page(each._repr_html_()) for name, each in parts.items()}
    for name, part in shown.items():
        assert part.found[0] == ("div", {"class": "diptych-report"}) and not part.all("script"), name
        for text in part.words.split("\n"):
            assert " ".join(text.split()) in " ".join(page.words.split()), "as in the report"
    assert len(shown["grids"].all("img")) == 3 and len(shown["pairs"].all("img")) == 2 * len(
        run_report.curate(report.run)["strips"][0][1]
    )
    assert "12 prompts" in shown["funnel"].words.replace("\u202f", " ") and shown["scores"].all("table")
    assert shown["training"].all("svg") and len(shown["images"].all("img")) > 4
    assert "CP·PF" in repr(report) and "<" not in repr(report.scores()) and "font" not in repr(report)
    with raises("path_not_found", tmp_path, kind=UsageError):
        Report(tmp_path)


def test_a_notebook_shows_what_an_unfinished_run_has(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(recipe.dump())
    report = Report(tmp_path)
    for part, command in ((report.grids(), "paint"), (report.funnel(), "curate"), (report.pairs(), "curate")):
        assert f"Run diptych {command}" in repr(part)
    assert "This run has no scores yet" in repr(report)


def test_the_style_of_a_part_stays_inside_it() -> None:
    css = style()
    assert css.startswith(".diptych-report {") and css.count("{") == css.count("}")
    assert not re.search(r":root|\bbody\b", css), "these would not match inside"
