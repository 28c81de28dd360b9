"""The Data tab: a run's pairs with their verdicts, people's own verdicts, and what other thresholds would keep."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import gradio as gr

from diptych.data import labels, records
from diptych.data.scan import open_run
from diptych.errors import UserError
from diptych.run import recurate
from diptych.serve.app import owner_of
from diptych.serve.app.job import wrong
from diptych.serve.app.runs import NO_RUN, listing
from diptych.serve.runs import NAME, Runs
from diptych.serve.service import Service
from diptych.utils.console import Display
from diptych.utils.markup import Html, html, tag

PAGE = 12  # pairs
SHOWN = ["all", "kept", "refused", "decided"]
NUMBERS = {"similarity": "similarity", "copy_distance": "distance from a copy", "seam": "seam"}
RANGES = {"same": (-1.0, 1.0), "near_copy": (0.0, 1.0), "seam": (-1.0, 2.0)}
# The thresholds that every run has, each with the words of its slider.
SLIDERS = {
    "same": "same: similarity of at least",
    "near_copy": "near_copy: distance of at least",
    "seam": "seam of at least",
}


def add(blocks: Any, service: Service) -> None:
    """The tab's components and what they do."""
    runs = service.runs
    assert runs is not None
    names = runs.names()
    with gr.Row():
        run = gr.Dropdown(names, value=names[0] if names else None, label="Run", elem_id="run", min_width=160)
        shown = gr.Dropdown(SHOWN, value="all", label="Pairs", elem_id="shown", min_width=160)
        subject = gr.Textbox(label="Subject contains", max_length=80, min_width=160)
    with gr.Row():
        back = gr.Button("Back", size="sm", min_width=80)
        on = gr.Button("On", size="sm", min_width=80)
        apply = gr.Button("Apply decisions in a new run", variant="primary", size="sm", elem_id="apply", min_width=200)
    at = gr.State(0)
    decided = gr.Textbox(elem_id="decide", elem_classes="dq-wire", label="decision", container=False)
    told = gr.HTML(elem_id="told")
    pairs = gr.HTML(elem_id="pairs")
    gr.Markdown(
        "### Thresholds\nMove one and see what would be kept. The run itself stays as it is; a new run follows the "
        "thresholds and the decisions."
    )
    with gr.Row():
        sliders = [
            gr.Slider(*RANGES[name], value=0, step=0.01, label=label, elem_id=f"limit-{name}", min_width=200)
            for name, label in SLIDERS.items()
        ]
    funnel = gr.HTML(elem_id="funnel")
    with gr.Row():
        other = gr.Textbox(label="Name of a new run with these thresholds", max_length=64, elem_id="new-run")
        make = gr.Button("Make it", elem_id="make-run")

    def show(name: str, what: str, part: str, start: int) -> tuple[str, Any]:
        return listed(runs, name, what, part, start)

    def turn(way: int) -> Any:
        def turned(name: str, what: str, part: str, start: int) -> tuple[int, str, Any]:
            first = max(0, start + way * PAGE)
            page, choices = listed(runs, name, what, part, first)
            if way > 0 and 'class="dq-pair"' not in page:
                first = max(0, start)
                page, choices = listed(runs, name, what, part, first)
            return first, page, choices

        return turned

    def decide(request: gr.Request, said: str, name: str, what: str, part: str, start: int) -> tuple[str, str, Any]:
        words = said.split()
        if len(words) < 2:
            return "", *show(name, what, part, start)
        try:
            runs.decide(name, words[1], words[0], owner_of(request))
        except UserError as error:
            return wrong(error), *show(name, what, part, start)
        return _count(runs, name), *show(name, what, part, start)

    def on_apply(name: str) -> tuple[str, Any]:
        return applied(runs, name), listing(runs, name)

    def on_make(name: str, new: str, *values: float) -> tuple[str, Any]:
        return made(runs, name, new, lambda: _sets(runs, name, values)), listing(runs, name)

    seen = [run, shown, subject, at]
    hidden: Any = {"api_visibility": "private", "show_progress": "hidden"}
    first: Any = [lambda name, what, part: (0, *show(name, what, part, 0)), [run, shown, subject], [at, pairs, shown]]
    gr.on([run.change, shown.input, subject.submit], *first, **hidden)
    back.click(turn(-1), seen, [at, pairs, shown], **hidden)
    on.click(turn(1), seen, [at, pairs, shown], **hidden)
    decided.change(decide, [decided, *seen], [told, pairs, shown], **hidden)
    apply.click(on_apply, run, [told, run], api_visibility="private", concurrency_limit=1)
    gr.on(
        [slider.input for slider in sliders],
        lambda name, *values: funnel_of(runs, name, values),
        [run, *sliders],
        funnel,
        trigger_mode="always_last",
        **hidden,
    )
    make.click(on_make, [run, other, *sliders], [funnel, run], api_visibility="private", concurrency_limit=1)
    run.change(lambda name: _limits(runs, name), run, sliders, **hidden)
    blocks.load(lambda name: listing(runs, name), run, run, **hidden)
    blocks.load(*first, **hidden)
    blocks.load(lambda name: _limits(runs, name), run, sliders, **hidden)


