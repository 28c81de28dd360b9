"""The Runs tab: how far each stage of a run is, its losses, its sample sheets and its report."""

from __future__ import annotations

from html import escape
from typing import Any

import gradio as gr

from diptych.data import funnel
from diptych.errors import UserError
from diptych.serve.runs import Runs
from diptych.serve.service import Service

WIDTH, HEIGHT = 640, 200
POINTS = 400  # of the curve: more than its pixels tell nothing
EVERY = 10.0  # seconds between looks at a run
SHEETS = 3


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


def described(runs: Runs, name: str | None) -> str:
    """A run as HTML."""
    if not name:
        return "<p>There is no run yet: <code>diptych run demo</code> makes one.</p>"
    try:
        folder, stages, losses = runs.of(name), runs.stages(name), runs.losses(name)
        steps = funnel.measure(folder)["steps"] if any(stage["rows"] for stage in stages) else []
    except UserError as error:
        return f'<div class="dq-wrong" role="alert">{escape(str(error))}</div>'
    rows = "".join(
        f'<tr><td>{s["stage"]}</td><td class="n">{s["rows"]}</td>'
        f"<td>{'complete' if s['complete'] else 'under way'}</td></tr>"
        for s in stages
    )
    parts = [
        '<div class="dq-scroll"><table class="dq-table"><tr><th>stage</th><th class="n">rows</th><th></th></tr>'
        f"{rows}</table></div>"
    ]
    if steps:
        told = "".join(_step(step) for step in steps)
        parts.append(f'<h3>Funnel</h3><div class="dq-scroll"><table class="dq-table">{told}</table></div>')
    if losses:
        parts.append(f"<h3>Loss</h3>{curve(losses)}")
    sheets = runs.sheets(name)
    if sheets:
        shown = list(enumerate(sheets))[-SHEETS:]
        images = "".join(
            f'<figure><img loading="lazy" style="aspect-ratio:auto" src="/v1/runs/{name}/sheets/{n}" '
            f'alt="samples, {path.stem}"><figcaption>{escape(path.stem)}</figcaption></figure>'
            for n, path in shown
        )
        parts.append(f'<h3>Samples</h3><div class="dq-gallery">{images}</div>')
    if runs.report(name) is not None:
        parts.append(f'<p><a href="/v1/runs/{name}/report" target="_blank" rel="noopener">The report</a></p>')
    return "".join(parts)


def _step(step: dict[str, Any]) -> str:
    share = "" if step["share"] is None else f"{100 * step['share']:.1f} %"
    lost = ", ".join(f"{times} {reason}" for reason, times in list(step["lost"].items())[:4])
    return (
        f'<tr><td>{step["name"]}</td><td class="n">{step["count"]} {step["unit"]}</td><td class="n">{share}</td>'
        f"<td>{escape(lost and 'lost: ' + lost)}</td></tr>"
    )


def curve(losses: list[tuple[int, float]]) -> str:
    """(step, loss) as an SVG; each point is the mean of what lies under it."""
    per = max(1, -(-len(losses) // POINTS))
    groups = [losses[i : i + per] for i in range(0, len(losses), per)]
    points = [(group[-1][0], sum(loss for _, loss in group) / len(group)) for group in groups]
    last, low, high = points[-1][0] or 1, min(y for _, y in points), max(y for _, y in points)
    span = (high - low) or 1.0
    path = " ".join(f"{WIDTH * x / last:.1f},{HEIGHT - (HEIGHT - 20) * (y - low) / span - 10:.1f}" for x, y in points)
    said = f"loss {points[0][1]:.3f} at step {points[0][0]}, {points[-1][1]:.3f} at step {points[-1][0]}"
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{said}" style="width:100%;height:auto">'
        f'<polyline points="{path}" fill="none" stroke="var(--color-accent)" stroke-width="2"/></svg>'
        f'<p class="dq-small">{said}; between {low:.3f} and {high:.3f}</p>'
    )
