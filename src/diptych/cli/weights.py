"""The commands for existing weights and images: `convert`, `push`, `sign` and `trace`."""

from __future__ import annotations

from shlex import join, quote
from typing import Annotated

import typer

from diptych.cli.options import Json, command, print_result
from diptych.student.weights import directions
from diptych.utils.console import show


def _print_directions(value: bool) -> None:
    if value:
        show(directions.table())
        raise typer.Exit()


@command(
    "diptych convert dsd_model student --to folded --base FLUX.1-dev",
    "diptych convert --table",
    Input="source base",
    Conversion="to dtype fuse table",
    Output="out overwrite",
)
def convert(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Student: a folder, a file, owner/name, or pocket.")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="Folder, or the name of a single file with its extension.")],
    to: Annotated[str, typer.Option("--to", metavar="FORMAT", help=f"{', '.join(directions.TARGETS)}; see --table.")],
    base: Annotated[
        str | None,
        typer.Option("--base", metavar="MODEL", help="Teacher: for a control LoRA, or to complete a folded folder."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", metavar="NAME", help="float32, float16, or bfloat16 [default: as stored].")
    ] = None,
    fuse: Annotated[bool, typer.Option("--fuse", help="Merge the student's LoRA into the weights.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
    table: Annotated[
        bool,
        typer.Option(
            "--table", callback=_print_directions, is_eager=True, help="Print which formats can be converted to which."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Convert a student's weights between formats without loss.

    A lossy direction is rejected with the reason. Weights are converted tensor by tensor, so a 24 GB file needs little
    memory. OUT appears when it is complete.
    """
    from diptych.student.weights import convert as conversion
    from diptych.utils.console import Display

    display = Display(quiet=as_json)
    with display.stage("convert", "%") as report:
        done = conversion.convert(
            source,
            out,
            to,
            base=base,
            dtype=dtype,
            fuse_lora=fuse,
            overwrite=overwrite,
            report=lambda done, total: report(100 * done // max(total, 1), 100),
        )
    display.say(directions.summary(done))
    print_result(done, lambda done: [done["out"]], as_json)
    if to != "exported":
        model = ["--lora", done["out"]] if to in directions.STYLES else ["--model", done["out"]]
        more = [] if done["complete"] else ["--base", base or "TEACHER"]
        display.next(f"diptych generate {join((*model, *more, '--reference', 'IMAGE', '--prompt', 'TEXT'))}")


@command(
    "diptych push runs/demo OWNER/demo --private",
    "diptych push runs/demo/pairs ./pairs --dry-run",
    Input="source",
    Output="target private license dry_run",
)
def push(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Run (its student), student, pairs, or export.")],
    target: Annotated[
        str, typer.Argument(metavar="TARGET", help="OWNER/NAME or hf://datasets/OWNER/NAME on the hub, or a folder.")
    ],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    license: Annotated[
        str, typer.Option("--license", metavar="ID", help="License, if the card has none: apache-2.0, cc-by-4.0, …")
    ] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, list files and sizes, and send nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Publish a student or a dataset on the hub, with its card.

    The license must be known, and every hash back to the grids must match. The token comes from `hf auth login` or
    HF_TOKEN. Files that are already on the hub are not sent again.
    """
    from diptych.provenance import push as pushing

    report = None if as_json else lambda line: show(f"sending {line}", news=True)
    result = pushing.push(source, target, private=private, license=license, dry_run=dry_run, report=report)
    print_result(result, pushing.format_push, as_json, indent=2)


@command(
    "diptych sign cat.png --certificate chain.pem --key key.pem",
    Input="files",
    Signature="certificate key algorithm timestamp",
    Output="out overwrite",
)
def sign(
    files: Annotated[list[str], typer.Argument(metavar="FILE", help="Images that diptych made.")],
    certificate: Annotated[
        str,
        typer.Option(
            "--certificate", metavar="FILE", help="PEM file with your certificate, then its issuers', up to the root."
        ),
    ],
    key: Annotated[
        str | None,
        typer.Option("--key", metavar="FILE", help="Private key, PEM [default: the key in $DIPTYCH_SIGN_KEY]."),
    ] = None,
    algorithm: Annotated[
        str | None,
        typer.Option("--algorithm", metavar="NAME", help="es256, ps384, ed25519, … [default: by the key]."),
    ] = None,
    timestamp: Annotated[
        str | None,
        typer.Option(
            "--timestamp", metavar="URL", help="RFC 3161 server; keeps the signature valid after the certificate ends."
        ),
    ] = None,
    out: Annotated[
        str | None, typer.Option("--out", metavar="PATH", help="File, or folder/ [default: sign files in place].")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing manifests and files.")] = False,
    as_json: Json = False,
) -> None:
    """Sign images with a C2PA manifest that records what made them.

    `diptych trace` verifies it. Images that are already signed are skipped, so you can repeat an interrupted command.
    The password of an encrypted key is read from DIPTYCH_SIGN_PASSWORD.
    """
    from diptych.provenance import sign as signing
    from diptych.utils.console import Display

    display = Display(quiet=as_json)
    with display.stage("sign", "images") as report:
        result = signing.sign(
            files,
            certificate,
            key,
            algorithm=algorithm,
            timestamp=timestamp,
            out=out,
            overwrite=overwrite,
            report=report,
        )
    for path in result["kept"]:
        display.say(f"{path} is already signed; --overwrite signs it again")
    if result["signed"]:
        display.say(f"signed by {result['signer']}, whose certificate ends on {result['until']}")
    print_result(result, lambda result: [str(path) for path in (*result["signed"], *result["kept"])], as_json)
    if result["signed"]:
        display.next(f"diptych trace {quote(str(result['signed'][0]))} verifies the signature")


@command("diptych trace cat.png --in runs/demo", Input="file places trust")
def trace(
    file: Annotated[str, typer.Argument(metavar="PATH", help="Image, weight file, student, run, or its data.")],
    places: Annotated[
        list[str] | None,
        typer.Option(
            "--in", metavar="DIR", help="Folder with runs or weights, if they are not above PATH. Repeatable."
        ),
    ] = None,
    trust: Annotated[
        list[str] | None,
        typer.Option(
            "--trust",
            metavar="FILE",
            help="PEM certificates; an image's C2PA signature must lead to one of them. Repeatable.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what an image or a student came from; check every hash.

    The chain goes back to the grids and the recipe. Exit code 0 if every file is unchanged, 1 if one differs, and 2
    for a file that diptych did not make.
    """
    from diptych.provenance import trace as tracing

    result = tracing.trace(file, places or (), trust or ())
    print_result(result, tracing.format_trace, as_json, indent=2)
    if not result["verified"]:
        raise typer.Exit(1)
