"""The command `diptych push`: a student or a data set, checked, to the hub or to a folder."""

from __future__ import annotations

from typing import Annotated

import typer

from diptych.cli.options import Json
from diptych.utils.console import printable_json, show

EXAMPLE = "Example: diptych push runs/demo OWNER/demo --private · diptych push runs/demo/pairs ./pairs --dry-run"


def push(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="A run (its student), a student's folder, pairs, or an export.")
    ],
    target: Annotated[
        str, typer.Argument(metavar="TARGET", help="OWNER/NAME or hf://datasets/OWNER/NAME on the hub, or ./FOLDER.")
    ],
    private: Annotated[bool, typer.Option("--private", help="Only its owners see the repository.")] = False,
    licence: Annotated[
        str, typer.Option("--licence", metavar="ID", help="Where the card knows none: apache-2.0, cc-by-4.0, …")
    ] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check it, list files and sizes, send nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Publish a student or a data set with its card, if its licence is known and every hash back to the grids holds.

    The token is that of `hf auth login` or HF_TOKEN. What is there already is not sent again.
    """
    from diptych.provenance import push as pushing

    report = None if as_json else lambda line: show(f"sending {line}", news=True)
    told = pushing.push(source, target, private=private, licence=licence, dry_run=dry_run, report=report)
    show(printable_json(told, indent=2) if as_json else "\n".join(pushing.lines(told)))
