"""The command `diptych trace`: from a picture back to the grids, every hash compared."""

from __future__ import annotations

from typing import Annotated

import typer

from diptych.cli.options import Json
from diptych.utils.console import printable_json, show

EXAMPLE = "Example: diptych trace cat.png --in runs/demo"


def trace(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A picture, a weight file or folder, a run or its data.")],
    places: Annotated[
        list[str] | None,
        typer.Option("--in", metavar="DIR", help="Where runs or weights lie, if not above FILE. Repeatable."),
    ] = None,
    trust: Annotated[
        list[str] | None,
        typer.Option(
            "--trust",
            metavar="FILE",
            help="Certificates of authorities (PEM): a picture's C2PA manifest must be signed under one. Repeatable.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what a picture or a student came from, back to the grids and the recipe, and check every hash on the way.

    Exit code 0 if all that was found is as it was, 1 if something differs, 2 for a file that diptych did not make.
    """
    from diptych.provenance import trace as tracing

    found = tracing.trace(file, places or (), trust or ())
    show(printable_json(found, indent=2) if as_json else "\n".join(tracing.lines(found)))
    if not found["verified"]:
        raise typer.Exit(1)
