"""The command `diptych push`: a student or a data set, checked, to the hub or to a folder."""

from __future__ import annotations

from typing import Annotated

import typer

from diptych.cli.options import Json
from diptych.utils.console import printable_json, show

PUSH_EXAMPLE = "Example: diptych push runs/demo OWNER/demo --private · diptych push runs/demo/pairs ./pairs --dry-run"


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


# The command `diptych sign`: a C2PA manifest for pictures that diptych made.

SIGN_EXAMPLE = "Example: diptych sign cat.png --certificate chain.pem --key key.pem"


def sign(
    files: Annotated[list[str], typer.Argument(metavar="FILE", help="Pictures that diptych made.")],
    certificate: Annotated[
        str,
        typer.Option("--certificate", metavar="FILE", help="PEM: your certificate, then its authorities', upwards."),
    ],
    key: Annotated[
        str | None,
        typer.Option("--key", metavar="FILE", help="Its private key, PEM [default: the key in $DIPTYCH_SIGN_KEY]."),
    ] = None,
    algorithm: Annotated[
        str | None,
        typer.Option("--algorithm", metavar="NAME", help="es256, ps384, ed25519, … [default: what the key is for]."),
    ] = None,
    timestamp: Annotated[
        str | None,
        typer.Option(
            "--timestamp", metavar="URL", help="An RFC 3161 authority: the signature then outlives the certificate."
        ),
    ] = None,
    out: Annotated[
        str | None, typer.Option("--out", metavar="FILE|DIR/", help="Where to [default: each file in its place].")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a manifest, or a file, that is there.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Sign pictures with a C2PA manifest that says what made them; `diptych trace` verifies it.

    A picture that is signed already is kept, so an interrupted command can be given again. The password of an
    encrypted key is taken from DIPTYCH_SIGN_PASSWORD.
    """
    from diptych.provenance import sign as signing
    from diptych.utils.console import Display

    display = Display(quiet=as_json)
    with display.stage("sign", "pictures") as report:
        told = signing.sign(
            files,
            certificate,
            key,
            algorithm=algorithm,
            timestamp=timestamp,
            out=out,
            overwrite=overwrite,
            report=report,
        )
    if as_json:
        show(printable_json(told))
        return
    for path in told["kept"]:
        display.say(f"{path} is signed already; --overwrite signs it anew")
    if told["signed"]:
        display.say(f"by {told['signer']}, whose certificate ends on {told['until']}")
    show("\n".join(str(path) for path in (*told["signed"], *told["kept"])))


# The command `diptych trace`: from a picture back to the grids, every hash compared.

TRACE_EXAMPLE = "Example: diptych trace cat.png --in runs/demo"


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
