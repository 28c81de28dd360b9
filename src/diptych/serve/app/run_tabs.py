"""The Data and Runs tabs. Data: a run's pairs with their verdicts, decisions by hand, and the effect of other
thresholds. Runs: the progress of each stage, the loss, sample sheets and the report."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import gradio as gr

from diptych.data import funnel, labels, verdicts
from diptych.data.scan import open_run
from diptych.errors import UserError
from diptych.run import recurate
from diptych.serve.app import owner_of
from diptych.serve.http.pages import error, render, status
from diptych.serve.runs import NAME, Runs
from diptych.serve.service import Service
from diptych.utils.console import Display

PAGE = 12  # pairs
SHOWN = [("all", "all"), ("accepted", "kept"), ("rejected", "refused"), ("decided by hand", "decided")]  # label, value
NUMBERS = {"similarity": "similarity", "copy_distance": "distance from a copy", "seam": "seam"}
# The thresholds that every run has: minimum, maximum and label of the slider.
SLIDERS = {
    "same": (-1.0, 1.0, "same: minimum similarity"),
    "near_copy": (0.0, 1.0, "near_copy: minimum distance from a copy"),
    "seam": (-1.0, 2.0, "seam: minimum"),
}
THRESHOLDS = (
    "### Thresholds\nMove a slider to see how many pairs would be accepted. This run does not change; a new run uses "
    "the thresholds and the decisions."
)
WIDTH, HEIGHT = 640, 200  # pixels of the loss curve
POINTS = 400  # of the curve; more would not be visible
EVERY = 10.0  # seconds between updates
SHEETS = 3
NO_RUN = "<p>No runs yet. <code>diptych run demo</code> makes one.</p>"
HIDDEN: Any = {"api_visibility": "private", "show_progress": "hidden"}
ONE: Any = {"api_visibility": "private", "concurrency_limit": 1}


def add_data(blocks: Any, service: Service) -> None:
    """Adds the Data tab."""
    runs = service.runs
    assert runs is not None
    names = runs.names()
    with gr.Row():
        run = gr.Dropdown(names, value=names[0] if names else None, label="Run", elem_id="run", min_width=160)
        shown = gr.Dropdown(SHOWN, value="all", label="Pairs", elem_id="shown", min_width=160)
        subject = gr.Textbox(label="Subject contains", max_length=80, min_width=160)
    with gr.Row():
        back = gr.Button("Back", size="sm", min_width=80)
        next_ = gr.Button("Next", size="sm", min_width=80)
        apply = gr.Button("Apply decisions in a new run", variant="primary", size="sm", elem_id="apply", min_width=200)
    at = gr.State(0)
    decided = gr.Textbox(elem_id="decide", elem_classes="dq-wire", label="decision", container=False)
    message = gr.HTML(elem_id="decisions")
    pairs = gr.HTML(elem_id="pairs")
    gr.Markdown(THRESHOLDS)
    with gr.Row():
        sliders = [
            gr.Slider(low, high, value=0, step=0.01, label=label, elem_id=f"limit-{name}", min_width=200)
            for name, (low, high, label) in SLIDERS.items()
        ]
    kept = gr.HTML(elem_id="funnel")
    with gr.Row():
        other = gr.Textbox(label="Name of a new run with these thresholds", max_length=64, elem_id="new-run")
        make = gr.Button("Start run", elem_id="make-run")

    def turn(name: str, what: str, part: str, start: int, way: int = 0) -> tuple[int, str, Any]:
        first = max(0, start + way * PAGE)
        page, choices, count = listed(runs, name, what, part, first)
        if way > 0 and not count:
            first = max(0, start)
            page, choices, _ = listed(runs, name, what, part, first)
        return first, page, choices

    def decide(request: gr.Request, decision: str, name: str, *seen: Any) -> tuple[str, str, Any]:
        words, answer = decision.split(), ""
        if len(words) >= 2:
            try:
                runs.decide(name, words[1], words[0], owner_of(request))
                answer = decisions(runs, name)
            except UserError as refusal:
                answer = error(refusal)
        return answer, *listed(runs, name, *seen)[:2]

    def on_apply(name: str) -> tuple[str, Any]:
        return applied(runs, name), listing(runs, name)

    def on_make(name: str, new: str, *values: float) -> tuple[str, Any]:
        return made(runs, name, new, lambda: _sets(runs, name, values)), listing(runs, name)

    seen = [run, shown, subject, at]
    page = [at, pairs, shown]
    first: Any = [lambda name, what, part: turn(name, what, part, 0), [run, shown, subject], page]
    gr.on([run.change, shown.input, subject.submit], *first, **HIDDEN)
    back.click(lambda *seen: turn(*seen, way=-1), seen, page, **HIDDEN)
    next_.click(lambda *seen: turn(*seen, way=1), seen, page, **HIDDEN)
    decided.change(decide, [decided, *seen], [message, pairs, shown], **HIDDEN)
    apply.click(on_apply, run, [message, run], **ONE)
    gr.on(
        [slider.input for slider in sliders],
        lambda name, *values: thresholds(runs, name, values),
        [run, *sliders],
        kept,
        trigger_mode="always_last",
        **HIDDEN,
    )
    make.click(on_make, [run, other, *sliders], [kept, run], **ONE)
    run.change(lambda name: _limits(runs, name), run, sliders, **HIDDEN)
    blocks.load(lambda name: listing(runs, name), run, run, **HIDDEN)
    blocks.load(*first, **HIDDEN)
    blocks.load(lambda name: _limits(runs, name), run, sliders, **HIDDEN)


def add_runs(blocks: Any, service: Service) -> None:
    """Adds the Runs tab."""
    runs = service.runs
    assert runs is not None
    names = runs.names()
    run = gr.Dropdown(names, value=names[0] if names else None, label="Run", elem_id="the-run")
    shown = gr.HTML(elem_id="run-state")
    timer = gr.Timer(EVERY)
    gr.on([run.change, timer.tick, blocks.load], lambda name: described(runs, name), run, shown, **HIDDEN)
    blocks.load(lambda name: listing(runs, name), run, run, **HIDDEN)


def listing(runs: Runs, name: str | None) -> Any:
    """Returns the current runs as a drop-down list. The first is selected if `name` is not one of them."""
    names = runs.names()
    return gr.Dropdown(choices=names, value=name if name in names else next(iter(names), None))


def listed(runs: Runs, name: str | None, shown: str, subject: str, start: int) -> tuple[str, Any, int]:
    """Returns a page of pairs as HTML, the choices of what to show, and the number of pairs on the page."""
    if not name:
        return NO_RUN, gr.Dropdown(), 0
    try:
        pairs, total, reasons = runs.page(name, shown, subject or "", start, PAGE)
    except UserError as refusal:
        return error(refusal), gr.Dropdown(), 0
    for pair in pairs:
        pair["address"] = quote(pair["id"], safe="")
        measured = {words: pair[key] for key, words in NUMBERS.items()}
        pair["numbers"] = ", ".join(f"{words} {n:.2f}" for words, n in measured.items() if n is not None)
    by_hand = {True: verdicts.ACCEPTED, False: verdicts.REJECTED}
    page = render("pairs.html", run=name, pairs=pairs, start=start, limit=PAGE, total=total, verdicts=by_hand)
    choices = [*SHOWN, *((reason, reason) for reason in reasons if (reason, reason) not in SHOWN)]
    return page, gr.Dropdown(choices=choices, value=shown), len(pairs)


def made(runs: Runs, name: str | None, new: str | None, sets: Callable[[], list[str]]) -> str:
    """Makes the run `new` from a run, with the thresholds `sets` and the decisions, and returns a message as HTML."""
    try:
        if not NAME.fullmatch(new or ""):
            raise UserError("option_invalid", "A run's name has at most 64 letters, digits, dots, dashes, underscores.")
        folder = runs.folder / str(new)
        result = recurate.recurate(runs.of(name), sets(), folder, Display(quiet=True))
    except UserError as refusal:
        return error(refusal)
    return status(
        f"The run {new} has {result['pairs']} pairs for training. {name} did not change. To train a student, run: ",
        f"diptych distill {folder / 'recipe.yaml'} --out {folder}",
    )


def applied(runs: Runs, name: str | None) -> str:
    """Makes a run with the decisions under a free name, and returns a message as HTML."""
    try:
        source = runs.of(name)
        if labels.decided(source) == labels.applied(source):
            raise UserError("labels_invalid", f"{name} has all decisions already. Accept or reject a pair first.")
    except UserError as refusal:
        return error(refusal)
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


def thresholds(runs: Runs, name: str | None, values: Any) -> str:
    """Returns the effect of these thresholds as HTML, from the stored numbers."""
    try:
        if not name or not (sets := _sets(runs, name, values)):
            return status("These are the thresholds of the run.")
        result = recurate.recurate(runs.of(name), sets)
    except UserError as refusal:
        return error(refusal)
    return render("thresholds.html", result=result)


def decisions(runs: Runs, name: str) -> str:
    """Returns the number of decisions and the next step, as HTML."""
    counts = labels.counts(labels.decided(runs.of(name)))
    return status(
        f"{counts['accepted']} accepted and {counts['rejected']} rejected by hand. Press Apply to make a new run with "
        "these decisions; this run does not change."
    )


def described(runs: Runs, name: str | None) -> str:
    """Returns a run as HTML."""
    if not name:
        return NO_RUN
    try:
        folder, stages, losses = runs.of(name), runs.stages(name), runs.losses(name)
        steps = funnel.measure(folder)["steps"] if any(stage["rows"] for stage in stages) else []
        sheets, report = runs.sheets(name), runs.report(name)
    except UserError as refusal:
        return error(refusal)
    return render(
        "run.html",
        run=name,
        stages=stages,
        steps=steps,
        curve=curve(losses) if losses else None,
        sheets=[(number, path.stem) for number, path in enumerate(sheets)][-SHEETS:],
        report=report is not None,
    )


def curve(losses: list[tuple[int, float]]) -> dict[str, Any]:
    """Returns (step, loss) as the points of an SVG, each the mean of its steps, and a summary in words."""
    per = max(1, -(-len(losses) // POINTS))
    groups = [losses[i : i + per] for i in range(0, len(losses), per)]
    points = [(group[-1][0], sum(loss for _, loss in group) / len(group)) for group in groups]
    last, low, high = points[-1][0] or 1, min(y for _, y in points), max(y for _, y in points)
    span = (high - low) or 1.0
    path = " ".join(f"{WIDTH * x / last:.1f},{HEIGHT - (HEIGHT - 20) * (y - low) / span - 10:.1f}" for x, y in points)
    summary = f"loss {points[0][1]:.3f} at step {points[0][0]}, {points[-1][1]:.3f} at step {points[-1][0]}"
    return {"points": path, "summary": summary, "low": low, "high": high, "width": WIDTH, "height": HEIGHT}
