"""The command `diptych sign`: a C2PA manifest for pictures that diptych made."""

from __future__ import annotations

from typing import Annotated

import typer

from diptych.cli.options import Json
from diptych.utils.console import printable_json, show

EXAMPLE = "Example: diptych sign cat.png --certificate chain.pem --key key.pem"


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
