"""The commands for weights and images that are there: `convert`, `push`, `sign` and `trace`."""

from __future__ import annotations

from typing import Annotated

import typer

from diptych.cli.options import Json, command, tell
from diptych.student.weights import directions
from diptych.utils.console import show


def _print_directions(value: bool) -> None:
    if value:
        show(directions.table())
        raise typer.Exit()


@command("diptych convert dsd_model student --to folded --base FLUX.1-dev · diptych convert --table")
def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A student: folder, file, owner/name, or `pocket`.")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="A folder; for a single file, a name with its ending.")],
    to: Annotated[str, typer.Option("--to", help=f"{', '.join(directions.TARGETS)}; see --table.")],
    base: Annotated[
        str | None, typer.Option("--base", help="The teacher: for a control-LoRA, or to complete a folded folder.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="float32, float16 or bfloat16 [default: as stored].")
    ] = None,
    fuse: Annotated[bool, typer.Option("--fuse", help="Add the LoRA beside the weights into them.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is there.")] = False,
    table: Annotated[
        bool,
        typer.Option("--table", callback=_print_directions, is_eager=True, help="Print what can become what."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Convert a student's weights between layouts, without loss; a lossy direction is refused, and why.

    Tensor by tensor: a 24 GB file needs little memory. OUT appears when it is whole.
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
    display.say(conversion.summary(done))
    tell(done, lambda done: [done["out"]], as_json)


@command("diptych push runs/demo OWNER/demo --private · diptych push runs/demo/pairs ./pairs --dry-run")
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
    tell(told, pushing.lines, as_json, indent=2)


@command("diptych sign cat.png --certificate chain.pem --key key.pem")
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
    for path in told["kept"]:
        display.say(f"{path} is signed already; --overwrite signs it again")
    if told["signed"]:
        display.say(f"by {told['signer']}, whose certificate ends on {told['until']}")
    tell(told, lambda told: [str(path) for path in (*told["signed"], *told["kept"])], as_json)


@command("diptych trace cat.png --in runs/demo")
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
    tell(found, tracing.lines, as_json, indent=2)
    if not found["verified"]:
        raise typer.Exit(1)
