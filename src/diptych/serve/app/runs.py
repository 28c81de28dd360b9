"""The Runs tab: how far each stage of a run is, its losses, its sample sheets and its report."""

from __future__ import annotations

from typing import Any

import gradio as gr

from diptych.data import funnel
from diptych.errors import UserError
from diptych.serve.app.job import wrong
from diptych.serve.runs import Runs
from diptych.serve.service import Service
from diptych.utils.markup import Html, html, tag

WIDTH, HEIGHT = 640, 200
POINTS = 400  # of the curve: more than its pixels tell nothing
EVERY = 10.0  # seconds between looks at a run
SHEETS = 3
NO_RUN = tag("p", "There is no run yet: ", tag("code", "diptych run demo"), " makes one.")


def add(blocks: Any, service: Service) -> None:
    """The tab's components and what they do."""
    runs = service.runs
    assert runs is not None
    names = runs.names()
    run = gr.Dropdown(names, value=names[0] if names else None, label="Run", elem_id="the-run")
    shown = gr.HTML(elem_id="run-state")
    timer = gr.Timer(EVERY)
    hidden: Any = {"api_visibility": "private", "show_progress": "hidden"}
    gr.on([run.change, timer.tick, blocks.load], lambda name: described(runs, name), run, shown, **hidden)
    blocks.load(lambda name: listing(runs, name), run, run, **hidden)


def listing(runs: Runs, name: str | None) -> Any:
    """The runs that there are now; the first is chosen if what was chosen is not among them."""
    names = runs.names()
    return gr.Dropdown(choices=names, value=name if name in names else next(iter(names), None))


def described(runs: Runs, name: str | None) -> Html:
    """A run as HTML."""
    if not name:
        return NO_RUN
    try:
        folder, stages, losses = runs.of(name), runs.stages(name), runs.losses(name)
        steps = funnel.measure(folder)["steps"] if any(stage["rows"] for stage in stages) else []
        sheets, report = runs.sheets(name), runs.report(name)
    except UserError as error:
        return wrong(error)
    head = tag("tr", tag("th", "stage"), tag("th", "rows", class_="n"), tag("th"))
    rows = [_row(s["stage"], s["rows"], last="complete" if s["complete"] else "under way") for s in stages]
    parts = [_table(head, *rows)]
    if steps:
        parts += [tag("h3", "Funnel"), _table(*map(_step, steps))]
    if losses:
        parts += [tag("h3", "Loss"), curve(losses)]
    if sheets:
        figures = [_sheet(name, number, path.stem) for number, path in list(enumerate(sheets))[-SHEETS:]]
        parts += [tag("h3", "Samples"), tag("div", *figures, class_="dq-gallery")]
    if report is not None:
        link = tag("a", "The report", href=f"/v1/runs/{name}/report", target="_blank", rel="noopener")
        parts.append(tag("p", link))
    return html(*parts)


def _sheet(run: str, number: int, name: str) -> Html:
    address = f"/v1/runs/{run}/sheets/{number}"
    image = tag("img", loading="lazy", style="aspect-ratio:auto", src=address, alt=f"samples, {name}")
    return tag("figure", image, tag("figcaption", name))


def _table(*rows: Html) -> Html:
    return tag("div", tag("table", *rows, class_="dq-table"), class_="dq-scroll")


def _row(first: str, *numbers: object, last: str) -> Html:
    return tag("tr", tag("td", first), *(tag("td", number, class_="n") for number in numbers), tag("td", last))


def _step(step: dict[str, Any]) -> Html:
    share = "" if step["share"] is None else f"{100 * step['share']:.1f} %"
    lost = ", ".join(f"{times} {reason}" for reason, times in list(step["lost"].items())[:4])
    return _row(step["name"], f"{step['count']} {step['unit']}", share, last=lost and f"lost: {lost}")


def curve(losses: list[tuple[int, float]]) -> Html:
    """(step, loss) as an SVG; each point is the mean of what lies under it."""
    per = max(1, -(-len(losses) // POINTS))
    groups = [losses[i : i + per] for i in range(0, len(losses), per)]
    points = [(group[-1][0], sum(loss for _, loss in group) / len(group)) for group in groups]
    last, low, high = points[-1][0] or 1, min(y for _, y in points), max(y for _, y in points)
    span = (high - low) or 1.0
    path = " ".join(f"{WIDTH * x / last:.1f},{HEIGHT - (HEIGHT - 20) * (y - low) / span - 10:.1f}" for x, y in points)
    said = f"loss {points[0][1]:.3f} at step {points[0][0]}, {points[-1][1]:.3f} at step {points[-1][0]}"
    line = tag("polyline", points=path, fill="none", stroke="var(--color-accent)", stroke_width=2)
    # An SVG's viewBox has its capital letter.
    shape = {"viewBox": f"0 0 {WIDTH} {HEIGHT}", "style": "width:100%;height:auto"}
    svg = tag("svg", line, role="img", aria_label=said, **shape)
    return html(svg, tag("p", f"{said}; between {low:.3f} and {high:.3f}", class_="dq-small"))
