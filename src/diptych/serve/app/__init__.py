"""The web app: one Gradio page with a tab for each job, on the server's own address, behind the server's own guard.

A tab is a function that adds components inside `gr.Blocks` and knows the `Service`; `tabs` lists them, so that another
is one line. Pictures never pass through Gradio: the page sends them to /v1/references and shows them from
/v1/pictures, where everybody sees their own, so that Gradio's cache of files stays empty.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.resources import files
from typing import Any

from diptych.serve.app.event_filter import EventFilter
from diptych.serve.http.guard import APP
from diptych.serve.service import Service

SESSIONS = 256  # open pages whose state is kept, the latest: over 100 KB each, and Gradio lets none go by itself
Tab = Callable[[Any, Service], None]  # (the gr.Blocks it is in, the service)


def tabs(service: Service) -> dict[str, Tab]:
    """The tabs by name, in order."""
    from diptych.serve.app import image_tabs, run_tabs

    found: dict[str, Tab] = {
        "Create": image_tabs.add_create,
        "Relight": image_tabs.add_relight,
        "Story": image_tabs.add_story,
    }
    if service.runs is not None:
        found |= {"Data": run_tabs.add_data, "Runs": run_tabs.add_runs}
    return found


def mount(app: Any, service: Service) -> Any:
    """The FastAPI app with the web app under /app."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported
    import gradio as gr

    # Tabs wrap, so that a phone shows all of them.
    page: Any = gr.Blocks(title="diptych", analytics_enabled=False, fill_width=False)
    with page as blocks, gr.Tabs(overflow_behavior="wrap"):
        for name, add in tabs(service).items():
            with gr.Tab(name, id=name.lower(), elem_id=f"tab-{name.lower()}"):
                add(blocks, service)
    blocks.queue(api_open=False, max_size=200)
    blocks.state_session_capacity = SESSIONS
    blocks._queue.pending_messages_per_session.max_size = SESSIONS
    mounted = gr.mount_gradio_app(
        app,
        blocks,
        APP,
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        css=_asset("page.css"),
        head=f"<script>{_asset('page.js')}</script>",
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        pwa=False,
        enable_monitoring=False,
        mcp_server=False,
        show_error=False,
        max_file_size=1,
    )
    return EventFilter(mounted, blocks)


def _asset(name: str) -> str:
    return (files("diptych.serve.app") / name).read_text("utf8")


def unread(blocks: Any, request: Any) -> Callable[[], int]:
    """Counts the messages that wait for the page that a request came from."""
    waiting = blocks._queue.pending_messages_per_session
    return lambda: waiting[request.session_hash].qsize() if request.session_hash in waiting else 0


def owner_of(request: Any) -> str:
    """Whose a request of the app is: what the guard found, as for the API."""
    return request.request.state.owner
