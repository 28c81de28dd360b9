"""`diptych serve`. Thin, like `cli.py`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from diptych.cli.options import Loading, command
from diptych.errors import UsageError, nearest
from diptych.utils.console import show

EXTRA = "diptych serve needs more than the core: pip install 'diptych[serve]'"


@command("diptych serve --model pocket --port 8000 --token-file tokens.txt")
def serve(
    loading: Loading,
    host: Annotated[str, typer.Option("--host", help="Other than this machine only: needs tokens.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes a free one.")] = 8000,
    name: Annotated[
        list[str] | None, typer.Option("--name", metavar="HOST", help="A name it is reached by. Repeatable.")
    ] = None,
    trusted_proxy: Annotated[
        list[str] | None,
        typer.Option(
            "--trusted-proxy",
            metavar="ADDRESS",
            help="Address or network of a proxy in front of the server. Its X-Forwarded-For and X-Forwarded-Proto are "
            "believed, and nobody else's. Repeatable.",
        ),
    ] = None,
    token_file: Annotated[
        str | None,
        typer.Option("--token-file", metavar="FILE", help="One token a line; also $DIPTYCH_SERVE_TOKENS."),
    ] = None,
    data: Annotated[
        str, typer.Option("--data", metavar="DIR", help="Where jobs and pictures are kept.")
    ] = "~/.local/share/diptych/serve",
    runs: Annotated[
        str | None,
        typer.Option(
            "--runs",
            metavar="DIR",
            help="Folder of runs, for the app's Data and Runs tabs [default: runs, if it is "
            "there and no tokens are used].",
        ),
    ] = None,
    device: Annotated[
        list[str] | None, typer.Option("--device", help="cpu, cuda:0, … Repeated: one worker on each.")
    ] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Pictures of equal settings drawn together.")] = 8,
    queue: Annotated[int, typer.Option("--queue", min=1, help="Images a token may have waiting.")] = 256,
    rate: Annotated[
        float | None, typer.Option("--rate", min=0, help="Requests a minute and token [default: 120 with tokens].")
    ] = None,
    max_upload: Annotated[float, typer.Option("--max-upload", min=0.01, help="MiB of one request.")] = 20,
    keep: Annotated[float, typer.Option("--keep", metavar="HOURS", min=0.1, help="That results are kept.")] = 24,
    quota: Annotated[
        float,
        typer.Option("--quota", metavar="MIB", min=0, help="MiB kept for one token. 0: no limit."),
    ] = 2048,
    watermark: Annotated[
        bool, typer.Option("--watermark", help="Mark pictures invisibly, by $DIPTYCH_WATERMARK_KEY.")
    ] = False,
    log_level: Annotated[
        str,
        typer.Option(
            "--log-level",
            metavar="LEVEL",
            help="debug, info, warning or error. Info writes a line for each request; debug also for health checks and "
            "the app's own.",
        ),
    ] = "info",
    app: Annotated[bool, typer.Option("--app/--no-app", help="The web app beside the API.")] = True,
) -> None:
    """Serve a student: an HTTP API in OpenAI's format, and a web app, on one port.

    Jobs are kept in --data: killed and started again, it draws what it had accepted. Ctrl-C ends it after the batch in
    hand, and a second one at once. Nobody but this machine is let in unless there are tokens.
    """
    for option, value in (("host", host), ("data", data), ("runs", runs), ("token-file", token_file)):
        if value == "":
            raise UsageError(f"--{option} is empty")
    if log_level not in (levels := ("debug", "info", "warning", "error")):
        raise UsageError(f"--log-level {log_level}: choose {', '.join(levels)}{nearest(log_level, levels)}")
    student = loading.arguments()
    try:
        from diptych.serve import auth, server
        from diptych.serve.config import MIB, Limits, ServerSettings
    except ImportError as error:
        raise UsageError(f"{EXTRA} ({error.name} is missing)") from error
    known = auth.read(token_file)
    key = os.environ.get("DIPTYCH_WATERMARK_KEY", "diptych") if watermark else None
    limits = Limits(
        queue=queue,
        kept_bytes=int(quota * MIB),
        upload_bytes=int(max_upload * MIB),
        rate=rate if rate is not None else 120.0 if known else 0.0,
    )
    settings = ServerSettings(
        folder=Path(data).expanduser(),
        loading=student,
        devices=tuple(device) if device else (None,),
        host=host,
        port=port,
        names=tuple(name or ()),
        proxies=tuple(trusted_proxy or ()),
        tokens=known,
        runs=_runs(runs, bool(known)),
        batch=batch,
        keep_hours=keep,
        watermark=key,
        limits=limits,
    )
    server.run(settings, say=lambda text: show(text, news=True), web_app=app, log_level=log_level)


def _runs(asked: str | None, with_tokens: bool) -> Path | None:
    if asked is None:
        return Path("runs") if Path("runs").is_dir() and not with_tokens else None
    if not Path(asked).is_dir():
        raise UsageError(f"--runs {asked}: no such folder")
    return Path(asked)