def listed(runs: Runs, name: str | None, shown: str, subject: str, start: int) -> tuple[Html, Any]:
    """A page of pairs as HTML, and the choices of what to show."""
    if not name:
        return NO_RUN, gr.Dropdown()
    try:
        rows, total, reasons = runs.page(name, shown, subject or "", start, PAGE)
    except UserError as error:
        return wrong(error), gr.Dropdown()
    figures = [_pair(name, row) for row in rows]
    upto = min(start + PAGE, total)
    head = tag("p", f"{start + 1 if rows else 0} to {upto} of {total} pairs", role="status")
    choices = [*SHOWN, *(reason for reason in reasons if reason not in SHOWN)]
    return html(head, tag("div", *figures, class_="dq-gallery")), gr.Dropdown(choices=choices, value=shown)


def _pair(run: str, row: dict[str, Any]) -> Html:
    id = row["id"]
    images = [
        tag("img", loading="lazy", src=f"/v1/runs/{run}/pairs/{quote(id, safe='')}/{side}", alt=f"{side} of {id}")
        for side in ("reference", "target")
    ]
    numbers = ", ".join(f"{words} {row[key]:.2f}" for key, words in NUMBERS.items() if row[key] is not None)
    verdict = "kept" if row["kept"] else f"refused: {row['reason']}"
    if row["decided"] is not None:
        verdict = records.ACCEPTED if row["decided"] else records.REJECTED
    buttons = []
    for said, label, mine in (("accept", "Accept", True), ("reject", "Reject", False)):
        pressed = row["decided"] is mine
        value = f"{'judge' if pressed else said} {id}"  # pressed once more, it is left to the judge again
        aloud = str(pressed).lower()
        buttons.append(
            tag("button", label, type="button", data_put="decide", data_once=1, data_value=value, aria_pressed=aloud)
        )
    words = tag("span", f"{row['subject']}: {row['caption']}")
    caption = tag("figcaption", tag("b", verdict), words, tag("span", numbers, class_="dq-small"), *buttons)
    return tag("figure", tag("div", *images, class_="dq-pair"), caption, data_pair=id)


def made(runs: Runs, name: str | None, new: str | None, sets: Callable[[], list[str]]) -> str:
    """Makes the run `new` of a run, with the thresholds `sets` and people's decisions, and says so as HTML."""
    try:
        if not NAME.fullmatch(new or ""):
            raise UserError("a run's name has letters, digits, dot, dash and underscore, at most 64")
        folder = runs.folder / str(new)
        found = recurate.recurate(runs.of(name), sets(), folder, Display(quiet=True))
    except UserError as error:
        return wrong(error)
    command = f"diptych distill {folder / 'recipe.yaml'} --out {folder}"
    said = f"The run {new} has {found['pairs']} pairs to train on; {name} is as it was. To train it: "
    return tag("p", said, tag("code", command), role="status")


def applied(runs: Runs, name: str | None) -> str:
    """Makes a run that follows people's decisions, under a free name, and says so as HTML."""
    try:
        source = runs.of(name)
        if labels.decided(source) == labels.applied(source):
            raise UserError(f"{name} follows all decisions already; accept or reject a pair first")
    except UserError as error:
        return wrong(error)
    names = (f"{str(name)[:52]}-decided{number}" for number in ("", *(f"-{n}" for n in range(2, 1000))))
    return made(runs, name, next(new for new in names if not (runs.folder / new).exists()), list)


def _limits(runs: Runs, name: str | None) -> list[float]:
    """The run's thresholds, for the sliders."""
    if not name:
        return [0.0] * len(SLIDERS)
    _, recipe, task = open_run(runs.of(name))
    known = recurate.settable(recipe, task)
    return [float(known[key] or 0.0) for key in SLIDERS]


def _sets(runs: Runs, name: str, values: Any) -> list[str]:
    """The thresholds that differ from the run's, as `recurate` takes them."""
    now = _limits(runs, name)
    return [f"{key}={value}" for key, value, old in zip(SLIDERS, values, now, strict=True) if abs(value - old) > 1e-9]


def funnel_of(runs: Runs, name: str | None, values: Any) -> str:
    """What these thresholds would keep, and what would come and go, from the stored numbers."""
    try:
        if not name or not (sets := _sets(runs, name, values)):
            return tag("p", "These are the run's own thresholds.", role="status")
        found = recurate.recurate(runs.of(name), sets)
    except UserError as error:
        return wrong(error)
    total = found["candidates"]
    bars = [
        tag("tr", tag("td", label), tag("td", n, class_="n"), tag("td", _bar(n / total), style="width:50%"))
        for label, n in (("candidates", total), ("kept now", found["kept_before"]), ("kept then", found["kept_after"]))
    ]
    moves = [tag("li", f"{m['pairs']}: {m['from']} → {m['to']}") for m in found["moves"]]
    said = f"{found['came']} would come, {found['went']} would go."
    return html(tag("table", *bars, class_="dq-table"), tag("p", said, role="status"), tag("ul", *moves))


def _bar(share: float) -> Html:
    return tag("span", class_="dq-bar", style=f"width:{100 * share:.1f}%")


def _said(runs: Runs, name: str) -> str:
    decided = labels.counts(labels.decided(runs.of(name)))
    return f"{decided['accepted']} accepted and {decided['rejected']} rejected by hand"


def _count(runs: Runs, name: str) -> str:
    return tag("p", f"{_said(runs, name)}; Apply makes a new run of them, and this one stays as it is.", role="status")
