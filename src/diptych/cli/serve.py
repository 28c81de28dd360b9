"""The command `serve`: the HTTP API and the web app."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from diptych.cli.options import Loading, command, require_text
from diptych.errors import UsageError, nearest
from diptych.utils.console import show

LEVELS = ("debug", "info", "warning", "error")


@command(
    "diptych serve --model pocket --port 8000 --token-file tokens.txt",
    Network="host port name trusted_proxy",
    Access="token_file rate max_upload queue quota",
    Storage="data keep runs",
    Workers="device batch",
    Output="watermark log_level app",
)
def serve(
    loading: Loading,
    host: Annotated[
        str, typer.Option("--host", help="Address to bind. Anything other than localhost requires tokens.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port; 0 selects a free one.")] = 8000,
    name: Annotated[
        list[str] | None,
        typer.Option("--name", metavar="HOST", help="Host name under which users reach the server. Repeatable."),
    ] = None,
    trusted_proxy: Annotated[
        list[str] | None,
        typer.Option(
            "--trusted-proxy",
            metavar="ADDRESS",
            help="Address or network of a proxy in front of the server, whose X-Forwarded-For and X-Forwarded-Proto "
            "are trusted. Repeatable.",
        ),
    ] = None,
    token_file: Annotated[
        str | None,
        typer.Option(
            "--token-file", metavar="FILE", help="File with one token a line [default: $DIPTYCH_SERVE_TOKENS]."
        ),
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option("--rate", min=0, help="Requests per minute for each token [default: 120 with tokens]."),
    ] = None,
    max_upload: Annotated[
        float, typer.Option("--max-upload", metavar="MIB", min=0.01, help="Limit of one request.")
    ] = 20,
    queue: Annotated[int, typer.Option("--queue", min=1, help="Images that each token may have waiting.")] = 256,
    quota: Annotated[
        float, typer.Option("--quota", metavar="MIB", min=0, help="Storage for each token; 0 means no limit.")
    ] = 2048,
    data: Annotated[
        str, typer.Option("--data", metavar="DIR", help="Folder for jobs and images.")
    ] = "~/.local/share/diptych/serve",
    keep: Annotated[float, typer.Option("--keep", metavar="HOURS", min=0.1, help="Hours to keep results.")] = 24,
    runs: Annotated[
        str | None,
        typer.Option(
            "--runs",
            metavar="DIR",
            help="Folder of runs for the Data and Runs tabs [default: runs, if it exists and there are no tokens].",
        ),
    ] = None,
    device: Annotated[
        list[str] | None,
        typer.Option("--device", metavar="NAME", help="cpu, cuda:0, … Repeatable: one worker on each."),
    ] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Images with equal settings to generate together.")] = 8,
    watermark: Annotated[
        bool, typer.Option("--watermark", help="Add an invisible watermark with the key $DIPTYCH_WATERMARK_KEY.")
    ] = False,
    log_level: Annotated[
        str,
        typer.Option(
            "--log-level",
            metavar="LEVEL",
            help="debug, info, warning, or error. Info logs every request; debug also health checks and the app's own "
            "requests.",
        ),
    ] = "info",
    app: Annotated[bool, typer.Option("--app/--no-app", help="Serve the web app beside the API.")] = True,
) -> None:
    """Serve a student over HTTP, with a web app.

    The API has OpenAI's format. Accepted jobs are stored in --data and resume after a restart. Ctrl-C stops the
    server after the current batch; a second Ctrl-C stops it at once. Without tokens, only this machine has access.
    """
    require_text(host=host, data=data, runs=runs, token_file=token_file)
    if log_level not in LEVELS:
        hint = nearest(log_level, LEVELS)
        raise UsageError("option_invalid", f"--log-level {log_level} is not one of {', '.join(LEVELS)}{hint}")
    student = loading.arguments()
    try:
        from diptych.serve import auth, server
        from diptych.serve.config import MIB, Limits, ServerSettings
    except ImportError as error:
        raise UsageError(
            "dependency_missing",
            f"diptych serve needs the package {error.name}. Install it: pip install 'diptych[serve]'",
        ) from error
    tokens = auth.read(token_file)
    key = os.environ.get("DIPTYCH_WATERMARK_KEY", "diptych") if watermark else None
    limits = Limits(
        queue=queue,
        kept_bytes=int(quota * MIB),
        upload_bytes=int(max_upload * MIB),
        rate=rate if rate is not None else 120.0 if tokens else 0.0,
    )
    settings = ServerSettings(
        folder=Path(data).expanduser(),
        loading=student,
        devices=tuple(device) if device else (None,),
        host=host,
        port=port,
        names=tuple(name or ()),
        proxies=tuple(trusted_proxy or ()),
        tokens=tokens,
        runs=_runs_folder(runs, bool(tokens)),
        batch=batch,
        keep_hours=keep,
        watermark=key,
        limits=limits,
    )
    server.run(settings, say=lambda text: show(text, news=True), web_app=app, log_level=log_level)


def _runs_folder(runs: str | None, with_tokens: bool) -> Path | None:
    if runs is None:
        return Path("runs") if Path("runs").is_dir() and not with_tokens else None
    if not Path(runs).is_dir():
        raise UsageError("path_not_found", f"--runs {runs} is not a folder. Check the path.")
    return Path(runs)
